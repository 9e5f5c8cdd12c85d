"""ViT-T/S/B whose last block is the paper's, in timm's registry.

``import models_sar`` adds ``vit_tiny``, ``vit_small``, ``vit_base`` (the unchanged baselines) and their
``*_sar`` forms to ``timm.create_model``. All are timm's ``VisionTransformer`` except for the last block. That
block can drop its skips (Eq. 10-11) and return S, the similarity of the [CLS] query with the patch keys (Eq. 4).

Letters of the axes: B images, N tokens, C channels, H heads, D channels of a head; h x w patches.

einops names the axes only where neither TorchScript nor FX reads the code.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention, PatchDropout
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

# timm's decorator adds the models to it
__all__ = ["LAST_BLOCKS", "SIMILARITIES", "LastBlock", "SARVisionTransformer", "similarity_map"]

# Table 1(b). Each row: (skip around the attention, second LayerNorm, skip around the MLP)
LAST_BLOCKS = {
    "standard": (True, True, True),  # rows A and E: Eq. 1-2
    "no_msa_skip": (False, True, True),  # row B
    "sar": (False, False, True),  # rows C and F: Eq. 10-11
    "no_skips": (False, False, False),  # row D
}
SIMILARITIES = ("dot", "cosine", "softmax")
QUERIES = ("cls", "mean")


def check_choice(name: str, value: str, choices) -> None:
    """Raise a ``ValueError`` that lists the choices, unless ``value`` is one of them."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}")


def similarity_map(q_BHD: Tensor, k_BHND: Tensor, scale: float, grid: tuple[int, int], kind: str = "dot") -> Tensor:
    """Similarity S of the [CLS] query with the patch keys (Eq. 4).

    Args:
        q_BHD: the [CLS] query of each head, any floating type.
        k_BHND: all keys. The last ``h * w`` are the patches, row by row, after all prefix tokens.
        scale: factor of the attention scores, ``D ** -0.5`` in a ViT.
        grid: ``(h, w)`` of the keys.
        kind: ``"dot"``, the scores before the softmax (Eq. 4). ``"cosine"`` (Eq. 15). ``"softmax"``, the
            attention row of [CLS], normalised over all keys, [CLS] included; it collapses (Section 4.3).

    Returns:
        S, ``(B, H, h, w)``, float32 (float64 for float64 inputs).

    Raises:
        ValueError: ``kind`` is unknown.
    """
    check_choice("similarity", kind, SIMILARITIES)
    h, w = grid
    dtype = torch.promote_types(q_BHD.dtype, torch.float32)
    q, k = q_BHD.to(dtype).unsqueeze(-2), k_BHND.to(dtype)
    if kind == "cosine":
        q, k, scale = F.normalize(q, dim=-1), F.normalize(k, dim=-1), 1.0
    # A product and a sum, not a matmul: neither autocast nor TF32 can lower their precision.
    scores_BHN = (q * scale * k).sum(dim=-1)
    if kind == "softmax":
        scores_BHN = scores_BHN.softmax(dim=-1)
    return rearrange(scores_BHN[..., -h * w :], "B H (h w) -> B H h w", h=h, w=w)


