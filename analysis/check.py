"""Check a data set before hours are spent on it: decode every image once, and list what is wrong or remarkable.

    python -m analysis.check --data-set folder --data-path mine --out check.csv

Wrong, because training or evaluation would stop or be misled:
  refused        the reader of the data set does not accept the split; the detail says why
  unreadable     a file that cannot be decoded
  wrong mask     a mask of another size or with numbers that are no class (--task segment)
  empty class    a class folder without images
Remarkable:
  tiny class     of the training split, with fewer than 5 images, or than a tenth of the median
  deep           more than 8 bits a colour: grey is scaled from the file's own range, colours lose their lower bits
  huge           more than 25 million pixels, which every epoch decodes again
  thin           sides of a ratio above 10: crops show little of it
  rotated        by EXIF: viewers turn or mirror it; training does so, too, but for published sets, masks and boxes
  duplicate      a link to another image, or the same bytes under another name, across the splits, too
  hidden         files and folders of the system, such as ._a.jpg or .ipynb_checkpoints; not used
  link           folders linked a second time or in a circle, links in a tar that lead nowhere; not used
  suffix         files that are no images by their suffix; not used
  beside         images outside of the class folders; not used

--out gets a CSV of all findings, one a row, and of the number of images of each class. The exit code is 0 if nothing is
wrong (remarks alone do not count), 1 if something is wrong, and 2 if the command or the whole data set cannot be read.
"""

import argparse
import hashlib
import io
import os
import statistics
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from cli import Parser, at_least, exit_code
from datasets import read_split
from readers import FOLDER_LAYOUT, DataSet, canonical_name, sets_of
from readers.files import LeftOut
from readers.folders import class_folders, read_class_folders, read_classes
from readers.images import DEEP_MODES, TOLD_OF_DEEP, EncodedImages, ImageFiles, LabelledImages, ReadingError
from readers.segmentation import WrongMask
from tasks import TASKS
from utils import UserError, first_few, prepare_output_dir, progress, readable, start_logging, write_csv

WRONG = ("refused", "unreadable", "wrong mask", "empty class")
REMARKABLE = (
    *("tiny class", "deep", "huge", "thin", "rotated", "duplicate"),
    *("hidden", "link", "suffix", "beside"),
)
COUNT = "images"
"""Kind of the rows that count a class's images."""
TINY, TINY_SHARE = 5, 0.1
HUGE = 25_000_000
THIN = 10
TURNED = {2: "mirrored", 3: "turned by 180°", 4: "mirrored", 6: "turned by 90°", 8: "turned by 90°"}
"""What a viewer does by EXIF's orientation; 5 and 7 do both."""
ALL = "all"
"""The name of the images of a single folder of classes, for ``--val-split``."""
SHOWN = 3
"""Findings of a kind that the terminal lists."""


# ------------------------------------------------------------------------------------------------ images


def inspect(images: EncodedImages, index: int) -> tuple[dict[str, str], bytes]:
    """Decode an image as training does, and look at its header.

    Returns:
        Kind -> detail of each finding, and the digest of the file; empty for an unreadable one.
    """
    try:
        data = images.encoded(index)
        images[index]
    except ReadingError as error:
        return {"wrong mask" if isinstance(error, WrongMask) else "unreadable": error.reason or str(error)}, b""
    remarks: dict[str, str] = {}
    with suppress(Exception), Image.open(io.BytesIO(data)) as header:  # Pillow may refuse what was decoded otherwise
        for kind, detail in _remarks(header, images.upright):  # of a broken EXIF block, what came before it
            remarks[kind] = detail
    return remarks, hashlib.blake2b(data, digest_size=16).digest()


def _remarks(header: Image.Image, upright: bool) -> Iterator[tuple[str, str]]:
    width, height = header.size
    if header.mode in DEEP_MODES:
        yield "deep", f"{DEEP_MODES[header.mode]} bits, grey"
    elif ";16" in str(getattr(header, "tile", "")):  # how Pillow names the layout of the file's pixels
        yield "deep", "16 bits a colour"
    if width * height > HUGE:
        yield "huge", f"{width} x {height} px"
    if max(width, height) > THIN * min(width, height):
        yield "thin", f"{width} x {height} px"
    orientation = header.getexif().get(ExifTags.Base.Orientation, 1)
    if 2 <= orientation <= 8:
        training = "does so, too" if upright else "does not"
        yield "rotated", f"by EXIF, {TURNED.get(orientation, 'turned by 90° and mirrored')}; training {training}"


