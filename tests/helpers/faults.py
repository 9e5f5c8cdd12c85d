"""Fault injection: how a small run ends when a fault meets one of its parts, and what the same command does afterwards.

    python tests/helpers/faults.py                        # all 80 combinations, as a table; about 15 minutes
    python tests/helpers/faults.py step/stall/2/1         # place/fault/workers/processes

A stall is left by two Ctrl-C. ``seconds`` are counted from the fault, or from the second Ctrl-C, to the end of the last
process, loader workers included. With several processes the fault meets the last one, only the first saves and logs.
"""

import functools
import itertools
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from helpers import runs  # noqa: E402 - after the paths

PLACES = {
    "loader": ("datasets", "isolated_rng", 30),
    "step": ("engine", "update_weights", 7),
    "evaluation": ("tasks.classify", "batch_sums", 1),
    "checkpoint": ("checkpoints", "snapshot", 2),
    "log": ("records", "step_line", 3),
}
"""Module, function and number of its call at which the fault happens."""
FAULTS = ("exception", "memory", "kill", "stall")
FIRST_RANK_ONLY = ("checkpoint", "log")


@dataclass(frozen=True)
class Ending:
    """What became of a run; ``again`` is the exit code of the same command afterwards, without the fault."""

    seconds: float
    code: int | None
    last_line: str
    again: int
    identical: bool
    """Whether its files are then those of an uninterrupted run, bit for bit."""


def happen(fault: str, when: Path) -> None:
    """The fault itself, in the process that it meets."""
    part = when.with_name(f"{when.name}.part")
    part.write_text(str(time.time()))
    part.rename(when)  # whoever waits for the file never finds it empty
    if fault == "exception":
        raise ValueError("a planted error")
    if fault == "memory":
        raise MemoryError
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        time.sleep(60)


def plant(rank: int, place: str, fault: str, faulty_rank: int, when: Path) -> None:
    """Plant the fault in one of the ranks, before it begins."""
    if rank == faulty_rank:
        runs.at_call(*PLACES[place], functools.partial(happen, fault, when))()


def inject(run: runs.Child, output: Path, place: str, fault: str, workers: int, ranks: int, expected=None) -> Ending:
    """Let a run meet the fault, and give its command again; ``expected``: `runs.content` of an uninterrupted run."""
    # 1. the run and its fault
    when = output.with_name(f"{output.name}.when")
    words = ("--num-workers", str(workers), "--batch-size", "24")
    faulty_rank = 0 if place in FIRST_RANK_ONLY else ranks - 1
    everywhere = functools.partial(plant, place=place, fault=fault, faulty_rank=faulty_rank, when=when)
    children = run.start(output, *words, everywhere=everywhere, ranks=ranks)
    try:
        seconds = _seconds_to_end(children, run.log, fault, when)
    finally:
        for process in writers(run.log):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    code, lines = children[0].exitcode, run.text().splitlines() or [""]
    # 2. the same command again
    again = run(output, *words, ranks=ranks)
    identical = again == 0 and expected is not None and is_identical(runs.content(output), expected)
    return Ending(seconds, code, lines[-1], again, identical)


def _seconds_to_end(children: list, log: Path, fault: str, when: Path) -> float:
    """Seconds from the fault to the end of a run's last process; a stall is ended by two Ctrl-C, from which it counts.

    Infinite if a process is left after 90 s.
    """
    wait(lambda: when.exists() or not any(child.is_alive() for child in children), 120)
    began = float(when.read_text())
    if fault == "stall":
        time.sleep(1)
        for _ in range(2):
            time.sleep(1)
            for child in children:
                if child.is_alive():
                    os.kill(child.pid, signal.SIGINT)
        began = time.time()
    ended = wait(lambda: not (any(child.is_alive() for child in children) or writers(log)), 90)
    return time.time() - began if ended else float("inf")


def wait(condition, seconds: float) -> bool:
    """Wait until the condition is met, for so many seconds at most; returns whether it is."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return met


def writers(log: Path) -> list[int]:
    """The processes whose standard output is one of a run's logs: its ranks and their loader workers."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            target = os.readlink(entry / "fd/1")
        except OSError:  # another user's, or ended
            continue
        if target.startswith(str(log)):
            found.append(int(entry.name))
    return found


def is_identical(one: dict, two: dict) -> bool:
    try:
        runs.assert_identical(one, two)
    except AssertionError:
        return False
    return True


def main(chosen: list[str]) -> int:
    """Print the table of the chosen combinations; exit code 1 if one did not end within 20 s."""
    every = itertools.product(PLACES, FAULTS, ("0", "2"), ("1", "2"))
    combinations = [text.split("/") for text in chosen] or list(every)
    slow = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = runs.Child(runs.write_digits(folder / "digits"), folder / "text")
        expected = {}
        for ranks in (1, 2):  # dropout and Mixup are drawn by rank
            assert run(folder / f"whole{ranks}", "--batch-size", "24", ranks=ranks) == 0
            expected[ranks] = runs.content(folder / f"whole{ranks}")
        head = "place fault workers processes seconds code last again identical".split()
        print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
        for place, fault, workers, ranks in combinations:
            output = folder / f"{place}-{fault}-{workers}-{ranks}"
            end = inject(run, output, place, fault, int(workers), int(ranks), expected[int(ranks)])
            slow += end.seconds > 20
            cells = [place, fault, workers, ranks, f"{end.seconds:.1f}", end.code, end.last_line, end.again]
            print(f"| {' | '.join(map(str, cells))} | {'yes' if end.identical else 'no'} |", flush=True)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
