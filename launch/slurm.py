"""Start runs of main.py, here or on a SLURM cluster, and tell how far they are.

A `Point` is one run. Here: `finish` takes it to its end in the foreground. There: `submit_all` makes job arrays of
many, each run as `Cluster` asks for it, and leaves ``job.json`` in the output folders; from that and Slurm's queue
`status` tells what became of them.
"""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError
from submitit.helpers import clean_env
from submitit.slurm.slurm import _make_sbatch_string

from cli import expand_arguments
from launch.job import Job, ask_slurm
from launch.runs import ROOT, Point, epochs_done, is_locked, locked
from launch.status import jobs_in_queue, queued_job, table
from utils import UserError, environment, write_json

CPUS_PER_TASK = 10  # the paper's nodes: 80 cores for 8 GPUs
SIGNAL_DELAY_S = 120  # so long before a job's time is up it is told to save
SITE_OPTIONS = ("partition", "account", "qos", "reservation", "constraint")  # a user's environment may set them


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