class Findings:
    """The rows of the CSV: dicts of split, kind, class, file and detail."""

    def __init__(self) -> None:
        self.rows: list[dict[str, str]] = []
        self._first: dict[bytes, tuple[str, LabelledImages, int]] = {}

    def add(self, split: str, kind: str, *, label: str = "", file: str = "", detail: str = "") -> None:
        """Add one row."""
        row = {"split": split, "kind": kind, "class": label, "file": file, "detail": detail}
        self.rows.append({name: readable(value) for name, value in row.items()})

    def add_images(self, split: str, images: EncodedImages, num_workers: int) -> None:
        """Decode all images of a split, in threads: decoders let other threads run."""
        with ThreadPool(num_workers) as pool:
            results = pool.imap(lambda index: inspect(images, index), range(len(images)), chunksize=8)
            for index in progress(range(len(images)), f"decoding {split}"):
                found, digest = next(results)
                place: dict[str, str] = {"label": _class_of(images, index), "file": str(images.names[index])}
                for kind, detail in found.items():
                    self.add(split, kind, **place, detail=detail)
                if digest:
                    first = self._first.setdefault(digest, (split, images, index))
                    if first[1:] != (images, index):
                        self.add(split, "duplicate", **place, detail=_describe_duplicate(images, index, *first))

    def add_left_out(self, split: str, left_out: LeftOut) -> None:
        """Add what the reader does not use."""
        kinds = {"hidden": left_out.hidden, "link": left_out.links, "suffix": left_out.suffixes}
        for kind, paths in (kinds | {"beside": left_out.beside}).items():
            for path in paths:
                self.add(split, kind, file=path)

    def add_classes(self, split: str, images: LabelledImages) -> None:
        """Add the number of images of each class, and classes with few or none."""
        counts = count_classes(images)
        median = statistics.median(counts.values()) if counts else 0
        for name, count in counts.items():
            self.add(split, COUNT, label=name, detail=str(count))
            if not count:
                self.add(split, "empty class", label=name)
            elif split != "val" and count < max(TINY, TINY_SHARE * median):
                self.add(split, "tiny class", label=name, detail=f"{count} images")

    def of(self, kind: str) -> list[dict[str, str]]:
        """The rows of a kind."""
        return [row for row in self.rows if row["kind"] == kind]


def count_classes(images: LabelledImages) -> dict[str, int]:
    """Number of images by class; empty for a set whose images have no label."""
    if not images.classes or not images.labelled:
        return {}
    return dict(zip(images.classes, np.bincount(images.targets, minlength=len(images.classes)).tolist(), strict=True))


def _class_of(images: LabelledImages, index: int) -> str:
    return images.classes[images.targets[index]] if images.classes and images.labelled else ""


def _describe_duplicate(images: LabelledImages, index: int, split: str, other: Any, number: int) -> str:
    """What the image is to the ``number``-th one of ``other``, of this split, which has the same bytes."""
    what = "the same bytes as"
    if isinstance(images, ImageFiles) and isinstance(other, ImageFiles):
        paths = [os.path.join(each.root, each.names[place]) for each, place in ((images, index), (other, number))]
        what = "linked with" if os.path.samefile(*paths) else what
    return f"{what} {other.names[number]} ({split}{f', {label}' if (label := _class_of(other, number)) else ''})"


# ---------------------------------------------------------------------------------------------- the set


def splits_of(entry: DataSet) -> list[str]:
    """The splits that a data set has."""
    if not entry.has_classes:
        return ["train"]
    return [split for split in ("train", "val") if split in entry.images or not entry.images]


def is_single_folder(name: str, args: argparse.Namespace) -> bool:
    """Whether the set is a folder of classes without ``train/`` and ``val/``."""
    root = args.data_path
    if args.task != "classify" or name != "folder" or root is None or not root.is_dir():
        return False
    return not any((root / split).is_dir() for split in ("train", "val")) and bool(class_folders(root))


def read_or_refuse(
    name: str, split: str, sets: dict[str, DataSet], data_path: Path | None
) -> tuple[LabelledImages | None, UserError | None]:
    """A split, and the reason if its reader refuses it; the images of class folders are read even then.

    The split "all" is that of a single folder of classes.
    """
    try:
        if split == ALL and data_path is not None:
            images = read_class_folders(data_path)
            images.upright = sets[name].upright
            return images, None
        return read_split(name, split, data_path, sets), None
    except UserError as error:
        root = data_path / split if data_path else None
        if root is None or not root.is_dir() or not sets[name].layout.startswith(FOLDER_LAYOUT):
            return None, error
        with suppress(UserError):
            return read_classes(root.parent, split, class_folders(root)), error
        return None, error


