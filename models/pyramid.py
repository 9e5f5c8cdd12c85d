"""The common parts of PVT and CvT: stages of blocks on ever coarser grids.

A stage embeds patches of the map before it and runs its blocks. [CLS] enters the last stage, and SAR is in its last
block. ``models_sar.py`` holds the interface of all models.

TorchScript compiles the blocks and `as_map`, so their changes of shape are torch's own and not einops'.
"""

from collections.abc import Sequence

import torch
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import global_pool_nlc
from torch import Tensor, nn

from models_sar import LastBlock, SimilarityModel, check_choice

__all__ = ["PyramidBlock", "PyramidTransformer"]


POOLS = ("token", "avg")
MOST_STAGES = 4
LAST_GROUP = (99999,)
"""What timm's ``group_parameters`` takes for the group of the last block."""


def check_stages(**sizes) -> None:
    """Raise a ``ValueError`` unless the sizes make a pyramid.

    Args:
        sizes: tuples with one entry per stage, among them ``depths``, ``embed_dims`` and ``num_heads``. They have
            equal lengths, at most `MOST_STAGES`. Every stage has a block, and its heads divide its channels.
    """
    if len({len(values) for values in sizes.values()}) > 1:
        listed = ", ".join(f"{name} {len(values)}" for name, values in sizes.items())
        raise ValueError(f"sizes are of different numbers of stages ({listed}); give each as many")
    if len(sizes["depths"]) > MOST_STAGES:
        raise ValueError(f"depths={tuple(sizes['depths'])}: a pyramid has at most {MOST_STAGES} stages")
    if min(sizes["depths"]) < 1:
        raise ValueError(f"depths={tuple(sizes['depths'])}: every stage needs a block")
    for dim, heads in zip(sizes["embed_dims"], sizes["num_heads"], strict=True):
        if dim % heads:
            raise ValueError(f"num_heads {heads} does not divide the {dim} channels of its stage")


