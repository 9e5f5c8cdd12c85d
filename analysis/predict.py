"""Run a trained checkpoint on photographs, and write and draw what it predicts.

    python -m analysis.predict --checkpoint output/boxes/best.pth --images photos --out predictions

The task is that of the checkpoint. --out gets

    detect             pictures/*.jpg with boxes, names and scores; detections.json, images.json in COCO's layout
    segment            pictures/*.jpg with the classes in colour; classes/*.png, each pixel the number of its class;
                       predictions.json with the share of each class
    classify, linear   sheet-1.png and so on with the most probable classes; predictions.csv, predictions.json

Photographs are turned upright as their EXIF data say, and then prepared as in the evaluation of the run. They are
predicted one by one, in float32, so a result does not depend on the others. One that cannot be read is named and
skipped.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from analysis.commands import add_device_options, remove_pages
from analysis.pictures import MIN_SCORE, above, draw_boxes, draw_names, draw_pixels, draw_sheet, resized, shares_of
from arguments import parse_arguments
from augmentation import as_tensor
from batches import prepare
from checkpoints import NoImages, load_trained
from cli import Parser, at_least, exit_code
from readers.files import list_images
from readers.images import UnreadableImage, read_photograph
from tasks import Task, load_task
from tasks.detect import coco_detections, coco_images
from tasks.segment import write_prediction
from utils import UserError, logger, pick_device, prepare_output_dir, progress, start_logging, write_csv, write_json
from weights import is_own, read_checkpoint

RANKS = 5  # classes that are named for a photograph
CELLS = 16  # photographs on a sheet


def main(argv: list[str] | None = None) -> int:
    """Predict the photographs of a folder; returns the exit code (2: bad usage)."""
    return exit_code(lambda: run(parse_args(argv)))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m analysis.predict",
        description=__doc__,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FILE", help="best.pth or checkpoint.pth of a run of main.py")
    add("--images", type=Path, required=True, metavar="DIR", help="folder of photographs; those in its subfolders, too")
    add("--out", type=Path, required=True, metavar="DIR", help="output folder")
    add(
        "--min-score",
        type=at_least(float, 0, 1),
        metavar="P",
        help=f"detect: leave out boxes of a lower score (default: {MIN_SCORE})",
    )
    add_device_options(parser)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Predict all photographs, write the results, and print where they are; returns 0.

    Raises:
        UserError: before anything is predicted, if the checkpoint predicts nothing or options are wrong; at the end,
            if no photograph could be read.
    """
    # 1. the photographs, the task and the output folder
    start_logging(0)
    device, paths = pick_device(args.device), list_images(args.images)
    if args.out.resolve().is_relative_to(args.images.resolve()):
        raise UserError(f"--out {args.out} is in --images, and its pictures would be predicted, too; name another")
    task, transform, classes = load_predictor(args, device)
    prepare_output_dir(args.out, "--out")
    options = {} if args.min_score is None else {"least": args.min_score}
    if options and task.prediction != "boxes":
        raise UserError(f"--min-score is for detectors, but {args.checkpoint} is none; leave it out")
    writer: Writer = WRITERS[task.prediction](args.out, classes, **options)
    # 2. predict one by one
    names, unreadable = output_names([path.relative_to(args.images) for path in paths]), 0
    for path, name in progress([*zip(paths, names, strict=True)], "photographs"):
        try:
            photograph = read_photograph(path)
        except UnreadableImage as error:
            logger.warning(f"{error}; skipped")
            unreadable += 1
            continue
        item = item_of(transform(as_tensor(photograph)), device)
        with torch.inference_mode():
            found = task.predict(item)
        writer.add(path.relative_to(args.images).as_posix(), name, photograph, found)
    if unreadable == len(paths):
        raise UserError(f"--images {args.images}: none of its {unreadable} images can be read")
    # 3. what is written at the end
    left_out = f"; unreadable and skipped: {unreadable}" if unreadable else ""
    print(f"{writer.finish()}: {args.out} (photographs: {len(paths) - unreadable}{left_out})")
    return 0


def load_predictor(args: argparse.Namespace, device: torch.device) -> tuple[Task, Any, list[str]]:
    """The task of the checkpoint in evaluation mode, its evaluation transform, and the names of its classes.

    Raises:
        UserError: a checkpoint of another program, or of a task without predictions; or its weights do not fit.
    """
    path = args.checkpoint
    checkpoint = read_checkpoint(path)
    if not is_own(checkpoint):
        raise UserError(f"{path}: not written by main.py, so its task and its classes are unknown")
    name = checkpoint["args"].get("task", "classify")
    task_class = load_task(name)
    if not task_class.prediction:
        raise UserError(
            f"{path}: --task {name} learns features and predicts no classes. Train classifiers of them (--task "
            "linear --finetune FILE), measure them (--task knn --eval), or draw the attention (analysis.figures)"
        )
    key = ["--checkpoint-key", args.checkpoint_key] if args.checkpoint_key else []
    saved, classes = parse_arguments(["--eval", *key], saved=checkpoint["args"]), list(checkpoint["data"]["classes"])
    task = load_trained(saved, NoImages(classes), checkpoint, path, device)
    return task.eval(), task_class.evaluation_transform(saved), classes


