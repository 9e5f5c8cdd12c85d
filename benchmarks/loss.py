"""Time the spatial-entropy loss, forward and backward, against two ways of writing it with OpenCV.

    python -m benchmarks.loss                    # all sizes on this CPU: minutes on two cores
    python -m benchmarks.loss --device cuda
    python -m benchmarks.loss --batch-sizes 128 --grids 14 --threads 2

"map by map": each map is labelled by OpenCV and its entropy pooled by one mask a component. "stacked":
labelled map by map too, but the masks of all maps are stacked and pooled at once, as in the paper's Fig. 5.
The ways run in turn in every repeat, so that a machine that changes its speed changes it for all; the table
holds medians.

Expected: at batch 128, 14 x 14, on two cores, ours at least 12 times faster than map by map.
On a machine that is busy with other things too, set OMP_WAIT_POLICY=passive: else the threads of each
operation spin for a core that somebody else has, and the many short operations of ours suffer most.
Needs opencv-python-headless.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import cv2
import torch
import torch.nn.functional as F
from torch import Tensor

from cli import HelpFormatter
from losses import SpatialEntropyLoss, label_components


def component_masks(above) -> list[Tensor]:
    """One bool mask for each 8-connected component of one (h, w) map."""
    count, labels = cv2.connectedComponents(above, connectivity=8)
    return [torch.from_numpy(labels == component) for component in range(1, count)]


def map_by_map_loss(similarity: Tensor) -> Tensor:
    """Eq. 5-9, one map after the other."""
    excess = F.relu(similarity - similarity.mean((-2, -1), keepdim=True)).flatten(0, 1)
    entropies = []
    for values, above in zip(excess, (excess > 0).byte().cpu().numpy(), strict=True):
        masks = torch.stack(component_masks(above)).to(values.device)
        p = (values * masks).sum((-2, -1)) / values.sum()
        entropies.append(-(p * p.log()).sum())
    return torch.stack(entropies).mean()


def stacked_loss(similarity: Tensor) -> Tensor:
    """Eq. 5-9 with the masks of all maps stacked."""
    excess = F.relu(similarity - similarity.mean((-2, -1), keepdim=True)).flatten(0, 1)
    owners, masks = [], []
    for index, above in enumerate((excess > 0).byte().cpu().numpy()):
        found = component_masks(above)
        owners += [index] * len(found)
        masks += found
    mass = (excess[owners] * torch.stack(masks).to(excess.device)).sum((-2, -1))
    p = mass / excess.sum((-2, -1))[owners]
    return -(p * p.log()).sum() / len(excess)


BASELINES = {"map by map": map_by_map_loss, "stacked": stacked_loss}


def make_maps(kind: str, batch: int, heads: int, grid: int, device: str) -> Tensor:
    """Noise, or noise blurred over 5 x 5 patches, which is closer to the maps of a trained network."""
    maps = torch.randn(batch, heads, grid, grid, generator=torch.Generator().manual_seed(0))
    if kind == "smooth":
        maps = F.avg_pool2d(F.avg_pool2d(maps, 3, 1, 1), 3, 1, 1)
    return maps.to(device)


def milliseconds(run: Callable, device: str) -> float:
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def forward_backward(loss: Callable, maps: Tensor) -> None:
    loss(maps.detach().requires_grad_()).backward()


def time_case(maps: Tensor, repeats: int) -> dict[str, float]:
    """Median milliseconds of each way, of our forward pass alone, and of the labelling alone."""
    runs: dict[str, Callable[[], Any]] = {
        name: partial(forward_backward, loss, maps) for name, loss in BASELINES.items()
    }
    runs["ours"] = partial(forward_backward, SpatialEntropyLoss(), maps)
    runs["forward"] = partial(SpatialEntropyLoss(), maps.clone().requires_grad_())
    runs["labelling"] = partial(label_components, maps > maps.mean((-2, -1), keepdim=True))
    for run in runs.values():
        run()  # warm up
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(milliseconds(run, maps.device.type))
    return {name: statistics.median(values) for name, values in times.items()}


def print_row(kind: str, grid: int, batch: int, ms: dict[str, float]) -> None:
    ours = ms["ours"]
    baselines = " | ".join(f"{ms[name]:.1f} | {ms[name] / ours:.1f}" for name in BASELINES)
    shares = f"{ms['labelling'] / ours:.0%} | {ms['forward'] / ours:.0%}"
    print(f"| {kind} | {grid} x {grid} | {batch} | {ours:.2f} | {baselines} | {shares} |", flush=True)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where the maps are")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 128, 512], metavar="N", help="images")
    parser.add_argument("--grids", type=int, nargs="+", default=[14, 30], metavar="K", help="K x K patches a map")
    parser.add_argument("--heads", type=int, default=6, help="maps an image, as in ViT-S")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds of each case")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    print(f"torch {torch.__version__}, OpenCV {cv2.__version__}, {hardware}, {args.threads} thread(s)\n")
    names = " | ".join(f"{name} ms | ratio" for name in BASELINES)
    print(f"| maps | grid | batch | ours ms | {names} | labelling | forward |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for kind in ("random", "smooth"):
        for grid in args.grids:
            for batch in args.batch_sizes:
                maps = make_maps(kind, batch, args.heads, grid, args.device)
                print_row(kind, grid, batch, time_case(maps, args.repeats))
    print(
        "\nRatio: that way's time over ours. Labelling, forward: share of our time (forward holds the labelling;"
        "\nthe rest is the backward pass). What bounds ours is the labelling: on a CPU its memory traffic, on a GPU"
        "\nits kernel launches, whose number depends on the grid alone."
    )


if __name__ == "__main__":
    main()
