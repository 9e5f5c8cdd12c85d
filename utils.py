"""What every process of a run uses: errors, process group, signals, atomic files, environment, log.

Torch is imported inside functions, so that reading a command line does not wait for it.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import gc
import importlib.metadata
import io
import itertools
import json
import logging
import multiprocessing
import os
import platform
import re
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

logger = logging.getLogger("sar")


class UserError(Exception):
    """The user's input cannot be used; the message is one line that names the cause and what to change.

    ``main.py`` prints it without a traceback and exits with code 2.
    """


class RunError(Exception):
    """A running program cannot continue; the message is one line. ``main.py`` exits with code 1."""


def readable(name: str) -> str:
    """A file name as text that can be written: a byte that is no UTF-8 becomes the four characters ``\\xe9``."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def first_few(names: list[str], limit: int = 5) -> str:
    """Up to ``limit`` names, and the number of the others."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


# --------------------------------------------------------------------------------------------- processes


GROUP_TIMEOUT = timedelta(minutes=30)
"""Longest wait of a process for the others; rank 0 may need minutes to list a large data set alone."""
TELL_AFTER = 10.0
"""Seconds of waiting for the other processes at the start, after which a process says so."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the run: rank, number of processes, device, and rank on its machine."""

    rank: int
    world_size: int
    device: torch.device
    local_rank: int = 0
    store: dist.Store | None = None
    """Key-value store for messages between the processes; None for a single process."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Stack tensors of equal shape of all ranks, on the host: ``(...)`` -> ``(world_size, ...)``."""
        import torch
        import torch.distributed as dist

        if self.world_size == 1:
            return rows[None].cpu()
        parts = [torch.empty_like(rows) for _ in range(self.world_size)]
        dist.all_gather(parts, rows)
        return torch.stack(parts).cpu()

    def barrier(self) -> None:
        """Wait for all ranks: at the end of a run, a launcher may kill the others after the first one exits."""
        import torch

        self.gather(torch.zeros((), device=self.device))

    def explain(self, error: Exception) -> Exception:
        """The error to report: ``error`` itself, or which other process was lost if that caused it.

        Also posts this rank's last words, as the others may be waiting for it.
        """
        position = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
        if not is_peer_failure(error):
            self.post_last_words(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}{position}")
            return error
        if self.is_main:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which would end it before it reports
        return RunError(f"lost {self.find_lost_ranks()}{position}; the same command resumes from the last checkpoint")

    def post_last_words(self, words: str) -> None:
        """Store this rank's last error message for the others; empty: it has not failed itself, but lost another."""
        if self.store is not None:
            with contextlib.suppress(RuntimeError):  # the process that holds the store may be the one that died
                self.store.set(f"last words/{self.rank}", words)

    def find_lost_ranks(self, seconds: float = 2.0) -> str:
        """The ranks that failed, with their last words, and those that post none within ``seconds``.

        Called by a rank whose communication with another one failed.
        """
        # 1. wait until all ranks have posted
        self.post_last_words("")
        keys = [f"last words/{rank}" for rank in range(self.world_size)]
        deadline = time.monotonic() + seconds
        try:
            while not self.store.check(keys) and time.monotonic() < deadline:
                time.sleep(0.1)
            words = [self.store.get(key).decode() if self.store.check([key]) else "silent" for key in keys]
            if self.is_main:
                time.sleep(1)  # it usually holds the store, which the others are still reading
        except RuntimeError:
            return "the process that holds the store of the process group"
        # 2. those that failed, or are silent
        return ", ".join(f"rank {rank} ({last})" for rank, last in enumerate(words) if last) or "one of the processes"


def environment_number(name: str, default: int) -> int:
    """A whole number from the environment; the default if the variable is empty or not set.

    Raises:
        UserError: it is something else.
    """
    text = os.environ.get(name, "").strip()
    if text and not text.isdecimal():
        raise UserError(f"{name}={text} in the environment is not a whole number; unset {name}")
    return int(text or default)