def item_of(views: Any, device: torch.device) -> dict[str, Any]:
    """What an evaluation transform makes of one photograph, as `tasks.Task.predict` takes it, on the device."""
    return prepare(views if isinstance(views, dict) else {"images": views[None]}, device)


def output_names(paths: Sequence[Path]) -> list[str]:
    """A name without suffix for the files that belong to each photograph; those of ``a.jpg`` and ``a.png`` differ."""
    stems = [path.with_suffix("").as_posix() for path in paths]
    often = Counter(stem.lower() for stem in stems)
    return [
        f"{stem}_{path.suffix[1:]}" if often[stem.lower()] > 1 else stem
        for path, stem in zip(paths, stems, strict=True)
    ]


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture as a JPEG with sharp colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=92, subsampling=0)


# ------------------------------------------------------------------------------------------------- the writers


class Writer:
    """Writes the predictions of one kind.

    Args:
        out: output folder.
        classes: names.
    """

    def __init__(self, out: Path, classes: list[str]):
        self.out, self.classes = out, classes

    def add(self, file: str, name: str, photograph: Image.Image, found: dict[str, np.ndarray]) -> None:
        """Add a photograph.

        Args:
            file: its path below --images.
            name: that of its results, see `output_names`.
            photograph: RGB.
            found: see `tasks.Task.predict`.
        """
        raise NotImplementedError

    def finish(self) -> str:
        """Write what belongs to all photographs; returns what was found, in words."""
        raise NotImplementedError


class BoxWriter(Writer):
    """Writes detections: a picture each, and all in the layout of COCO's results, with names.

    Args:
        least: score of the boxes that are kept.
    """

    def __init__(self, out: Path, classes: list[str], least: float = MIN_SCORE):
        super().__init__(out, classes)
        self.least = least
        self.records: list[dict[str, Any]] = []

    def add(self, file: str, name: str, photograph: Image.Image, found: dict[str, np.ndarray]) -> None:
        found, size = above(found, self.least), photograph.size[::-1]
        self.records.append({"index": len(self.records), "name": file, "size": size, "detections": found})
        picture = draw_boxes(resized(photograph), found, size, self.classes)
        save_picture(picture, self.out / "pictures" / f"{name}.jpg")

    def finish(self) -> str:
        boxes = coco_detections(self.records, self.classes)
        named = [box | {"file_name": self.records[box["image_id"]]["name"]} for box in boxes]
        write_json(self.out / "detections.json", named)
        write_json(self.out / "images.json", coco_images(self.records, self.classes))
        return f"{len(boxes)} boxes with a score of at least {self.least:g}"


class PixelWriter(Writer):
    """Writes segmentations: a picture and an image of class numbers each, and the shares of all classes."""

    def __init__(self, out: Path, classes: list[str]):
        super().__init__(out, classes)
        self.rows: list[dict[str, Any]] = []

    def add(self, file: str, name: str, photograph: Image.Image, found: dict[str, np.ndarray]) -> None:
        numbers, labels = f"classes/{name}.png", found["classes"]
        write_prediction(labels, self.out / numbers)
        save_picture(draw_pixels(resized(photograph), labels, self.classes), self.out / "pictures" / f"{name}.jpg")
        shares = {self.classes[label]: share for label, share in shares_of(labels, len(self.classes)).items()}
        self.rows.append({"image": file, "classes": numbers, "shares": shares})

    def finish(self) -> str:
        write_json(self.out / "predictions.json", self.rows)
        return f"{len({name for row in self.rows for name in row['shares']})} of {len(self.classes)} classes found"


class NameWriter(Writer):
    """Writes classifications: the most probable classes of all photographs as tables, and drawn on sheets."""

    def __init__(self, out: Path, classes: list[str]):
        super().__init__(out, classes)
        self.rows: list[dict[str, Any]] = []
        self.cells: list[Image.Image] = []
        self.sheets = 0

    def add(self, file: str, name: str, photograph: Image.Image, found: dict[str, np.ndarray]) -> None:
        probabilities = found["probabilities"]
        best = np.argsort(-probabilities, kind="stable")[:RANKS]
        names, values = [self.classes[label] for label in best], probabilities[best].tolist()
        self.rows += [
            {"image": file, "rank": rank, "class": each, "probability": value}
            for rank, (each, value) in enumerate(zip(names, values, strict=True), 1)
        ]
        self.cells.append(draw_names(photograph, file, names, values))
        if len(self.cells) == CELLS:
            self._write_sheet()

    def _write_sheet(self) -> None:
        self.sheets += 1
        draw_sheet(self.cells).save(self.out / f"sheet-{self.sheets}.png")
        self.cells = []

    def finish(self) -> str:
        if self.cells:
            self._write_sheet()
        remove_pages(self.out, "sheet", self.sheets + 1)
        write_csv(self.out / "predictions.csv", self.rows)
        write_json(self.out / "predictions.json", self.rows)
        return f"the {min(RANKS, len(self.classes))} most probable of {len(self.classes)} classes"


WRITERS = {"boxes": BoxWriter, "pixels": PixelWriter, "names": NameWriter}
"""The writer of each kind of predictions, see `tasks.Task.prediction`."""


if __name__ == "__main__":
    sys.exit(main())
