"""Validation images out of a single folder of classes: ``--val-split``.

The choice depends on the folder, the share and a seed alone. A run keeps it in its folder, in ``split.json``, so that
the same images stay apart when the run is resumed or evaluated, whatever has been added to the folder since.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from readers.folders import class_root, read_class_folders, read_folder
from readers.images import ImageFiles
from samplers import class_subset
from utils import UserError, first_few, logger, write_json

SPLIT_FILE = "split.json"


@dataclass(frozen=True)
class Holdout:
    """The settings of ``--val-split``.

    Attributes:
        share: of each class's images that is held out for validation; at most one half, 0 for none.
        seed: of the choice.
        runs: folders that may hold `SPLIT_FILE`; the first that does decides.
        evaluating: the images are those of a finished run: what is new in the folder since is left out.
    """

    share: float
    seed: int
    runs: tuple[Path, ...] = ()
    evaluating: bool = False


def read_part(data_path: Path, split: str, holdout: Holdout) -> ImageFiles:
    """The training or validation images of a single folder of classes; its layout is that of `class_root`.

    To evaluate a run on another folder, which has ``val/``, that is read.

    Raises:
        UserError: see `read_class_folders`; or the folder has changed since the run began.
    """
    kept = next((path for run in holdout.runs if (path := run / SPLIT_FILE).is_file()), None)
    own = kept is not None and _read(kept).get("data_path") == str(data_path.resolve())
    if holdout.evaluating and not own and (data_path / "val").is_dir():
        return read_folder(data_path, split)
    if kept is not None and holdout.evaluating:
        return _read_kept(data_path, split, kept)
    if holdout.evaluating and split == "val":
        logger.warning(f"no {SPLIT_FILE} beside the checkpoint: the validation images are chosen anew from {data_path}")
    images = read_class_folders(data_path)
    chosen = choose(images, holdout)
    if kept is not None:
        _check_unchanged(data_path, chosen, kept)
    names, label_of = chosen[split], dict(zip(images.names, images.targets.tolist(), strict=True))
    if not names:
        reason = "as no class has two" if holdout.share else "as the share says; name a folder with val/<class>/*"
        raise UserError(f"--val-split {holdout.share:g}: {data_path} has no validation images, {reason}")
    part = ImageFiles(images.root, names, [label_of[name] for name in names], images.classes)
    part.left_out = images.left_out
    return part


def choose(images: ImageFiles, holdout: Holdout) -> dict[str, list[str]]:
    """The names of the images in ``train`` and in ``val``.

    ``val`` is the `samplers.class_subset` of the share: of each class, the rounded share, but at least one image. A
    class with a single image keeps it for training.
    """
    counts = np.bincount(images.targets, minlength=len(images.classes))
    subset = class_subset(images.targets, holdout.share, holdout.seed) if holdout.share else []
    held_out = {index for index in subset if counts[images.targets[index]] > 1}
    names: dict[str, list[str]] = {"train": [], "val": []}
    for index, name in enumerate(images.names):
        names["val" if index in held_out else "train"].append(name)
    return names


def keep(data_path: str | Path, holdout: Holdout, folder: Path) -> None:
    """Write `SPLIT_FILE` into the folder of a run that begins; that of a run that goes on stays."""
    path, data_path = folder / SPLIT_FILE, Path(data_path).expanduser()
    if not (path.exists() and has_checkpoint(folder)):
        chosen = choose(read_class_folders(data_path), holdout)
        place = class_root(data_path).relative_to(data_path).as_posix()
        settings = {"val_split": holdout.share, "sampling_seed": holdout.seed, "folder": place}
        settings["data_path"] = str(data_path.resolve())
        write_json(path, settings | chosen)


def has_checkpoint(folder: Path) -> bool:
    """Whether a run has been saved in the folder; one that ended before that begins anew, with a choice of its own."""
    return (folder / "checkpoint.pth").is_file()


def _check_unchanged(data_path: Path, chosen: dict[str, list[str]], path: Path) -> None:
    """Refuse a folder with other images than when the run began, as training images may be in its validation now."""
    before = _read(path)
    if all(before[part] == chosen[part] for part in ("train", "val")):
        return
    known, found = ({*names["train"], *names["val"]} for names in (before, chosen))
    changes = [
        f"{len(names):,} {what} ({first_few(names, 2)})"
        for names, what in ((sorted(found - known), "new"), (sorted(known - found), "gone"))
        if names
    ]
    raise UserError(
        f"--data-path {data_path}: not the images of {path}: {', '.join(changes) or 'divided otherwise'}; restore them "
        "and give the same --val-split and --sampling-seed, or another --output-dir"
    )


def _read_kept(data_path: Path, split: str, path: Path) -> ImageFiles:
    """The images of a split as the run chose them."""
    kept = _read(path)
    root, names = data_path / kept["folder"], kept[split]
    if not names:
        raise UserError(f"{path}: the run had no validation images; give --data-path, a folder with val/<class>/*")
    gone = [name for name in names if not (root / name).is_file()]
    if len(gone) == len(names):
        raise UserError(
            f"--data-path {data_path}: no val/<class>/*, and none of the {len(names):,} validation images of {path}; "
            "name the run's images, or a folder with val/<class>/*"
        )
    if gone:
        raise UserError(
            f"--data-path {data_path}: {len(gone):,} images of {path} are gone ({first_few(gone, 2)}); restore them, "
            "or name a folder with val/<class>/*"
        )
    classes = sorted({_class_of(name) for name in (*kept["train"], *kept["val"])})
    number = {name: label for label, name in enumerate(classes)}
    return ImageFiles(root, names, [number[_class_of(name)] for name in names], classes)


def _class_of(name: str) -> str:
    return name.partition("/")[0]


def _read(path: Path) -> dict[str, Any]:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(kept[part], Sequence) for part in ("folder", "train", "val")):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: damaged; it lists the validation images of its run, so copy it back") from None
    return kept
