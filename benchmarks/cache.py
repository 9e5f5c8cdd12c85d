"""Time loading with and without --cache-images: epochs a minute of the loader alone, as in training.

    python -m benchmarks.cache --data-path caltech20                       # an image folder, 224 px
    python -m benchmarks.cache --data-set cars --data-path data --num-workers 8

An epoch is every training image once: read, decoded (or taken from memory), random crop, flip, RandAugment,
random erasing, batched. Both kinds run in turn in every repeat; the table holds medians. Expected: the cache saves
the decoding, a few per cent for photographs of 300 x 200 px, whose augmentation takes longer; more for larger ones.
"""

import argparse
import platform
import statistics
import time

import torch

from arguments import parse_arguments
from cli import HelpFormatter
from datasets import build_loader, cache_splits
from samplers import TrainSampler
from tasks import load_task
from utils import Processes, start_logging

KINDS = {"files": [], "memory": ["--cache-images"]}


def make_epoch(options, kind: str):
    """A function that loads one epoch of training batches and returns its number of images."""
    words = ["--data-set", options.data_set, "--data-path", options.data_path, "--aa", options.aa, *KINDS[kind]]
    args = parse_arguments([*words, "--input-size", str(options.input_size)])
    alone = Processes(0, 1, torch.device("cpu"))
    dataset = load_task(args.task).data(args, "train", alone)
    if args.cache_images:
        cache_splits([dataset], alone)
    sampler = TrainSampler(len(dataset), options.batch_size)
    loader = build_loader(dataset, sampler, options.batch_size, options.num_workers)

    def epoch() -> int:
        return sum(len(batch["images"]) for batch in loader)

    return epoch


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--data-set", default="folder", help="name of the data set")
    parser.add_argument("--data-path", required=True)
    parser.add_argument("--input-size", type=int, default=224, help="px")
    parser.add_argument("--aa", default="rand-m9-mstd0.5-inc1", help="RandAugment as in training, or none")
    parser.add_argument("--batch-size", type=int, default=64, help="images")
    parser.add_argument("--num-workers", type=int, default=2, help="loader workers")
    parser.add_argument("--repeats", type=int, default=5, help="timed epochs of each kind")
    parser.add_argument("--warmup", type=int, default=1, help="epochs before them")
    options = parser.parse_args(argv)
    start_logging(0)
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {options.num_workers} workers")
    epochs = {kind: make_epoch(options, kind) for kind in KINDS}
    times = {kind: [] for kind in KINDS}
    for repeat in range(options.repeats + options.warmup):
        for kind, epoch in epochs.items():
            began = time.perf_counter()
            images = epoch()
            if repeat >= options.warmup:
                times[kind].append(time.perf_counter() - began)
    seconds = {kind: statistics.median(values) for kind, values in times.items()}
    print(f"{images} images at {options.input_size} px, --aa {options.aa}\n")
    print("| images from | s an epoch | epochs a minute | images a second | ratio |")
    print("|---|---|---|---|---|")
    for kind, value in seconds.items():
        ratio = seconds["files"] / value
        print(f"| {kind} | {value:.2f} | {60 / value:.1f} | {images / value:.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
