"""CvT (Convolutional vision Transformer, H. Wu et al., 2021) in timm's registry: ``cvt_13``, ``cvt_13_sar``.

There are three stages. Queries, keys and values come from depthwise convolutions; those of keys and values have
stride 2. So S in the last stage is 7 x 7 for 14 x 14 patches at 224 px. [CLS] enters the last stage and skips the
convolutions. There are no positions. The names of the weights are those of the official release.

TorchScript compiles the blocks, so their changes of shape are torch's own and not einops'.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from timm.layers import QuickGELU, calculate_drop_path_rates, trunc_normal_
from timm.models import register_model
from torch import Tensor, nn

from models.pyramid import LAST_GROUP, PyramidBlock, PyramidTransformer, as_map, check_stages, init_linear
from models_sar import create, imagenet_cfgs

__all__ = ["CvT"]


PATCH_SIZE = 4


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed in at least float32, also where tokens or weights have a lower precision."""

    def forward(self, x: Tensor) -> Tensor:
        return precise_norm(x, self.weight, self.bias, self.eps)


@torch.fx.wrap  # so that each pass, and not the tracing, reads the type of the tokens
def precise_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`LayerNorm` over the last axis of ``x``, in the type of ``x``."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(dtype), weight.shape, weight.to(dtype), bias.to(dtype), eps).to(x.dtype)


class ConvEmbed(nn.Module):
    """A stage's patches: a convolution of overlapping windows, and a LayerNorm.

    ``forward(x (B, C, height, width))`` -> tokens ``(B, h * w, dim)`` and their grid ``(h, w)``.
    """

    def __init__(self, in_chans: int, dim: int, kernel: int, stride: int, padding: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride, padding)
        self.norm = LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)), (x.shape[-2], x.shape[-1])


class ConvAttention(nn.Module):
    """Weights of CvT's attention. Scores are divided by the root of all channels, not of those of a head."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, attn_drop: float, proj_drop: float, stride_kv: int):
        super().__init__()
        self.num_heads, self.stride_kv, self.scale = num_heads, stride_kv, dim**-0.5
        for name, stride in (("q", 1), ("k", stride_kv), ("v", stride_kv)):
            conv = nn.Conv2d(dim, dim, 3, stride, 1, groups=dim, bias=False)
            setattr(self, f"conv_proj_{name}", nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(dim))))
            setattr(self, f"proj_{name}", nn.Linear(dim, dim, bias=qkv_bias))
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(proj_drop)
        self.proj = nn.Linear(dim, dim)


def beside(cls: Tensor, patches: Tensor) -> Tensor:
    """Tokens ``(B, N, C)``: [CLS], ``(B, 1 or 0, C)``, and then the patches of a map ``(B, C, h, w)``."""
    return torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1)


class CvTBlock(PyramidBlock):
    """A block with `ConvAttention`."""

    def query(self, y: Tensor) -> Tensor:
        return self.heads(self.attn.proj_q(y))

    def project(self, y: Tensor, one_query: bool, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """See `LastBlock.project`; all queries are computed, also with ``one_query``.

        The running statistics of their BatchNorm come from all patches, and in training every weight must get a
        gradient.
        """
        attn = self.attn
        h, w = grid
        cls, patches = y[:, : -h * w], as_map(y, grid)
        q = self.heads(attn.proj_q(beside(cls, attn.conv_proj_q(patches))))
        k = self.heads(attn.proj_k(beside(cls, attn.conv_proj_k(patches))))
        v = self.heads(attn.proj_v(beside(cls, attn.conv_proj_v(patches))))
        return q[:, :, :1] if one_query else q, k, v

    def key_grid(self, h: int, w: int) -> tuple[int, int]:
        stride = self.attn.stride_kv
        return -(-h // stride), -(-w // stride)


class Stage(nn.Module):
    """The parts of a stage, under their official names."""

    def __init__(self, patch_embed: ConvEmbed, blocks: nn.ModuleList, cls_token: nn.Parameter | None):
        super().__init__()
        self.patch_embed, self.blocks, self.cls_token = patch_embed, blocks, cls_token

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """See `PyramidTransformer.embed`."""
        x, grid = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return x, grid

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens after the blocks, and their grid, of a map ``(B, C, h, w)``."""
        x, grid = self.embed(x)
        for block in self.blocks:
            x = block(x, grid)
        return x, grid