class LastBlock(nn.Module):
    """SAR's changes to the last block of any pre-norm transformer (Table 1b): a mixin before the block's own class.

    The block's class provides ``norm1``, ``attn`` (with ``scale``), ``drop_path1``, ``norm2``, ``mlp`` and
    ``drop_path2``, and ``ls1`` and ``ls2`` where it scales its branches. A subclass calls `attach` once these
    exist. It defines how its attention works in `query`, `project` and `attend`. Tokens are ``(B, N, C)``, the
    prefix first.

    Drop-path and layer-scale belong to a residual branch; a branch without a skip has neither.
    """

    def attach(self, last_block: str, similarity: str = "dot", similarity_query: str = "cls") -> None:
        """Remove the skips and the LayerNorm that the row ``last_block`` of Table 1(b) does not have.

        Args:
            last_block: a key of `LAST_BLOCKS`.
            similarity: the ``kind`` of `similarity_map`.
            similarity_query: ``"cls"``, or ``"mean"``, the query of the mean of the normalised patch tokens.

        Raises:
            ValueError: one of the three is unknown.
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
        """Queries ``(B, H, N, D)`` of normalised tokens ``(B, N, C)`` outside the grid: [CLS], or a mean."""
        raise NotImplementedError

    def project(self, y: Tensor, one_query: bool, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``(B, H, N, D)`` of normalised tokens ``(B, N, C)``.

        Args:
            one_query: compute the query of [CLS] alone, ``(B, H, 1, D)``.
            grid: ``(h, w)`` of the patches.
        """
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Output of the attention, ``(B, number of queries, C)``, for the queries, keys and values of `project`."""
        attn = self.attn
        bias = self.position_bias()
        dropout = attn.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=attn.scale)
        return attn.proj_drop(attn.proj(x.transpose(1, 2).flatten(2)))

    def position_bias(self) -> Tensor | None:
        """The bias that the attention adds to its scores; S does not contain it."""
        return None

    def key_grid(self, h: int, w: int) -> tuple[int, int]:
        """Rows and columns of the keys for ``h x w`` patches."""
        return h, w

    def with_similarity(
        self, x: Tensor, one_query: bool, grid: tuple[int, int], similarity: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The block's output, and S on request.

        Args:
            x: tokens ``(B, N, C)``; the last ``grid[0] * grid[1]`` are the patches.
            one_query: compute [CLS] alone.
            grid: ``(h, w)`` of the patches.
            similarity: compute S.

        Returns:
            ``(tokens, S)``. The tokens are ``(B, 1, C)`` with ``one_query``, else ``(B, N, C)``. S is
            ``(B, H, h, w)``, or None if not asked for.
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
        """The rest of the block after the attention, Eq. 1-2 with skips and Eq. 10-11 without.

        Args:
            x: the block's input tokens, ``(B, N, C)``.
            y: the attention's output for them, ``(B, N, C)``.
        """
        y = self.drop_path1(self.ls1(y))
        x = x + y if self.attn_skip else y
        y = self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x + y if self.mlp_skip else y


class SimilarityModel(nn.Module):
    """Interface of every model here: logits, and on request the similarity maps and tokens of the last block.

    A mixin before a timm model with ``norm``, ``forward_features`` and ``forward_head``. A subclass defines which
    block is the last, which tokens enter it, and whether its classifier reads [CLS] alone. If it does, the last
    block computes one query and one MLP token, and a hook on it sees ``((B, 1, C), S)``. A caller who asks for
    features or tokens gets all of them computed.
    """

    def last(self) -> LastBlock | None:
        """The last block, or None if it was pruned away."""
        raise NotImplementedError

    def forward_trunk(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens ``(B, N, C)`` that enter the last block, the prefix first, and the grid ``(h, w)`` of the patches."""
        raise NotImplementedError

    def reads_only_cls(self) -> bool:
        """Whether [CLS] is all of the last block's output that the classifier reads."""
        raise NotImplementedError

    def classify(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Logits ``(B, classes)`` of the last block's tokens ``(B, N, C)``."""
        return self.forward_head(self.norm(x))

    def forward(self, images: Tensor, return_similarity: bool = False, return_tokens: bool = False):
        """Logits, and on request the similarity maps and tokens of the last block.

        Args:
            images: ``(B, 3, height, width)``, pixels.
            return_similarity: add S (Eq. 4), ``(B, H, h, w)``, float32 also inside autocast.
            return_tokens: add the last block's patch tokens before the final norm, ``(B, C, h, w)``.

        Returns:
            ``logits`` of shape ``(B, classes)``, or a tuple ``(logits[, similarity][, tokens])``.

        Raises:
            ValueError: the maps do not exist: there is no class token, patch dropout is active in training, or
                the last block was pruned away.
        """
        # TorchScript compiles nothing of this branch. Under FX the flags are proxies, which are not True. Both compute
        # all tokens, as a graph may be asked for features.
        if not torch.jit.is_scripting():
            if return_similarity is True or return_tokens is True:
                return self._forward_maps(images, return_similarity, return_tokens)
            if self.last() is not None and self.reads_only_cls() and not isinstance(images, torch.fx.Proxy):
                x, grid = self.forward_trunk(images)
                x, _ = self._forward_last(x, grid, one_query=True)
                return self.classify(x, grid)
        return self.forward_head(self.forward_features(images))

    def check_maps(self, return_similarity: bool) -> None:
        """Raise a ``ValueError`` if the model has no maps to return; `forward` lists the reasons."""
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
            outputs.append(rearrange(x[:, -h * w :], "B (h w) C -> B C h w", h=h, w=w))
        return tuple(outputs)

    def _forward_last(self, x: Tensor, grid: tuple[int, int], one_query: bool, similarity: bool = False):
        call = partial(self.recompute, self.last()) if self.grad_checkpointing else self.last()
        return call(x, one_query=one_query, grid=grid, similarity=similarity)

    def recompute(self, block: nn.Module, *args, **kwargs):
        """``block(...)`` with gradient checkpointing: the backward pass computes it again."""
        return checkpoint(block, *args, use_reentrant=False, **kwargs)


class ViTLastBlock(LastBlock, Block):
    """timm's ``Block`` as a `LastBlock`.

    Raises:
        ValueError: ``attn_layer`` is not timm's ``Attention``.
    """

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

        If ``one_query`` is True or False, the result is that of `LastBlock.with_similarity`. This needs plain
        Python (no TorchScript) and no mask.
        """
        if not torch.jit.is_scripting() and one_query is not None:
            return self.with_similarity(x, one_query, grid, similarity)
        return self.residuals(x, self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal))

    def query(self, y: Tensor) -> Tensor:
        attn = self.attn
        weight, bias = attn.qkv.weight[: attn.attn_dim], attn.qkv.bias
        q = F.linear(y, weight, None if bias is None else bias[: attn.attn_dim])
        return attn.q_norm(rearrange(q, "B N (H D) -> B H N D", H=attn.num_heads))

    def project(self, y: Tensor, one_query: bool, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        attn, H = self.attn, self.attn.num_heads
        if one_query:
            # The backward pass of split is one concatenation; that of two slices would add two zero-filled weights.
            sizes = [attn.attn_dim, 2 * attn.attn_dim]
            weight_q, weight_kv = attn.qkv.weight.split(sizes)
            bias_q, bias_kv = (None, None) if attn.qkv.bias is None else attn.qkv.bias.split(sizes)
            q = rearrange(F.linear(y[:, :1], weight_q, bias_q), "B N (H D) -> B H N D", H=H)
            k, v = rearrange(F.linear(y, weight_kv, bias_kv), "B N (kv H D) -> kv B H N D", kv=2, H=H).unbind(0)
        else:
            q, k, v = rearrange(attn.qkv(y), "B N (qkv H D) -> qkv B H N D", qkv=3, H=H).unbind(0)
        return attn.q_norm(q), attn.k_norm(k), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attn = self.attn
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=attn.attn_drop.p if self.training else 0.0)
        return attn.proj_drop(attn.proj(attn.norm(rearrange(x, "B H N D -> B N (H D)"))))


class SARVisionTransformer(SimilarityModel, VisionTransformer):
    """timm's ``VisionTransformer``, with all its keywords, and a `LastBlock`.

    Args:
        last_block: a key of `LAST_BLOCKS`, Table 1(b): ``"standard"`` is Eq. 1-2, ``"sar"`` Eq. 10-11.
        similarity: ``"dot"`` (Eq. 4), ``"cosine"`` (Eq. 15) or ``"softmax"`` (Section 4.3), see `similarity_map`.
        similarity_query: ``"cls"`` or ``"mean"``, see `LastBlock.attach`. A model without [CLS] needs the mean.
        depth: blocks, the last one included.
        kwargs: those of timm's ``VisionTransformer``.

    A classifier with token pooling reads only [CLS], so the last block computes only [CLS]. Features, other poolings
    and ``return_tokens`` need all tokens. Both ways draw the same random numbers for drop-path. For attention and
    projection dropout they draw different numbers of the same distribution.
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


def scaled_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Position embedding for another grid, as DINO resamples it (``interpolate_pos_encoding``).

    Bicubic, without antialiasing. The scale is (h + 0.1) / side, so sample points are not quite those of a resize to
    the new size, which is timm's function. At 6 x 6 of 14 x 14 both are some 16 % apart.

    Args:
        positions: ``(1, 1 + side * side, C)``, [CLS] first; its own is kept.
        grid: ``(h, w)`` of the patches.

    Returns:
        ``(1, 1 + h * w, C)``.
    """
    (h, w), side = grid, round((positions.shape[1] - 1) ** 0.5)
    if (h, w) == (side, side):
        return positions
    patches = rearrange(positions[:, 1:], "1 (h w) C -> 1 C h w", h=side)
    patches = F.interpolate(patches, scale_factor=((h + 0.1) / side, (w + 0.1) / side), mode="bicubic")
    return torch.cat([positions[:, :1], rearrange(patches, "1 C h w -> 1 (h w) C")], dim=1)


class ScaledPositionsViT(SARVisionTransformer):
    """A ViT for images of any whole number of patches, whose positions are resampled by `scaled_positions`.

    Built by ``positions="dino"``. The position embedding belongs to a square grid, and the first token is [CLS].
    """

    def __init__(self, **kwargs):
        super().__init__(dynamic_img_size=True, **kwargs)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Tokens ``(B, 1 + h * w, C)`` of patches ``(B, h, w, C)``: timm's method with other positions."""
        cls_token = self.cls_token.expand(len(x), -1, -1)
        return self.pos_drop(
            torch.cat([cls_token, x.flatten(1, 2)], 1) + scaled_positions(self.pos_embed, x.shape[1:3])
        )


PATCH_SIZE = 16
POSITIONS = {"timm": SARVisionTransformer, "dino": ScaledPositionsViT}
SIZES = {
    "tiny": {"embed_dim": 192, "num_heads": 3},
    "small": {"embed_dim": 384, "num_heads": 6},
    "base": {"embed_dim": 768, "num_heads": 12},
}


def imagenet_cfgs(*names: str, **more) -> dict:
    """timm's description of each model and of its ``_sar`` form, without weights.

    The evaluation is DeiT's: resize to 256 px, bicubic, and crop 224 px. ``more`` adds or replaces entries.
    """
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
    """Build a registered model. A name that ends in ``_sar`` means the paper's last block, unless a keyword differs.

    Args:
        model: the class.
        name: in timm's registry.
        pretrained: timm's.
        features: the stages that ``features_only`` returns, or the number of last blocks.
        kwargs: those of the class.
    """
    last_block = "sar" if name.endswith("_sar") else "standard"
    feature_cfg = {"out_indices": features, "feature_cls": "getter"}
    kwargs = {"last_block": last_block, **kwargs}
    return build_model_with_cfg(model, name, pretrained, feature_cfg=feature_cfg, **kwargs)


def _create(name: str, pretrained: bool, positions: str = "timm", **kwargs) -> SARVisionTransformer:
    """A registered ViT; ``positions="dino"`` builds a `ScaledPositionsViT`."""
    check_choice("positions", positions, POSITIONS)
    sizes = SIZES[name.split("_")[1]] | kwargs
    return create(POSITIONS[positions], name, pretrained, 3, pretrained_filter_fn=checkpoint_filter_fn, **sizes)


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
