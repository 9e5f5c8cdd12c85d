"""The specification of a run of main.py, and its execution in the foreground on this machine."""

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

ROOT = Path(__file__).resolve().parents[1]
LOCK_FILE = "launcher.lock"  # see `hold_lock`


@dataclass(frozen=True)
class RunSpec:
    """A run of main.py to be started.

    Attributes:
        name: of the run, in tables and messages.
        words: main.py's command line.
        args: the parsed command line.
    """

    name: str
    words: list[str]
    args: argparse.Namespace

    @property
    def folder(self) -> Path:
        """main.py's output folder."""
        return Path(self.args.output_dir)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pth"

    @property
    def epochs(self) -> int:
        """Number of epochs of the finished run."""
        return self.args.epochs + self.args.cooldown_epochs

    @property
    def dependencies(self) -> tuple[str, ...]:
        """Names of the runs that must finish first, because this run reads their files."""
        return ()

    def __str__(self) -> str:
        return self.name


def epochs_done(spec: RunSpec) -> int:
    """Number of finished epochs, read from the run's checkpoint; 0 without one.

    Raises:
        UserError: the checkpoint belongs to a run with other arguments, or is damaged.
    """
    if not spec.checkpoint.exists():
        return 0
    from weights import read_checkpoint  # imports torch

    try:
        checkpoint = read_checkpoint(spec.checkpoint, lazily=True)
        saved, epoch = checkpoint["args"], checkpoint["epoch"]
    except (UserError, KeyError) as error:
        raise UserError(f"{spec.checkpoint} cannot be read; remove it to start {spec} from scratch") from error
    different = differences(vars(spec.args), saved)
    if different:
        raise UserError(
            f"{spec.folder} holds a run with other arguments; choose another folder ({'; '.join(different)})"
        )
    return epoch


def run_command(command: list[str]) -> int:
    """Run a command in the foreground and forward stop signals to it.

    SIGTERM, SIGUSR1 and SIGUSR2 are forwarded as SIGTERM, on which main.py and torchrun save and exit. The terminal
    itself sends Ctrl-C (SIGINT) to the child. There is no time limit for the child to exit.

    Returns:
        the command's exit code, or 128 + the number of the signal that ended it or that this process received.
    """
    received, child = [], None

    def forward(number: int, frame) -> None:
        received.append(number)
        if child is not None and number != signal.SIGINT:
            child.terminate()

    # 1. install the handlers before the child exists, so that no signal is lost
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
    previous_handlers = {number: signal.signal(number, forward) for number in numbers}
    try:
        # 2. start the child; forward a signal that arrived before it existed
        child = subprocess.Popen(command)
        if received:
            child.terminate()
        code = child.wait()
    finally:
        # 3. restore the previous handlers
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
    if received:
        return 128 + received[0]
    return code if code >= 0 else 128 - code


def complete_run(spec: RunSpec, command: list[str]) -> int:
    """Run ``command`` unless the run is finished.

    Returns:
        0: finished. 1: this run failed. Above 1: a reason that would also end the next run (a signal, bad usage).
    """
    if epochs_done(spec) == spec.epochs:
        print(f"{spec}: already finished", flush=True)
        return 0
    print(f"{spec}: {shlex.join(command)}", flush=True)
    code = run_command(command)
    done = epochs_done(spec)
    if done == spec.epochs and code < 128:
        return 0
    hint = "" if code == 2 else "; run the same command to resume it"
    print(f"{spec}: stopped after {done} of {spec.epochs} epochs with exit code {code}{hint}", file=sys.stderr)
    return code or 128 + signal.SIGTERM  # main.py itself received SIGTERM, saved, and exited with 0


@contextlib.contextmanager
def hold_lock(folder: Path, activity: str) -> Iterator[None]:
    """Hold the lock of a folder: only one launcher at a time works in it; others wait here until it has ended.

    A launcher trains in a run's folder, measures in a measurement's, and submits from the folder of submitit's files:
    it asks the queue and adds to it, and another one must not see the queue in between. Each finds out what is left to
    do while it holds the lock, so nothing is done twice. The system releases the lock when the launcher dies. Jobs of
    Slurm hold none: `launch.status.check_not_queued` asks the queue for them.

    Args:
        folder: created if missing; the lock is on its file LOCK_FILE, which stays.
        activity: what the launcher does ("training <run>"), for the messages.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another launcher is {activity}; waiting until it has ended", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            print(
                f"warning: cannot lock {file.name} ({error.strerror}); make sure that no other launcher is {activity}",
                file=sys.stderr,
            )
        yield


def is_locked(folder: Path) -> bool:
    """Whether a launcher works in the folder; see `hold_lock`."""
    try:
        with (folder / LOCK_FILE).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:  # also without the file, or on a file system without locks
        return isinstance(error, BlockingIOError)
    return False


def warn_missing_data(specs: Sequence[RunSpec]) -> set[str]:
    """Warn about every ``--data-path`` that does not exist on this machine, and return them; the nodes may have it."""
    paths = {spec.args.data_path for spec in specs} - {None}
    missing = {path for path in paths if not Path(path).exists()}
    for path in sorted(missing):
        print(f"warning: --data-path {path} does not exist on this machine; the nodes must have it", file=sys.stderr)
    return missing
