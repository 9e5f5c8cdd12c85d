"""Who trains in an output folder: a note that keeps a second run out, and that a dead run does not leave for ever.

The note, ``owner.json``, names the run's host, process and Slurm job. A thread touches it every few seconds. It is an
ordinary file, as locks of the system do not work on every shared file system. A run removes it when it ends; that of a
killed run is recognised: on the same host by its process, from another host or container by its silence.
"""

import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils import RunError, UserError, free_folder, logger, write_json

NOTE = "owner.json"
HEARTBEAT = 10.0
"""Seconds between two touches of the note."""
SILENCE = 6 * HEARTBEAT
"""Seconds without a touch after which an owner on another host is taken for dead."""


class Owner:
    """The owner of an output folder: this process, from `claim` on."""

    def __init__(self, folder: Path):
        self.path = Path(folder) / NOTE
        self.note = {
            "host": platform.node(),
            "process": os.getpid(),
            "process_namespace": process_namespace(),
            "process_start": process_start(os.getpid()),
            "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
            "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }

    def claim(self) -> None:
        """Write the note; wait up to SILENCE to see whether an owner on another host still lives.

        Raises:
            UserError: another run trains in the folder.
        """
        with contextlib.suppress(FileExistsError):
            with open(self.path, "x", encoding="utf-8") as file:  # of two that start now, one creates it
                file.write(json.dumps(self.note) + "\n")
            return
        other = read_note(self.path)
        if other is None:  # it is just being written, or damaged
            time.sleep(1)
            other = read_note(self.path)
        if other is not None and is_alive(other, self.path):
            raise UserError(f"--output-dir {self.path.parent}: {describe(other)} trains there; {self.mend()}")
        write_json(self.path, self.note)
        time.sleep(0.2)  # another one may have found the same dead owner
        self.check()

    def mend(self) -> str:
        """What to do about another owner."""
        free = free_folder(self.path.parent)
        return f"wait until it has ended, or give --output-dir {free} (if it runs no more, remove {self.path})"

    def check(self) -> None:
        """Refuse to write into the folder once another run has taken it, as after this host was suspended.

        Raises:
            RunError: it has.
        """
        other = read_note(self.path)
        if other is not None and other != self.note:
            raise RunError(f"{self.path.parent}: {describe(other)} has taken the folder of this run; {self.mend()}")

    @contextlib.contextmanager
    def touching(self) -> Iterator[None]:
        """Touch the note in a thread; at the end remove it."""
        ended = threading.Event()

        def touch() -> None:
            while not ended.wait(HEARTBEAT):
                with contextlib.suppress(OSError):
                    os.utime(self.path)

        thread = threading.Thread(target=touch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            if read_note(self.path) == self.note:
                self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[Owner]:
    """Own a folder, and delete the temporary files of its killed runs.

    Raises:
        UserError: another run trains there, or the folder cannot be written.
    """
    owner = Owner(folder)
    try:
        owner.claim()
        for leftover in folder.glob(".*.tmp"):
            if not leftover.name.startswith(".job.json."):  # a launcher may just be writing it
                leftover.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {folder}: {error.strerror}; name a writable folder") from error
    with owner.touching():
        yield owner


def read_note(path: Path) -> dict[str, Any] | None:
    """The content of a note; None if it is missing or damaged."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) else None


def is_alive(note: dict[str, Any], path: Path) -> bool:
    """Whether the owner of a note still runs; for one on another host this takes up to SILENCE."""
    here = platform.node(), process_namespace()
    if here == (note.get("host"), note.get("process_namespace")) and here[1]:
        process = note.get("process")
        return isinstance(process, int) and process_start(process) == note.get("process_start") is not None
    # the clock of its host may differ, so the age of the note does not tell
    logger.info(f"{path.parent}: {describe(note)} has left its note; looking for {SILENCE:.0f} s whether it still runs")
    before, deadline = touched(path), time.monotonic() + SILENCE
    while time.monotonic() < deadline:
        time.sleep(min(1.0, SILENCE / 10))
        if touched(path) != before:
            return path.exists()
    return False


def touched(path: Path) -> float:
    """When the note was last touched; 0 if it is gone. Opening it asks the server of a network disk."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return 0.0


def process_start(process: int) -> str | None:
    """When a process of this host started, so that another one with its id is told apart; None if there is none."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def process_namespace() -> str:
    """What process ids of this process refer to: containers of one host number theirs anew. Empty outside Linux."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def describe(note: dict[str, Any]) -> str:
    """The owner in words."""
    job = f", Slurm job {note['slurm_job']}" if note.get("slurm_job") else ""
    return f"a run (process {note.get('process')} on {note.get('host')}{job}, since {note.get('since')})"
