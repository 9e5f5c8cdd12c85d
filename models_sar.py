"""ViT-T/S/B whose last block is the paper's, in timm's registry.

``import models_sar`` adds ``vit_tiny``, ``vit_small``, ``vit_base`` (the unchanged baselines) and their
``*_sar`` forms to ``timm.create_model``. All are timm's ``VisionTransformer`` but for the last block, which
can drop its skips (Eq. 10-11) and hand out S, the similarity of the [CLS] query with the patch keys (Eq. 4).

Letters of the axes in names: B images, N tokens, C channels, H heads, D channels of a head; h x w patches.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention, PatchDropout
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

# timm's decorator adds the models to it
__all__ = ["LAST_BLOCKS", "SIMILARITIES", "LastBlock", "SARVisionTransformer", "similarity_map"]

# Table 1(b): (skip around the attention, second LayerNorm, skip around the MLP)
LAST_BLOCKS = {
    "standard": (True, True, True),  # rows A and E: Eq. 1-2
    "no_msa_skip": (False, True, True),  # row B
    "sar": (False, False, True),  # rows C and F: Eq. 10-11
    "no_skips": (False, False, False),  # row D
}
SIMILARITIES = ("dot", "cosine", "softmax")
QUERIES = ("cls", "mean")


def check_choice(name: str, value: str, choices) -> None:
    """Raise a ``ValueError`` that names the choices unless ``value`` is one of them."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}")


def similarity_map(q_BHD: Tensor, k_BHND: Tensor, scale: float, grid: tuple[int, int], kind: str = "dot") -> Tensor:
    """Similarity S of the [CLS] query with the patch keys, computed in float32 (float64 for float64 inputs).

    Args:
        q_BHD: the [CLS] query of each head, any floating type.
        k_BHND: all keys; the last ``h * w`` are the patches, row by row, after all prefix tokens.
        scale: factor of the attention scores, ``D ** -0.5`` in a ViT.
        grid: ``(h, w)`` of the keys.
        kind: ``"dot"``, the scores before the softmax (Eq. 4); ``"cosine"`` (Eq. 15); ``"softmax"``, the
            attention row of [CLS], normalised over all keys, [CLS] included (it collapses, Section 4.3).

    Returns:
        S of shape ``(B, H, h, w)``.
    """
    check_choice("similarity", kind, SIMILARITIES)
    h, w = grid
    dtype = torch.promote_types(q_BHD.dtype, torch.float32)
    q, k = q_BHD.to(dtype).unsqueeze(-2), k_BHND.to(dtype)
    if kind == "cosine":
        q, k, scale = F.normalize(q, dim=-1), F.normalize(k, dim=-1), 1.0
    # a product and a sum, not a matmul: neither autocast nor TF32 can lower their precision
    scores_BHN = (q * scale * k).sum(dim=-1)
    if kind == "softmax":
        scores_BHN = scores_BHN.softmax(dim=-1)
    return scores_BHN[..., -h * w :].unflatten(-1, (h, w))


