"""Start runs of main.py, here or on a SLURM cluster, and tell how far they are.

A `Point` is one run. Here: `finish` takes it to its end in the foreground. There: `submit_all` makes job arrays of
many, each run as `Cluster` asks for it, and leaves ``job.json`` in the output folders; from that and Slurm's queue
`status` tells what became of them.
"""

import argparse
import contextlib
import fcntl
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError
from submitit.helpers import clean_env
from submitit.slurm.slurm import _make_sbatch_string

from arguments import differences, expand_arguments
from checkpoints import read_checkpoint
from slurm_job import Job, ask_slurm, reason_of
from utils import RunError, UserError, environment, write_json

ROOT = Path(__file__).resolve().parent

CPUS_PER_TASK = 10  # the paper's nodes: 80 cores for 8 GPUs
SIGNAL_DELAY_S = 120  # so long before a job's time is up it is told to save
SITE_OPTIONS = ("partition", "account", "qos", "reservation", "constraint")  # a user's environment may set them


# ---------------------------------------------------------------------------------------------------- a run


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
    different = differences(point.args, saved)
    if different:
        raise UserError(
            f"{point.folder} holds a run with other arguments; name another folder ({'; '.join(different)})"
        )
    return epoch


def epochs_saved(folder: Path) -> int:
    """Finished epochs of whatever run the folder holds; 0 where there is none yet.

    Raises:
        UserError: a damaged file.
    """
    path = folder / "checkpoint.pth"
    return read_checkpoint(path, lazily=True).get("epoch", 0) if path.exists() else 0


def exit_code(work: Callable[[], int]) -> int:
    """What ``work`` returns, or the code of the error that it prints: 1, or 2 where the user's input cannot be used."""
    try:
        return work()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        # The frames of an error keep a loader, whose processes would never end.
        traceback.clear_frames(error.__traceback__)
        if not isinstance(error, UserError | RunError | OSError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


# ------------------------------------------------------------------------------------------------------ here


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


# -------------------------------------------------------------------------------------------- on a cluster


@dataclass(frozen=True)
class Cluster:
    """What is asked of Slurm for each run; one task a GPU.

    Attributes:
        nodes: of a run.
        ngpus: of a node; 0 asks for one task a node and no GPU.
        timeout: minutes until a job is requeued.
        partition: None leaves it to the cluster.
        slurm_args: more options of sbatch, by name with underscores; True for one without a value.
        max_parallel: how many runs at once; None for all.
    """

    nodes: int = 1
    ngpus: int = 8
    timeout: int = 2800
    partition: str | None = None
    slurm_args: dict[str, str | bool] = field(default_factory=dict)
    max_parallel: int | None = None

    @property
    def processes(self) -> int:
        """Of a run."""
        return self.nodes * max(1, self.ngpus)

    def parameters(self, after: Sequence[str] = ()) -> dict:
        """submitit's parameters of jobs that begin when the jobs ``after`` have ended well."""
        asked = {"cpus_per_task": str(CPUS_PER_TASK), "signal_delay_s": str(SIGNAL_DELAY_S), "job_name": "sar"}
        asked |= self.slurm_args
        if after:
            conditions = [asked.get("dependency"), f"afterok:{':'.join(after)}"]
            asked["dependency"] = ",".join(filter(None, conditions))
            asked["kill_on_invalid_dep"] = "yes"
        known = SlurmExecutor._valid_parameters()
        optional = {
            "partition": self.partition,
            "gpus_per_node": self.ngpus if self.ngpus and "gres" not in asked else None,
            "array_parallelism": self.max_parallel,
        }
        return {
            "nodes": self.nodes,
            "ntasks_per_node": max(1, self.ngpus),
            "time": self.timeout,
            **{name: value for name, value in optional.items() if value is not None},
            **{name: value for name, value in asked.items() if name in known},
            "additional_parameters": {"requeue": True}
            | {name: value for name, value in asked.items() if name not in known},
            "stderr_to_stdout": True,
            # srun no longer takes sbatch's CPUs for its own, and lets the other ranks wait for one that is gone
            "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={asked['cpus_per_task']}"],
            # the job finds this repository wherever it starts, and no module of a folder that it happens to start in
            "setup": [
                f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1",
            ],
        }


def sbatch_file(cluster: Cluster, folder: Path, number: int, after: Sequence[str] = ()) -> str:
    """The file that `submit` gives sbatch for so many runs; ``folder`` is for submitit's files."""
    return _make_sbatch_string(
        command=shlex.join([sys.executable, "-u", "-m", "submitit.core._submit", str(folder.absolute())]),
        folder=folder.absolute(),
        map_count=number if number > 1 else None,
        **cluster.parameters(after),
    )


