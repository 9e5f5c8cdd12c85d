"""ViTDet (Y. Li et al., 2022): a plain ViT as the backbone of detection and segmentation, and its feature pyramid.

The mathematics is that of detectron2, commit 02b5c4e: ``modeling/backbone/vit.py``, ``utils.py``. Blocks have timm's
modules and weights. Most attend within windows, some to the whole image. The last block is a `models_sar.LastBlock`.

Letters of the axes: B images, C channels, H heads, D channels of a head; h x w patches.
"""

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import LayerNorm2d, PatchEmbed, calculate_drop_path_rates, trunc_normal_
from timm.models import checkpoint
from timm.models.vision_transformer_sam import Block, window_partition, window_unpartition
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from models.pyramid import init_linear
from models_sar import LastBlock, similarity_map

STRIDES = (4, 8, 16, 32, 64)
"""Of the maps of `SimpleFeaturePyramid`, in px, for patches of 16 px."""


class ViTDetBlock(LastBlock, Block):
    """timm's windowed ``Block``, as any block of `ViTDet`; `attach` makes it a last block of Table 1(b).

    Drop-path follows the windows and drops whole images, as in detectron2; timm's own ``forward`` drops windows.

    Args:
        dim, num_heads, kwargs: those of timm's ``Block``; ``window_size=0`` attends to the whole image.
    """

    def __init__(self, dim: int, num_heads: int, **kwargs):
        super().__init__(dim, num_heads, **kwargs)
        self.attach("standard")

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(B, h, w, C)`` to tokens ``(B, h, w, C)``."""
        grid = (x.shape[1], x.shape[2])
        y = self.norm1(x)
        if self.window_size:  # padding is zeros after the norm, and is attended to
            windows, padded = window_partition(y, self.window_size)
            y = window_unpartition(self._attention(windows), self.window_size, grid, padded)
        else:
            y = self._attention(y)
        return self.residuals(x, y)

    def _attention(self, y: Tensor) -> Tensor:
        """Attention of every token to all others of its image or window, ``(B, h, w, C)`` both."""
        attn, (h, w) = self.attn, y.shape[1:3]
        q, k, v = rearrange(attn.qkv(y), "B h w (qkv H D) -> qkv B H (h w) D", qkv=3, H=attn.num_heads).unbind(0)
        bias = relative_bias(q, attn.rel_pos_h, attn.rel_pos_w, (h, w)) if attn.use_rel_pos else None
        dropout = attn.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        return attn.proj_drop(attn.proj(rearrange(x, "B H (h w) D -> B h w (H D)", h=h)))

    def similarity_maps(self, x: Tensor) -> Tensor:
        """S (Eq. 4) of the tokens ``(B, h, w, C)`` that enter the block, ``(B, H, h, w)``; see `similarity_map`.

        The query is that of the mean of all normalised tokens, as there is no [CLS]. The keys are those of the whole
        image, also where the block attends within windows.
        """
        attn, grid = self.attn, (x.shape[1], x.shape[2])
        y = rearrange(self.norm1(x), "B h w C -> B (h w) C")
        (weight_q, weight_k, _), (bias_q, bias_k, _) = (part.chunk(3) for part in (attn.qkv.weight, attn.qkv.bias))
        q = rearrange(F.linear(y.mean(dim=1), weight_q, bias_q), "B (H D) -> B H D", H=attn.num_heads)
        k = rearrange(F.linear(y, weight_k, bias_k), "B N (H D) -> B H N D", H=attn.num_heads)
        return similarity_map(q, k, attn.scale, grid, self.similarity)


def relative_bias(q: Tensor, table_h: Tensor, table_w: Tensor, grid: tuple[int, int]) -> Tensor:
    """What relative positions add to the scores: q.Rh[i - i'] + q.Rw[j - j'], with q not scaled.

    Gradients of timm's own function depend on the order of its threads; these do not.

    Args:
        q: queries ``(B, H, h * w, D)``.
        table_h, table_w: learned, ``(2 S - 1, D)``: one row a distance, the smallest first.
        grid: ``(h, w)`` of queries and keys.

    Returns:
        ``(B, H, h * w, h * w)``.
    """
    h, w = grid
    q = rearrange(q, "B H (h w) D -> B H h w D", h=h)
    rows = torch.einsum("B H h w D, h D k -> B H h w k", q, relative_positions(table_h, h))
    columns = torch.einsum("B H h w D, w D k -> B H h w k", q, relative_positions(table_w, w))
    return (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)


def relative_positions(table: Tensor, size: int) -> Tensor:
    """R ``(size, D, size)``: ``R[i, :, j]`` is the row of the distance i - j in a table ``(L, D)``.

    A table for another size is resized linearly to ``2 size - 1`` rows.
    """
    if len(table) != 2 * size - 1:
        table = F.interpolate(table.T[None], size=2 * size - 1, mode="linear")[0].T
    return table.unfold(0, size, 1).flip(-1)


class ViTDet(nn.Module):
    """A ViT without [CLS], final norm and head, whose output is the last block's map.

    Args:
        img_size: px of the training images, a side; the whole-image tables of relative positions are made for it.
        patch_size: px.
        pretrain_size: px of the images that ``pos_embed`` was trained for; it is resized at each pass.
        embed_dim, depth, num_heads, mlp_ratio, proj_drop_rate: as in timm's ``VisionTransformer``.
        drop_path_rate: of the last block; the rates rise linearly from 0.
        window_size: side of a window, in patches.
        global_blocks: the blocks that attend to the whole image (default: the last of each quarter).
        rel_pos: whether blocks learn relative positions.
        last_block, similarity: see `models_sar.LastBlock.attach`.

    Attributes:
        num_features: channels of the map.
        reduction: px between two of its locations; images are padded to a multiple of it.
        last_block: as given.
    """

    def __init__(
        self,
        img_size: int = 512,
        patch_size: int = 16,
        pretrain_size: int = 224,
        in_chans: int = 3,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        window_size: int = 14,
        global_blocks: tuple[int, ...] | None = None,
        rel_pos: bool = True,
        last_block: str = "standard",
        similarity: str = "dot",
    ):
        super().__init__()
        self.num_features, self.reduction = embed_dim, patch_size
        self.last_block, self.grad_checkpointing = last_block, False
        # 1. patches, padded at the right and bottom to whole ones; positions, the first of which is [CLS]'s
        self.patch_embed = PatchEmbed(
            None, patch_size, in_chans, embed_dim, output_fmt="NHWC", strict_img_size=False, dynamic_img_pad=True
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (pretrain_size // patch_size) ** 2, embed_dim))
        trunc_normal_(self.pos_embed, std=0.02)
        # 2. blocks
        grid = -(-img_size // patch_size)
        if global_blocks is None:
            global_blocks = tuple(quarter * depth // 4 - 1 for quarter in (1, 2, 3, 4))
        self.blocks = nn.ModuleList(
            ViTDetBlock(
                embed_dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                proj_drop=proj_drop_rate,
                drop_path=rate,
                norm_layer=partial(nn.LayerNorm, eps=1e-6),  # type: ignore[arg-type]
                use_rel_pos=rel_pos,
                window_size=0 if number in global_blocks else window_size,
                input_size=(grid, grid),
            )
            for number, rate in enumerate(calculate_drop_path_rates(drop_path_rate, depth))
        )
        self.apply(init_linear)
        self.blocks[-1].attach(last_block, similarity, "mean")

    def forward(self, images: Tensor, return_similarity: bool = False):
        """The map ``(B, C, h, w)``, and on request S ``(B, H, h, w)`` of the last block.

        Args:
            images: ``(B, 3, height, width)`` of any size, normalised. Patches cover them with zeros at the right and
                bottom, so h is the height divided by the patch size, rounded up.
            return_similarity: return ``(map, S)``.
        """
        x = self.patch_embed(images)
        x = x + resize_positions(self.pos_embed, (x.shape[1], x.shape[2]))
        for block in self.blocks[:-1]:
            x = self._run(block, x)
        similarity = self.blocks[-1].similarity_maps(x) if return_similarity else None
        x = rearrange(self._run(self.blocks[-1], x), "B h w C -> B C h w")
        return (x, similarity) if return_similarity else x

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}


def resize_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Positions ``(1, 1 + n * n, C)`` of [CLS] and a square, without [CLS]'s, for a grid: ``(1, h, w, C)``.

    Bicubic and without antialiasing, as in detectron2; timm's function has antialiasing by default.
    """
    side = round((positions.shape[1] - 1) ** 0.5)
    patches = rearrange(positions[:, 1:], "1 (h w) C -> 1 C h w", h=side)
    if grid != (side, side):
        patches = F.interpolate(patches, size=grid, mode="bicubic")
    return rearrange(patches, "1 C h w -> 1 h w C")