class LastBlock(nn.Module):
    """What SAR makes of the last block of any pre-norm transformer (Table 1b); a mixin before the block's own class.

    The block's class has ``norm1``, ``attn`` (with ``scale``), ``drop_path1``, ``norm2``, ``mlp``, ``drop_path2``, and
    ``ls1`` and ``ls2`` where it scales its branches. The class of the last block calls `attach` when these are there,
    and says in `query`, `project` and `attend` how its attention works. Tokens are ``(B, N, C)``, the prefix first.

    Drop-path and layer-scale are made for a residual branch; a branch without a skip has neither.
    """

    def attach(self, last_block: str, similarity: str = "dot", similarity_query: str = "cls") -> None:
        """Take away the skips and the LayerNorm that ``last_block`` does without.

        Args:
            last_block: a row of `LAST_BLOCKS`.
            similarity: see `similarity_map`.
            similarity_query: ``"cls"``, or ``"mean"``, the query of the mean of the normalised patch tokens.
        """
        check_choice("last_block", last_block, LAST_BLOCKS)
        check_choice("similarity", similarity, SIMILARITIES)
        check_choice("similarity_query", similarity_query, QUERIES)
        self.similarity, self.similarity_query = similarity, similarity_query
        self.attn_skip, has_norm2, self.mlp_skip = LAST_BLOCKS[last_block]
        for branch, skip in enumerate((self.attn_skip, self.mlp_skip), start=1):
            for name in (f"ls{branch}", f"drop_path{branch}"):
                if not skip or not hasattr(self, name):
                    setattr(self, name, nn.Identity())
        if not has_norm2:
            self.norm2 = nn.Identity()

    def query(self, y: Tensor) -> Tensor:
        """Queries ``(B, H, N, D)`` of normalised tokens ``(B, N, C)`` that stand in no grid: [CLS], or a mean."""
        raise NotImplementedError

    def project(self, y: Tensor, one_query: bool, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (of [CLS] alone if ``one_query``), keys, values ``(B, H, N, D)`` of normalised tokens."""
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention's output ``(B, number of queries, C)`` for what `project` returned."""
        attn = self.attn
        bias = self.position_bias()
        dropout = attn.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=attn.scale)
        return attn.proj_drop(attn.proj(x.transpose(1, 2).flatten(2)))

    def position_bias(self) -> Tensor | None:
        """What the attention adds to its scores; S is without it."""
        return None

    def key_grid(self, h: int, w: int) -> tuple[int, int]:
        """Rows and columns of the keys of ``h x w`` patches."""
        return h, w

    def with_similarity(
        self, x: Tensor, one_query: bool, grid: tuple[int, int], similarity: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The block's output for tokens ``x``, and S ``(B, H, h, w)`` if ``similarity`` asks for it.

        Args:
            x: ``(B, N, C)``; the last ``grid[0] * grid[1]`` are the patches.
            one_query: compute [CLS] alone: ``(B, 1, C)`` comes out.
        """
        y = self.norm1(x)
        q, k, v = self.project(y, one_query, grid)
        maps = None
        if similarity:
            h, w = grid
            by_cls = self.similarity_query == "cls"
            query = q[:, :, 0] if by_cls else self.query(y[:, -h * w :].mean(dim=1, keepdim=True))[:, :, 0]
            maps = similarity_map(query, k, self.attn.scale, self.key_grid(h, w), self.similarity)
        return self.residuals(x[:, :1] if one_query else x, self.attend(q, k, v)), maps

    def residuals(self, x: Tensor, y: Tensor) -> Tensor:
        """What follows the attention: ``x`` are the block's input tokens, ``y`` the attention's output."""
        y = self.drop_path1(self.ls1(y))
        x = x + y if self.attn_skip else y
        y = self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x + y if self.mlp_skip else y


class SimilarityModel(nn.Module):
    """The interface of every model here: logits, and on request what the last block computed on the way.

    A mixin before a timm model with ``norm``, ``forward_features`` and ``forward_head``. The class says what the last
    block is, which tokens enter it, and whether its classifier reads [CLS] alone. Then the last block computes one
    query and one MLP token; a hook on it sees ``((B, 1, C), S)``. Whoever needs more tokens gets them computed.
    """

    def last(self) -> LastBlock | None:
        """The last block; None if it was pruned away."""
        raise NotImplementedError

    def forward_trunk(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens ``(B, N, C)`` that enter the last block, prefix first, and the grid ``(h, w)`` of the patches."""
        raise NotImplementedError

    def reads_only_cls(self) -> bool:
        """Whether [CLS] is all of the last block's output that the classifier reads."""
        raise NotImplementedError

    def classify(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Logits of the last block's tokens."""
        return self.forward_head(self.norm(x))

    def forward(self, images: Tensor, return_similarity: bool = False, return_tokens: bool = False):
        """Logits, and on request what the last block computed on the way.

        Args:
            images: ``(B, 3, height, width)``.
            return_similarity: add S, ``(B, H, h, w)``, float32 whatever autocast says (Eq. 4).
            return_tokens: add the last block's patch tokens before the final norm, ``(B, C, h, w)``.

        Returns:
            ``logits`` of shape ``(B, classes)``, or a tuple ``(logits[, similarity][, tokens])``.

        Raises:
            ValueError: a map is asked for that does not exist: no class token, patch dropout in training, the
                last block pruned away.
        """
        # TorchScript compiles nothing of this branch; under FX the flags are proxies, which are not True. Both take all
        # tokens: a graph is asked for features, too.
        if not torch.jit.is_scripting():
            if return_similarity is True or return_tokens is True:
                return self._forward_maps(images, return_similarity, return_tokens)
            if self.last() is not None and self.reads_only_cls() and not isinstance(images, torch.fx.Proxy):
                x, grid = self.forward_trunk(images)
                x, _ = self._forward_last(x, grid, one_query=True)
                return self.classify(x, grid)
        return self.forward_head(self.forward_features(images))

    def check_maps(self, return_similarity: bool) -> None:
        """Raise a ``ValueError`` where maps have no meaning."""
        if self.last() is None:
            raise ValueError("the last block was pruned away: no similarity and no last tokens to return")

    def _forward_maps(self, images: Tensor, return_similarity: bool, return_tokens: bool) -> tuple:
        self.check_maps(return_similarity)
        x, (h, w) = self.forward_trunk(images)
        one_query = self.reads_only_cls() and not return_tokens
        x, similarity = self._forward_last(x, (h, w), one_query, return_similarity)
        outputs = [self.classify(x, (h, w))]
        if return_similarity:
            outputs.append(similarity)
        if return_tokens:
            outputs.append(x[:, -h * w :].transpose(1, 2).unflatten(2, (h, w)))
        return tuple(outputs)

    def _forward_last(self, x: Tensor, grid: tuple[int, int], one_query: bool, similarity: bool = False):
        call = partial(self.recompute, self.last()) if self.grad_checkpointing else self.last()
        return call(x, one_query=one_query, grid=grid, similarity=similarity)

    def recompute(self, block: nn.Module, *args, **kwargs):
        """``block(...)``, computed again in the backward pass (gradient checkpointing)."""
        return checkpoint(block, *args, use_reentrant=False, **kwargs)


class ViTLastBlock(LastBlock, Block):
    """timm's ``Block`` as a `LastBlock`."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        last_block: str = "sar",
        similarity: str = "dot",
        similarity_query: str = "cls",
        attn_layer: Any = Attention,
        **kwargs,
    ) -> None:
        if attn_layer not in ("", "attn", Attention):
            raise ValueError(f"attn_layer={attn_layer!r} has no single [CLS] query; use timm's Attention")
        super().__init__(dim, num_heads, attn_layer=attn_layer, **kwargs)
        self.attach(last_block, similarity, similarity_query)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        one_query: bool | None = None,
        grid: tuple[int, int] | None = None,
        similarity: bool = False,
    ):
        """timm's ``Block.forward``: tokens ``(B, N, C)`` to tokens ``(B, N, C)``.

        With ``one_query`` True or False (not under TorchScript, and without a mask): `LastBlock.with_similarity`.
        """
        if not torch.jit.is_scripting() and one_query is not None:
            return self.with_similarity(x, one_query, grid, similarity)
        return self.residuals(x, self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal))

    def query(self, y: Tensor) -> Tensor:
        attn = self.attn
        heads = (attn.num_heads, attn.head_dim)
        weight, bias = attn.qkv.weight[: attn.attn_dim], attn.qkv.bias
        q = F.linear(y, weight, None if bias is None else bias[: attn.attn_dim])
        return attn.q_norm(q.unflatten(2, heads).transpose(1, 2))

    def project(self, y: Tensor, one_query: bool, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        attn = self.attn
        heads = (attn.num_heads, attn.head_dim)
        if one_query:
            # split's backward is one concatenation; that of two slices would add two zero-filled weights
            sizes = [attn.attn_dim, 2 * attn.attn_dim]
            weight_q, weight_kv = attn.qkv.weight.split(sizes)
            bias_q, bias_kv = (None, None) if attn.qkv.bias is None else attn.qkv.bias.split(sizes)
            q = F.linear(y[:, :1], weight_q, bias_q).unflatten(2, heads).transpose(1, 2)
            kv = F.linear(y, weight_kv, bias_kv).unflatten(2, (2, *heads))
            k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = attn.qkv(y).unflatten(2, (3, *heads)).permute(2, 0, 3, 1, 4).unbind(0)
        return attn.q_norm(q), attn.k_norm(k), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attn = self.attn
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=attn.attn_drop.p if self.training else 0.0)
        return attn.proj_drop(attn.proj(attn.norm(x.transpose(1, 2).flatten(2))))


class SARVisionTransformer(SimilarityModel, VisionTransformer):
    """timm's ``VisionTransformer`` (every keyword of it) with a `LastBlock`.

    Args:
        last_block: a row of `LAST_BLOCKS`, Table 1(b): ``"standard"`` is Eq. 1-2, ``"sar"`` Eq. 10-11.
        similarity: ``"dot"`` (Eq. 4), ``"cosine"`` (Eq. 15), ``"softmax"`` (Section 4.3): `similarity_map`.
        similarity_query: ``"cls"`` or ``"mean"``, see `LastBlock.attach`; a model without [CLS] needs the mean.

    A classifier with token pooling reads only [CLS]; features, other poolings and ``return_tokens`` get all tokens.
    Both ways draw the same random numbers for drop-path; for attention and projection dropout they draw different ones
    of the same distribution.
    """

    def __init__(
        self,
        last_block: str = "standard",
        similarity: str = "dot",
        similarity_query: str = "cls",
        depth: int = 12,
        **kwargs,
    ):
        def block_fn(depth: int, **block_kwargs) -> Block:
            if depth == last:
                return ViTLastBlock(depth=depth, **sar, **block_kwargs)
            return Block(depth=depth, **block_kwargs)

        last = depth - 1
        sar = {"last_block": last_block, "similarity": similarity, "similarity_query": similarity_query}
        super().__init__(depth=depth, block_fn=block_fn, **kwargs)
        self.last_block = last_block

    def last(self) -> LastBlock | None:
        return self.blocks[-1] if isinstance(self.blocks[-1], LastBlock) else None

    def check_maps(self, return_similarity: bool) -> None:
        super().check_maps(return_similarity)
        if self.training and isinstance(self.patch_drop, PatchDropout):
            raise ValueError("patch dropout leaves no h x w grid: train with patch_drop_rate=0 to get maps")
        if return_similarity and not self.has_class_token and self.last().similarity_query == "cls":
            raise ValueError(
                "similarity is that of the [CLS] query: build the model with class_token=True, or with "
                "similarity_query='mean' (--sar-query mean)"
            )

    def reads_only_cls(self) -> bool:
        return self.global_pool == "token" and self.attn_pool is None

    def forward_trunk(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(images))))
        for block in list(self.blocks)[:-1]:
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        return x, self.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))


PATCH_SIZE = 16
SIZES = {
    "tiny": {"embed_dim": 192, "num_heads": 3},
    "small": {"embed_dim": 384, "num_heads": 6},
    "base": {"embed_dim": 768, "num_heads": 12},
}


def imagenet_cfgs(*names: str, **more) -> dict:
    """timm's description of each model and its ``_sar`` twin: DeiT's evaluation, 256 -> 224 bicubic; no weights."""
    return generate_default_cfgs(
        {
            name + suffix: {
                "num_classes": 1000,
                "input_size": (3, 224, 224),
                "fixed_input_size": True,
                "crop_pct": 0.875,
                "interpolation": "bicubic",
                "mean": IMAGENET_DEFAULT_MEAN,
                "std": IMAGENET_DEFAULT_STD,
                "classifier": "head",
                "license": "apache-2.0",
                **more,
            }
            for name in names
            for suffix in ("", "_sar")
        }
    )


default_cfgs = imagenet_cfgs(*(f"vit_{size}" for size in SIZES), first_conv="patch_embed.proj")


def create(model: type[nn.Module], name: str, pretrained: bool, features: int | tuple[int, ...], **kwargs) -> nn.Module:
    """A registered model; those called ``*_sar`` have the paper's last block unless told otherwise.

    ``features`` are the stages that ``features_only`` hands out, or how many of the last blocks.
    """
    last_block = "sar" if name.endswith("_sar") else "standard"
    feature_cfg = {"out_indices": features, "feature_cls": "getter"}
    kwargs = {"last_block": last_block, **kwargs}
    return build_model_with_cfg(model, name, pretrained, feature_cfg=feature_cfg, **kwargs)


def _create(name: str, pretrained: bool, **kwargs) -> SARVisionTransformer:
    sizes = SIZES[name.split("_")[1]] | kwargs
    return create(SARVisionTransformer, name, pretrained, 3, pretrained_filter_fn=checkpoint_filter_fn, **sizes)


@register_model
def vit_tiny(pretrained: bool = False, **kwargs) -> SARVisionTransformer:
    """ViT-T/16 (DeiT-T): 5,717,416 parameters."""
    return _create("vit_tiny", pretrained, **kwargs)


@register_model
def vit_small(pretrained: bool = False, **kwargs) -> SARVisionTransformer:
    """ViT-S/16 (DeiT-S): 22,050,664 parameters."""
    return _create("vit_small", pretrained, **kwargs)


@register_model
def vit_base(pretrained: bool = False, **kwargs) -> SARVisionTransformer:
    """ViT-B/16 (DeiT-B): 86,567,656 parameters."""
    return _create("vit_base", pretrained, **kwargs)


@register_model
def vit_tiny_sar(pretrained: bool = False, **kwargs) -> SARVisionTransformer:
    """ViT-T/16 with the last block of Eq. 10-11: 5,717,032 parameters."""
    return _create("vit_tiny_sar", pretrained, **kwargs)


@register_model
def vit_small_sar(pretrained: bool = False, **kwargs) -> SARVisionTransformer:
    """ViT-S/16 with the last block of Eq. 10-11: 22,049,896 parameters."""
    return _create("vit_small_sar", pretrained, **kwargs)


@register_model
def vit_base_sar(pretrained: bool = False, **kwargs) -> SARVisionTransformer:
    """ViT-B/16 with the last block of Eq. 10-11: 86,566,120 parameters."""
    return _create("vit_base_sar", pretrained, **kwargs)
