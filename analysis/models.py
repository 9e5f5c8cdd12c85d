"""A trained model to be looked at, from a checkpoint of any format (the table in ``weights.py``)."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.data import ImageNetInfo
from torch import Tensor, nn

from arguments import parse_arguments
from models import build_model
from tasks.settings import model_settings
from utils import UserError, logger
from weights import is_own, last_block_of, load_weights, num_blocks, num_heads_of, read_checkpoint, select_weights

CPU = torch.device("cpu")
POSITIONS = ("timm", "released")


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode that gives similarity maps, and what is known of it.

    Attributes:
        name: what tables and pictures call it.
        input_size: side of its images, px.
        classes: the names of its classes, in order; None where the file does not tell them.
        crop_pct: of its evaluation; None: by size, see `datasets.eval_transform`.
    """

    name: str
    model: nn.Module
    input_size: int
    patch_size: int
    classes: list[str] | None
    crop_pct: float | None = None


def load_model(
    path: str | Path,
    device: torch.device = CPU,
    key: str | None = None,
    num_heads: int | None = None,
    input_size: int | None = None,
    positions: str = "timm",
) -> TrainedModel:
    """The model that a checkpoint's weights belong to; nothing of it is left at random.

    Args:
        path, key: see `weights.read_checkpoint`, `weights.select_weights`.
        num_heads: of a ViT whose file does not tell it. Of another program's file it wins over what
            `weights.num_heads_of` takes from layout and width, with a warning; this program's files know.
        input_size: px; None: that of the training. For another one the position embedding is resampled.
        positions: how: "timm" (bicubic, antialiased) or "released", as the released code does it (bicubic without
            antialiasing, by a scale factor of 0.1 patches more).

    Raises:
        UserError: no such file, weights that are no ViT's or do not fit, heads that must be said or that are known to
            be others, a size that the patches do not divide.
    """
    path, checkpoint = Path(path), read_checkpoint(path)
    try:
        if is_own(checkpoint):
            model, size, patch_size = _own_model(checkpoint, device, num_heads, input_size)
        else:
            model, size, patch_size = _other_vit(checkpoint, key, num_heads, input_size)
        state, _ = select_weights(checkpoint, key)
        if positions == "released":
            state = _with_released_positions(state, model)
        load_weights(model, state, keep_head=True)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    crop_pct = checkpoint["args"]["crop_pct"] if is_own(checkpoint) else None
    classes, name = _classes(checkpoint, model), short_names([path])[0]
    return TrainedModel(name, model.to(device).eval(), size, patch_size, classes, crop_pct)


def _own_model(checkpoint: Mapping, device: torch.device, num_heads: int | None, input_size: int | None) -> tuple:
    """The model of a checkpoint of this program, without its weights, and its input and patch size."""
    args = parse_arguments(["--eval"], saved=checkpoint["args"])
    size = input_size or args.input_size
    _check_size(size, args.patch_size)
    settings = replace(model_settings(args, len(checkpoint["data"]["classes"])), input_size=size)
    model, _ = build_model(settings, device)
    own = num_heads if num_heads is None else model.last().attn.num_heads
    if own != num_heads:
        raise UserError(f"trained with {own} heads, not {num_heads}; leave --num-heads out")
    return model, size, args.patch_size


def _other_vit(checkpoint: Mapping, key: str | None, num_heads: int | None, input_size: int | None) -> tuple:
    """The ViT of another program's checkpoint, sizes read off its weights, without them; its input and patch size."""
    state, _ = select_weights(checkpoint, key)
    names = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "norm.weight")
    missing = [name for name in names if name not in state]
    if missing:
        raise UserError(f"its weights are no ViT's: no {', '.join(missing)}; only ViTs of other programs are read")
    width, _, patch_size, _ = state["patch_embed.proj.weight"].shape
    known = num_heads_of(checkpoint, key)
    heads = num_heads or known
    if None not in (num_heads, known) and num_heads != known:
        logger.warning(f"taken as one of {num_heads} heads, though by its layout it has {known}")
    if heads is None:
        raise UserError(f"how many heads a ViT of width {width} has, the file does not tell: say it with --num-heads")
    if width % heads:
        raise UserError(f"--num-heads {heads} does not divide the width {width}")
    size = input_size or math.isqrt(state["pos_embed"].shape[1] - 1) * patch_size
    _check_size(size, patch_size)
    model = timm.create_model(
        "vit_small",
        img_size=size,
        patch_size=patch_size,
        embed_dim=width,
        depth=num_blocks(state),
        num_heads=heads,
        mlp_ratio=len(state["blocks.0.mlp.fc1.weight"]) / width,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        num_classes=len(state.get("head.weight", ())),
        last_block=last_block_of(state),
    )
    return model, size, patch_size


def _check_size(size: int, patch_size: int) -> None:
    if size % patch_size:
        nearest = max(1, round(size / patch_size)) * patch_size
        raise UserError(f"an input size of {size} is not divisible by its patches of {patch_size}; take {nearest}")


def _with_released_positions(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state dict with its positions brought to the model's grid as the released code does it."""
    if "pos_embed" not in state:
        raise UserError("the released code resamples positions of ViTs only; leave it to timm")
    own, (h, w) = state["pos_embed"], model.patch_embed.grid_size
    side = math.isqrt(own.shape[1] - 1)
    if (side, side) == (h, w):
        return state
    grid = own[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=((h + 0.1) / side, (w + 0.1) / side), mode="bicubic")
    return state | {"pos_embed": torch.cat([own[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)}


def _classes(checkpoint: Mapping, model: nn.Module) -> list[str] | None:
    if is_own(checkpoint):
        return list(checkpoint["data"]["classes"])
    return ImageNetInfo("imagenet-1k").label_names() if model.num_classes == 1000 else None


def short_names(paths: list[str | Path]) -> list[str]:
    """What tells the paths of checkpoints apart: ``["a/seed0/best.pth", "b/seed0/best.pth"]`` -> ``["a", "b"]``.

    A single path's is the name of its file, or of its folder where all such files are called alike.

    Raises:
        UserError: a path that is given twice.
    """
    if len({os.path.abspath(path) for path in paths}) < len(paths):
        raise UserError(f"a checkpoint is given twice: {', '.join(map(str, paths))}; name each once")
    whole = [Path(os.path.abspath(path)) for path in paths]
    without = [path.with_suffix("") for path in whole]
    parts = [path.parts for path in (without if len(set(without)) == len(without) else whole)]
    if len(parts) == 1:
        *_, folder, name = parts[0]
        return [folder if name in ("best", "checkpoint") else name]
    for end in (0, -1):  # what all begin with, then what all end with
        while all(len(names) > 1 for names in parts) and len({names[end] for names in parts}) == 1:
            parts = [names[1:] if end == 0 else names[:-1] for names in parts]
    return ["/".join(names) for names in parts]
