"""Time analysis.jaccard against a loop that takes image by image, class by class, head by head, pixel by pixel.

    python -m benchmarks.jaccard --checkpoint best.pth --data-path VOCdevkit               # at 480 px
    python -m benchmarks.jaccard --checkpoint best.pth --data-path VOCdevkit --input-size 64 --threads 1

"measure": from attention and masks in memory to the best head of each class (threshold, count, compare). "command":
from the files to there, model included; batched, with loading processes and the baselines' masks, against one image
after the other in one process. The loop enlarges each thresholded mask to pixels, as one writes it down first. Both
ways run in turn in every repeat; the table holds medians, and counts the images whose scores are not the same numbers.

Expected on one core: the measure 13 times faster at 64 px, twice at 480 px, where counting the pixels of large masks
takes most of the time; the whole command half as fast again at 64 px, and no faster at 480 px, where the model is all.
"""

import argparse
import platform
import statistics
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.attention import MASS, attention_of, keep_mass, similarity_maps
from analysis.commands import add_loading_options, add_model_options, load_batches
from analysis.jaccard import (
    PROTOCOLS,
    BestHead,
    Scores,
    SquashedImages,
    best_heads,
    measure_model,
)
from analysis.models import load_model
from cli import HelpFormatter
from readers.masks import BACKGROUND, VOID, count_labels, read_masked_images
from utils import pick_device


def threshold(attention: Tensor, mass: float) -> Tensor:
    """The patches of one head's map (h, w) that hold the top ``mass``, as a map of 0 and 1."""
    values, order = attention.flatten().sort(stable=True)
    share = (values / values.sum()).cumsum(0)
    kept = torch.zeros_like(values)
    kept[order[share > 1 - mass]] = 1
    return kept.view_as(attention)


def score_image(attention: Tensor, labels: Tensor, mass: float, void_counts: bool) -> dict[int, BestHead]:
    """The best head of each class of one image: attention (H, h, w), labels (height, width)."""
    masks = torch.stack([threshold(head, mass) for head in attention])
    masks = F.interpolate(masks[None], size=labels.shape, mode="nearest")[0].bool()
    counted = torch.ones_like(labels, dtype=torch.bool) if void_counts else labels != VOID
    scores = {}
    for label in labels.unique().tolist():
        if label in (BACKGROUND, VOID):
            continue
        target, found = labels == label, []
        for mask in masks:
            intersection = (mask & target & counted).sum()
            union = ((mask | target) & counted).sum()
            found.append((intersection / union).item())
        scores[label] = BestHead(max(found), found.index(max(found)))
    return scores


def measure_loop(attention: Tensor, labels: Tensor, void_counts: bool) -> Scores:
    return [score_image(*image, MASS, void_counts) for image in zip(attention, labels, strict=True)]


def measure_batched(attention: Tensor, labels: Tensor, void_counts: bool, batch_size: int) -> Scores:
    scores = []
    for maps, masks in zip(attention.split(batch_size), labels.split(batch_size), strict=True):
        scores += best_heads(keep_mass(maps, MASS), *count_labels(masks, *maps.shape[-2:]), void_counts)
    return scores


def command_loop(trained, dataset, void_counts: bool, device: torch.device) -> Scores:
    scores = []
    for image, labels, _ in (dataset[index] for index in range(len(dataset))):
        attention = attention_of(similarity_maps(trained.model, image[None].to(device)))
        scores += measure_loop(attention, labels[None].to(device), void_counts)
    return scores


def command_batched(trained, dataset, void_counts: bool, device: torch.device, args) -> Scores:
    return measure_model(trained, load_batches(dataset, args, device), void_counts, MASS, device).model


def in_memory(trained, dataset, device: torch.device) -> tuple[Tensor, Tensor]:
    """Attention (N, H, h, w) and labels (N, size, size) of a whole data set."""
    images, labels, _ = zip(*(dataset[index] for index in range(len(dataset))), strict=True)
    attention = [attention_of(similarity_maps(trained.model, image[None].to(device))) for image in images]
    return torch.cat(attention), torch.stack(labels).to(device)


def time_ways(ways: dict, repeats: int) -> tuple[dict[str, float], dict[str, Scores]]:
    """Median seconds of each way, and what it gave; they run in turn, once before it counts."""
    times, results = {name: [] for name in ways}, {}
    for repeat in range(repeats + 1):
        for name, run in ways.items():
            began = time.perf_counter()
            results[name] = run()  # ends on the host, so nothing is left to wait for
            if repeat:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}, results


def differing(one: Scores, other: Scores) -> int:
    """Images whose scores are not the same numbers (a model's maps depend on the batch in their last digits)."""
    return sum(a != b for a, b in zip(one, other, strict=True))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, metavar="FILE")
    parser.add_argument("--data-path", required=True, metavar="DIR", help="as of analysis.jaccard")
    parser.add_argument("--split", metavar="NAME", help="of VOC's lists")
    parser.add_argument("--input-size", type=int, default=480, metavar="PX", help="input size of the model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds")
    add_model_options(parser)
    add_loading_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    device, protocol = pick_device(args.device), PROTOCOLS["void-excluded"]
    void = protocol.void_counts
    trained = load_model(args.checkpoint, device, args.checkpoint_key, args.num_heads, args.input_size)
    data = read_masked_images(args.data_path, args.split)
    dataset = SquashedImages(data, args.input_size, protocol.interpolation)
    maps = in_memory(trained, dataset, device)
    cases = {
        "measure": (partial(measure_loop, *maps, void), partial(measure_batched, *maps, void, args.batch_size)),
        "command": (
            partial(command_loop, trained, dataset, void, device),
            partial(command_batched, trained, dataset, void, device, args),
        ),
    }
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"torch {torch.__version__}, {hardware}, {args.threads} thread(s), {args.num_workers} loading process(es)")
    print(f"{len(data)} images at {args.input_size} px, maps of {tuple(maps[0].shape[1:])}, batch {args.batch_size}\n")
    print("| what | batched, images a second | image by image | ratio | images that differ |\n|---|---|---|---|---|")
    for name, (loop, batched) in cases.items():
        seconds, results = time_ways({"loop": loop, "batched": batched}, args.repeats)
        rates = {way: len(data) / value for way, value in seconds.items()}
        ratio = rates["batched"] / rates["loop"]
        different = differing(*results.values())
        print(f"| {name} | {rates['batched']:.1f} | {rates['loop']:.1f} | {ratio:.2f} | {different} |", flush=True)


if __name__ == "__main__":
    main()
