"""Writes a model's weights for other programs: as a file, or as a folder of the Hugging Face Hub."""

import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import save_for_hf
from torch import nn

from augmentation import crop_pct_of
from utils import UserError, prepare_output_dir, write_atomically

MOCO_PREFIX = "module.base_encoder."
TIMMS_OWN = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "swin_tiny": "swin_tiny_patch4_window7_224",
}
"""This program's models -> timm's, which are the same if the last block is standard."""
OWN_OPTIONS = ("last_block", "similarity", "similarity_query", "positions")
"""Arguments of this program's models that timm's do not have."""
OTHER_WEIGHTS = (".pt", ".bin", ".onnx", ".ckpt", ".npz", ".h5", ".pkl")
"""Suffixes of weights that are not written here; a name such as ``hub-v1.0`` is one of a folder."""


def write_weights(model: nn.Module, path: str | Path, args: Any, classes: Sequence[str]) -> str:
    """Write a model's weights for other programs, which the suffix of the file names.

    ``.safetensors``: the state dict, whose names are timm's, for timm and others. ``.pth``: the same as a file of
    torch, for DINO's scripts (``--pretrained_weights``). ``.tar``: with the names of a MoCo-v3 checkpoint, for its
    scripts (``--pretrained``). Any other name is a folder, see `write_folder`. `weights.read_checkpoint` reads all.

    Args:
        model: built by ``timm.create_model``.
        path: of the file or folder.
        args: of the run, for a folder.
        classes: their names, for a folder; empty for a model without a classifier.

    Returns:
        What reads it, in words, for the log.

    Raises:
        UserError: a suffix of OTHER_WEIGHTS, or no such folder.
        RunError: see `utils.write_atomically`.
    """
    path = Path(path)
    if path.is_dir() or path.suffix not in (".safetensors", ".pth", ".tar", *OTHER_WEIGHTS):
        return write_folder(model, path, args, classes)
    if path.suffix in OTHER_WEIGHTS:
        raise UserError(
            f"--export {path}: name a file *.safetensors (timm), *.pth (DINO) or *.pth.tar (MoCo-v3), or a folder"
        )
    if not path.parent.is_dir():
        raise UserError(f"--export {path}: there is no folder {path.parent}; make it first")
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if path.suffix == ".safetensors":
        write_atomically(path, lambda file: file.write(safetensors.torch.save(state)))
    else:
        content = state if path.suffix == ".pth" else {"state_dict": {MOCO_PREFIX + k: v for k, v in state.items()}}
        write_atomically(path, lambda file: torch.save(content, file))
    return "the state dict alone"


def write_folder(model: nn.Module, folder: Path, args: Any, classes: Sequence[str]) -> str:
    """Write ``model.safetensors`` and ``config.json``, as timm reads and uploads them.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` builds the model and loads it. The configuration holds
    its sizes, its input and the names of its classes. With a standard last block the model is timm's own.

    Args, results and errors are those of `write_weights`.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise UserError(f"--export {folder}: a folder with other files; name a new one")
    # 1. the model as timm knows it
    described: Any = copy.copy(model)
    name = args.model.removesuffix("_sar")
    stock = args.last_block == "standard" and name in TIMMS_OWN
    options: Mapping[str, Any] = model._model_args  # type: ignore[assignment]  # by timm.create_model
    described._model_args = {key: value for key, value in options.items() if not (stock and key in OWN_OPTIONS)}
    # 2. its input, as `augmentation.eval_transform` makes it
    data = {
        "input_size": (3, args.input_size, args.input_size),
        "crop_pct": crop_pct_of(args.input_size, args.crop_pct),
        "interpolation": getattr(args, "eval_interpolation", "bicubic"),
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
    }
    config: dict[str, Any] = {"pretrained_cfg": {"architecture": TIMMS_OWN[name] if stock else args.model}}
    if len(classes) and model.num_classes == len(classes):
        config["label_names"] = list(classes)
    # 3. timm writes both files, elsewhere, so that nothing but them is uploaded; each replaces an older one when whole
    prepare_output_dir(folder, "--export")
    with tempfile.TemporaryDirectory() as there:
        save_for_hf(described, there, model_config=config, data_config=data, safe_serialization=True)
        for path in sorted(Path(there).iterdir(), reverse=True):  # the weights first
            content = path.read_bytes()
            write_atomically(folder / path.name, lambda file, content=content: file.write(content))
    architecture = json.loads((folder / "config.json").read_text())["architecture"]
    return f'timm.create_model("local-dir:{folder}", pretrained=True) loads it as {architecture}'