def process_variables() -> tuple[str, str, str]:
    """The variables of rank, number of processes and local rank: torchrun's, or srun's where there is no RANK."""
    # srun sets it for its tasks only, not for batch scripts
    if not os.environ.get("RANK") and os.environ.get("SLURM_STEP_NUM_TASKS"):
        return "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"
    return "RANK", "WORLD_SIZE", "LOCAL_RANK"


def processes_here() -> tuple[int, int, int]:
    """Rank, number of processes and local rank from the environment of torchrun, else of srun, else a single one.

    Raises:
        UserError: variables that contradict each other, as those that another program has left.
    """
    names = process_variables()
    rank, world_size, local_rank = map(environment_number, names, (0, 1, 0))
    if rank >= world_size or (world_size > 1 and not os.environ.get(names[0])):
        given = ", ".join(f"{name}={os.environ[name]}" if name in os.environ else f"no {name}" for name in names[:2])
        raise UserError(
            f"{given} in the environment: no process of a group; unset both to run alone, or use torchrun or srun"
        )
    return rank, world_size, local_rank if world_size > 1 else 0


def rendezvous_url() -> str:
    """Where the processes meet: from the environment of torchrun, or on the first node of srun's step.

    Each restart of a requeued job uses another port, so that its processes never meet those of an earlier one.
    """
    if "MASTER_ADDR" in os.environ or "SLURM_STEP_NODELIST" not in os.environ:
        return "env://"
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    job, step, restart = (environment_number(name, 0) for name in names)
    first = re.sub(r"\[(\w+)[^]]*\]", r"\1", os.environ["SLURM_STEP_NODELIST"]).partition(",")[0]  # n[01-04,7] -> n01
    number = job * 101 + step * 10 + restart  # 101 and 12,000 are coprime: consecutive jobs never share a port
    return f"tcp://{first}:{20_000 + number % 12_000}"  # below the ephemeral ports of operating systems


def start_processes(device_name: str) -> Processes:
    """Join the process group that the environment of torchrun or srun describes; without one, run alone.

    Args:
        device_name: ``auto`` (a GPU if there is one), or a name for ``torch.device``.

    Raises:
        UserError: there is no such device, or this torch has no kernels for the GPU.
        RunError: the processes could not join each other.
    """
    import torch.distributed as dist

    rank, world_size, local_rank = processes_here()
    device = pick_device(device_name, local_rank)
    if world_size == 1:
        return Processes(rank, world_size, device, local_rank)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        with _telling_of_the_wait(rank, world_size):
            store, _, _ = next(dist.rendezvous(rendezvous_url(), rank, world_size, timeout=GROUP_TIMEOUT))
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=GROUP_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"the {world_size} processes could not meet: {reason}") from error
    return Processes(rank, world_size, device, local_rank, store)


