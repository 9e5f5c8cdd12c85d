"""A run of main.py, and taking it to its end on this machine."""

import argparse
import contextlib
import fcntl
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from arguments import differences
from utils import UserError
from weights import read_checkpoint

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Point:
    """A run: its name in tables, main.py's words, and what they come to."""

    name: str
    words: list[str]
    args: argparse.Namespace

    @property
    def folder(self) -> Path:
        return Path(self.args.output_dir)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pth"

    @property
    def epochs(self) -> int:
        return self.args.epochs + self.args.cooldown_epochs

    @property
    def lock(self) -> Path:
        """Held by the launcher that trains the run here."""
        return self.folder / "launcher.lock"

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the runs whose files it reads."""
        return ()

    def __str__(self) -> str:
        return self.name


def epochs_done(point: Point) -> int:
    """Finished epochs of the run.

    Raises:
        UserError: its folder holds another run, or a damaged file.
    """
    if not point.checkpoint.exists():
        return 0
    try:
        checkpoint = read_checkpoint(point.checkpoint, lazily=True)
        saved, epoch = checkpoint["args"], checkpoint["epoch"]
    except (UserError, KeyError) as error:
        raise UserError(f"{point.checkpoint} cannot be read; remove it to begin {point} again") from error
    different = differences(vars(point.args), saved)
    if different:
        raise UserError(
            f"{point.folder} holds a run with other arguments; name another folder ({'; '.join(different)})"
        )
    return epoch


def launch(command: list[str]) -> int:
    """Run the command; its exit code, or 128 + the signal that ended it or that asked this program to stop.

    SIGTERM, SIGUSR1 and SIGUSR2 reach the run as SIGTERM, which main.py and torchrun take for: save and end. Ctrl-C
    comes to the run from the terminal. The run has the time that it needs.
    """
    received, child = [], None

    def stop(number: int, frame) -> None:
        received.append(number)
        if child is not None and number != signal.SIGINT:
            child.terminate()

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        child = subprocess.Popen(command)
        if received:  # before there was a child to tell
            child.terminate()
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        return 128 + received[0]
    return code if code >= 0 else 128 - code


def finish(point: Point, command: list[str]) -> int:
    """Take the run to its end; 0, or the exit code: 1, it failed by itself; above 1, the next would end so, too."""
    if epochs_done(point) == point.epochs:
        print(f"{point}: finished before", flush=True)
        return 0
    print(f"{point}: {shlex.join(command)}", flush=True)
    code = launch(command)
    done = epochs_done(point)
    if done == point.epochs and code < 128:
        return 0
    again = "" if code == 2 else "; the same command goes on from there"
    print(f"{point}: ended at epoch {done} of {point.epochs} with exit code {code}{again}", file=sys.stderr)
    return code or 128 + signal.SIGTERM  # which someone sent to main.py: it saved, and ended with 0


@contextlib.contextmanager
def locked(path: Path, doing: str) -> Iterator[None]:
    """Hold the file, so that no other launcher is ``doing`` the same; where one is, wait for that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another launcher is {doing}; waiting for that", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            print(f"warning: {path}: {error.strerror}; let no other launcher be {doing} now", file=sys.stderr)
        yield


def is_locked(path: Path) -> bool:
    """Whether a launcher holds the file."""
    if not path.exists():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return isinstance(error, BlockingIOError)
    return False


def warn_of_data_elsewhere(points: Sequence[Point]) -> set[str]:
    """Say which data folders this machine does not have; the nodes may. Returns them."""
    paths = {point.args.data_path for point in points} - {None}
    missing = {path for path in paths if not Path(path).exists()}
    for path in sorted(missing):
        print(f"warning: --data-path {path} is not on this machine; the nodes must have it", file=sys.stderr)
    return missing