class SimpleFeaturePyramid(nn.Module):
    """Five maps of strides 4 to 64 from the one map of a plain backbone.

    Args:
        in_channels: of the backbone's map.
        out_channels: of each map.
    """

    def __init__(self, in_channels: int, out_channels: int = 256):
        super().__init__()
        half, quarter = in_channels // 2, in_channels // 4

        def double(before: int, after: int) -> nn.Module:
            return nn.ConvTranspose2d(before, after, kernel_size=2, stride=2)

        self.levels = nn.ModuleList(
            nn.Sequential(*rescale, *_to_width(channels, out_channels))
            for channels, rescale in (
                (quarter, [double(in_channels, half), LayerNorm2d(half), nn.GELU(), double(half, quarter)]),
                (half, [double(in_channels, half)]),
                (in_channels, []),
                (in_channels, [nn.MaxPool2d(kernel_size=2, stride=2)]),
            )
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """``(B, C, h, w)`` -> p2, ..., p6 of ``out_channels``: ``(4 h, 4 w)``, ``(2 h, 2 w)``, ``(h, w)``, ...

        p5 has half the sides, rounded down; p6 is every second pixel of p5.
        """
        maps = [level(x) for level in self.levels]
        return [*maps, maps[-1][..., ::2, ::2]]


def _to_width(channels: int, width: int) -> list[nn.Module]:
    """A 1 x 1 and a 3 x 3 convolution to ``width`` channels, without bias and each with a LayerNorm over channels."""
    return [
        Conv2dNormActivation(before, width, size, norm_layer=LayerNorm2d, activation_layer=None)
        for before, size in ((channels, 1), (width, 3))
    ]
