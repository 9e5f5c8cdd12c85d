"""What every process of a run needs: errors for users, the processes, signals, safe files, the log.

Torch is imported where it is used, so that a program that only reads its command line answers at once.
"""

from __future__ import annotations

import contextlib
import csv
import gc
import importlib.metadata
import io
import json
import logging
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
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
    """The user's input cannot be used; the message is one line that names the thing and the mend.

    ``main.py`` prints it without a traceback and exits with code 2.
    """


class RunError(Exception):
    """A run that had begun cannot go on; the message is one line. ``main.py`` exits with code 1."""


# --------------------------------------------------------------------------------------------- processes


GROUP_TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others: rank 0 may list a large data set alone."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the run: its rank, their number, the device it computes on, its place on its node."""

    rank: int
    world_size: int
    device: torch.device
    local_rank: int = 0
    store: dist.Store | None = None
    """Where they leave short messages for each other; None for a process alone."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Equal-shaped tensors of all ranks, stacked: ``(...)`` -> ``(world_size, ...)``, on the host."""
        import torch
        import torch.distributed as dist

        if self.world_size == 1:
            return rows[None].cpu()
        parts = [torch.empty_like(rows) for _ in range(self.world_size)]
        dist.all_gather(parts, rows)
        return torch.stack(parts).cpu()

    def leave_together(self) -> None:
        """Wait until all ranks are here: a launcher may end the others soon after the first has gone."""
        import torch

        self.gather(torch.zeros((), device=self.device))

    def explain(self, error: Exception) -> Exception:
        """What this process is to say of an error: the error itself, or which other process is lost.

        It leaves its last words for the others, which may be waiting for it.
        """
        place = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
        if not is_peer_failure(error):
            self.say(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}{place}")
            return error
        if self.is_main:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, for all that are left: the word first
        return RunError(f"lost {self.missing()}{place}; the same command goes on from the last checkpoint")

    def say(self, words: str) -> None:
        """Leave this rank's last words for the others; empty: it is well, and misses another."""
        if self.store is not None:
            with contextlib.suppress(RuntimeError):  # the store's own process may be the one that died
                self.store.set(f"last words/{self.rank}", words)

    def missing(self, seconds: float = 2.0) -> str:
        """Which ranks have failed or say nothing within so many seconds, and their last words.

        Called by those whose exchange with another failed.
        """
        self.say("")
        keys = [f"last words/{rank}" for rank in range(self.world_size)]
        give_up = time.monotonic() + seconds
        try:
            while not self.store.check(keys) and time.monotonic() < give_up:
                time.sleep(0.1)
            words = [self.store.get(key).decode() if self.store.check([key]) else "silent" for key in keys]
            if self.is_main:
                time.sleep(1)  # it mostly holds the store, where the others are still reading
        except RuntimeError:
            return "the process that holds the others together"
        return ", ".join(f"rank {rank} ({said})" for rank, said in enumerate(words) if said) or "one of the processes"


def processes_here() -> tuple[int, int, int]:
    """Rank, number of processes, and place on the node: torchrun's, or srun's without it, or alone."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "RANK" not in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:  # a batch script has none, only srun's tasks
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    rank, world_size, local_rank = (
        int(os.environ.get(name, alone)) for name, alone in zip(names, (0, 1, 0), strict=True)
    )
    return rank, world_size, local_rank


def meeting_point() -> str:
    """Where the processes meet, as a URL: as torchrun's environment has it, or on the first node of srun's step.

    The port is another one for every life of a job that is requeued, so that no process meets an earlier life's.
    """
    if "MASTER_ADDR" in os.environ or "SLURM_STEP_NODELIST" not in os.environ:
        return "env://"
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    job, step, life = (int(os.environ.get(name, 0)) for name in names)
    first = re.sub(r"\[(\w+)[^]]*\]", r"\1", os.environ["SLURM_STEP_NODELIST"]).partition(",")[0]  # n[01-04,7] -> n01
    number = job * 101 + step * 10 + life  # 101 has no divisor in common with 12,000: neighbouring jobs never meet
    return f"tcp://{first}:{20_000 + number % 12_000}"  # below what systems hand out themselves


def start_processes(device_name: str) -> Processes:
    """Join the other processes of the run as torchrun's environment describes them, or srun's; alone without.

    Args:
        device_name: ``auto`` (a GPU if there is one), or what ``torch.device`` understands.
    Raises:
        UserError: no such device here, or a GPU that this torch has no kernels for.
        RunError: the others did not come.
    """
    import torch.distributed as dist

    rank, world_size, local_rank = processes_here()
    device = pick_device(device_name, local_rank)
    if world_size == 1:
        return Processes(rank, world_size, device, local_rank)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        store, _, _ = next(dist.rendezvous(meeting_point(), rank, world_size, timeout=GROUP_TIMEOUT))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=GROUP_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"the {world_size} processes could not meet: {reason}") from error
    return Processes(rank, world_size, device, local_rank, store)


def end_processes() -> None:
    """Leave the process group, if one was joined."""
    if among_processes():
        import torch.distributed as dist

        gc.collect()  # a DistributedDataParallel that outlives its group can spin at exit
        dist.destroy_process_group()


def among_processes() -> bool:
    """Whether this process has joined others."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_initialized()


