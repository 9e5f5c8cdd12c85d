"""Swin-T (Z. Liu et al., 2021) with SAR, in timm's registry: ``swin_tiny``, ``swin_tiny_sar``.

Swin has no [CLS]. The query of S is that of the mean of the normalised tokens, which the paper leaves for later.
At 224 px the last stage has one window, the whole 7 x 7 map. S does not contain the relative-position bias, which
does not depend on the image.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models import checkpoint, register_model
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, checkpoint_filter_fn
from torch import Tensor

from models_sar import LastBlock, SimilarityModel, create, imagenet_cfgs

__all__ = ["SARSwinTransformer"]


PATCH_SIZE = 4


class SwinLastBlock(LastBlock, SwinTransformerBlock):
    """timm's block as a `LastBlock`. S needs one window that is the whole map."""

    def forward(
        self, x: Tensor, one_query: bool | None = None, grid: tuple[int, int] | None = None, similarity: bool = False
    ):
        """timm's ``SwinTransformerBlock.forward``: maps ``(B, h, w, C)`` to maps ``(B, h, w, C)``.

        If ``one_query`` is True or False, ``x`` are tokens and the result is that of `LastBlock.with_similarity`.
        """
        if not torch.jit.is_scripting() and one_query is not None:
            return self.with_similarity(x, one_query, grid, similarity)
        return self.residuals(x, self._attn(self.norm1(x)))

    def with_similarity(
        self, x: Tensor, one_query: bool, grid: tuple[int, int], similarity: bool
    ) -> tuple[Tensor, Tensor | None]:
        """See `LastBlock.with_similarity`.

        Raises:
            ValueError: the map is not one window.
        """
        if tuple(self.window_size) != grid or any(self.shift_size):
            raise ValueError(
                "the last stage has {} x {} tokens in windows of {} x {}{}: S needs one window that is the whole map, "
                "as at 224 px with windows of 7 (--model-kwargs window_size=N sets them)".format(
                    *grid, *self.window_size, ", shifted" if any(self.shift_size) else ""
                )
            )
        return super().with_similarity(x, one_query, grid, similarity)

    def query(self, y: Tensor) -> Tensor:
        qkv = self.attn.qkv
        dim = qkv.out_features // 3
        q = F.linear(y, qkv.weight[:dim], None if qkv.bias is None else qkv.bias[:dim])
        return rearrange(q, "B N (H D) -> B H N D", H=self.attn.num_heads)

    def project(self, y: Tensor, one_query: bool, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(self.attn.qkv(y), "B N (qkv H D) -> qkv B H N D", qkv=3, H=self.attn.num_heads).unbind(0)
        return q, k, v

    def position_bias(self) -> Tensor:
        return self.attn._get_rel_pos_bias()


class SARSwinTransformer(SimilarityModel, SwinTransformer):
    """timm's ``SwinTransformer``, with all its keywords, and a `LastBlock`.

    Args:
        last_block, similarity: see `LastBlock.attach`.
        similarity_query: ``"mean"``.
        kwargs: those of timm's ``SwinTransformer``.

    Raises:
        ValueError: ``similarity_query`` is another one.
    """

    def __init__(self, last_block: str = "standard", similarity: str = "dot", similarity_query: str = "mean", **kwargs):
        if similarity_query != "mean":
            raise ValueError(f"similarity_query={similarity_query!r}: Swin has no [CLS]; its query is the mean's")
        super().__init__(**kwargs)
        self.last_block = last_block
        block = self.layers[-1].blocks[-1]
        block.__class__ = SwinLastBlock  # timm's stage builds its blocks itself and takes no class for them
        block.attach(last_block, similarity, similarity_query)

    def last(self) -> LastBlock | None:
        block = self.layers[-1].blocks[-1]
        return block if isinstance(block, LastBlock) else None

    def reads_only_cls(self) -> bool:
        return False

    @property
    def grad_checkpointing(self) -> bool:
        return self.layers[-1].grad_checkpointing

    def forward_trunk(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.patch_embed(images)
        for stage in list(self.layers)[:-1]:
            x = stage(x)
        stage = self.layers[-1]
        x = stage.downsample(x)
        for block in list(stage.blocks)[:-1]:
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        return rearrange(x, "B h w C -> B (h w) C"), (x.shape[1], x.shape[2])

    def classify(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        h, w = grid
        return self.forward_head(rearrange(self.norm(x), "B (h w) C -> B h w C", h=h, w=w))


SIZES = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "window_size": 7}
default_cfgs = imagenet_cfgs("swin_tiny", pool_size=(7, 7), first_conv="patch_embed.proj", classifier="head.fc")


def _create(name: str, pretrained: bool, **kwargs) -> SARSwinTransformer:
    kwargs = {"pretrained_filter_fn": checkpoint_filter_fn, **SIZES, **kwargs}
    return create(SARSwinTransformer, name, pretrained, (0, 1, 2, 3), **kwargs)


@register_model
def swin_tiny(pretrained: bool = False, **kwargs) -> SARSwinTransformer:
    """Swin-T: 28,288,354 parameters."""
    return _create("swin_tiny", pretrained, **kwargs)


@register_model
def swin_tiny_sar(pretrained: bool = False, **kwargs) -> SARSwinTransformer:
    """Swin-T with the last block of Eq. 10-11: 28,286,818 parameters."""
    return _create("swin_tiny_sar", pretrained, **kwargs)