def submit(cluster: Cluster, points: Sequence[Point], folder: Path, after: Sequence[str] = ()) -> list[str]:
    """Submit the runs as one job array (a single one as a job); returns their job ids.

    Each output folder gets ``job.json``: job id, log, arguments, and what they were submitted with.

    Args:
        folder: for submitit's files and the logs; the nodes must see it.
        after: ids of jobs that must have ended well before these begin.
    Raises:
        UserError: Slurm refuses.
    """
    submitter = environment()
    executor = SlurmExecutor(folder=folder)
    executor.update_parameters(**cluster.parameters(after))
    commit = submitter["commit"]
    tasks = [Job(expand_arguments(point.words), str(point.folder), point.epochs, commit) for point in points]
    before = set(folder.iterdir())
    try:
        # submitit prints what its error says, too
        with _outside_of_jobs(cluster), contextlib.redirect_stderr(io.StringIO()):
            jobs = executor.submit_array(tasks)
    except FailedJobError as error:
        for path in set(folder.iterdir()) - before:
            path.unlink()
        raise UserError(_explain_refusal(str(error))) from None
    for point, job in zip(points, jobs, strict=True):
        record = {
            "job_id": job.job_id,
            "log": str(job.paths.stdout),
            "words": point.words,
            "args": vars(point.args),
            "epochs": point.epochs,
            "commit": commit,
            "uncommitted_changes": submitter["uncommitted_changes"],
            "python": sys.executable,
            "working_directory": os.getcwd(),
            "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        point.folder.mkdir(parents=True, exist_ok=True)
        write_json(point.folder / "job.json", record)
    return [job.job_id for job in jobs]


def submit_all(cluster: Cluster, points: Sequence[Point], folder: Path) -> None:
    """Submit the runs that are neither finished nor queued, and print the table of all job ids.

    One job array for those that need no other run, and one for those that wait for the same runs.

    Args:
        folder: see `submit`.
    Raises:
        UserError: see `sort_out`, `submit`; no Slurm on this machine; a folder that cannot be written.
    """
    _prepare_folder(folder)
    with locked(folder / "lock", f"submitting with {folder}"):
        queue = jobs_in_queue()
        waiting, ids = sort_out(points, queue)
        for point in waiting:
            if is_locked(point.lock):
                raise UserError(f"{point}: another launcher is training it without Slurm; end that, or wait for it")
        states = {name: f"in the queue before, {queue[job_id]}" for name, job_id in ids.items()}
        for needs, group in arrays(waiting, ids).items():
            new = submit(cluster, group, folder, [ids[name] for name in needs])
            ids |= {point.name: job_id for point, job_id in zip(group, new, strict=True)}
            states |= {point.name: f"submitted, after {', '.join(needs)}" if needs else "submitted" for point in group}
    if waiting and environment()["uncommitted_changes"]:
        print("warning: uncommitted changes; a job runs the files as they are when it starts", file=sys.stderr)
    rows = [[point.name, ids.get(point.name, "-"), states.get(point.name, "finished before")] for point in points]
    print(table(["run", "job", ""], rows))


def warn_of_data_elsewhere(points: Sequence[Point]) -> set[str]:
    """Say which data folders this machine does not have; the nodes may. Returns them."""
    paths = {point.args.data_path for point in points} - {None}
    missing = {path for path in paths if not Path(path).exists()}
    for path in sorted(missing):
        print(f"warning: --data-path {path} is not on this machine; the nodes must have it", file=sys.stderr)
    return missing


def sort_out(points: Sequence[Point], queue: dict[str, str]) -> tuple[list[Point], dict[str, str]]:
    """The runs to be submitted, and the job ids of those that are in the queue, by name; others are finished.

    Raises:
        UserError: a folder or a job in the queue has other arguments.
    """
    unfinished = [point for point in points if epochs_done(point) < point.epochs]
    ids = {point.name: queued_job(point, queue) for point in unfinished}
    queued = {name: job_id for name, job_id in ids.items() if job_id}
    return [point for point in unfinished if point.name not in queued], queued


def arrays(waiting: Sequence[Point], queued: Iterable[str]) -> dict[tuple[str, ...], list[Point]]:
    """The job arrays by the names of the runs that they wait for; what is waited for stands before."""
    unfinished = {point.name for point in waiting} | set(queued)
    groups: dict[tuple[str, ...], list[Point]] = {}
    for point in waiting:
        groups.setdefault(tuple(name for name in point.needs if name in unfinished), []).append(point)
    return groups


def print_submission(cluster: Cluster, points: Sequence[Point], folder: Path) -> None:
    """What `submit_all` would do: the files that sbatch would get, and the command of each run."""
    try:
        queue = jobs_in_queue()
    except UserError as error:
        print(f"# as if nothing were in the queue: {error}")
        queue = {}
    waiting, queued = sort_out(points, queue)
    for point in points:
        if point not in waiting:
            print(f"# {point}: " + (f"job {queued[point.name]} has it" if point.name in queued else "finished before"))
    for needs, group in arrays(waiting, queued).items():
        after = [queued.get(name, f"<job of {name}>") for name in needs]
        print(f"\n# {len(group)} {'runs, one job array' if len(group) > 1 else 'run, one job'}; sbatch gets:")
        print(f"{sbatch_file(cluster, folder, len(group), after)}")
        for index, point in enumerate(group):
            print(f"# {index}: {point}\nmain.py {shlex.join(point.words)}")


@contextlib.contextmanager
def _outside_of_jobs(cluster: Cluster) -> Iterator[None]:
    """Hide the variables that sbatch would hand on from a job that this program itself runs in, or take for options.

    What the user's environment says on place and account stays, where ``cluster`` says nothing: to sbatch a variable
    counts more than what its file says.
    """
    said = cluster.slurm_args.keys() | ({"partition"} if cluster.partition else set())
    stay = {"SLURM_CONF", "SLURM_CLUSTERS"}
    stay |= {f"SBATCH_{name.upper()}" for name in SITE_OPTIONS if name not in said}
    of_the_user = {name: value for name, value in os.environ.items() if name in stay}
    with clean_env():
        os.environ.update(of_the_user)
        yield


def _prepare_folder(folder: Path) -> None:
    """Make the folder for submitit's files.

    Raises:
        UserError: no sbatch here, or a folder that cannot be written.
    """
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise UserError("no sbatch on this machine; submit on a login node of the cluster (--local runs without Slurm)")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; name one that can be written and that the nodes see") from None


def _explain_refusal(error: str) -> str:
    """What sbatch said, in one line with the mend."""
    said = "; ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in error.splitlines() if line)
    mends = {
        "account": "--slurm-arg account=NAME says whose time it is",
        "partition": f"--partition: this cluster has {_partitions()}",
        "qos": "--slurm-arg qos=NAME",
        "time limit": "--timeout, in minutes",
        "memory": "--slurm-arg mem=...",
        "feature": "--slurm-arg constraint=...",
        "array": "sweep over fewer values in one command",
        "node|cpu|gres|gpu": "ask for less with --nodes, --ngpus or --slurm-arg cpus_per_task=N",
    }
    for pattern, mend in mends.items():
        if re.search(pattern, said, re.IGNORECASE):
            return f"Slurm refuses: {said} ({mend})"
    return f"Slurm refuses: {said}"


def _partitions() -> str:
    try:
        return ", ".join(ask_slurm("sinfo", "-h", "-o", "%R").split()) or "none"
    except (OSError, subprocess.SubprocessError):
        return "those that sinfo lists"


# ------------------------------------------------------------------------------------------- what became of it


def jobs_in_queue() -> dict[str, str]:
    """What each job of this user is doing that is not over, by job id (``12``, or ``12_3`` in an array).

    ``running``, ``pending: <Slurm's reason>``, or another of Slurm's states in lower case.

    Raises:
        UserError: Slurm cannot be asked.
    """
    try:
        lines = ask_slurm("squeue", "-h", "-r", "-u", str(os.getuid()), "-o", "%i %T %r").splitlines()
    except FileNotFoundError:
        raise UserError("no squeue on this machine; ask on a login node of the cluster") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"Slurm does not answer ({reason_of(error)}); try again later") from None
    jobs = (line.split(maxsplit=2) for line in lines)
    return {job_id: f"pending: {why}" if state == "PENDING" else state.lower() for job_id, state, why in jobs}