def check(args: argparse.Namespace) -> Findings:
    """Check all splits; prints a line about each.

    Raises:
        UserError: no split can be read at all.
    """
    sets = sets_of(args.task)
    name = canonical_name(args.data_set, sets)
    TOLD_OF_DEEP[0] = 1  # they are listed here
    findings, refusals, read = Findings(), [], 0
    single = is_single_folder(name, args)
    if single:
        print("no folders train/ and val/: main.py needs --val-split, such as --val-split 0.1")
    for split in [ALL] if single else splits_of(sets[name]):
        images, refusal = read_or_refuse(name, split, sets, args.data_path)
        if refusal is not None:
            refusals.append(refusal)
            findings.add(split, "refused", detail=str(refusal))
        if images is None:
            continue
        read += 1
        print(describe_split(split, images))
        findings.add_left_out(split, images.left_out)
        findings.add_classes(split, images)
        if isinstance(images, EncodedImages):
            findings.add_images(split, images, args.num_workers)
    if not read:
        raise refusals[0]
    return findings


def describe_split(split: str, images: LabelledImages) -> str:
    """One line, such as ``train: 1,200 images in 20 classes of 48 (ewer) to 61 (watch)``."""
    text, counts = f"{split}: {len(images):,} images", count_classes(images)
    if counts:
        least, most = (choose(counts, key=counts.__getitem__) for choose in (min, max))
        each = f"{counts[least]:,} each" if counts[least] == counts[most] else ""
        text += f" in {len(counts):,} classes of " + (
            each or f"{counts[least]:,} ({least}) to {counts[most]:,} ({most})"
        )
    return text


def describe(findings: Findings) -> str:
    """All kinds that were found, with their number and a few examples each."""
    lines = []
    for heading, kinds in (("wrong", WRONG), ("remarkable", REMARKABLE)):
        there = {kind: rows for kind in kinds if (rows := findings.of(kind))}
        lines += ["", f"{heading}:" if there else f"nothing is {heading}"]
        for kind, rows in there.items():
            examples = [_describe_row(row) for row in rows[:SHOWN]]
            if len(rows) > SHOWN:
                examples.append(f"and {len(rows) - SHOWN:,} more")
            heads = [f"  {kind:<12}{len(rows):>6}  ", *[" " * 22] * (len(examples) - 1)]
            lines += [head + example for head, example in zip(heads, examples, strict=True)]
    return "\n".join(lines)


def _describe_row(row: dict[str, str]) -> str:
    where = row["file"] or row["class"]
    if not where:
        return f"{row['split']}: {row['detail']}"
    place = where if where.startswith(f"{row['split']}/") else f"{row['split']}: {where}"
    return f"{place} ({row['detail']})" if row["detail"] else place


# -------------------------------------------------------------------------------------- the command line


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m analysis.check",
        description=__doc__,
    )
    add, cores = parser.add_argument, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    tasks = [name for name in TASKS if name in ("classify", "segment", "detect")]
    add("--task", choices=tasks, default="classify", help="whose data sets are meant (default: %(default)s)")
    add("--data-set", required=True, metavar="NAME", help=f"as for main.py: {first_few(list(sets_of('classify')), 4)}")
    add("--data-path", type=Path, metavar="DIR", help="folder of the data set")
    add("--out", type=Path, metavar="FILE.csv", help="file for all findings")
    add("--num-workers", type=at_least(int, 1), default=cores, metavar="N", help="threads (default: one a core)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Check, print and write; returns the exit code."""
    start_logging(0)
    if args.data_path:
        args.data_path = args.data_path.expanduser()
    if args.out:
        prepare_output_dir(args.out.parent, "--out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # listed as huge
        findings = check(args)
    print(describe(findings))
    if args.out:
        write_csv(args.out, findings.rows or [dict.fromkeys(("split", "kind", "class", "file", "detail"))])
        print(f"\nall findings: {args.out}")
    else:
        print("\n--out FILE.csv writes all findings")
    return int(any(findings.of(kind) for kind in WRONG))


def main(argv: list[str] | None = None) -> int:
    """Execute the command line; returns the exit code."""
    return exit_code(lambda: run(build_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
