"""The last block's [CLS] attention: similarity maps, masks of their top mass, and measures of blobness.

All functions take batches on any device. Maps are ``(B, H, h, w)``: images, heads, rows and columns of the
patch grid.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from losses import label_components, max_components, spatial_entropy, thresholded

MASS = 0.6
"""The fraction of a map's mass that the paper's masks keep (Fig. 1, Section 5.3)."""


@torch.inference_mode()
def similarity_maps(model: nn.Module, images: Tensor) -> Tensor:
    """The similarity map S of the last block (Eq. 4).

    S is always the dot product of Eq. 4, which the attention is computed from, even if the model was trained with
    another similarity.

    Args:
        images: normalised, ``(B, 3, height, width)``.
    Returns:
        float32 ``(B, H, h, w)``.
    """
    with _dot_similarity(model.last()):
        _, similarity = model(images, return_similarity=True)
    return similarity


@contextmanager
def _dot_similarity(last_block: Any) -> Iterator[None]:
    trained_with, last_block.similarity = last_block.similarity, "dot"
    try:
        yield
    finally:
        last_block.similarity = trained_with


def attention_of(similarity: Tensor) -> Tensor:
    """Each head's attention A^h of [CLS] to the patches: softmax of S ``(B, H, h, w)`` over the patches, same shape.

    It equals the attention row of [CLS] without its [CLS] entry, renormalised to sum 1. `keep_mass` needs no more.
    """
    return similarity.flatten(-2).softmax(dim=-1).view_as(similarity)


def keep_mass(attention: Tensor, mass: float = MASS) -> Tensor:
    """Mask of the patches that hold the top ``mass`` of each map (Fig. 1): bool ``(..., h, w)`` for ``(..., h, w)``.

    Values are summed in ascending order; a patch is kept where the cumulative sum exceeds ``1 - mass`` of the total.
    The kept patches therefore hold slightly more than ``mass``. Of equal values, the later patch in row-major order
    ranks higher. Sums use the map's own floating-point type, as in the released code.
    """
    values, order = attention.flatten(-2).sort(dim=-1, stable=True)
    share = (values / values.sum(dim=-1, keepdim=True)).cumsum(dim=-1)
    kept = torch.zeros_like(share, dtype=torch.bool).scatter(-1, order, share > 1 - mass)
    return kept.view_as(attention)


def measure_maps(similarity: Tensor) -> dict[str, Tensor]:
    """Measures of how blob-like each head's map is, each ``(B, H)`` for S ``(B, H, h, w)``.

    Returns:
        ``entropy``: spatial entropy in nats (Eq. 7); ``components``: number of 8-connected components above the mean
        (Eq. 5-6); ``largest``: number of patches of the largest component; ``kept``: of all components.
    """
    entropy, components = spatial_entropy(similarity)
    sizes = component_sizes(thresholded(similarity) > 0)
    return {"entropy": entropy, "components": components, "largest": sizes.amax(-1), "kept": sizes.sum(-1)}


def component_sizes(mask: Tensor) -> Tensor:
    """Number of patches of each 8-connected component of bool maps ``(..., h, w)``: int64 ``(..., labels)``."""
    labels = label_components(mask).flatten(-2)
    sizes = labels.new_zeros(*labels.shape[:-1], 1 + max_components(*mask.shape[-2:]))
    return sizes.scatter_add(-1, labels, torch.ones_like(labels))[..., 1:]