@contextlib.contextmanager
def _telling_of_the_wait(rank: int, world_size: int) -> Iterator[None]:
    """Tell after TELL_AFTER seconds whom a process waits for. Ctrl-C ends the wait, which Python's handler cannot."""
    source = process_variables()[1]
    alone = "env " + " ".join(f"-u {name}" for name in ("SLURM_STEP_NUM_TASKS", "RANK", "WORLD_SIZE"))
    words = (
        f"rank {rank} is waiting for the other processes: {source}={world_size}. "
        f"To train with this process alone: {alone} python main.py ..."
    )
    timer = threading.Timer(TELL_AFTER, print, [words], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        timer.cancel()


def end_workers() -> None:
    """Kill the loaders' workers, which an error has left; they ignore the signal by which the interpreter ends them."""
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    if not workers:
        return
    # torch's handler would report each as an error of its own
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(1)
    signal.signal(signal.SIGCHLD, handler)


def end_processes() -> None:
    """Leave the process group, if this process has joined one."""
    if in_process_group():
        import torch.distributed as dist

        gc.collect()  # a DistributedDataParallel that outlives its group can hang at exit
        dist.destroy_process_group()


def in_process_group() -> bool:
    """Whether this process has joined a process group."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_initialized()


def is_peer_failure(error: BaseException) -> bool:
    """Whether a collective operation failed because another process died or timed out."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of this process for the name ``name``; arguments and errors as in `start_processes`."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or not (index.isdigit() or name == kind):
        raise UserError(f"--device {name}: unknown; use auto, cpu, cuda, cuda:0 or mps")
    if kind == "mps":
        return _apple_gpu()
    if kind == "cpu":
        return torch.device("cpu")
    # srun may let each task see its own GPU only
    default = 0 if torch.cuda.device_count() == 1 and "RANK" not in os.environ else local_rank
    device = torch.device("cuda", int(index or default))
    if device.index >= torch.cuda.device_count():
        raise UserError(
            f"--device {device}: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs here; "
            "start at most that many processes, or use --device cpu"
        )
    torch.cuda.set_device(device)
    major, minor = torch.cuda.get_device_capability(device)
    if not has_kernels(torch.cuda.get_arch_list(), major, minor):
        raise UserError(
            f"{torch.cuda.get_device_name(device)} (sm_{major}{minor}): torch {torch.__version__} has no "
            "kernels for it; install requirements-v100.txt, or use --device cpu"
        )
    return device


def _apple_gpu() -> torch.device:
    """The GPU of a Mac, for a single process.

    Raises:
        UserError: there is none; several processes.
    """
    import torch

    if not torch.backends.mps.is_available():
        raise UserError("--device mps: torch sees no Apple GPU here; use auto, cpu or cuda")
    if processes_here()[1] > 1:
        raise UserError("--device mps: processes cannot share an Apple GPU; start one alone, or use --device cpu")
    return torch.device("mps")


def float64_device(device: torch.device) -> torch.device:
    """Where to compute in float64: on the device itself, but on the host for Apple's GPUs, which have no float64."""
    import torch

    return torch.device("cpu") if device.type == "mps" else device


def float64(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float64, on its `float64_device`."""
    return tensor.to(float64_device(tensor.device)).double()


def gpu_count() -> int:
    """GPUs that this process can use; torch is imported only on a machine that has NVIDIA's driver."""
    if not Path("/proc/driver/nvidia").exists() and not Path("/dev/nvidiactl").exists():
        return 0
    import torch

    return torch.cuda.device_count()


def has_kernels(arch_list: list[str], major: int, minor: int) -> bool:
    """Whether kernels built for ``arch_list`` run on a GPU of compute capability ``major.minor``.

    Machine code (``sm_80``) runs on later minor versions of its major version, PTX (``compute_80``) on all later
    versions.
    """
    for arch in arch_list:
        kind, _, digits = arch.rstrip("af").partition("_")
        if not digits.isdigit():  # not an NVIDIA architecture
            return True
        built = (int(digits[:-1]), int(digits[-1]))
        if kind == "sm" and built[0] == major and built[1] <= minor:
            return True
        if kind == "compute" and built <= (major, minor):
            return True
    return False


# ------------------------------------------------------------------------------------------------ signals


SAME_SIGNAL = 0.5
"""Seconds in which a signal is the same as the one before: launchers pass on what their processes get, too."""
SECONDS_TO_SAVE = 10.0
"""Time that a process has to save after a second signal other than Ctrl-C."""


class StopSignal:
    """Catches the signals that end a run, so that it can save between two updates and end.

    These are SIGTERM, SIGUSR1, SIGUSR2, SIGINT (Ctrl-C), SIGHUP (the terminal is gone) and SIGPIPE (nobody reads the
    output any more). Every rank calls ``poll`` once per update and gets the same answer. The ranks' signals are
    exchanged on the host during an update and read one update later, so ``poll`` never waits for a GPU.

    Rank 0 tells of the first signal at once. A second one ends the process, whatever it is waiting for: Ctrl-C at
    once, another one after SECONDS_TO_SAVE. A thread counts them, as Python calls no handler while the main thread
    waits for a GPU or for another process.
    """

    numbers = tuple(
        getattr(signal, name)
        for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP", "SIGPIPE")
        if hasattr(signal, name)  # Windows, where `cli` ends every command, lacks some
    )

    def __init__(self, processes: Processes):
        self.received = 0
        self._tells = processes.is_main
        self._alone = processes.world_size == 1
        import torch.distributed as dist

        self._group: Any = None if self._alone else dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
        self._pending: tuple[Any, torch.Tensor] | None = None

    def __enter__(self):
        # 1. the handlers; under nohup a run outlives its terminal
        under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        numbers = [number for number in self.numbers if not (under_nohup and number == signal.SIGHUP)]
        self._handlers = {number: signal.signal(number, self._receive) for number in numbers}
        # 2. the thread, to which the interpreter writes the number of each signal at once
        self._source, self._sink = os.pipe()
        os.set_blocking(self._sink, False)
        self._previous_sink = signal.set_wakeup_fd(self._sink, warn_on_full_buffer=False)
        self._counter = threading.Thread(target=self._count, daemon=True)
        self._counter.start()
        return self

    def __exit__(self, *error):
        signal.set_wakeup_fd(self._previous_sink)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.write(self._sink, b"\0")
        self._counter.join()
        os.close(self._source)
        os.close(self._sink)

    def _receive(self, number, frame):
        self.received = self.received or number  # SLURM sends SIGTERM after SIGUSR2

    def _count(self) -> None:
        """Read the numbers of signals until a 0; after the second one end the process."""
        first: float | None = None
        deadline: float | None = None
        code = 0
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._source], [], [], left)[0]:
                _end_now(code)
            number, now = os.read(self._source, 1)[0], time.monotonic()
            if number == 0:
                return
            if number not in self.numbers or number == signal.SIGPIPE:  # others have handlers, too
                continue
            if first is None:
                first = now
                if self._tells:  # in a thread: a terminal that shows nothing (Ctrl-S) must not stop the counting
                    threading.Thread(target=_tell_of, args=[number], daemon=True).start()
            if now - first > SAME_SIGNAL:
                code = 128 + number
                deadline = now if number == signal.SIGINT else deadline or now + SECONDS_TO_SAVE

    @property
    def exit_code(self) -> int:
        """The exit code of a saved run, the same on all ranks: 75 after SIGUSR2, 130 after Ctrl-C, else 0.

        75 is ``EX_TEMPFAIL``, the system's code for a temporary failure.
        """
        codes: dict[int, int] = {signal.SIGINT: 130, signal.SIGUSR2: os.EX_TEMPFAIL}
        return codes.get(self.received, 0)

    def poll(self) -> bool:
        """Whether all ranks must stop now."""
        import torch
        import torch.distributed as dist

        if self._alone:
            return bool(self.received)
        previous, number = self._pending, torch.tensor([self.received])
        self._pending = (dist.all_reduce(number, dist.ReduceOp.MAX, group=self._group, async_op=True), number)
        if previous is None:
            return False
        previous[0].wait()
        self.received = int(previous[1]) or self.received
        return bool(previous[1])


