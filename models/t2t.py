"""T2T-ViT (Tokens-to-Token ViT, L. Yuan et al., 2021): ``t2t_vit_14``, ``t2t_vit_t_14``, each also with ``_sar``.

Two small attention layers on overlapping windows turn an image of 224 px into 14 x 14 tokens. They are Performers in
``t2t_vit_14`` and transformers in ``t2t_vit_t_14``. A ViT with fixed sinusoidal positions follows; its last block is
SAR's. The names of the weights are those of the official release.

TorchScript compiles the token-to-token module, so its changes of shape are torch's own and not einops'.
"""

import math
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Mlp, trunc_normal_
from timm.models import checkpoint_seq, register_model
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from models_sar import SARVisionTransformer, create, imagenet_cfgs

__all__ = ["T2TViT"]

PATCH_SIZE = 16
WINDOWS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))
"""Kernel, stride and padding of the three unfoldings, px; together they make a patch of 16 px."""


class Performer(nn.Module):
    """A token-to-token layer whose attention is linear in the tokens, by random features of the softmax kernel.

    ``forward(x (B, N, dim))`` -> ``(B, N, token_dim)``; the attention is computed in at least float32. The skip adds
    the values, as the tokens have another width. The features are orthogonal and fixed after they are drawn.
    """

    def __init__(self, dim: int, token_dim: int, num_features: int, dropout: float = 0.1):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.kqv = nn.Linear(dim, 3 * token_dim)
        w = nn.init.orthogonal_(torch.empty(num_features, token_dim)) * math.sqrt(num_features)
        self.register_buffer("w", w)
        self.proj = nn.Linear(token_dim, token_dim)
        self.dropout = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(token_dim)
        self.mlp = nn.Sequential(
            nn.Linear(token_dim, token_dim), nn.GELU(), nn.Linear(token_dim, token_dim), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)  # in this order
        x = v + self.dropout(self.proj(self.attend(k, q, v).to(v.dtype)))
        return x + self.mlp(self.norm2(x))

    def attend(self, k: Tensor, q: Tensor, v: Tensor) -> Tensor:
        """Output of the attention, ``(B, N, token_dim)``, without an ``N x N`` matrix."""
        return linear_attention(k, q, v, self.w)


