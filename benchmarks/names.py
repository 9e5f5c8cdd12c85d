"""Measure what a loader's worker copies of a long list of file names and labels: Python lists against arrays.

    python -m benchmarks.names                    # 1.28 million names, as of ImageNet's training images

A forked worker shares the list with its parent until it writes. Reading a Python object writes its reference count,
so an epoch copies the pages of all names into every worker (pytorch#13246).
"""

import argparse
import os
import re
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset, get_worker_info

from cli import HelpFormatter, at_least
from readers.names import Names


class ListedNames(Dataset):
    """Names and labels; an item is the length of a name, its label and the worker's own memory in bytes."""

    def __init__(self, names, targets):
        self.names, self.targets = names, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[int, int, int]:
        assert get_worker_info() is not None
        memory = own_memory() if index == len(self) - 1 else 0
        return len(self.names[index]), int(self.targets[index]), memory


def own_memory() -> int:
    """Memory of this process that it shares with no other, in bytes."""
    found = re.findall(r"^Private_\w+: +(\d+) kB", Path(f"/proc/{os.getpid()}/smaps_rollup").read_text(), re.MULTILINE)
    return 1024 * sum(int(size) for size in found)


def memory_after(dataset: ListedNames, order: range) -> int:
    """Own memory of a worker after it has read the items of ``order``, of which the last is the set's."""
    loader = DataLoader(dataset, batch_size=1000, sampler=order, num_workers=1)  # type: ignore[arg-type]
    return max(int(memory.max()) for _, _, memory in loader)


def main(arguments: list[str] | None = None) -> int:
    """Print a table: own memory of a worker before and after an epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--names", type=at_least(int, 2), default=1_281_167, help="number of names")
    args = parser.parse_args(arguments)
    print("| names and labels | at the start, MB | after an epoch, MB |\n|---|---|---|")
    for kind in ("lists", "arrays"):
        names = [f"train/n{number % 1000:08}/n{number % 1000:08}_{number}.JPEG" for number in range(args.names)]
        targets = [10_000 + number % 1000 for number in range(args.names)]  # beyond the integers that Python keeps
        dataset = ListedNames(names, targets) if kind == "lists" else ListedNames(Names(names), np.array(targets))
        del names, targets
        start, end = (memory_after(dataset, range(first, args.names)) for first in (args.names - 1, 0))
        print(f"| {kind} | {start / 1e6:.0f} | {end / 1e6:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