def read_job(folder: Path) -> dict | None:
    """The ``job.json`` of the run's last submission; None if it was never submitted.

    Raises:
        UserError: a damaged file.
    """
    path = folder / "job.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"{path} cannot be read; remove it if no job of this run is in the queue") from None


def queued_job(point: Point, queue: dict[str, str]) -> str | None:
    """The id of the job in ``queue`` that has this run; None if there is none.

    Raises:
        UserError: it was submitted with other arguments, or is about to end.
    """
    job = read_job(point.folder)
    if job is None or job["job_id"] not in queue:
        return None
    if queue[job["job_id"]] == "completing":
        raise UserError(f"{point}: its job {job['job_id']} is just ending; give the command again in a minute")
    mine = argparse.Namespace(**json.loads(json.dumps(vars(point.args))))  # as job.json keeps it
    different = differences(mine, job["args"])
    if different:
        listed = "; ".join(line.replace("in the checkpoint", "in the job") for line in different)
        raise UserError(f"{point.folder}: job {job['job_id']} has other arguments; scancel it first ({listed})")
    return job["job_id"]


def refuse_queued(points: Iterable[Point]) -> None:
    """Refuse to run here what a job in the queue has.

    Raises:
        UserError: one of the runs is in the queue.
    """
    submitted = [point for point in points if read_job(point.folder)]
    try:
        queue = jobs_in_queue() if submitted else {}
    except UserError as error:
        print(f"warning: {error}; let no job train here, too: {', '.join(map(str, submitted))}", file=sys.stderr)
        return
    for point in submitted:
        job_id = queued_job(point, queue)
        if job_id:
            raise UserError(f"{point}: job {job_id} has this run ({queue[job_id]}); wait for it, or scancel {job_id}")


