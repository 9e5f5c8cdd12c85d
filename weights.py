"""Reads checkpoints of this and other programs, and loads their weights into a model.

There are three steps, each usable alone. `read_checkpoint` reads a file safely. `select_weights` picks one of its state
dicts. `load_weights` loads it into a model: another head or grid is adapted and logged, all else is an error.

The known formats, and the keys that select weights:

    written by                    where the weights are                                keys (the default first)
    this program                  model, ema                                           the reported one: model or ema
    DeiT, the released SAR code   model, model_ema                                     model, model_ema
    timm                          the whole file, state_dict, state_dict_ema           state_dict, state_dict_ema
    DINO                          teacher, student; backbone.* in them, or all         teacher, student
    MoCo-v3                       state_dict; base_encoder.*, momentum_encoder.* in it base, momentum
    MoCo-v3's linear probe        state_dict: the ViT and its classifier
    DINO's linear probe           state_dict: a classifier alone, see `classifier_of`

Self-supervised training by this program has the keys of the last two networks, too: student, teacher; base, momentum.

The prefixes of DistributedDataParallel and ``torch.compile`` are removed, and any that all names share, such as
Lightning's ``model.``. The projection and prediction heads of DINO and MoCo-v3 and the decoder of MAE are not part of
the ViT and are left out. Any other name that does not fit is an error. `export` writes weights for other programs.
"""

import argparse
import io
import math
import pathlib
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import safetensors.torch
import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models import clean_state_dict
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fetch import local_file
from models_sar import SIZES
from utils import UserError, first_few


class Misfit(UserError):
    """Weights that are missing, unexpected or of another shape."""


# Keys of this program, DeiT, the released SAR code and timm; averaged weights come last.
WEIGHT_KEYS = ("model", "state_dict", "ema", "model_ema", "state_dict_ema")


@dataclass(frozen=True)
class SelfSupervised:
    """The checkpoint format of a self-supervised training program, which holds ViTs beside other networks.

    Attributes:
        name: name of the program.
        encoders: key -> (entry of the file, prefix of the ViT's weights in it); the first key is the default.
        others: prefixes of all other weights.
        head: pattern of a projection head's names, after the ViT's prefix is removed.
    """

    name: str
    encoders: dict[str, tuple[str, str]]
    others: tuple[str, ...]
    head: str

    def holds(self, checkpoint: Mapping) -> bool:
        """Whether this program wrote the file; an entry ``state_dict``, which is common, must hold the ViT's prefix."""
        for entry, prefix in self.encoders.values():
            state = checkpoint.get(entry)
            if state is not None and _is_state_dict(state):
                return entry != "state_dict" or any(name.startswith(prefix) for name in clean_state_dict(state))
        return False

    def select(self, checkpoint: Mapping, key: str | None) -> tuple[dict[str, Tensor], str]:
        """The ViT's state dict and its key; see `select_weights`, also for errors."""
        key = key or next((key for key, (entry, _) in self.encoders.items() if entry in checkpoint), "")
        entry, prefix = self.encoders.get(key, ("", ""))
        if not _is_state_dict(checkpoint.get(entry)):
            there = ", ".join(key for key, (entry, _) in self.encoders.items() if entry in checkpoint)
            raise UserError(f"the {self.name} checkpoint has no weights under {key!r}; keys with weights: {there}")
        state = clean_state_dict(checkpoint[entry])
        if not any(name.startswith(prefix) for name in state):
            return {name: value for name, value in state.items() if not re.match(self.head, name)}, key
        odd = [name for name in state if not name.startswith((prefix, *self.others))]
        if odd:
            raise UserError(f"{entry!r} of the {self.name} checkpoint has weights of other networks: {first_few(odd)}")
        encoder = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        return {name: value for name, value in encoder.items() if not re.match(self.head, name)}, key


DINO_HEAD = r"(head\.)?(mlp|last_layer|projection_head|prototypes)\."  # the last two in early files