class CvT(PyramidTransformer):
    """CvT with a last block of Table 1(b); any image size.

    Args:
        last_block, similarity, similarity_query: see `models_sar.LastBlock.attach`.
        img_size: without effect, as there are no positions.
        patch_size: px between two patches of the first stage. Each further stage halves the grid.
        patch_sizes, patch_paddings: kernel and padding of each stage's embedding.
        stride_kv: of the convolutions of keys and values.
        drop_path_rate: of the last block; the rates rise linearly from 0 over the last stage. Other stages have none.
        device, dtype: of the weights.

    Raises:
        ValueError: the sizes make no pyramid (`models.pyramid.check_stages`).
    """

    def __init__(
        self,
        last_block: str = "standard",
        similarity: str = "dot",
        similarity_query: str = "cls",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = PATCH_SIZE,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dims: tuple[int, ...] = (64, 192, 384),
        depths: tuple[int, ...] = (1, 2, 10),
        num_heads: tuple[int, ...] = (1, 3, 6),
        mlp_ratios: tuple[float, ...] = (4, 4, 4),
        patch_sizes: tuple[int, ...] = (7, 3, 3),
        patch_paddings: tuple[int, ...] = (2, 1, 1),
        stride_kv: int = 2,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        check_stages(
            embed_dims=embed_dims,
            depths=depths,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            patch_sizes=patch_sizes,
            patch_paddings=patch_paddings,
        )
        strides = [patch_size] + [2] * (len(depths) - 1)
        reductions = [patch_size * 2**stage for stage in range(len(depths))]
        super().__init__(in_chans, num_classes, global_pool, embed_dims, reductions, LayerNorm, drop_rate)
        self.last_block = last_block

        # The stages, under their official names.
        for stage, dim in enumerate(embed_dims):
            last = stage == len(depths) - 1
            rates = calculate_drop_path_rates(drop_path_rate if last else 0.0, depths[stage])
            channels = in_chans if stage == 0 else embed_dims[stage - 1]
            embed = ConvEmbed(channels, dim, patch_sizes[stage], strides[stage], patch_paddings[stage])
            attention = (dim, num_heads[stage], qkv_bias, attn_drop_rate, proj_drop_rate, stride_kv)
            settings = (dim, mlp_ratios[stage], LayerNorm, QuickGELU, proj_drop_rate)
            blocks = nn.ModuleList(CvTBlock(ConvAttention(*attention), *settings, rate) for rate in rates)
            cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if last else None
            setattr(self, f"stage{stage}", Stage(embed, blocks, cls_token))

        # Initial weights, and the last block of Table 1(b).
        trunc_normal_(cls_token, std=0.02)
        self.apply(init_linear)
        self.last().attach(last_block, similarity, similarity_query)
        self.to(device, dtype)

    def blocks_of(self, stage: int) -> nn.ModuleList:
        return getattr(self, f"stage{stage}").blocks

    def drop_stage(self, stage: int) -> None:
        delattr(self, f"stage{stage}")

    def recompute(self, block: nn.Module, *args, **kwargs):
        """See `SimilarityModel.recompute`; a batch enters the block's running statistics only once."""
        return super().recompute(block, *args, context_fn=lambda: (nullcontext(), uncounted(block)), **kwargs)

    def embed(self, stage: int, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        return getattr(self, f"stage{stage}").embed(x)

    def written_out(self, images: Tensor) -> Tensor:
        x, grid = self.stage0(images)
        if hasattr(self, "stage1"):
            x, grid = self.stage1(as_map(x, grid))
        if hasattr(self, "stage2"):
            x, grid = self.stage2(as_map(x, grid))
        if hasattr(self, "stage3"):
            x, grid = self.stage3(as_map(x, grid))
        return x

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's groups of layers: the stem, then the blocks of all stages, or with ``coarse`` the stages."""
        stage, place = r"^stage(\d+)\.(?:patch_embed|cls_token)", () if coarse else (0,)
        blocks = r"^stage(\d+)\.blocks" if coarse else r"^stage(\d+)\.blocks\.(\d+)"
        return {
            "stem": r"^stage0\.patch_embed",
            "blocks": [(stage, place), (blocks, None), (r"^norm", LAST_GROUP)],
        }

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {f"stage{len(self.feature_info) - 1}.cls_token"}


@contextmanager
def uncounted(block: nn.Module) -> Iterator[None]:
    """A context in which the block's BatchNorms keep their running statistics as they are."""
    norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)


def checkpoint_filter_fn(state: dict[str, Tensor], model: CvT) -> dict[str, Tensor]:
    """Weights fit every grid unchanged, as there are no positions."""
    return state


default_cfgs = imagenet_cfgs("cvt_13", pool_size=(14, 14), first_conv="stage0.patch_embed.proj")


@register_model
def cvt_13(pretrained: bool = False, **kwargs) -> CvT:
    """CvT-13: 19,997,480 parameters."""
    return create(CvT, "cvt_13", pretrained, (0, 1, 2), **kwargs)


@register_model
def cvt_13_sar(pretrained: bool = False, **kwargs) -> CvT:
    """CvT-13 with the last block of Eq. 10-11: 19,996,712 parameters."""
    return create(CvT, "cvt_13_sar", pretrained, (0, 1, 2), **kwargs)