def state_of(folder: Path, queue: dict[str, str] | None) -> tuple[str, str]:
    """A word for what became of a submitted run, and what to know about it; ``queue`` is None if it is not known."""
    job = read_job(folder)
    try:
        done = epochs_saved(folder)
    except UserError as error:
        return "failed", str(error)
    progress = f"{done} of {job['epochs']} epochs"
    if done >= job["epochs"]:
        return "finished", progress
    if queue is None:
        return "unknown", progress
    if job["job_id"] in queue:
        state, _, why = queue[job["job_id"]].partition(": ")
        return state, f"{progress} ({why})" if why else progress
    log = Path(job["log"])
    own, slurms = last_errors(log)
    lines = [progress, own or slurms, f"log: {log}" if log.exists() else "its job never began"]
    told_to = not slurms or re.search("CANCELLED|exit code 75", slurms)
    return ("stopped" if told_to and not own else "failed"), "\n".join(filter(None, lines))


def last_errors(log: Path) -> tuple[str, str]:
    """The last lines that tell of errors in the tasks' last lives, the run's own and Slurm's; empty if none."""
    own, steps, sruns = [""], [""], [""]
    for path in sorted(log.parent.glob(log.name.replace("_0_log", "_*_log"))):
        last_life = path.read_text(errors="replace").rpartition("Starting with JobEnvironment")[2]
        own += re.findall(r"^(?:\[rank \d+\] )?(?:error|[\w.]*(?:Error|Exception)): .*", last_life, re.MULTILINE)
        steps += re.findall(r"^slurmstepd\S*: error: .*", last_life, re.MULTILINE)
        sruns += re.findall(r"^srun: error: .*", last_life, re.MULTILINE)
    return own[-1], steps[-1] or sruns[-1]  # srun only sees that a step has ended


def status(job_dir: Path) -> str:
    """A table of all runs below the folder that were submitted; links are not followed."""
    folders = sorted(Path(folder) for folder, _, files in os.walk(job_dir) if "job.json" in files)
    if not folders:
        return f"nothing was submitted in {job_dir}"
    try:
        queue, note = jobs_in_queue(), ""
    except UserError as error:
        queue, note = None, f"\nwhat is not finished may be waiting, running or over: {error}"
    rows = []
    for folder in folders:
        name = str(folder.relative_to(job_dir))
        rows.append([job_dir.name if name == "." else name, read_job(folder)["job_id"], *state_of(folder, queue)])
    counts = [f"{sum(row[2] == word for row in rows)} {word}" for word in dict.fromkeys(row[2] for row in rows)]
    return f"{table(['run', 'job', 'state', ''], rows)}\n{len(rows)} runs: {', '.join(counts)}{note}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as they must be; further lines of a cell stand indented below its row."""
    lines = []
    cells = [[cell.partition("\n")[0] for cell in row] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row, first in zip([head, *rows], cells, strict=True):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(first, widths, strict=True)).rstrip())
        lines += [f"    {line}" for cell in row for line in cell.splitlines()[1:]]
    return "\n".join(lines)