SELF_SUPERVISED = (
    SelfSupervised(
        "DINO",
        {"teacher": ("teacher", "backbone."), "student": ("student", "backbone.")},
        others=("head.", "projection_head.", "prototypes."),
        head=DINO_HEAD,
    ),
    SelfSupervised(
        "MoCo-v3",
        {"base": ("state_dict", "base_encoder."), "momentum": ("state_dict", "momentum_encoder.")},
        others=("predictor.", "base_encoder.", "momentum_encoder."),
        head=r"head\.\d+\.",
    ),
)

# What training programs pickle besides tensors: their arguments, paths in them, and NumPy numbers such as the best
# accuracy. A path of Windows is read as a pure one, which touches no disk.
_numpy_scalar = np.float64(0).__reduce__()[0]
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    (_numpy_scalar, "numpy.core.multiarray.scalar"),  # as NumPy 1 wrote it
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
    *(type(np.dtype(name)) for name in ("bool", "int32", "int64", "float32", "float64")),
    pathlib.PosixPath,
    pathlib.PurePosixPath,
    *((pathlib.PureWindowsPath, f"pathlib.{name}") for name in ("WindowsPath", "PureWindowsPath")),
]


def read_checkpoint(path: str | Path, lazily: bool = False) -> dict:
    """Read the whole content of a checkpoint file, on the CPU; code in the file is never run.

    The content decides, whatever the suffix: safetensors reads its own files, ``torch.load(weights_only=True)`` all
    others. Of the types that older training programs pickle, ``argparse.Namespace``, paths and NumPy numbers are
    allowed.

    Args:
        path: the file, or a name of `fetch.local_file`, which is fetched.
        lazily: map the weights from disk where the format allows it, to read only names and arguments. The weights
            must not be used when the file is gone.

    Raises:
        UserError: the file is missing, a folder, truncated, not a checkpoint, or would run code; or see `fetch`.
    """
    return _read_file(weights_file(path), lazily)


def weights_file(source: str | Path) -> Path:
    """The file of a path or of a name; see `fetch.local_file`, also for errors. What is fetched is a checkpoint."""
    return local_file(source, check=_read_file)


def _read_file(path: Path, lazily: bool = False) -> dict:
    """`read_checkpoint` of a file of this machine."""
    if path.is_dir():
        there = [name for name in ("best.pth", "model.safetensors") if (path / name).exists()]
        raise UserError(
            f"{path} is a folder; name the checkpoint in it, for example {path / (there or ['best.pth'])[0]}"
        )
    try:
        if _is_safetensors(path):
            return safetensors.torch.load_file(path, device="cpu")
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            misnamed = path.suffix == ".safetensors"  # which torch.load goes by
            on_disk = lazily and zipfile.is_zipfile(path) and not misnamed
            source = io.BytesIO(path.read_bytes()) if misnamed else path
            checkpoint = torch.load(source, map_location="cpu", weights_only=True, mmap=on_disk)
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); check the path") from error
    except Exception as error:  # damaged files raise errors of many types
        raise UserError(_explain_unreadable(path, error)) from error
    if not isinstance(checkpoint, dict):
        kind = type(checkpoint).__name__
        raise UserError(f"{path} holds a {kind}, not a dictionary of weights; give a checkpoint")
    return checkpoint


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins as one of safetensors: 8 bytes for the length of a header, which is JSON."""
    with open(path, "rb") as file:
        length, first = file.read(8), file.read(1)
    return first == b"{" and int.from_bytes(length, "little") < path.stat().st_size


def _explain_unreadable(path: Path, error: Exception) -> str:
    """The message of a `UserError` for a file that could not be read."""
    # 1. content that is not allowed
    blocked = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, UnpicklingError) else None
    if blocked:
        return (
            f"{path} is refused: reading it would call {blocked[1]}, which a checkpoint of weights does not need; "
            "get the file from a source you trust, saved as tensors and plain values"
        )
    # 2. another kind of file, or nothing
    if not path.stat().st_size:
        return f"{path} is empty: writing it was interrupted, or its disk was full; take another checkpoint"
    if zipfile.is_zipfile(path) and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
        return (
            f"{path} is a TorchScript archive, a program with its weights; save these alone: "
            f"torch.save(torch.jit.load({str(path)!r}).state_dict(), 'weights.pth')"
        )
    return f"{path} is truncated or not a checkpoint; copy or download it again"


def select_weights(checkpoint: Mapping, key: str | None = None) -> tuple[dict[str, Tensor], str | None]:
    """Select a state dict of a checkpoint; prefixes of DistributedDataParallel and ``torch.compile`` are removed.

    Args:
        checkpoint: the result of `read_checkpoint`.
        key: entry of the weights, see the table above. Default: the weights that this program reported, else the first
            known key of the file, else the file itself as a bare state dict.

    Returns:
        ``(state_dict, key)``; the key is None for a bare state dict.

    Raises:
        UserError: the checkpoint has no weights under ``key``, or without one, under any known key.
    """
    program = self_supervised(checkpoint)
    if program:
        return program.select(checkpoint, key)
    if key is None and is_own(checkpoint):
        key = own_key(checkpoint)
    holders = [name for name, value in checkpoint.items() if _is_state_dict(value)]
    there = ", ".join(map(str, holders)) or "none"
    if key is not None:
        if key not in holders:
            raise UserError(f"the checkpoint has no weights under {key!r}; keys with weights: {there}")
        return _timms_names(clean_state_dict(checkpoint[key])), key
    for name in WEIGHT_KEYS:
        if name in holders:
            return _timms_names(clean_state_dict(checkpoint[name])), name
    if _is_state_dict(checkpoint):
        return _timms_names(clean_state_dict(dict(checkpoint))), None
    raise UserError(
        f"the checkpoint has no weights under any of {', '.join(WEIGHT_KEYS)}; give another key. "
        f"Keys with weights: {there}; all keys: {first_few(list(map(str, checkpoint)))}"
    )


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without a first name that all of its weights have, such as Lightning's ``model.``."""
    first = {name.partition(".")[0] for name in state}
    if len(first) > 1 or not any(re.match(r"\w+\.(cls_token|pos_embed|patch_embed\.)", name) for name in state):
        return state
    return {name.partition(".")[2]: value for name, value in state.items()}


