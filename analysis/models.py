"""Load a trained model for analysis from a checkpoint of any supported format (see the table in ``weights.py``)."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn

from arguments import parse_arguments
from fetch import input_notes, is_name, short_name
from models import build_model
from models_sar import scaled_positions
from tasks.settings import model_settings
from utils import UserError, logger
from weights import is_own, last_block_of, load_weights, num_blocks, num_heads_of, read_checkpoint, select_weights

CPU = torch.device("cpu")
POSITIONS = ("timm", "released")


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode that returns similarity maps, and its metadata.

    Attributes:
        name: in tables and pictures.
        input_size: side of its square input, px.
        patch_size: side of a patch, px.
        classes: names of its classes, in order; None if the file does not give them.
        crop_pct: fraction of the resized image that evaluation crops; None: by size, see `datasets.eval_transform`.
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
    """Build the model of a checkpoint and load all of its weights.

    Args:
        path: see `weights.read_checkpoint`.
        device: to load the model on.
        key: see `weights.select_weights`.
        num_heads: for a ViT whose file does not give it. For another program's file it overrides the number that
            `weights.num_heads_of` infers from layout and width, with a warning.
        input_size: px; None for the training's. For another size the position embedding is resampled.
        positions: resampling method: "timm" (bicubic, antialiased), or "released" as in the released code (bicubic
            without antialiasing, with a scale factor that is 0.1 patches larger).

    Raises:
        UserError: no such file; weights that are not a ViT's or do not fit; an unknown or contradicting number of
            heads; an input size that is not a multiple of the patch size.
    """
    # 1. build the architecture, then load the weights
    checkpoint = read_checkpoint(path)
    try:
        if is_own(checkpoint):
            model, size, patch_size = _own_model(checkpoint, key, device, num_heads, input_size)
        else:
            model, size, patch_size = _foreign_vit(checkpoint, key, num_heads, input_size)
        state, _ = select_weights(checkpoint, key)
        if positions == "released":
            state = _with_released_positions(state, model)
        load_weights(model, state, strict_head=True)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    for note in input_notes(path):
        logger.info(f"{path}: {note}")
    # 2. metadata of this program's checkpoints
    crop_pct = checkpoint["args"]["crop_pct"] if is_own(checkpoint) else None
    classes, name = _classes(checkpoint, model), short_names([path])[0]
    return TrainedModel(name, model.to(device).eval(), size, patch_size, classes, crop_pct)


def _own_model(
    checkpoint: Mapping, key: str | None, device: torch.device, num_heads: int | None, input_size: int | None
) -> tuple:
    """The untrained model of a checkpoint of this program, its input size and its patch size (px)."""
    args = parse_arguments(["--eval"], saved=checkpoint["args"])
    size = input_size or args.input_size
    _check_size(size, args.patch_size)
    state, _ = select_weights(checkpoint, key)
    has_classifier = any(name.startswith("head.") for name in state)  # self-supervised models have none
    num_classes = len(checkpoint["data"]["classes"]) if has_classifier else 0
    settings = replace(model_settings(args, num_classes), input_size=size)
    model, _ = build_model(settings, device)
    own = num_heads if num_heads is None else model.last().attn.num_heads
    if own != num_heads:
        raise UserError(f"trained with {own} heads, not {num_heads}; leave --num-heads out")
    return model, size, args.patch_size


def _foreign_vit(checkpoint: Mapping, key: str | None, num_heads: int | None, input_size: int | None) -> tuple:
    """The untrained ViT of another program's checkpoint, its input size and its patch size (px).

    All dimensions are inferred from the shapes of the weights.
    """
    # 1. is it a ViT?
    state, _ = select_weights(checkpoint, key)
    names = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "norm.weight")
    missing = [name for name in names if name not in state]
    if missing:
        raise UserError(
            f"not the weights of a ViT: no {', '.join(missing)}; other programs' checkpoints must hold a ViT"
        )
    # 2. number of heads
    width, _, patch_size, _ = state["patch_embed.proj.weight"].shape
    known = num_heads_of(checkpoint, key)
    heads = num_heads or known
    if None not in (num_heads, known) and num_heads != known:
        logger.warning(f"using {num_heads} heads as given, although its layout implies {known}")
    if heads is None:
        raise UserError(f"the file does not give the number of heads of a ViT of width {width}; give --num-heads")
    if width % heads:
        raise UserError(f"--num-heads {heads} does not divide the width {width}")
    # 3. input size, and the model; in timm's ViTs of DeiT III and DINOv2, [CLS] and registers may have no positions
    positions, registers = state["pos_embed"].shape[1], state["reg_token"].shape[1] if "reg_token" in state else 0
    without_prefix = math.isqrt(positions) ** 2 == positions
    size = input_size or math.isqrt(positions - (not without_prefix)) * patch_size
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
        init_values=1e-5 if "blocks.0.ls1.gamma" in state else None,
        reg_tokens=registers,
        no_embed_class=without_prefix,
    )
    return model, size, patch_size


def _check_size(size: int, patch_size: int) -> None:
    if size % patch_size:
        nearest = max(1, round(size / patch_size)) * patch_size
        raise UserError(f"an input size of {size} is not divisible by the patch size {patch_size}; use {nearest}")


def _with_released_positions(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state dict with its position embedding resampled to the model's grid, as in the released code."""
    if "pos_embed" not in state or getattr(model, "no_embed_class", False):
        raise UserError("the released code resamples positions of ViTs with one for [CLS] only; leave it to timm")
    positions = scaled_positions(state["pos_embed"], cast(Any, model.patch_embed).grid_size)
    return state | {"pos_embed": positions}


def _classes(checkpoint: Mapping, model: nn.Module) -> list[str] | None:
    if is_own(checkpoint):
        return list(checkpoint["data"]["classes"])
    return ImageNetInfo("imagenet-1k").label_names() if model.num_classes == 1000 else None


def short_names(sources: Sequence[str | Path]) -> list[str]:
    """Short distinct names of checkpoints: ``["a/seed0/best.pth", "b/seed0/best.pth"]`` -> ``["a", "b"]``.

    A single path is named after its file, or after its folder if the file is main.py's ``best`` or ``checkpoint``.
    Weights by name have their `fetch.short_name`, or all of it where that is not distinct.

    Raises:
        UserError: a path or name that is given twice.
    """
    given = [str(source) if is_name(source) else os.path.abspath(source) for source in sources]
    if len(set(given)) < len(given):
        raise UserError(f"a checkpoint is given twice: {', '.join(map(str, sources))}; give each once")
    files = [source for source in given if not is_name(source)]
    names = dict(zip(files, _short_paths(files), strict=True))
    names |= {source: short_name(source) for source in given if is_name(source)}
    distinct = len(set(names.values())) == len(names)
    return [names[source] if distinct or not is_name(source) else source for source in given]


def _short_paths(paths: list[str]) -> list[str]:
    """`short_names` of absolute paths."""
    whole = [Path(path) for path in paths]
    without = [path.with_suffix("") for path in whole]
    parts = [path.parts for path in (without if len(set(without)) == len(without) else whole)]
    if len(parts) == 1:
        *_, folder, name = parts[0]
        return [folder if name in ("best", "checkpoint") else name]
    for end in (0, -1):  # strip the common prefix, then the common suffix
        while all(len(names) > 1 for names in parts) and len({names[end] for names in parts}) == 1:
            parts = [names[1:] if end == 0 else names[:-1] for names in parts]
    return ["/".join(names) for names in parts]
