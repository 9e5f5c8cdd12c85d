"""The last block's [CLS] attention: its maps, the part of their mass to keep, and what is measured of them.

All functions take whole batches on any device. Maps are ``(B, H, h, w)``: images, heads, rows and columns of the
patch grid.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from losses import label_components, max_components, spatial_entropy, thresholded

MASS = 0.6
"""The share of a map's mass that the paper keeps (Fig. 1, Section 5.3)."""


@torch.inference_mode()
def similarity_maps(model: nn.Module, images: Tensor) -> Tensor:
    """S in the last block, float32 ``(B, H, h, w)``, for images ``(B, 3, height, width)``.

    It is Eq. 4's, whatever similarity the model was trained with: its attention comes from that one.
    """
    with _dot_similarity(model.last()):
        _, similarity = model(images, return_similarity=True)
    return similarity


@contextmanager
def _dot_similarity(last_block: nn.Module) -> Iterator[None]:
    trained_with, last_block.similarity = last_block.similarity, "dot"
    try:
        yield
    finally:
        last_block.similarity = trained_with


def attention_of(similarity: Tensor) -> Tensor:
    """Each head's attention of [CLS] to the patches, A^h, for S ``(B, H, h, w)``: positive, each map sums to 1.

    It is the attention row after the softmax without its [CLS] entry, which thresholding by mass leaves out, too.
    """
    return similarity.flatten(-2).softmax(dim=-1).view_as(similarity)


def keep_mass(attention: Tensor, mass: float = MASS) -> Tensor:
    """The patches that hold the top ``mass`` of each map (Fig. 1): bool ``(..., h, w)`` for ``(..., h, w)``.

    Patches are added up from the smallest; those at which the sum is beyond ``1 - mass`` of the whole are kept, so a
    little more than ``mass`` stays. Of equal patches, a later one in row order counts as the larger. Sums are in the
    map's own floating type, as in the released code.
    """
    values, order = attention.flatten(-2).sort(dim=-1, stable=True)
    share = (values / values.sum(dim=-1, keepdim=True)).cumsum(dim=-1)
    kept = torch.zeros_like(share, dtype=torch.bool).scatter(-1, order, share > 1 - mass)
    return kept.view_as(attention)


def measure_maps(similarity: Tensor) -> dict[str, Tensor]:
    """How blob-like each head's map is; tensors ``(B, H)`` for S ``(B, H, h, w)``.

    Returns:
        ``entropy``: the spatial entropy in nats (Eq. 7); ``components``: the 8-connected components above the mean;
        ``largest``: the patches of the largest of them, ``kept``: of all of them.
    """
    entropy, components = spatial_entropy(similarity)
    sizes = component_sizes(thresholded(similarity) > 0)
    return {"entropy": entropy, "components": components, "largest": sizes.amax(-1), "kept": sizes.sum(-1)}


def component_sizes(mask: Tensor) -> Tensor:
    """Patches of each 8-connected component of bool maps ``(..., h, w)``: int64 ``(..., labels)``, 0 for none."""
    labels = label_components(mask).flatten(-2)
    sizes = labels.new_zeros(*labels.shape[:-1], 1 + max_components(*mask.shape[-2:]))
    return sizes.scatter_add(-1, labels, torch.ones_like(labels))[..., 1:]