def _timms_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without a prefix that all of its weights share, and with timm's names and forms.

    LayerScale of DeiT III (``gamma_1``) is ``ls1.gamma``. Register tokens of DINOv2 have no positions in timm's form,
    and that of [CLS] is added to the token (timm's ``no_embed_class``).
    """
    state = {re.sub(r"^(blocks\.\d+\.)gamma_([12])$", r"\1ls\2.gamma", k): v for k, v in _without_prefix(state).items()}
    if "register_tokens" in state and {"cls_token", "pos_embed"} <= state.keys():
        positions = state["pos_embed"]
        state |= {"cls_token": state["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}
        state["reg_token"] = state.pop("register_tokens")
    return state


# Names in the head of DINO's early files, and of torch's newer weight normalisation -> those in DINO's files of today.
HEAD_NAMES = {
    r"^(?:head\.)?(?:mlp|projection_head)\.": "mlp.",
    r"^(?:head\.)?(?:last_layer|prototypes)\.": "last_layer.",
    r"\.parametrizations\.weight\.original0$": ".weight_g",
    r"\.parametrizations\.weight\.original1$": ".weight_v",
}


def dino_head_of(checkpoint: Mapping, key: str) -> dict[str, Tensor]:
    """The projection head in a training checkpoint of DINO's program: ``mlp.*``, ``last_layer.weight_{g,v}``.

    Args:
        checkpoint: the result of `read_checkpoint`.
        key: ``teacher`` or ``student``.

    Returns:
        Its weights by the names of today's files, also from early files; empty without a head.
    """
    head = {}
    for name, value in clean_state_dict(checkpoint.get(key) or {}).items():
        if re.match(DINO_HEAD, name):
            for pattern, today in HEAD_NAMES.items():
                name = re.sub(pattern, today, name)
            head[name] = value
    return head


def classifier_of(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of a linear classifier: a ViT's, or the one in a file of DINO's linear probe; None without one.

    Args:
        state: a state dict from `select_weights`.
    """
    for name in ("head", "linear"):
        if f"{name}.weight" in state and f"{name}.bias" in state:
            return state[f"{name}.weight"], state[f"{name}.bias"]
    return None


def is_own(checkpoint: Mapping) -> bool:
    """Whether main.py of this program wrote the checkpoint."""
    args = checkpoint.get("args")
    return isinstance(args, Mapping) and "last_block" in args and "data" in checkpoint


def own_key(checkpoint: Mapping) -> str:
    """The key of the weights that a run of this program reports."""
    model = checkpoint.get("reported", "model")  # older checkpoints have no such entry
    return (checkpoint.get("best") or {}).get("weights", model)


def self_supervised(checkpoint: Mapping) -> SelfSupervised | None:
    """The self-supervised training program that wrote the checkpoint; None if none did."""
    if "model" in checkpoint or is_own(checkpoint):
        return None
    return next((program for program in SELF_SUPERVISED if program.holds(checkpoint)), None)


def _is_state_dict(value) -> bool:
    return isinstance(value, Mapping) and len(value) > 0 and all(isinstance(v, Tensor) for v in value.values())


# Stage and number of a block: blocks.11 (ViT, T2T-ViT), block4.2 (PVT), stage2.blocks.9 (CvT),
# layers.3.blocks.1 (Swin).
BLOCK = re.compile(r"((?:stage\d+\.|layers\.\d+\.)?blocks?\d*)\.(\d+)\.")


def last_block_of(source: str | Path | Mapping, key: str | None = None) -> str | None:
    """The kind of last block (`models_sar.LAST_BLOCKS`) that a checkpoint's weights were trained with.

    Checkpoints of this program hold it. In other files the second LayerNorm decides: with it the block is ``standard``,
    without it ``sar`` (the released code's `nosn`). None if there are no weights of a model.

    Args:
        source: a file, or a checkpoint already read.
        key: see `select_weights`, also for errors.
    """
    checkpoint = source if isinstance(source, Mapping) else read_checkpoint(source, lazily=True)
    args = checkpoint.get("args")
    if isinstance(args, Mapping) and "last_block" in args:
        return args["last_block"]
    state, _ = select_weights(checkpoint, key)
    last = last_block_name(state)
    return last and ("standard" if f"{last}.norm2.weight" in state else "sar")


def last_block_name(state: Mapping[str, Tensor]) -> str | None:
    """The name of the last block in a state dict, such as ``blocks.11`` or ``block4.2``; None without blocks."""
    blocks = {(match[1], int(match[2])) for name in state if (match := BLOCK.match(name))}
    if not blocks:
        return None
    stage, number = max(blocks, key=lambda block: (*map(int, re.findall(r"\d+", block[0])), block[1]))
    return f"{stage}.{number}"


def num_blocks(state: Mapping[str, Tensor]) -> int:
    """The depth of the ViT that the weights belong to; 0 if they are not a ViT's."""
    return max((int(name.split(".")[1]) + 1 for name in state if re.match(r"blocks\.\d+\.", name)), default=0)


# Number of heads of ViTs by width. MoCo-v3's have 12 at every width. Its ViT-S is as wide as DeiT's, so its weights
# would load into DeiT's model, but with other heads.
HEADS = {192: 3, 384: 6, 768: 12}
MOCO_HEADS = 12


def num_heads_of(checkpoint: Mapping, key: str | None = None) -> int | None:
    """The number of heads of a ViT's checkpoint; None if it is not a ViT, or cannot be known from the file.

    The number is known from the arguments (this program), from the format (DINO, MoCo-v3), from MoCo-v3's fixed sine
    and cosine position embedding, which fine-tuned models keep, or from the width. A ViT-S is ambiguous by its width:
    it is DeiT's if it has a classifier under DeiT's keys.

    Args:
        checkpoint, key: see `select_weights`, also for errors.
    """
    # 1. from the arguments
    args = checkpoint.get("args")
    if is_own(checkpoint) and args["model"].startswith("vit_"):
        return {**SIZES[args["model"].split("_")[1]], **args["model_kwargs"]}["num_heads"]
    if isinstance(args, Mapping) and "model_kwargs" in args and "num_heads" in args["model_kwargs"]:
        return args["model_kwargs"]["num_heads"]
    # 2. from the format and the position embedding
    program = self_supervised(checkpoint)
    state, key = select_weights(checkpoint, key)
    if "cls_token" not in state or "pos_embed" not in state or not num_blocks(state):
        return None
    width = state["cls_token"].shape[-1]
    if (program and program.name == "MoCo-v3") or has_moco_positions(state):
        return MOCO_HEADS
    # 3. from the width
    known = (
        program
        or isinstance(args, Mapping)
        or width != 384
        or (key in ("model", "model_ema") and "head.weight" in state)
        or "blocks.0.ls1.gamma" in state  # DeiT III, DINOv2
    )
    return HEADS.get(width) if known else None


def has_moco_positions(state: Mapping[str, Tensor]) -> bool:
    """Whether the position embedding is MoCo-v3's fixed sines and cosines, with zeros for [CLS]."""
    positions = state["pos_embed"]
    _, tokens, width = positions.shape
    side = math.isqrt(tokens - 1)
    if side * side + 1 != tokens or width % 4:
        return False
    fixed = build_sincos2d_pos_embed([side, side], dim=width, interleave_sin_cos=True)
    # A momentum encoder's are averaged in float32 at every update, and drift by up to 1e-4 in 300 epochs.
    return not positions[0, 0].any() and torch.allclose(positions[0, 1:].float(), fixed, rtol=0, atol=1e-3)


def load_weights(
    model: nn.Module,
    source: str | Path | Mapping,
    key: str | None = None,
    strict_head: bool = False,
    classes: Sequence[str] = (),
) -> list[str]:
    """Load a checkpoint of any known program into ``model``.

    A head with another number of classes, or with other ``classes``, is dropped, and the model keeps its own. In a ViT,
    position embedding and patch embedding of another grid are resampled by timm. Positions without one for [CLS] get
    zeros for it, which is the same. Nothing else may differ.

    Args:
        model: a model of this program, or a ViT of timm; changed in place.
        source: a file, or a checkpoint already read.
        key: see `select_weights`.
        strict_head: for evaluation: a head that does not fit is an error, and is not replaced.
        classes: names of the model's classes, to compare with those in a checkpoint of this program.

    Returns:
        One line for each adaptation, to be logged; empty if there was none.

    Raises:
        UserError: the file cannot be used (`read_checkpoint`, `select_weights`), or weights are missing, unexpected, of
            another shape or not finite. The model is not changed then.
    """
    # 1. read and check
    checkpoint = source if isinstance(source, Mapping) else read_checkpoint(source)
    state, _ = select_weights(checkpoint, key)
    check_finite(state)
    if state.keys() == {"linear.weight", "linear.bias"}:
        raise UserError(
            "the checkpoint is of DINO's linear probe, a classifier without its model; evaluate both by --task linear "
            "--eval --finetune BACKBONE --classifier FILE"
        )
    # 2. adapt
    notes = _compare_heads(num_heads_of(checkpoint, key), model if isinstance(model, VisionTransformer) else None)
    state, layout_notes = _fit_layout(state, model)
    state, grid_notes = _fit_grid(state, model)
    head_notes = []
    if not strict_head:
        known = (checkpoint.get("data") or {}).get("classes") if is_own(checkpoint) else None
        state, head_notes = _fit_head(state, model, bool(known and classes) and list(known or ()) != list(classes))
    # 3. all else is the same
    program = self_supervised(checkpoint)
    _check_fit(state, model, f"{program.name} checkpoint" if program else "checkpoint")
    model.load_state_dict(state)
    return notes + layout_notes + grid_notes + head_notes


def _compare_heads(heads: int | None, vit: Any) -> list[str]:
    """A note if a ViT has another number of heads than the weights were trained with, as they load all the same."""
    own = vit.blocks[0].attn.num_heads if vit is not None else None
    if None in (heads, own) or heads == own:
        return []
    return [f"apparently trained with {heads} heads, but the model has {own}: use --model-kwargs num_heads={heads}"]


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Refuse weights that are infinite or not numbers.

    Raises:
        UserError: it names the first of them.
    """
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{name} is not finite: its training had diverged; take an earlier checkpoint")


PRE_TRAININGS_OWN = re.compile(r"mask_token|decoder_")
"""Weights beside the ViT in files of MAE, and of DINOv2, which has a mask token alone."""


def _fit_layout(state: dict[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict in the layout of this program's ViTs: the encoder alone, and with a position of [CLS].

    Positions without one for [CLS] are recognised by their number on the model's own grid alone: of another grid they
    could as well be those of an oblong grid with [CLS].
    """
    notes = []
    if "mask_token" in state:
        decoder = any(name.startswith("decoder_") for name in state)
        state = {name: value for name, value in state.items() if not PRE_TRAININGS_OWN.match(name)}
        notes.append(
            "of MAE's pre-training: the encoder, without decoder and mask token" if decoder else "no mask token"
        )
    theirs, own = state.get("pos_embed"), getattr(model, "pos_embed", None)
    if theirs is not None and own is not None and theirs.ndim == own.ndim == 3:
        patches = theirs.shape[1]
        if "cls_token" in state and patches + 1 == own.shape[1] and math.isqrt(patches) ** 2 == patches:
            zeros = theirs.new_zeros(1, 1, theirs.shape[2])
            state = state | {"pos_embed": torch.cat([zeros, theirs], dim=1)}
            notes.append("pos_embed: without one for [CLS], which gets zeros")
    return state, notes


# Weights of a classifier that the backbone of a dense task does not have, and those that only the backbone has.
CLASSIFIERS_OWN = re.compile(r"cls_token|(norm|head)\.(weight|bias)")
BACKBONES_OWN = re.compile(r"blocks\.\d+\.attn\.rel_pos_[hw]")


def load_trunk(
    backbone: nn.Module, source: str | Path | Mapping, key: str | None = None, other_last_block: bool = False
) -> list[str]:
    """Load a classifier's weights, or a dense task's, into the backbone of a dense task, by their exact names.

    A classifier's [CLS], final norm and head are left out, and relative positions start anew. Of a dense task's
    checkpoint all but the backbone is left out. Nothing else may differ.

    Args:
        backbone: `models.vitdet.ViTDet` or `models.pvt.DensePVT`; changed in place.
        source: a file of a classifier or a dense task, or a checkpoint already read.
        key: see `select_weights`.
        other_last_block: the backbone may have another kind of last block than the file. A second LayerNorm that the
            file lacks starts at 1 and 0.

    Returns:
        One line for each difference, to be logged.

    Raises:
        UserError: as `load_weights`; or another last block without ``other_last_block``. Nothing is changed then.
    """
    checkpoint = source if isinstance(source, Mapping) else read_checkpoint(source)
    state, _ = select_weights(checkpoint, key)
    check_finite(state)
    state, layout_notes = _fit_layout(state, backbone)
    own = backbone.state_dict()
    notes = _compare_heads(num_heads_of(checkpoint, key), backbone if hasattr(backbone, "blocks") else None)
    notes += layout_notes
    # 1. the backbone of a dense task
    within = {name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")}
    if within:
        others = dict.fromkeys(name.partition(".")[0] for name in state if not name.startswith("backbone."))
        state, notes = within, [*notes, f"left out: {', '.join(others)}, which are new here"]
    # 2. the last block
    kind = last_block_of(checkpoint, key)
    if kind not in (None, backbone.last_block):
        if not other_last_block:
            raise UserError(
                f"the checkpoint has the last block {kind!r}, the backbone {backbone.last_block!r}: use --last-block "
                f"{kind}"
            )
        notes.append(f"last block: {kind} in the file, {backbone.last_block} here, as --last-block says")
        state, norm_notes = _fit_last_norm(state, own)
        notes += norm_notes
    # 3. what only one of them has
    left = [name for name in state if CLASSIFIERS_OWN.fullmatch(name)]
    new = {name: value for name, value in own.items() if BACKBONES_OWN.fullmatch(name) and name not in state}
    state = {name: value for name, value in state.items() if name not in left} | new
    notes += [f"left out: {', '.join(left)}"] * bool(left)
    notes += [f"relative positions start at 0 ({len(new)} tables)"] * bool(new)
    # 4. all else is the same
    for name in own.keys() & state.keys() & {"pos_embed", "pos_embed1"}:
        _check_pretrain_size(state[name], own[name])
    _check_fit(state, backbone, "checkpoint")
    backbone.load_state_dict(state)
    return notes


def _fit_last_norm(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Take the last block's second LayerNorm from ``own`` where the file lacks it, and drop one too many."""
    last = last_block_name(own)
    norm = {f"{last}.norm2.weight", f"{last}.norm2.bias"}
    added = {name: own[name] for name in norm if name in own and name not in state}
    fitted = {name: value for name, value in state.items() if name in own or name not in norm} | added
    return fitted, [f"{last}.norm2: not in the file, starts at 1 and 0"] * bool(added)


def _check_pretrain_size(theirs: Tensor, own: Tensor) -> None:
    """Refuse positions of images of another size, with the option that builds the backbone for them."""
    if theirs.shape[1] != own.shape[1] and theirs.shape[2] == own.shape[2]:
        raise UserError(
            f"the checkpoint has {theirs.shape[1]} positions, the backbone {own.shape[1]}: it was trained with images "
            "of another size or patches; give them with --model-kwargs pretrain_size=N and --patch-size"
        )


# Weights that depend on the patch size or the grid.
GRID_WEIGHTS = re.compile(r"^pos_embed\d?$|^patch_embed\.proj\.weight$|relative_position_bias_table$")


def _fit_grid(state: dict[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Resample position embedding and patch embedding to the model's grid and patch size; returns notes."""
    # 1. timm's convention: a function of this name in the model's module adapts weights
    modules = [sys.modules[kind.__module__] for kind in type(model).mro()]
    fit = next((module.checkpoint_filter_fn for module in modules if hasattr(module, "checkpoint_filter_fn")), None)
    if fit is None:
        return state, []
    try:
        fitted = fit(state, model)
    except (RuntimeError, ValueError):
        return state, []  # not resampled, so `_check_fit` reports the shapes
    # 2. which weights were resampled
    notes = []
    for name in filter(GRID_WEIGHTS.search, state.keys() & fitted.keys()):
        if state[name].shape == fitted[name].shape:
            fitted[name] = state[name]  # timm may assume a square grid although these weights fit
        else:
            notes.append(f"{name}: {_shape(state[name])} -> {_shape(fitted[name])}, resampled")
    return fitted, sorted(notes)


def _fit_head(
    state: dict[str, Tensor], model: nn.Module, other_classes: bool = False
) -> tuple[dict[str, Tensor], list[str]]:
    """Replace the classifier's weights by the model's own if the number or the names of classes differ; returns notes.

    Args:
        other_classes: the classes are known to have other names.
    """
    names = getattr(model, "pretrained_cfg", {}).get("classifier", "head")
    notes = []
    for name in (names,) if isinstance(names, str) else names:
        keys = (f"{name}.weight", f"{name}.bias")
        own = {k: v for k, v in model.state_dict().items() if k in keys}
        old, new = (None if keys[0] not in d else len(d[keys[0]]) for d in (state, own))
        if old == new and not (other_classes and new):
            continue
        if old == new:
            notes.append(f"{name}: of {old} classes with other names, dropped and re-initialised; --keep-head keeps it")
        elif old is None:
            notes.append(f"{name}: not in the checkpoint, initialised for {new} classes")
        elif new is None:
            notes.append(f"{name}: dropped ({old} classes), as the model has none")
        else:
            notes.append(f"{name}: {old} -> {new} classes, dropped and re-initialised")
        state = {k: v for k, v in state.items() if k not in keys} | own
    return state, notes


def _check_fit(state: dict[str, Tensor], model: nn.Module, file: str) -> None:
    """Raise a `Misfit` that lists missing and unexpected weights and other shapes; ``file`` says whose they are."""
    own = model.state_dict()
    missing = [k for k in own if k not in state]
    unexpected = [k for k in state if k not in own]
    reshaped = [
        f"{k} {_shape(state[k])} for {_shape(v)}" for k, v in own.items() if k in state and state[k].shape != v.shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    listed = "; ".join(f"{what}: {first_few(keys, 3)}" for what, keys in problems.items() if keys)
    if listed:
        raise Misfit(
            f"the {file}'s weights do not fit the model. {listed}{_hint(missing, unexpected, reshaped, model, state)}"
        )


# What timm's ViTs have on demand: in words, the names of its weights, and the --model-kwargs.
PARTS_ON_DEMAND = (
    ("LayerScale", r"blocks\.\d+\.ls[12]\.gamma", "init_values=1e-5"),
    ("register tokens", r"reg_token", "reg_tokens={registers} no_embed_class=True"),
    ("norms of queries and keys", r"blocks\.\d+\.attn\.[qk]_norm\.", "qk_norm=True"),
    ("a norm before the blocks", r"norm_pre\.", "pre_norm=True"),
    ("a norm after the mean of the patches", r"fc_norm\.", "global_pool=avg"),
)


def _hint_at_parts(missing: list[str], unexpected: list[str], model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Which of `PARTS_ON_DEMAND` only the file or only the model has, with the mend; empty if there are none."""

    def parts(names: list[str]) -> tuple[list[str], str]:
        """In words, and as --model-kwargs, those parts that have some of these weights."""
        found = [part for part in PARTS_ON_DEMAND if any(re.match(part[1], name) for name in names)]
        registers = state["reg_token"].shape[1] if "reg_token" in state else 0
        return [what for what, *_ in found], " ".join(kwargs.format(registers=registers) for *_, kwargs in found)

    theirs, kwargs = parts(unexpected)
    if theirs and not isinstance(model, VisionTransformer):
        return f". They have {' and '.join(theirs)}, which this model cannot have"
    if theirs:
        return f". They have {' and '.join(theirs)}: give --model-kwargs {kwargs}"
    own, kwargs = parts(missing)
    if own:
        names = ", ".join(re.findall(r"(\w+)=", kwargs))
        return f". They have no {' and no '.join(own)}: leave {names} out of --model-kwargs"
    return ""


def _hint(
    missing: list[str], unexpected: list[str], reshaped: list[str], model: nn.Module, state: Mapping[str, Tensor]
) -> str:
    """What to change for likely causes: another last block (Eq. 1-2, 10-11), a distilled DeiT, an oblong grid."""
    for keys, kind in ((unexpected, "standard"), (missing, "sar")):
        last_norms = {k.rpartition(".")[0] for k in keys if ".norm2." in k}
        if len(last_norms) == 1 and hasattr(model, "last_block"):
            return f". The checkpoint has the last block {kind!r}: use --last-block {kind}"
    if "dist_token" in unexpected:
        return ". They are a distilled DeiT's, which is not supported: use the model without distillation"
    if parts := _hint_at_parts(missing, unexpected, model, state):
        return parts
    if "reg_token" in state and not getattr(model, "no_embed_class", True):
        return ". Register tokens have no positions: give --model-kwargs no_embed_class=True, too"
    for names, program in LAYOUTS.items():
        if any(re.match(names, name) for name in unexpected):
            return f". The names are those of {program}, which are not read: convert them to timm's"
    for width in (re.match(r"cls_token 1x1x(\d+) for 1x1x(\d+)", key) for key in reshaped):
        if width:
            same = [f"vit_{name}" for name, sizes in SIZES.items() if sizes["embed_dim"] == int(width[1])]
            use = f"use --model {same[0]}" if same else f"give --model-kwargs embed_dim={width[1]}"
            return f". They are of width {width[1]}, and the model is of width {width[2]}: {use}"
    if [k.partition(" ")[0] for k in reshaped] == ["pos_embed"]:
        return (
            ". Only square grids with a position of [CLS] are resampled: use the checkpoint's image and patch size, or "
            "--model-kwargs no_embed_class=True if [CLS] has none"
        )
    if reshaped and all(re.match(r"head\.", name) for name in reshaped):
        return ". Its classes are others: fine-tune it (--finetune without --eval), or name the data set of its classes"
    return ""


# Names of ViTs in other programs, which timm's do not begin with.
LAYOUTS = {
    r"(vit|deit|dinov2|model)?\.?embeddings\.": "Hugging Face's transformers",
    r"(backbone\.)?layers\.\d+\.(ln1|attn|ffn)\.": "mmpretrain",
    r"(encoder\.layers\.encoder_layer_\d+|conv_proj)\.": "torchvision's ViT",
    r"(visual|transformer)\.": "CLIP",
}


def _shape(tensor: Tensor | None) -> str:
    """The shape in words, such as 1x197x384."""
    return "none" if tensor is None else "x".join(map(str, tensor.shape))