def _tell_of(number: int) -> None:
    """Say on standard error that a signal has come. The log is not used: the main thread may hold its lock."""
    words = f"{signal.Signals(number).name}: the run saves after this update, and ends"
    _write_error(f"{words}. Ctrl-C again ends it at once, unsaved" if number == signal.SIGINT else words)


def _write_error(line: str) -> None:
    """Write a line to standard error, in a terminal below a progress bar; nothing if nobody reads it any more."""
    with contextlib.suppress(OSError):
        os.write(2, f"{chr(10) * os.isatty(2)}{line}\n".encode())


def _end_now(code: int) -> None:
    """End this process from any thread, whatever the others do; its loader workers end with it."""
    _write_error("error: ended by a second signal before it could save; the same command resumes the run")
    os._exit(code)


# -------------------------------------------------------------------------------------------------- files


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk."""


def write_atomically(path: Path, write) -> None:
    """Let ``write(file)`` write a temporary file, flush it to disk, and rename it to ``path``.

    At every moment, ``path`` holds either the old or the new content completely.

    Raises:
        RunError: the file cannot be written; an old file is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            _flush_to_disk(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__
        reason = getattr(cause, "strerror", None) or str(error).splitlines()[0]
        mend = "; make room, and give the same command again" * (getattr(cause, "errno", None) in NO_ROOM)
        raise RunError(f"cannot write {path}: {reason}; an earlier file there is unchanged{mend}") from error


def _flush_to_disk(descriptor: int) -> None:
    """``fsync``, where the file system has it: some mounts, as those of object stores, refuse it."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
            raise


def write_json(path: Path, content) -> None:
    """Write ``content`` as readable JSON, atomically."""
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write rows with equal keys as a CSV file with a header, atomically; None becomes an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(readable(text.getvalue()).encode()))


def prepare_output_dir(path: Path, option: str = "--output-dir") -> None:
    """Create the output folder, and check that it is writable.

    Args:
        path: the folder.
        option: the option that names it, for the error message.

    Raises:
        UserError: the folder cannot be created or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}; name a writable folder") from None


