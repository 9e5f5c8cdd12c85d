"""Measures of how blob-like attention maps are on a folder of images, and ground-truth objects in a set of masks.

    python -m analysis.measures --checkpoint sar.pth --checkpoint base.pth --images DIR --out measures
    python -m analysis.measures --masks VOCdevkit --grid 14 --out bias

Maps: for each head, the spatial entropy (Eq. 7) of the similarity map, the number of 8-connected components above its
mean, and the number of patches of the largest component, also as a fraction of all patches above the mean. Images are
resized and cropped as in evaluation. --out gets heads.csv, images.csv (one row per image and head) and results.json;
with several checkpoints, in one folder per model.

Masks: the spatial bias that SAR assumes, measured on ground truth: the number of 8-connected components of an image's
foreground (all objects together) on the k x k patch grid. The mask is resized to a square without keeping its aspect
ratio; a patch is foreground if objects cover more than half of its pixels that are not void. An object that nowhere
covers half a patch adds no component; images without an object are skipped and counted. --out gets images.csv and
results.json.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from analysis.attention import component_sizes, measure_maps, similarity_maps
from analysis.commands import (
    add_checkpoint_options,
    add_loading_options,
    add_model_options,
    load_batches,
    load_models,
    result_folders,
    write_results,
)
from analysis.models import TrainedModel
from augmentation import as_tensor, eval_transform
from batches import device_batches
from cli import Parser, at_least, exit_code
from readers.files import list_images
from readers.images import read_photograph
from readers.masks import BACKGROUND, VOID, MaskedImages, count_labels, read_masked_images
from utils import UserError, pick_device, prepare_output_dir, progress, start_logging

GRID = 14
"""Patches per side in the paper's models: 224 px in patches of 16."""
PATCH = 16
"""Side of a patch of a resized mask, px."""
MEASURES = ("entropy", "components", "largest", "kept", "share")


# ------------------------------------------------------------------------------------------------ of maps


class CroppedImages(Dataset):
    """Photographs, upright, transformed as in evaluation at this input size: uint8 ``(3, size, size)``."""

    def __init__(self, paths: list[Path], size: int, crop_pct: float | None = None):
        self.paths, self.transform = paths, eval_transform(size, crop_pct)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(as_tensor(read_photograph(self.paths[index])))


def measure_images(trained: TrainedModel, loader, device: torch.device) -> dict[str, Tensor]:
    """All :data:`MEASURES` of every image's maps: ``(N, H)`` on the CPU.

    ``largest`` and ``kept`` are numbers of patches: of the largest component, and above the mean. ``share`` is
    ``largest / kept``; 0 for a constant map, which has no patch above its mean.
    """
    batches = []
    for images in device_batches(progress(loader, trained.name), device):
        found = measure_maps(similarity_maps(trained.model, images))
        batches.append({name: values.cpu() for name, values in found.items()})
    measured = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    return measured | {"share": measured["largest"] / measured["kept"].clamp_min(1)}


def head_rows(measured: dict[str, Tensor]) -> list[dict]:
    """Means over the images: one row per head (numbered from 1), and a last row with the means over the heads."""
    means = {name: measured[name].double().mean(0) for name in MEASURES}
    heads = len(means["entropy"])
    rows = [{"head": head + 1} | {name: means[name][head].item() for name in MEASURES} for head in range(heads)]
    return [*rows, {"head": "mean"} | {name: means[name].mean().item() for name in MEASURES}]


def image_rows(measured: dict[str, Tensor], names: list[str]) -> list[dict]:
    """One row per image and head; heads are numbered from 1."""
    values = {name: measured[name].tolist() for name in MEASURES}
    return [
        {"image": image, "head": head + 1} | {name: values[name][index][head] for name in MEASURES}
        for index, image in enumerate(names)
        for head in range(measured["entropy"].shape[1])
    ]


