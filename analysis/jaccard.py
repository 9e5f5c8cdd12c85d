"""Jaccard similarity of thresholded attention with ground-truth masks (Table 11; Table 12 (b)).

    python -m analysis.jaccard --checkpoint sar.pth --checkpoint base.pth --data-path VOCdevkit --out jaccard

The last block's [CLS] attention is thresholded, in each head, to the top 60 % of its mass. A class of an image is
worth the Jaccard similarity of its best head, an image the mean over its classes, a data set the mean over its images;
images without a class are skipped and counted. Images and masks are squashed to 480 x 480 px. Two rows beside the
models' say what the numbers mean: random maps of as many heads, thresholded alike (of the best of several heads even
chance gets a share), and the whole image as a mask.

--protocol void-excluded (the default) counts no pixel that the masks leave open. VOC marks the borders of objects, and
what is too hard to outline, as void, about 5 % of the pixels: neither object nor background, and left out by VOC's own
rules. --protocol paper-code is the released code: void is never object, so attention there counts as an error; and
positions and images are resampled as there (bicubic without antialiasing; bilinear), not as in training.

What "best head" of equal heads and "top" of equal patches are is fixed: the first head, the later patch in row order.
--out gets jaccard.csv (by class), images.csv (by image and class), results.json; with several checkpoints in a folder
each.
"""

import argparse
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode

from analysis.attention import MASS, attention_of, keep_mass, similarity_maps
from analysis.commands import (
    add_checkpoint_options,
    add_loading_options,
    add_model_options,
    load_batches,
    load_models,
    result_folders,
    write_results,
)
from analysis.images import squash
from analysis.models import TrainedModel
from cli import Parser, at_least, exit_code
from randomness import seed_sequence
from readers.masks import BACKGROUND, VOID, MaskedImages, count_labels, read_masked_images
from utils import UserError, pick_device, progress, start_logging


@dataclass(frozen=True)
class Protocol:
    """Whether void pixels count (as background), and how positions and images are resampled."""

    void_counts: bool
    positions: str
    interpolation: InterpolationMode


PROTOCOLS = {
    "void-excluded": Protocol(False, "timm", InterpolationMode.BICUBIC),
    "paper-code": Protocol(True, "released", InterpolationMode.BILINEAR),
}


# --------------------------------------------------------------------------------------------- the measure


class Best(NamedTuple):
    """The best head for a class of an image, from 0, and its Jaccard similarity, 0 to 1."""

    jaccard: float
    head: int


Scores = list[dict[int, Best]]
"""Of each image, by the labels of its classes; empty: no class."""


def jaccard(masks: Tensor, present: Tensor, counts: Tensor, void_counts: bool) -> Tensor:
    """Jaccard similarity of every mask of an image with every class in it, for a whole batch.

    Nothing is enlarged: a mask keeps or drops whole patches, so that how many pixels of a label it keeps is a sum over
    its patches. All counts are exact; the quotient is rounded to float32, as in the released code.

    Args:
        masks: bool ``(B, H, h, w)``.
        present, counts: the pixels of each label in each patch, from :func:`readers.masks.count_labels`.
        void_counts: void pixels are background; else they are nothing at all.

    Returns:
        float32 ``(B, H, K)`` for the ``K`` labels in ``present``; only those of classes mean something. NaN for a
        label that is not in the image.
    """
    kept, pixels = masks.flatten(2).double(), counts.flatten(2).double()
    intersection = kept @ pixels.mT
    size = pixels.sum(-1)[:, None]
    counting = torch.ones_like(present, dtype=torch.bool) if void_counts else present != VOID
    union = intersection[..., counting].sum(-1, keepdim=True) + size - intersection
    return torch.where(size > 0, intersection / union, torch.nan).float()


def best_heads(masks: Tensor, present: Tensor, counts: Tensor, void_counts: bool) -> Scores:
    """The best head for each class of each image; arguments as of :func:`jaccard`."""
    classes = (present != BACKGROUND) & (present != VOID)
    highest, heads = jaccard(masks, present, counts, void_counts)[..., classes].max(dim=1)
    labels = present[classes].tolist()
    return [
        {label: Best(*best) for label, *best in zip(labels, *row, strict=True) if not math.isnan(best[0])}
        for row in zip(highest.tolist(), heads.tolist(), strict=True)
    ]


