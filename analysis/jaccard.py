"""Jaccard similarity of thresholded attention with ground-truth masks (Table 11; Table 12 (b)).

    python -m analysis.jaccard --checkpoint sar.pth --checkpoint base.pth --data-path VOCdevkit --out jaccard

In each head, the last block's [CLS] attention is thresholded to the top 60 % of its mass. The score of a class in an
image is the Jaccard similarity of its best head; the score of an image is the mean over its classes; the score of a
data set is the mean over its images. Images without a class are skipped and counted. Images and masks are resized to
480 x 480 px without keeping their aspect ratio. Two baselines are reported for comparison: random maps with the same
number of heads, thresholded in the same variant (the best of several heads scores above zero even by chance), and the
whole image as a mask.

--protocol void-excluded (the default) ignores pixels that the masks leave undecided. VOC marks object borders and
ambiguous regions as void, about 5 % of the pixels; VOC's own evaluation ignores them. --protocol paper-code follows
the released code: void counts as background, so that attention there is an error; positions and images are resampled
as in that code (bicubic without antialiasing; bilinear), not as in training.

Ties are broken deterministically: of equal heads the first is best, of equal patches the later one in row-major order
ranks higher. --out gets jaccard.csv (per class), images.csv (per image and class) and results.json; with several
checkpoints, in one folder per model.
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
from utils import UserError, float64_device, pick_device, progress, start_logging


@dataclass(frozen=True)
class Protocol:
    """Whether void pixels count as background, and how positions and images are resampled."""

    void_counts: bool
    positions: str
    interpolation: InterpolationMode


PROTOCOLS = {
    "void-excluded": Protocol(False, "timm", InterpolationMode.BICUBIC),
    "paper-code": Protocol(True, "released", InterpolationMode.BILINEAR),
}


# --------------------------------------------------------------------------------------------- the measure


class BestHead(NamedTuple):
    """The best head (from 0) for a class of an image, and its Jaccard similarity (0 to 1)."""

    jaccard: float
    head: int


Scores = list[dict[int, BestHead]]
"""For each image: label of a class -> its best head; empty for an image without a class."""


def jaccard(masks: Tensor, present: Tensor, counts: Tensor, void_counts: bool) -> Tensor:
    """Jaccard similarity of every head's mask with every class, for a batch of images.

    Masks are not upsampled: as a mask consists of whole patches, the number of a label's pixels in it is a sum over
    patches. All counts are exact; the quotient is rounded to float32, as in the released code.

    Args:
        masks: bool ``(B, H, h, w)``.
        present, counts: the pixels of each label in each patch, from :func:`readers.masks.count_labels`.
        void_counts: count void pixels as background; else ignore them.

    Returns:
        float32 ``(B, H, K)`` for the ``K`` labels in ``present``, meaningful for classes only (neither background nor
        void). NaN for a label that is not in the image.
    """
    kept, pixels = masks.flatten(2).double(), counts.flatten(2).double()
    intersection = kept @ pixels.mT
    size = pixels.sum(-1)[:, None]
    counting = torch.ones_like(present, dtype=torch.bool) if void_counts else present != VOID
    union = intersection[..., counting].sum(-1, keepdim=True) + size - intersection
    return torch.where(size > 0, intersection / union, torch.nan).float()


def best_heads(masks: Tensor, present: Tensor, counts: Tensor, void_counts: bool) -> Scores:
    """The best head for each class of each image; arguments as for :func:`jaccard`."""
    classes = (present != BACKGROUND) & (present != VOID)
    highest, heads = jaccard(masks, present, counts, void_counts)[..., classes].max(dim=1)
    labels = present[classes].tolist()
    return [
        {label: BestHead(*best) for label, *best in zip(labels, *row, strict=True) if not math.isnan(best[0])}
        for row in zip(highest.tolist(), heads.tolist(), strict=True)
    ]


def image_mean(image: dict[int, BestHead]) -> float:
    """Mean over the classes of an image with at least one class."""
    return statistics.fmean(best.jaccard for best in image.values())


def mean_over_images(scores: Scores) -> float:
    """The score of Table 11, 0 to 1: the mean over the images that have a class."""
    return statistics.fmean(image_mean(image) for image in scores if image)


def by_class(scores: Scores) -> dict[int, list[float]]:
    """Label of each class (ascending) -> its Jaccard similarities over the images."""
    labels = sorted({label for image in scores for label in image})
    return {label: [image[label].jaccard for image in scores if label in image] for label in labels}


def mean_over_classes(scores: Scores) -> float:
    """The unweighted mean over the classes of their mean over images, 0 to 1."""
    return statistics.fmean(map(statistics.fmean, by_class(scores).values()))


def random_maps(numbers: list[int], shape: tuple[int, int, int]) -> Tensor:
    """Uniform random maps ``(B, *shape)`` in 0..1, seeded by each image's number alone."""
    seeds = [int(seed_sequence("random maps", number).generate_state(1)[0]) for number in numbers]
    return torch.stack([torch.rand(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


# ------------------------------------------------------------------------------------------ evaluation of a data set


class SquashedImages(Dataset):
    """Items ``(image (3, size, size), labels uint8 (size, size), index)`` of images with masks, resized to a square."""

    def __init__(self, data: MaskedImages, size: int, interpolation: InterpolationMode):
        self.data, self.size = data, size
        self.transform = squash(size, interpolation)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return self.transform(self.data.image(index)), self.data.labels(index, self.size), index


@dataclass(frozen=True)
class ScoresWithBaselines:
    """The scores of a model and of its baselines; ``shape`` of its maps: heads, rows, columns."""

    model: Scores
    random_maps: Scores
    whole_image: Scores
    shape: tuple[int, int, int]


def measure_model(
    trained: TrainedModel, loader: DataLoader, void_counts: bool, mass: float, device: torch.device
) -> ScoresWithBaselines:
    """Score a model and its baselines on batches of :class:`SquashedImages`.

    Args:
        trained: the model.
        loader: of the batches.
        void_counts: see :func:`jaccard`.
        mass: fraction of the attention that the masks keep.
        device: of the model.
    Raises:
        UnreadableImage: an image or mask that is truncated or not an image.
        UserError: no image has a class.
    """
    scores: dict[str, Scores] = {"model": [], "random_maps": [], "whole_image": []}
    counting = float64_device(device)
    for images, labels, numbers in progress(loader, trained.name):
        attention = attention_of(similarity_maps(trained.model, images.to(device))).to(counting)
        heads, h, w = attention.shape[1:]
        shape = (heads, h, w)
        masks = {
            "model": keep_mass(attention, mass),
            "random_maps": keep_mass(random_maps(numbers.tolist(), shape), mass).to(counting),
            "whole_image": torch.ones_like(attention[:, :1], dtype=torch.bool),
        }
        present, counts = count_labels(labels.to(counting), *shape[1:])
        for name, kept in masks.items():
            scores[name] += best_heads(kept, present, counts, void_counts)
    if not any(scores["model"]):
        raise UserError(
            "no image has a class: VOC's masks hold 0 for background, 255 for void and class numbers between them; "
            "masks of one object belong in masks/ beside images/"
        )
    return ScoresWithBaselines(**scores, shape=shape)


# ---------------------------------------------------------------------------------------------- the results


def summarise(measured: ScoresWithBaselines, data: MaskedImages) -> dict:
    """A model's results: mean scores (percent), numbers of images, and the same for each class."""
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


def class_rows(measured: ScoresWithBaselines, data: MaskedImages) -> list[dict]:
    """One row of jaccard.csv per class: mean Jaccard similarities (percent) over the images with that class."""
    variants = (measured.model, measured.random_maps, measured.whole_image)
    model, by_chance, whole = (
        {k: 100 * statistics.fmean(v) for k, v in by_class(variant).items()} for variant in variants
    )
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


def image_rows(measured: ScoresWithBaselines, data: MaskedImages) -> list[dict]:
    """One row of images.csv per class of each image; an image without a class gets a row with empty fields.

    Heads are numbered from 1; similarities are percentages; ``image_jaccard`` is the mean over the image's classes.
    """
    rows = []
    variants = (measured.model, measured.random_maps, measured.whole_image)
    for name, image, by_chance, whole in zip(data.names, *variants, strict=True):
        for label in image or [None]:
            row = dict.fromkeys("image class label head jaccard image_jaccard random_maps whole_image".split())
            row["image"] = name
            if label is not None:
                row |= {"class": data.class_name(label), "label": label, "head": image[label].head + 1}
                row |= {"jaccard": 100 * image[label].jaccard, "image_jaccard": 100 * image_mean(image)}
                row |= {"random_maps": 100 * by_chance[label].jaccard, "whole_image": 100 * whole[label].jaccard}
            rows.append(row)
    return rows


def as_markdown(results: dict[str, ScoresWithBaselines]) -> str:
    """The printed table: one row per model, per shape of random maps, and for the whole image."""
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
    )
    add = parser.add_argument
    add_checkpoint_options(parser, required=True)
    add(
        "--data-path",
        required=True,
        metavar="DIR",
        help="VOCdevkit or the same layout; or a folder with images/ and masks/",
    )
    add("--split", metavar="NAME", help="list of VOC to use (default: val)")
    add("--out", type=Path, metavar="DIR", help="output folder for the results")
    add(
        "--protocol",
        choices=PROTOCOLS,
        default="void-excluded",
        help="treatment of void and resampling, see above (default: %(default)s)",
    )
    add(
        "--mass",
        type=at_least(float, 0, 1, open_low=True),
        default=MASS,
        help="fraction of the attention to keep (default: %(default)s)",
    )
    add(
        "--input-size",
        type=at_least(int, 1, 4096),
        default=480,
        metavar="PX",
        help="input size of all models (default: %(default)s)",
    )
    add_model_options(parser)
    add_loading_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Execute the command line; returns the exit code (2: bad usage)."""
    return exit_code(lambda: run(parse_args(argv)))


def run(args: argparse.Namespace) -> int:
    """Measure all models, print the table and write the results; errors in the input are raised before a model runs."""
    # 1. read data and models
    start_logging(0)
    device, protocol = pick_device(args.device), PROTOCOLS[args.protocol]
    data = read_masked_images(args.data_path, args.split)
    models = load_models(args, device, protocol.positions)
    folders = result_folders(args, models)
    loader = load_batches(SquashedImages(data, args.input_size, protocol.interpolation), args, device)
    settings = {name: getattr(args, name) for name in ("data_path", "input_size", "mass", "protocol")}
    # 2. measure one model after another, and write its results at once
    results = {}
    for model, path, folder in zip(models, args.checkpoint, folders, strict=True):
        measured = results[model.name] = measure_model(model, loader, protocol.void_counts, args.mass, device)
        if folder:
            about = settings | {"split": data.split, "checkpoint": path, "model": model.name}
            tables = {"jaccard.csv": class_rows(measured, data), "images.csv": image_rows(measured, data)}
            write_results(folder, tables, about | summarise(measured, data))
    # 3. print the table
    place = args.data_path if data.split is None else f"{args.data_path}, {data.split}"
    print(f"Jaccard similarity, %: {args.protocol}, {args.mass:.0%} of the mass, {args.input_size} px; {place}\n")
    print(as_markdown(results))
    if args.out:
        print(f"\nresults: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
