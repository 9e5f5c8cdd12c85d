"""PVT v1 (Pyramid Vision Transformer, W. Wang et al., 2021) in timm's registry: ``pvt_small``, ``pvt_small_sar``.

There are four stages. In the first three, keys and values come from a coarser grid. [CLS] enters the last stage, where
S is 7 x 7 at 224 px. The names of the weights are those of the official release.
"""

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, calculate_drop_path_rates, resample_abs_pos_embed, to_2tuple, trunc_normal_
from timm.models import register_model
from torch import Tensor, nn

from models.pyramid import LAST_GROUP, PyramidBlock, PyramidTransformer, as_map, check_stages, init_linear
from models_sar import create, imagenet_cfgs

__all__ = ["PVT"]


PATCH_SIZE = 4


class ReducedAttention(nn.Module):
    """Weights of PVT's attention. Keys and values come from patches merged ``sr_ratio x sr_ratio`` to one."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, attn_drop: float, proj_drop: float, sr_ratio: int):
        super().__init__()
        self.num_heads, self.sr_ratio, self.scale = num_heads, sr_ratio, (dim // num_heads) ** -0.5
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(proj_drop)
        self.proj = nn.Linear(dim, dim)
        merges = sr_ratio > 1
        self.sr = nn.Conv2d(dim, dim, kernel_size=sr_ratio, stride=sr_ratio) if merges else nn.Identity()
        self.norm = nn.LayerNorm(dim, eps=1e-5) if merges else nn.Identity()


class PVTBlock(PyramidBlock):
    """A block with `ReducedAttention`."""

    def query(self, y: Tensor) -> Tensor:
        return self.heads(self.attn.q(y))

    def project(self, y: Tensor, one_query: bool, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        attn = self.attn
        source = y
        if attn.sr_ratio > 1:
            source = attn.norm(attn.sr(as_map(y, grid)).flatten(2).transpose(1, 2))
        k, v = attn.kv(source).chunk(2, dim=-1)
        return self.query(y[:, :1] if one_query else y), self.heads(k), self.heads(v)


def make_blocks(rates: list[float], of_attention: tuple, of_block: tuple) -> nn.ModuleList:
    """A stage's blocks, one per rate of stochastic depth.

    Args:
        rates: of stochastic depth.
        of_attention: arguments of `ReducedAttention`.
        of_block: arguments of `PVTBlock` between the attention and the rate.
    """
    return nn.ModuleList(PVTBlock(ReducedAttention(*of_attention), *of_block, rate) for rate in rates)


class PVT(PyramidTransformer):
    """PVT v1 with a last block of Table 1(b).

    Args:
        last_block, similarity, similarity_query: see `models_sar.LastBlock.attach`.
        img_size: px, a multiple of the last stage's patch. The learned positions belong to its grids. For images of
            another size they are interpolated bilinearly, as in the official release.
        patch_size: px between two patches of the first stage. Each further stage halves the grid.
        sr_ratios: patches that are merged to one key, along a side, in each stage.
        drop_path_rate: of the last block; the rates rise linearly from 0 over all blocks.
        device, dtype: of the weights.

    Raises:
        ValueError: the sizes make no pyramid (`models.pyramid.check_stages`), or ``img_size`` is no multiple.
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
        embed_dims: tuple[int, ...] = (64, 128, 320, 512),
        depths: tuple[int, ...] = (3, 4, 6, 3),
        num_heads: tuple[int, ...] = (1, 2, 5, 8),
        mlp_ratios: tuple[float, ...] = (8, 8, 4, 4),
        sr_ratios: tuple[int, ...] = (8, 4, 2, 1),
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        stages = {"embed_dims": embed_dims, "depths": depths, "num_heads": num_heads}
        check_stages(**stages, mlp_ratios=mlp_ratios, sr_ratios=sr_ratios)

        # What all stages share.
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        reductions = [patch_size * 2**stage for stage in range(len(depths))]
        super().__init__(in_chans, num_classes, global_pool, embed_dims, reductions, norm_layer, drop_rate)
        self.last_block, self.last_stage = last_block, len(depths) - 1
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=False)
        sides = to_2tuple(img_size)
        if any(side % reductions[-1] for side in sides):
            raise ValueError(f"img_size={img_size}: {len(depths)} stages need a multiple of {reductions[-1]} px")

        # The stages: patches, positions and blocks under their official names.
        for stage, dim in enumerate(embed_dims):
            step, channels = (patch_size, in_chans) if stage == 0 else (2, embed_dims[stage - 1])
            embed = PatchEmbed(sides, step, channels, dim, partial(nn.LayerNorm, eps=1e-5), strict_img_size=False)
            sides = embed.grid_size
            tokens = embed.num_patches + (stage == self.last_stage)
            positions = nn.Parameter(torch.zeros(1, tokens, dim))
            blocks = make_blocks(
                rates[sum(depths[:stage]) : sum(depths[: stage + 1])],
                (dim, num_heads[stage], qkv_bias, attn_drop_rate, proj_drop_rate, sr_ratios[stage]),
                (dim, mlp_ratios[stage], norm_layer, nn.GELU, proj_drop_rate),
            )
            for name, part in (("patch_embed", embed), ("pos_embed", positions), ("block", blocks)):
                setattr(self, f"{name}{stage + 1}", part)
            trunc_normal_(positions, std=0.02)

        # [CLS], and the last block of Table 1(b).
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dims[-1]))
        trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_linear)
        self.last().attach(last_block, similarity, similarity_query)
        self.to(device, dtype)

    def blocks_of(self, stage: int) -> nn.ModuleList:
        return getattr(self, f"block{stage + 1}")

    def drop_stage(self, stage: int) -> None:
        for name in ("patch_embed", "pos_embed", "block"):
            delattr(self, f"{name}{stage + 1}")
        if hasattr(self, "cls_token"):  # it enters the last stage, which is the first to go
            del self.cls_token

    def embed(self, stage: int, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        embed, positions = getattr(self, f"patch_embed{stage + 1}"), getattr(self, f"pos_embed{stage + 1}")
        grid = embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        return self.place(stage, embed(x), positions, embed.grid_size, grid), grid

    def place(self, stage: int, x: Tensor, positions: Tensor, known: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        """Add the positions to a stage's patches, and [CLS] before them in the last stage.

        Args:
            stage: counted from 0.
            x: patches ``(B, h * w, C)``.
            positions: ``(1, N, C)``, learned for the grid ``known``.
            known: grid of the positions.
            grid: ``(h, w)`` of the patches.
        """
        if hasattr(self, "cls_token") and stage == self.last_stage:  # pruning deletes it
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.pos_drop(x + resized(positions, known, grid))

    def written_out(self, images: Tensor) -> Tensor:
        h, w = images.shape[-2], images.shape[-1]
        grid = self.patch_embed1.dynamic_feat_size((h, w))
        x = self.place(0, self.patch_embed1(images), self.pos_embed1, self.patch_embed1.grid_size, grid)
        for block in self.block1:
            x = block(x, grid)
        if hasattr(self, "block2"):
            x = self.patch_embed2(as_map(x, grid))
            grid = self.patch_embed2.dynamic_feat_size(grid)
            x = self.place(1, x, self.pos_embed2, self.patch_embed2.grid_size, grid)
            for block in self.block2:
                x = block(x, grid)
        if hasattr(self, "block3"):
            x = self.patch_embed3(as_map(x, grid))
            grid = self.patch_embed3.dynamic_feat_size(grid)
            x = self.place(2, x, self.pos_embed3, self.patch_embed3.grid_size, grid)
            for block in self.block3:
                x = block(x, grid)
        if hasattr(self, "block4"):
            x = self.patch_embed4(as_map(x, grid))
            grid = self.patch_embed4.dynamic_feat_size(grid)
            x = self.place(3, x, self.pos_embed4, self.patch_embed4.grid_size, grid)
            for block in self.block4:
                x = block(x, grid)
        return x

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's groups of layers: the stem, then the blocks of all stages, or with ``coarse`` the stages."""
        stage, place = r"^(?:patch_embed|pos_embed)(\d+)", () if coarse else (0,)
        blocks = r"^block(\d+)" if coarse else r"^block(\d+)\.(\d+)"
        cls_token = (r"^cls_token", (len(self.feature_info), *place))
        return {
            "stem": r"^(?:patch_embed|pos_embed)1\b",
            "blocks": [(stage, place), cls_token, (blocks, None), (r"^norm", LAST_GROUP)],
        }

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"cls_token"}


class DensePVT(PVT):
    """PVT as the backbone of dense tasks: four maps, and no [CLS] in any stage (whai362/PVT, ``segmentation/pvt.py``).

    The names of the weights are the classifier's. Row 0 of the last stage's positions, that of [CLS], is unused.

    Args:
        similarity_query: ``"mean"``, as there is no [CLS].
        kwargs: those of `PVT`; ``img_size`` is that of the pre-training, whose positions are resized at each pass.

    Attributes:
        reduction: px between two locations of the last map; images are padded to a multiple of it.
    """

    def __init__(self, similarity_query: str = "mean", **kwargs):
        super().__init__(similarity_query=similarity_query, num_classes=0, **kwargs)
        del self.cls_token
        self.norm = nn.Identity()
        self.reduction = self.feature_info[-1]["reduction"]

    def place(self, stage: int, x: Tensor, positions: Tensor, known: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        return super().place(stage, x, positions[:, -known[0] * known[1] :], known, grid)

    def forward(self, images: Tensor, return_similarity: bool = False):  # type: ignore[override]
        """The maps of all stages, ``(B, C_i, h_i, w_i)``, finest first; on request ``(maps, S)``, S ``(B, H, h, w)``.

        Images ``(B, 3, height, width)`` of any size are padded with zeros at the right and bottom to whole patches of
        the last stage.
        """
        x = F.pad(images, (0, -images.shape[3] % self.reduction, 0, -images.shape[2] % self.reduction))
        maps: list[Tensor] = []
        for stage in range(self.num_stages - 1):
            x, grid = self.embed(stage, x)
            x = as_map(self._run(self.blocks_of(stage), x, grid), grid)
            maps.append(x)
        x, grid = self.embed(self.num_stages - 1, x)
        x = self._run(self.blocks_of(self.num_stages - 1)[:-1], x, grid)
        x, similarity = self._forward_last(x, grid, one_query=False, similarity=return_similarity)
        maps.append(as_map(x, grid))
        return (maps, similarity) if return_similarity else maps


@torch.fx.wrap  # so that each pass, and not the tracing, decides whether the grids are equal
def resized(positions: Tensor, known: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Positions ``(1, N, C)`` interpolated bilinearly from the grid ``known`` to ``grid``; the patches' come last."""
    if grid == known:
        return positions
    h, w = known
    patches = F.interpolate(as_map(positions, known), size=[grid[0], grid[1]], mode="bilinear")
    return torch.cat([positions[:, : -h * w], patches.flatten(2).transpose(1, 2)], dim=1)


def checkpoint_filter_fn(state: dict[str, Tensor], model: PVT) -> dict[str, Tensor]:
    """Fit weights to the model's grid: timm resamples the learned positions of each stage."""
    fitted = dict(state)
    for stage in range(model.num_stages):
        name, grid = f"pos_embed{stage + 1}", getattr(model, f"patch_embed{stage + 1}").grid_size
        prefix = int(stage == model.num_stages - 1)
        if name in state and state[name].shape[1] != grid[0] * grid[1] + prefix:
            fitted[name] = resample_abs_pos_embed(state[name], grid, num_prefix_tokens=prefix)
    return fitted


default_cfgs = imagenet_cfgs("pvt_small", pool_size=(7, 7), first_conv="patch_embed1.proj")


@register_model
def pvt_small(pretrained: bool = False, **kwargs) -> PVT:
    """PVT-Small: 24,485,864 parameters."""
    return create(PVT, "pvt_small", pretrained, (0, 1, 2, 3), **kwargs)


@register_model
def pvt_small_sar(pretrained: bool = False, **kwargs) -> PVT:
    """PVT-Small with the last block of Eq. 10-11: 24,484,840 parameters."""
    return create(PVT, "pvt_small_sar", pretrained, (0, 1, 2, 3), **kwargs)