def is_peer_failure(error: BaseException) -> bool:
    """Whether an exchange failed because another process is gone or silent."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that ``name`` means for this process; see ``start_processes``, also for errors."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or not (index.isdigit() or name == kind):
        raise UserError(f"--device {name}: unknown; use auto, cpu, cuda or cuda:0")
    if kind == "cpu":
        return torch.device("cpu")
    own = 0 if torch.cuda.device_count() == 1 and "RANK" not in os.environ else local_rank  # srun may show each its own
    device = torch.device("cuda", int(index or own))
    if device.index >= torch.cuda.device_count():
        raise UserError(
            f"--device {device}: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs here; "
            "start no more processes than that, or use --device cpu"
        )
    torch.cuda.set_device(device)
    major, minor = torch.cuda.get_device_capability(device)
    if not has_kernels(torch.cuda.get_arch_list(), major, minor):
        raise UserError(
            f"{torch.cuda.get_device_name(device)} (sm_{major}{minor}): torch {torch.__version__} has no "
            "kernels for it; install requirements-v100.txt, or use --device cpu"
        )
    return device


def has_kernels(arch_list: list[str], major: int, minor: int) -> bool:
    """Whether code built for ``arch_list`` runs on a GPU of capability ``major.minor``.

    Machine code (``sm_80``) runs on later minor versions of its own major one, PTX (``compute_80``) on all
    later versions.
    """
    for arch in arch_list:
        kind, _, digits = arch.rstrip("af").partition("_")
        if not digits.isdigit():  # not one of NVIDIA's
            return True
        built = (int(digits[:-1]), int(digits[-1]))
        if kind == "sm" and built[0] == major and built[1] <= minor:
            return True
        if kind == "compute" and built <= (major, minor):
            return True
    return False


# -------------------------------------------------------------------------------------- seeds and signals


class StopSignal:
    """Notices SIGTERM, SIGUSR1, SIGUSR2 and SIGINT (Ctrl-C), so that a run can save between two steps and end.

    ``poll`` is called once a step by every rank and gives the same answer on all of them: the ranks' signals
    are exchanged on the host while the step is computed, and read one step later. It never waits for a GPU.
    A second Ctrl-C ends the process at once.
    """

    def __init__(self, processes: Processes):
        self.received = 0
        self._alone = processes.world_size == 1
        import torch.distributed as dist

        self._group = None if self._alone else dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
        self._pending: tuple[Any, torch.Tensor] | None = None

    def __enter__(self):
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
        self._handlers = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *error):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number  # a cluster's SIGTERM follows its SIGUSR2

    @property
    def exit_code(self) -> int:
        """0: saved and ended as asked. 75 after SIGUSR2: start it again. 130 after Ctrl-C: end what started it, too.

        All ranks have the same code. 75 is the system's own for a failure that passes (``EX_TEMPFAIL``).
        """
        codes: dict[int, int] = {signal.SIGINT: 130, signal.SIGUSR2: os.EX_TEMPFAIL}
        return codes.get(self.received, 0)

    def poll(self) -> bool:
        """Whether all ranks are to stop now."""
        import torch
        import torch.distributed as dist

        if self._alone:
            return bool(self.received)
        earlier, numbers = self._pending, torch.tensor([self.received])
        self._pending = (dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._group, async_op=True), numbers)
        if earlier is None:
            return False
        earlier[0].wait()
        self.received = int(earlier[1]) or self.received
        return bool(earlier[1])


# -------------------------------------------------------------------------------------------------- files


def write_atomically(path: Path, write) -> None:
    """Let ``write(file)`` fill a temporary file beside ``path``, fsync it, and put it in place in one step.

    Whatever happens, ``path`` holds the old content or the new one, whole.

    Raises:
        RunError: the folder or disk refused it; the old file is untouched.
    """
    path = Path(path)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False) as file:
            temporary = file.name
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as a RuntimeError
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise RunError(f"cannot write {path}: {reason}; what was there before is untouched") from error


def write_json(path: Path, content) -> None:
    """Write ``content`` as readable JSON, atomically."""
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write rows of equal keys, a line each below a line of the keys, atomically; None is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def prepare_output_dir(path: Path, option: str = "--output-dir") -> None:
    """Make the output folder, try to write in it, and clear away what a killed writer left.

    Args:
        path: of the folder.
        option: what the user named it with.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        for leftover in path.glob(".*.tmp"):
            leftover.unlink()
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}; name a folder that can be written") from None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment() -> dict:
    """What a result depends on beside the arguments: commit, versions, hardware, command."""
    import torch

    here = Path(__file__).parent

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *command], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "command": sys.argv,
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain")),
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


def start_logging(rank: int) -> None:
    """Rank 0 tells on standard output what happens; the other ranks only their warnings, with their rank."""
    handler = logging.StreamHandler(sys.stdout if rank == 0 else sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False


def to_device(batch: Any, device: torch.device) -> Any:
    """A tree of tensors (in dicts, lists, tuples) on ``device``; from pinned memory, without waiting for the copy."""
    import torch

    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: to_device(part, device) for name, part in batch.items()}
    if isinstance(batch, list):
        return [to_device(part, device) for part in batch]
    if isinstance(batch, tuple):
        parts = (to_device(part, device) for part in batch)
        return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
    return batch


def progress(iterable, what: str):
    """``iterable``, with a bar where rank 0 has a terminal."""
    hidden = None if logger.isEnabledFor(logging.INFO) else True  # None: shown in a terminal only
    return tqdm(iterable, desc=what, leave=False, disable=hidden)
