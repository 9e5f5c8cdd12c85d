"""Time DINO's loss, forward and backward, and its peak memory: ours, and one log-softmax for each pair of crops.

    python -m benchmarks.dino                                  # K = 65,536, 2 + 8 crops, on this CPU: a minute
    python -m benchmarks.dino --device cuda --batch-size 64    # as on each GPU of the official runs

"pairs" is the loss as the official program writes it: a log-softmax of a crop's logits for each of the 2 (V - 1) pairs
of crops. The ways run in turn in every repeat; times are medians. Memory is what a forward and a backward pass add to
the logits, each way in a process of its own: peak of the resident memory on a CPU, of torch's allocator on a GPU.
Expected on a CPU: ours at least twice as fast, with a third of the memory.
"""

import argparse
import multiprocessing
import platform
import resource
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.loss import milliseconds
from cli import HelpFormatter
from tasks.dino import STUDENT_TEMPERATURE, CrossEntropyOfCrops


def loss_of_pairs(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss pair by pair: student's logits ``(V, B, K)``, teacher's probabilities ``(2, B, K)``."""
    total, pairs = logits.new_zeros(()), 0
    for i, q in enumerate(targets):
        for v, z in enumerate(logits):
            if v != i:
                total = total + (-q * (z / STUDENT_TEMPERATURE).log_softmax(dim=-1)).sum(dim=-1).mean()
                pairs += 1
    return total / pairs


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"pairs": loss_of_pairs, "ours": CrossEntropyOfCrops.apply}


def make_inputs(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Logits of the student, and probabilities of the teacher."""
    torch.manual_seed(0)
    shape = (2 + options.local_crops, options.batch_size, options.out_dim)
    logits = torch.rand(shape, device=options.device).sub_(0.5).requires_grad_()
    return logits, (torch.rand(2, *shape[1:], device=options.device) * 4).softmax(dim=-1)


def forward_and_backward(way: str, logits: Tensor, targets: Tensor) -> float:
    """The loss; its gradient is computed, and dropped."""
    logits.grad = None
    loss = WAYS[way](logits, targets)
    loss.backward()
    return loss.item()


def added_memory(way: str, options: argparse.Namespace) -> float:
    """MiB that one forward and one backward pass add at their peak; to be called in a fresh process."""
    torch.set_num_threads(options.threads)
    logits, targets = make_inputs(options)
    before = peak_memory(options.device)
    forward_and_backward(way, logits, targets)
    return peak_memory(options.device) - before


def peak_memory(device: str) -> float:
    """MiB at the peak of this process so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure_memory(options: argparse.Namespace) -> dict[str, float]:
    """`added_memory` of each way, each in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        return {way: fresh.apply(added_memory, (way, options)) for way in WAYS}


def measure_times(options: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of each way; all of them are run in every repeat."""
    inputs, times = make_inputs(options), {way: [] for way in WAYS}
    for repeat in range(1 + options.repeats):
        for way in WAYS:
            elapsed = milliseconds(lambda way=way: forward_and_backward(way, *inputs), options.device)
            times[way] += [elapsed] * (repeat > 0)
    return {way: statistics.median(values) for way, values in times.items()}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of the loss")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    parser.add_argument("--batch-size", type=int, default=16, help="images")
    parser.add_argument("--local-crops", type=int, default=8, help="beside the two global ones")
    parser.add_argument("--out-dim", type=int, default=65536, help="prototypes K")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds (default: 7), after one more")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    on = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, {on}, {options.threads} threads")
    print(f"K = {options.out_dim:,}, batch {options.batch_size}, 2 + {options.local_crops} crops\n")
    memory = measure_memory(options)  # first: new processes begin with the peak of this one
    times = measure_times(options)
    print("| way | ms | MiB beside the logits |\n|---|---|---|")
    for way in WAYS:
        print(f"| {way} | {times[way]:.1f} | {memory[way]:.0f} |")


if __name__ == "__main__":
    main()
