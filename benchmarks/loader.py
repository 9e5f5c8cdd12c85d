"""Time the loading of images: this project's way against DeiT's, CPU time an image on one core.

    python -m benchmarks.loader --images DIR                 # a folder of photographs, such as some of ImageNet's
    python -m benchmarks.loader --images DIR --repeats 5

DeiT's way is torchvision's reading of an image folder with timm's transform, as its data set builds it. Ours leaves
normalisation and random erasing to the device. Both take turns in every repeat, in one process and one thread; the
table holds medians over the repeats. The crops' rows compare ours with cutting each crop from the Pillow image.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import default_collate
from torchvision import transforms
from torchvision.datasets.folder import pil_loader

import randomness
from augmentation import TrainTransform, as_pillow, as_tensor, eval_transform
from cli import HelpFormatter, at_least
from crops import random_box, resize_crops
from datasets import AugmentedDataset, collate
from randomness import isolated_rng
from readers.files import list_images
from readers.images import ImageFiles, decode
from samplers import Draw
from utils import progress, start_logging

GLOBAL, LOCAL = (0.4, 1.0), (0.05, 0.4)  # area of DINO's crops
BATCH = 32
Way = Callable[[int], object]


def training_ways(files: ImageFiles) -> dict[str, tuple[Way, Way]]:
    """A whole item of training and of evaluation: DeiT's way and ours, as functions of the image's number."""
    deit, without_policy = (
        create_transform(
            224,
            is_training=True,
            color_jitter=None,  # type: ignore[arg-type]  # none beside RandAugment
            auto_augment=policy,
            interpolation="bicubic",
            re_prob=0.25,
            re_mode="pixel",
        )
        for policy in ("rand-m9-mstd0.5-inc1", None)
    )
    evaluation = create_transform(224, interpolation="bicubic", crop_pct=0.875)
    ours = {
        "training": TrainTransform(224),
        "training, no RandAugment": TrainTransform(224, aa="none", color_jitter=0),
        "evaluation": eval_transform(224),
    }
    theirs = {"training": deit, "training, no RandAugment": without_policy, "evaluation": evaluation}

    def deits(transform) -> Way:
        return collated(lambda number: (transform(pil_loader(files._location(number))), 0), len(files), default_collate)

    def our_items(transform) -> Way:
        dataset = AugmentedDataset(files, transform)
        return collated(lambda number: dataset[Draw(number, 0, number)], len(files), collate)

    return {f"{name}, collated": (deits(theirs[name]), our_items(ours[name])) for name in ours}


def collated(item: Way, count: int, collate_items: Callable) -> Way:
    """Collect items, and collate each full batch as a loader's worker does."""
    items: list[object] = []

    def collect(number: int) -> object:
        items.append(item(number))
        if len(items) < BATCH and number < count - 1:
            return None
        batch = collate_items(items)
        items.clear()
        return batch

    return collect


def part_ways(files: ImageFiles) -> dict[str, tuple[Way, Way]]:
    """Each part alone, on decoded images."""
    paths = [files._location(number) for number in range(len(files))]
    pictures = [pil_loader(path) for path in paths]
    images = [as_tensor(picture) for picture in pictures]
    crop = RandomResizedCropAndInterpolation(224, (0.08, 1.0), interpolation="bicubic")
    cropped = [crop(picture) for picture in pictures]
    tensors = [as_tensor(picture).contiguous() for picture in cropped]
    finish = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])
    colours = TrainTransform(224).colours
    _, timms, _ = create_transform(
        224, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic", separate=True
    )

    def decode_file(number: int) -> object:
        return decode(Path(paths[number]).read_bytes())

    def crop_tensor(number: int) -> object:
        image = images[number]
        return resize_crops(image, [random_box(image.shape[1], image.shape[2], (0.08, 1.0))], 224)

    def seed(number: int) -> None:
        with isolated_rng("augmentation", 0, 0, number):
            pass

    return {
        "decoding": (lambda number: pil_loader(paths[number]), decode_file),
        "crop and resize": (lambda number: crop(pictures[number]), crop_tensor),
        "RandAugment": (
            lambda number: timms(cropped[number]),
            lambda number: as_tensor(colours(as_pillow(tensors[number]))),
        ),
        "to tensor, normalise": (lambda number: finish(cropped[number]), lambda number: None),
        "random numbers": (lambda number: None, seed),
    }


def crop_ways(files: ImageFiles) -> dict[str, tuple[Way, Way]]:
    """Two crops of 224 px, and eight more of 96 px, with decoding, without what follows a crop."""
    finish = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])

    def theirs(local: int) -> Way:
        large = transforms.RandomResizedCrop(224, GLOBAL, interpolation=Image.Resampling.BICUBIC)  # type: ignore
        small = transforms.RandomResizedCrop(96, LOCAL, interpolation=Image.Resampling.BICUBIC)  # type: ignore

        def crops(number: int) -> object:
            image = pil_loader(files._location(number))
            return [finish(large(image)) for _ in range(2)] + [finish(small(image)) for _ in range(local)]

        return crops

    def ours(local: int) -> Way:
        def crops(number: int) -> object:
            image, _ = files[number]
            h, w = image.shape[1:]
            large = resize_crops(image, [random_box(h, w, GLOBAL) for _ in range(2)], 224)
            small = [random_box(h, w, LOCAL) for _ in range(local)]
            return [large, resize_crops(image, small, 96) if local else None]

        return crops

    return {"two crops": (theirs(0), ours(0)), "2 + 8 crops": (theirs(8), ours(8))}


def time_ways(ways: dict[str, tuple[Way, Way]], count: int, repeats: int) -> dict[str, list[float]]:
    """Median CPU time an image in milliseconds of both ways of each row."""
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ways}
    for _ in progress(range(repeats), "repeats"):
        for name, pair in ways.items():
            for way, taken in zip(pair, seconds[name], strict=True):
                random.seed(0)  # both ways see the same draws where they draw alike
                np.random.seed(0)  # noqa: NPY002
                start = time.process_time()
                for number in range(count):
                    way(number)
                taken.append(time.process_time() - start)
    return {name: [1000 * statistics.median(taken) / count for taken in both] for name, both in seconds.items()}


def main(arguments: list[str] | None = None) -> int:
    """Print a table: milliseconds and images a second of a core."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--images", type=Path, required=True, help="folder of image files")
    parser.add_argument("--repeats", type=at_least(int, 1), default=5, help="rounds over all images")
    args = parser.parse_args(arguments)
    start_logging(0)
    torch.set_num_threads(1)
    randomness.get_worker_info = lambda: "a worker"  # type: ignore  # it restores no generator
    paths = list_images(args.images)
    files = ImageFiles(args.images, [str(path.relative_to(args.images)) for path in paths], [0] * len(paths), ["any"])
    print(f"{len(files)} images, one thread, {args.repeats} repeats, torch {torch.__version__}\n")
    print("| what | DeiT's ms | ours ms | ratio | ours images/s a core |")
    print("|---|---|---|---|---|")
    for name, (theirs, ours) in time_ways(
        training_ways(files) | part_ways(files) | crop_ways(files), len(files), args.repeats
    ).items():
        compared = f"**{theirs / ours:.2f}** | {1000 / ours:,.0f}" if min(theirs, ours) > 0.01 else "|"
        print(f"| {name} | {theirs:.2f} | {ours:.2f} | {compared} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