@torch.fx.wrap  # so that each pass, and not the tracing, reads types and devices
def linear_attention(k: Tensor, q: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """The attention of a `Performer`.

    Args:
        k, q, v: ``(B, N, token_dim)``.
        w: random features, ``(num_features, token_dim)``.

    Returns:
        ``(B, N, token_dim)`` in at least float32.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    k, q, v, w = k.to(dtype), q.to(dtype), v.to(dtype), w.to(dtype)
    if not torch.jit.is_scripting():  # TorchScript cannot turn autocast off
        with torch.autocast(v.device.type, enabled=False) if v.device.type != "meta" else nullcontext():
            return weighted_values(features(k, w), features(q, w), v)
    return weighted_values(features(k, w), features(q, w), v)


def features(x: Tensor, w: Tensor) -> Tensor:
    """Positive random features ``(B, N, num_features)``: exp(w x - |x|^2 / 2) / sqrt(num_features)."""
    return (x @ w.T - x.square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(len(w))


def weighted_values(k: Tensor, q: Tensor, v: Tensor) -> Tensor:
    """Weighted means of the values, ``(B, N, token_dim)``; the weights are the products of positive ``q`` and ``k``."""
    sums = q @ k.sum(dim=1).unsqueeze(-1)
    return q @ (k.mT @ v) / (sums + 1e-8)


class TokenTransformer(nn.Module):
    """A token-to-token layer with one head of softmax attention: ``(B, N, dim)`` to ``(B, N, token_dim)``."""

    def __init__(self, dim: int, token_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = TokenAttention(dim, token_dim)
        self.norm2 = nn.LayerNorm(token_dim)
        self.mlp = Mlp(token_dim, token_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TokenAttention(nn.Module):
    """Attention of one head that changes the width from ``dim`` to ``token_dim``.

    The skip adds the values. Scores are divided by the root of the incoming width.
    """

    def __init__(self, dim: int, token_dim: int):
        super().__init__()
        self.scale = dim**-0.5
        self.qkv = nn.Linear(dim, 3 * token_dim, bias=False)
        self.proj = nn.Linear(token_dim, token_dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return v + self.proj(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=self.scale)[:, 0])


def windows_along(side: int, window: tuple[int, int, int]) -> int:
    """Number of windows along a side of ``side`` px; ``window`` is an entry of `WINDOWS`."""
    kernel, stride, padding = window
    return (side + 2 * padding - kernel) // stride + 1


def unfold(x: Tensor, window: tuple[int, int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Overlapping windows of a map as tokens.

    Args:
        x: ``(B, C, height, width)``.
        window: kernel, stride and padding.

    Returns:
        Tokens ``(B, h * w, C * kernel ** 2)`` and their grid ``(h, w)``.
    """
    kernel, stride, padding = window
    grid = windows_along(x.shape[-2], window), windows_along(x.shape[-1], window)
    return F.unfold(x, kernel, stride=stride, padding=padding).transpose(1, 2), grid


class TokensToToken(nn.Module):
    """The image as tokens: it unfolds overlapping windows three times, with attention after the first two.

    It takes the place of timm's ``PatchEmbed`` and has its interface, as far as ``VisionTransformer`` uses it.

    Args:
        img_size: px.
        patch_size: 16.
        in_chans: channels of the images.
        embed_dim: width of the tokens that leave it.
        token_dim: width of the tokens within it.
        performer: attention of `Performer`; False for `TokenTransformer`.
        bias: of the last projection.
        dynamic_img_pad: timm passes it; without effect.
        device, dtype: of the weights.

    Raises:
        ValueError: another patch size is asked for.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        token_dim: int = 64,
        performer: bool = True,
        bias: bool = True,
        dynamic_img_pad: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.patch_size, self.windows = (16, 16), WINDOWS
        self.set_input_size(img_size, patch_size)
        areas = [kernel * kernel for kernel, _, _ in WINDOWS]
        layer = partial(Performer, num_features=token_dim // 2) if performer else TokenTransformer
        self.attention1 = layer(in_chans * areas[0], token_dim)
        self.attention2 = layer(token_dim * areas[1], token_dim)
        self.project = nn.Linear(token_dim * areas[2], embed_dim, bias=bias)
        self.to(device, dtype)

    def feat_ratio(self, as_scalar: bool = True):
        """Pixels between two tokens, as a number or as a pair."""
        return self.patch_size[0] if as_scalar else self.patch_size

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, patch_size=None) -> None:
        """Set the size of the images, px, and the grid that follows from it.

        Raises:
            ValueError: another patch size is asked for.
        """
        if patch_size not in (None, 16, (16, 16)):
            raise ValueError(f"patch_size={patch_size}: T2T-ViT's windows make patches of 16 px; leave it out")
        if img_size is not None:
            self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
            self.grid_size = self.dynamic_feat_size(self.img_size)
            self.num_patches = math.prod(self.grid_size)

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens for an image of this height and width."""
        h, w = img_size
        for window in WINDOWS:
            h, w = windows_along(h, window), windows_along(w, window)
        return h, w

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_chans, height, width)`` to ``(B, h * w, embed_dim)``."""
        first, second, third = self.windows
        x, grid = unfold(x, first)
        x, grid = unfold(self.attention1(x).transpose(1, 2).unflatten(2, grid), second)
        x, grid = unfold(self.attention2(x).transpose(1, 2).unflatten(2, grid), third)
        return self.project(x)


def sinusoids(positions: int, dim: int) -> Tensor:
    """Fixed positions ``(1, positions, dim)``: sine and cosine in turn (Vaswani et al., 2017, Section 3.5)."""
    angles = torch.arange(positions)[:, None] * 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    waves = rearrange([angles.sin(), angles.cos()], "wave position pair -> 1 position (pair wave)")
    return waves[..., :dim].float()


class T2TViT(SARVisionTransformer):
    """T2T-ViT with a last block of Table 1(b).

    Args:
        token_dim: width of the tokens within the token-to-token module.
        performer: attention of that module: `Performer`, or `TokenTransformer` if False.
        kwargs: those of `SARVisionTransformer`.
    """

    dynamic_img_size: torch.jit.Final[bool]  # TorchScript may read only annotations of the class itself
    __jit_unused_properties__ = ["patch_embed"]  # noqa: RUF012 - TorchScript wants a list

    def __init__(self, token_dim: int = 64, performer: bool = True, norm_layer=None, **kwargs):
        embed = partial(TokensToToken, token_dim=token_dim, performer=performer)
        super().__init__(embed_layer=embed, norm_layer=norm_layer or partial(nn.LayerNorm, eps=1e-5), **kwargs)
        trunc_normal_(self.cls_token, std=0.02)
        self._modules["tokens_to_token"] = self._modules.pop("patch_embed")
        positions = sinusoids(self.pos_embed.shape[1], self.embed_dim).to(self.pos_embed)
        del self.pos_embed
        self.register_buffer("pos_embed", positions)  # saved with the weights, never trained

    @property
    def patch_embed(self) -> nn.Module:
        """The token-to-token module, under the name that timm uses."""
        return self.tokens_to_token

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """timm's ``forward_features``, images to normalised tokens ``(B, N, C)``.

        The token-to-token module has its own name here, the only one that TorchScript knows.
        """
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.tokens_to_token(x))))
        if attn_mask is not None or is_causal:
            for block in self.blocks:
                x = block(x, attn_mask=attn_mask, is_causal=is_causal)
        elif self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)

    @torch.jit.ignore
    def set_input_size(self, img_size: tuple[int, int] | None = None, patch_size: tuple[int, int] | None = None):
        """timm's ``set_input_size``; the fixed positions are computed anew for the grid.

        Raises:
            ValueError: another patch size is asked for.
        """
        embed, before = self.tokens_to_token, self.tokens_to_token.num_patches
        embed.set_input_size(img_size, patch_size)
        count = self.pos_embed.shape[1] - before + embed.num_patches
        self.pos_embed = sinusoids(count, self.embed_dim).to(self.pos_embed)
        update_model_input_size(self, embed.img_size)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        groups = super().group_matcher(coarse)
        return groups | {"stem": groups["stem"] + "|tokens_to_token"}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"cls_token"}


def checkpoint_filter_fn(state: dict[str, Tensor], model: T2TViT) -> dict[str, Tensor]:
    """Fit weights to the model's grid: the fixed positions are the model's own."""
    return state | {"pos_embed": model.pos_embed} if "pos_embed" in state else state


SIZES = {"embed_dim": 384, "depth": 14, "num_heads": 6, "mlp_ratio": 3.0, "qkv_bias": False}
default_cfgs = imagenet_cfgs("t2t_vit_14", "t2t_vit_t_14", first_conv=(), crop_pct=0.9)


@register_model
def t2t_vit_14(pretrained: bool = False, **kwargs) -> T2TViT:
    """T2T-ViT-14: 21,465,806 parameters, without the fixed positions and random features."""
    return create(T2TViT, "t2t_vit_14", pretrained, 3, **SIZES | kwargs)


@register_model
def t2t_vit_14_sar(pretrained: bool = False, **kwargs) -> T2TViT:
    """T2T-ViT-14 with the last block of Eq. 10-11: 21,465,038 parameters."""
    return create(T2TViT, "t2t_vit_14_sar", pretrained, 3, **SIZES | kwargs)


@register_model
def t2t_vit_t_14(pretrained: bool = False, **kwargs) -> T2TViT:
    """T2T-ViT-14 with `TokenTransformer` in its token-to-token module: 21,465,422 parameters."""
    return create(T2TViT, "t2t_vit_t_14", pretrained, 3, **{"performer": False} | SIZES | kwargs)


@register_model
def t2t_vit_t_14_sar(pretrained: bool = False, **kwargs) -> T2TViT:
    """T2T-ViT_t-14 with the last block of Eq. 10-11: 21,464,654 parameters."""
    return create(T2TViT, "t2t_vit_t_14_sar", pretrained, 3, **{"performer": False} | SIZES | kwargs)