def free_folder(folder: Path) -> str:
    """A folder beside this one that does not exist yet: its name with _2, or the next number that is free."""
    name = folder if folder.name else Path(os.path.abspath(folder))  # of "."
    return next(path for number in itertools.count(2) if not os.path.lexists(path := f"{name}_{number}"))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment() -> dict:
    """What a result depends on besides the arguments: command, commit, versions, hardware."""
    import torch

    here = Path(__file__).parent

    def git(*command: str) -> str | None:
        """The output of a git command in this repository; None if it fails."""
        try:
            done = subprocess.run(["git", "-C", str(here), *command], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # new files count if they can change a result; a run's own output does not
    changed = git("status", "--porcelain", "--untracked-files=no")
    added = git("ls-files", "--others", "--exclude-standard", "--", "*.py", "*.args", "*.sh", "*.toml")
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "command": sys.argv,
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(changed or added),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: importlib.metadata.version(name) for name in ("torchvision", "timm", "numpy")},
        "host": platform.node(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


# ---------------------------------------------------------------------------------------------------- log


class _Terminal(logging.StreamHandler):
    """Writes above progress bars, until nobody reads the stream any more: a closed pipe, a terminal that is gone."""

    def emit(self, record):
        with tqdm.external_write_mode(self.stream):
            super().emit(record)

    def handleError(self, record):
        """From now on write to nothing; a run under `StopSignal` gets SIGPIPE or SIGHUP, and saves."""
        if not isinstance(sys.exc_info()[1], OSError):
            return super().handleError(record)
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


class _Readable(logging.Formatter):
    """Formats file names so that every terminal can show them."""

    def format(self, record: logging.LogRecord) -> str:
        return readable(super().format(record))


def start_logging(rank: int) -> None:
    """Rank 0 logs to standard output; the other ranks log only warnings, with their rank, to standard error."""
    with contextlib.suppress(AttributeError):  # standard output may have been replaced by something simpler
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names that it cannot show
    handler = _Terminal(sys.stdout if rank == 0 else sys.stderr)
    handler.setFormatter(_Readable("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False


def progress(iterable, description: str):
    """``iterable``, with a progress bar if rank 0 has a terminal."""
    hidden = None if logger.isEnabledFor(logging.INFO) else True  # None: only shown in a terminal
    return tqdm(iterable, desc=description, leave=False, disable=hidden)