def maps_as_markdown(results: dict[str, list[dict]]) -> str:
    """The rows of :func:`head_rows` of each model as one table."""
    lines = ["| model | head | spatial entropy | components | largest, patches | share of the mask |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    for model, rows in results.items():
        lines += [
            f"| {model} | {row['head']} | {row['entropy']:.3f} | {row['components']:.2f} | {row['largest']:.1f} | "
            f"{row['share']:.1%} |"
            for row in rows
        ]
    return "\n".join(lines)


def run_maps(args: argparse.Namespace) -> None:
    """Measure the maps of the models on --images, print them and write the results."""
    device, paths = pick_device(args.device), list_images(args.images)
    models = load_models(args, device)
    folders = result_folders(args, models)
    images = [path.relative_to(args.images).as_posix() for path in paths]
    results = {}
    for model, path, folder in zip(models, args.checkpoint, folders, strict=True):
        loader = load_batches(CroppedImages(paths, model.input_size, model.crop_pct), args, device)
        measured = measure_images(model, loader, device)
        *heads, mean = results[model.name] = head_rows(measured)
        if folder:
            about = {"checkpoint": path, "model": model.name, "input_size": model.input_size, "data_path": args.images}
            tables = {"heads.csv": [*heads, mean], "images.csv": image_rows(measured, images)}
            write_results(folder, tables, about | {"images": len(paths), "heads": heads, "mean": mean})
    print(f"{len(paths)} images in {args.images}; means over them\n\n{maps_as_markdown(results)}")


# ----------------------------------------------------------------------------------------------- of masks


class SquashedMasks(Dataset):
    """Masks resized to ``PATCH`` px per patch of the grid: uint8 labels ``(size, size)``."""

    def __init__(self, data: MaskedImages, grid: int):
        self.data, self.size = data, PATCH * grid

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Tensor:
        return self.data.labels(index, self.size)


def foreground(labels: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """The foreground patches of masks on a ``grid x grid``.

    Args:
        labels: uint8 ``(B, H, W)``.
        grid: patches per side.
    Returns:
        bool ``(B, grid, grid)``: objects cover more than half of the patch's pixels that are not void; bool ``(B,)``:
        the mask holds an object.
    """
    present, counts = count_labels(labels, grid, grid)
    known = present != VOID
    objects = counts[:, known & (present != BACKGROUND)].sum(1)
    return 2 * objects > counts[:, known].sum(1), objects.flatten(1).any(1)


def measure_masks(loader, grid: int) -> tuple[Tensor, Tensor]:
    """Numbers of components and of patches of each image's foreground: int64 ``(N,)`` each, -1 without an object."""
    components, patches = [], []
    for labels in progress(loader, "masks"):
        cells, has_object = foreground(labels, grid)
        sizes = component_sizes(cells)
        components.append(torch.where(has_object, (sizes > 0).sum(-1), -1))
        patches.append(torch.where(has_object, sizes.sum(-1), -1))
    return torch.cat(components), torch.cat(patches)


def summarise_masks(components: Tensor) -> dict:
    """Mean number of components, and the number of images with 0, 1, 2, ... of them.

    Raises:
        UserError: no image has an object.
    """
    with_object = components[components >= 0]
    if not len(with_object):
        raise UserError("no mask has an object: all hold only 0 (background) and 255 (void)")
    images = with_object.bincount().tolist()
    return {
        "components": with_object.double().mean().item(),
        "exactly_one": 100 * images[1] / len(with_object) if len(images) > 1 else 0.0,
        "images_by_components": images,
        "images": len(with_object),
        "skipped": len(components) - len(with_object),
    }


def masks_as_markdown(summary: dict) -> str:
    """The histogram of components as a table, and a line with the mean."""
    lines = ["| components | images | share |", "|---|---:|---:|"]
    lines += [
        f"| {number} | {images} | {images / summary['images']:.1%} |"
        for number, images in enumerate(summary["images_by_components"])
    ]
    mean = f"{summary['components']:.2f} components on average, exactly one in {summary['exactly_one']:.1f} %"
    return "\n".join([*lines, "", f"{mean} of {summary['images']} images; {summary['skipped']} without object skipped"])


def mask_rows(names: list[str], components: Tensor, patches: Tensor) -> list[dict]:
    """One row per image; an image without an object gets empty fields."""
    columns = zip(names, components.tolist(), patches.tolist(), strict=True)
    return [
        {"image": name, "components": None if number < 0 else number, "patches": None if size < 0 else size}
        for name, number, size in columns
    ]


def run_masks(args: argparse.Namespace) -> None:
    """Measure the foregrounds of --masks, print them and write the results."""
    data, grid = read_masked_images(args.masks, args.split), args.grid or GRID
    if args.out:
        prepare_output_dir(args.out, "--out")
    components, patches = measure_masks(load_batches(SquashedMasks(data, grid), args, torch.device("cpu")), grid)
    summary = summarise_masks(components)
    if args.out:
        about = {"data_path": args.masks, "split": data.split, "grid": grid}
        write_results(args.out, {"images.csv": mask_rows(data.names, components, patches)}, about | summary)
    print(f"Foreground of {args.masks} on {grid} x {grid} patches\n\n{masks_as_markdown(summary)}")


# ------------------------------------------------------------------------------------------ the command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m analysis.measures",
        description=__doc__,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", metavar="DIR", help="measure the maps of the images in this folder")
    source.add_argument(
        "--masks",
        metavar="DIR",
        help="measure the masks of VOCdevkit (or the same layout), or of a folder with images/ and masks/",
    )
    add = parser.add_argument
    add_checkpoint_options(parser, required=False)
    add(
        "--input-size",
        type=at_least(int, 1, 4096),
        metavar="PX",
        help="with --images: input size (default: the model's)",
    )
    add("--split", metavar="NAME", help="with --masks: list of VOC to use (default: val)")
    add("--grid", type=at_least(int, 1, 256), metavar="K", help=f"with --masks: patches per side (default: {GRID})")
    add("--out", type=Path, metavar="DIR", help="output folder for the results")
    add_model_options(parser)
    add_loading_options(parser)
    args = parser.parse_args(argv)
    given, foreign = (
        ("--images", ("split", "grid")) if args.images else ("--masks", ("checkpoint", "name", "input_size"))
    )
    for name in foreign:
        if getattr(args, name) is not None:
            parser.error(f"--{name.replace('_', '-')} has no effect with {given}; leave it out")
    if args.images and not args.checkpoint:
        parser.error("--images needs --checkpoint, the model whose maps are measured")
    return args


def main(argv: list[str] | None = None) -> int:
    """Execute the command line; returns the exit code (2: bad usage)."""
    return exit_code(lambda: run(parse_args(argv)))


def run(args: argparse.Namespace) -> int:
    """Measure maps or masks; errors in the input are raised before a model runs."""
    start_logging(0)
    run_maps(args) if args.images else run_masks(args)
    if args.out:
        print(f"\nresults: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