class PyramidBlock(LastBlock):
    """A pre-norm block of a stage, the last block of a model included. ``forward`` gets the grid of the patches."""

    def __init__(
        self, attn: nn.Module, dim: int, mlp_ratio: float, norm_layer, act_layer, proj_drop: float, drop_path: float
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.attach("standard")

    def forward(self, x: Tensor, grid: tuple[int, int], one_query: bool | None = None, similarity: bool = False):
        """Tokens ``(B, N, C)`` to tokens ``(B, N, C)``.

        If ``one_query`` is True or False, the result is that of `LastBlock.with_similarity`.
        """
        if not torch.jit.is_scripting() and one_query is not None:
            return self.with_similarity(x, one_query, grid, similarity)
        q, k, v = self.project(self.norm1(x), False, grid)
        return self.residuals(x, self.attend(q, k, v))

    def heads(self, x: Tensor) -> Tensor:
        """``(B, N, C)`` -> ``(B, H, N, D)``."""
        return x.unflatten(2, (self.attn.num_heads, -1)).transpose(1, 2)


class PyramidTransformer(SimilarityModel):
    """Base class of the pyramids. A subclass defines how a stage embeds patches, and which blocks it has.

    Args:
        in_chans: channels of the images.
        num_classes: 0 for no classifier.
        global_pool: ``"token"``, the classifier reads [CLS], or ``"avg"``, the mean of the patches.
        embed_dims: channels of each stage.
        reductions: px of the image between two patches of each stage.
        norm_layer: makes the final norm, of a width.
        drop_rate: dropout before the classifier.

    Raises:
        ValueError: ``global_pool`` is unknown.
    """

    def __init__(
        self,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        embed_dims: Sequence[int],
        reductions: Sequence[int],
        norm_layer,
        drop_rate: float,
    ):
        super().__init__()
        check_choice("global_pool", global_pool, POOLS)
        self.in_chans, self.num_classes, self.global_pool = in_chans, num_classes, global_pool
        self.num_prefix_tokens, self.grad_checkpointing = 1, False
        self.num_stages = len(embed_dims)
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": reduction, "module": f"stage {stage}"}
            for stage, (dim, reduction) in enumerate(zip(embed_dims, reductions, strict=True))
        ]
        self.norm = norm_layer(embed_dims[-1])
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dims[-1], num_classes) if num_classes > 0 else nn.Identity()

    def embed(self, stage: int, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens ``(B, N, C)`` of a stage's patches and their grid ``(h, w)``; in the last stage [CLS] comes first.

        Args:
            stage: counted from 0.
            x: the images, or the map ``(B, C, h, w)`` of the stage before.
        """
        raise NotImplementedError

    def blocks_of(self, stage: int) -> nn.ModuleList:
        """The blocks of a stage."""
        raise NotImplementedError

    def last(self) -> LastBlock | None:
        blocks = self.blocks_of(len(self.feature_info) - 1) if self.num_stages == len(self.feature_info) else None
        return blocks[-1] if blocks is not None else None

    def reads_only_cls(self) -> bool:
        return self.global_pool == "token"

    def _run(self, blocks, x: Tensor, grid: tuple[int, int]) -> Tensor:
        for block in blocks:
            x = self.recompute(block, x, grid) if self.grad_checkpointing else block(x, grid)
        return x

    def forward_trunk(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = images
        for stage in range(self.num_stages - 1):
            x, grid = self.embed(stage, x)
            x = as_map(self._run(self.blocks_of(stage), x, grid), grid)
        x, grid = self.embed(self.num_stages - 1, x)
        return self._run(self.blocks_of(self.num_stages - 1)[:-1], x, grid), grid

    def forward_features(self, images: Tensor) -> Tensor:
        """All tokens of the last stage after the final norm, ``(B, 1 + h * w, C)``."""
        if torch.jit.is_scripting():
            x = self.written_out(images)
        else:
            x, grid = self.forward_trunk(images)
            x = self._run(self.blocks_of(self.num_stages - 1)[-1:], x, grid)
        return self.norm(x)

    def written_out(self, images: Tensor) -> Tensor:
        """All tokens of the last stage before the final norm, ``(B, N, C)``, for TorchScript.

        TorchScript looks up no computed names, so a subclass writes out each of `MOST_STAGES`. TorchScript decides
        at compile time which of them exist.
        """
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of normalised tokens ``(B, N, C)``, or the features before the classifier if ``pre_logits``."""
        x = self.head_drop(global_pool_nlc(x, self.global_pool, self.num_prefix_tokens))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ):
        """timm's ``forward_intermediates``: the maps after chosen stages.

        Args:
            x: images.
            indices: stages, or the number of last stages; all if None.
            norm: apply the final norm to the map of the last stage.
            stop_early: compute no stage after the last of ``indices``.
            output_fmt: ``"NCHW"`` only.
            intermediates_only: return the maps alone.

        Returns:
            The maps, a list of ``(B, C, h, w)``, or ``(last tokens (B, N, C), maps)``.

        Raises:
            ValueError: ``output_fmt`` is another one.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: a pyramid's maps are NCHW")
        # The stages, one after the other.
        take, last = feature_take_indices(self.num_stages, indices)
        maps = []
        for stage in range(last + 1 if stop_early else self.num_stages):
            x, grid = self.embed(stage, x)
            tokens = self._run(self.blocks_of(stage), x, grid)
            final = stage == len(self.feature_info) - 1
            tokens = self.norm(tokens) if final and norm else tokens
            x = as_map(tokens, grid)
            if stage in take:
                maps.append(x)
        # What timm returns beside the maps: the last tokens, normalised once.
        if intermediates_only:
            return maps
        return (self.norm(tokens) if final and not norm else tokens), maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's ``prune_intermediate_layers``: drop the stages after the last of ``indices``; returns the stages."""
        take, last = feature_take_indices(self.num_stages, indices)
        for stage in range(last + 1, self.num_stages):
            self.drop_stage(stage)
        if prune_norm or last + 1 < self.num_stages:
            self.norm = nn.Identity()
        if prune_head or last + 1 < self.num_stages:
            self.reset_classifier(0)
        self.num_stages = last + 1
        return take

    def drop_stage(self, stage: int) -> None:
        """Delete the modules of a stage."""
        raise NotImplementedError

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; ``num_classes=0`` removes it.

        Raises:
            ValueError: ``global_pool`` is unknown.
        """
        if global_pool is not None:
            check_choice("global_pool", global_pool, ("", *POOLS))  # timm says "" where it takes the head away
            self.global_pool = global_pool
        self.num_classes, weight = num_classes, next(self.parameters())
        head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.head = head.to(weight.device, weight.dtype).train(self.training)


def as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The patches of tokens ``(B, N, C)``, which follow the prefix, as a map ``(B, C, h, w)``."""
    h, w = grid
    return tokens[:, -h * w :].transpose(1, 2).unflatten(2, (h, w))


def init_linear(module: nn.Module) -> None:
    """Initialise a linear layer as both official releases do: truncated normal of deviation 0.02, bias 0."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