def image_mean(image: dict[int, Best]) -> float:
    """Mean over the classes of an image that has any."""
    return statistics.fmean(best.jaccard for best in image.values())


def mean_over_images(scores: Scores) -> float:
    """The measure of Table 11, 0 to 1: the mean over the images that have a class."""
    return statistics.fmean(image_mean(image) for image in scores if image)


def by_class(scores: Scores) -> dict[int, list[float]]:
    """The Jaccard similarities of each class, by its label, rising."""
    labels = sorted({label for image in scores for label in image})
    return {label: [image[label].jaccard for image in scores if label in image] for label in labels}


def mean_over_classes(scores: Scores) -> float:
    """The mean of the classes' own means, 0 to 1: a class of many images weighs no more than a rare one."""
    return statistics.fmean(map(statistics.fmean, by_class(scores).values()))


def random_maps(numbers: list[int], shape: tuple[int, int, int]) -> Tensor:
    """Uniform maps ``(B, *shape)`` in 0..1 for images by number: an image's depend on nothing but its number."""
    seeds = [int(seed_sequence("random maps", number).generate_state(1)[0]) for number in numbers]
    return torch.stack([torch.rand(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


# ------------------------------------------------------------------------------------------ over a data set


class SquashedImages(Dataset):
    """``(image (3, size, size), labels uint8 (size, size), number)`` of images with masks."""

    def __init__(self, data: MaskedImages, size: int, interpolation: InterpolationMode):
        self.data, self.size = data, size
        self.transform = squash(size, interpolation)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return self.transform(self.data.image(index)), self.data.labels(index, self.size), index


@dataclass(frozen=True)
class Measured:
    """A model's scores and those of its baselines, and the shape of its maps: heads, rows, columns."""

    model: Scores
    random_maps: Scores
    whole_image: Scores
    shape: tuple[int, int, int]


def measure(
    trained: TrainedModel, loader: DataLoader, void_counts: bool, mass: float, device: torch.device
) -> Measured:
    """One pass of a model over batches of :class:`SquashedImages`.

    Raises:
        UnreadableImage: an image or mask that is truncated or none.
        UserError: no image has a class.
    """
    scores = {"model": [], "random_maps": [], "whole_image": []}
    for images, labels, numbers in progress(loader, trained.name):
        attention = attention_of(similarity_maps(trained.model, images.to(device, non_blocking=True)))
        shape = tuple(attention.shape[1:])
        masks = {
            "model": keep_mass(attention, mass),
            "random_maps": keep_mass(random_maps(numbers.tolist(), shape), mass).to(device),
            "whole_image": torch.ones_like(attention[:, :1], dtype=torch.bool),
        }
        present, counts = count_labels(labels.to(device, non_blocking=True), *shape[1:])
        for name, kept in masks.items():
            scores[name] += best_heads(kept, present, counts, void_counts)
    if not any(scores["model"]):
        raise UserError(
            "no image has a class: VOC's masks hold 0 for background, 255 for void and class numbers between them; "
            "masks of one object belong in masks/ beside images/"
        )
    return Measured(**scores, shape=shape)


# ---------------------------------------------------------------------------------------------- the results


def summarise(measured: Measured, data: MaskedImages) -> dict:
    """All figures of a model: percentages, numbers of images, and the same by class."""
    figures = {
        "jaccard": 100 * mean_over_images(measured.model),
        "random_maps": 100 * mean_over_images(measured.random_maps),
        "whole_image": 100 * mean_over_images(measured.whole_image),
        "mean_over_classes": 100 * mean_over_classes(measured.model),
        "images": sum(map(bool, measured.model)),
        "skipped": sum(not image for image in measured.model),
        "heads": measured.shape[0],
        "grid": list(measured.shape[1:]),
    }
    return figures | {"classes": class_rows(measured, data)}


def class_rows(measured: Measured, data: MaskedImages) -> list[dict]:
    """A row of jaccard.csv for each class: mean Jaccard similarities over the images that have it, percent."""
    ways = (measured.model, measured.random_maps, measured.whole_image)
    model, by_chance, whole = ({k: 100 * statistics.fmean(v) for k, v in by_class(way).items()} for way in ways)
    numbers = {label: len(values) for label, values in by_class(measured.model).items()}
    return [
        {
            "class": data.class_name(label),
            "label": label,
            "images": numbers[label],
            "jaccard": model[label],
            "random_maps": by_chance[label],
            "whole_image": whole[label],
        }
        for label in numbers
    ]


def image_rows(measured: Measured, data: MaskedImages) -> list[dict]:
    """A row of images.csv for each class of each image (an image without one has a row of empty fields).

    Heads are counted from 1; similarities are percentages; ``image_jaccard`` is the mean over the image's classes.
    """
    rows = []
    ways = (measured.model, measured.random_maps, measured.whole_image)
    for name, image, by_chance, whole in zip(data.names, *ways, strict=True):
        for label in image or [None]:
            row = dict.fromkeys("image class label head jaccard image_jaccard random_maps whole_image".split())
            row["image"] = name
            if label is not None:
                row |= {"class": data.class_name(label), "label": label, "head": image[label].head + 1}
                row |= {"jaccard": 100 * image[label].jaccard, "image_jaccard": 100 * image_mean(image)}
                row |= {"random_maps": 100 * by_chance[label].jaccard, "whole_image": 100 * whole[label].jaccard}
            rows.append(row)
    return rows


def as_markdown(results: dict[str, Measured]) -> str:
    """The printed table: a row a model, one for random maps of each shape, one for the whole image."""
    rows = [(name.replace("|", "\\|"), measured.model) for name, measured in results.items()]
    baselines = {}
    for measured in results.values():
        baselines["random maps, {} of {} x {}".format(*measured.shape)] = measured.random_maps
        baselines["the whole image"] = measured.whole_image
    lines = ["| | Jaccard | mean over classes | images | skipped |", "|---|---:|---:|---:|---:|"]
    for name, scores in [*rows, *baselines.items()]:
        with_class = sum(map(bool, scores))
        means = f"{100 * mean_over_images(scores):.2f} | {100 * mean_over_classes(scores):.2f}"
        lines.append(f"| {name} | {means} | {with_class} | {len(scores) - with_class} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------ the command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m analysis.jaccard",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add_checkpoint_options(parser, required=True)
    add("--data-path", required=True, metavar="DIR", help="VOCdevkit or alike; or a folder with images/ and masks/")
    add("--split", metavar="NAME", help="of VOC's lists (default: val)")
    add("--out", type=Path, metavar="DIR", help="keep the results there")
    add("--protocol", choices=PROTOCOLS, default="void-excluded", help="default: %(default)s")
    add("--mass", type=at_least(float, 0, 1, open_low=True), default=MASS, help="share kept (default: %(default)s)")
    add("--input-size", type=at_least(int, 1, 4096), default=480, metavar="PX", help="default: %(default)s")
    add_model_options(parser)
    add_loading_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure, print and keep; returns the exit code."""
    return exit_code(lambda: run(parse_args(argv)))


def run(args: argparse.Namespace) -> int:
    """Carry the command out; all that can be wrong with its input is known before a model runs."""
    start_logging(0)
    device, protocol = pick_device(args.device), PROTOCOLS[args.protocol]
    data = read_masked_images(args.data_path, args.split)
    models = load_models(args, device, protocol.positions)
    folders = result_folders(args, models)
    loader = load_batches(SquashedImages(data, args.input_size, protocol.interpolation), args, device)
    settings = {name: getattr(args, name) for name in ("data_path", "input_size", "mass", "protocol")}
    results = {}
    for model, path, folder in zip(models, args.checkpoint, folders, strict=True):
        measured = results[model.name] = measure(model, loader, protocol.void_counts, args.mass, device)
        if folder:
            about = settings | {"split": data.split, "checkpoint": path, "model": model.name}
            tables = {"jaccard.csv": class_rows(measured, data), "images.csv": image_rows(measured, data)}
            write_results(folder, tables, about | summarise(measured, data))
    place = args.data_path if data.split is None else f"{args.data_path}, {data.split}"
    print(f"Jaccard similarity, %: {args.protocol}, {args.mass:.0%} of the mass, {args.input_size} px; {place}\n")
    print(as_markdown(results))
    if args.out:
        print(f"\nresults: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
