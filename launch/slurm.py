"""Submit runs of main.py to a SLURM cluster as job arrays.

`submit_all` groups the unfinished runs into job arrays, requests for each run what a `Cluster` describes, and writes
``job.json`` into every output folder. `launch.status` reads these files and Slurm's queue to report the runs' state.
"""

import contextlib
import io
import os
import shlex
import shutil
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
from launch.job import SlurmJob
from launch.runs import ROOT, RunSpec, epochs_done, hold_lock, is_locked
from launch.status import format_table, jobs_in_queue, queued_job_id
from utils import UserError, environment, write_json

CPUS_PER_TASK = 10  # the paper's nodes: 80 cores for 8 GPUs
SIGNAL_DELAY_S = 120  # seconds before the time limit at which Slurm signals the job to save a checkpoint
# sbatch options that a user may set by SBATCH_* environment variables
SITE_OPTIONS = ("partition", "account", "qos", "reservation", "constraint")


@dataclass(frozen=True)
class Cluster:
    """The resources requested from Slurm for each run, with one task per GPU.

    Attributes:
        nodes: number of nodes.
        ngpus: GPUs per node; 0 requests one task per node and no GPU.
        timeout: time limit in minutes, after which the job is requeued.
        partition: None for the cluster's default.
        slurm_args: further sbatch options, by name with underscores; True for an option without a value.
        max_parallel: number of runs of an array that may run at once; None for all.
    """

    nodes: int = 1
    ngpus: int = 8
    timeout: int = 2800
    partition: str | None = None
    slurm_args: dict[str, str | bool] = field(default_factory=dict)
    max_parallel: int | None = None

    @property
    def processes(self) -> int:
        """Number of training processes of a run."""
        return self.nodes * max(1, self.ngpus)

    def submitit_parameters(self, after: Sequence[str] = ()) -> dict:
        """Parameters for ``SlurmExecutor.update_parameters``.

        Args:
            after: ids of jobs that must succeed before these jobs start (sbatch's ``afterok``).
        """
        # 1. defaults, overridden by the user's sbatch options
        requested: dict[str, str | bool] = {
            "cpus_per_task": str(CPUS_PER_TASK),
            "signal_delay_s": str(SIGNAL_DELAY_S),
            "job_name": "sar",
        }
        requested |= self.slurm_args
        # 2. the dependencies; a job whose dependency failed is cancelled, not left pending forever
        if after:
            own = [str(requested["dependency"])] if "dependency" in requested else []
            requested["dependency"] = ",".join([*own, f"afterok:{':'.join(after)}"])
            requested["kill_on_invalid_dep"] = "yes"
        # 3. submitit's own parameters by name, all other sbatch options as additional_parameters
        known = SlurmExecutor._valid_parameters()
        optional = {
            "partition": self.partition,
            "gpus_per_node": self.ngpus if self.ngpus and "gres" not in requested else None,
            "array_parallelism": self.max_parallel,
        }
        return {
            "nodes": self.nodes,
            "ntasks_per_node": max(1, self.ngpus),
            "time": self.timeout,
            **{name: value for name, value in optional.items() if value is not None},
            **{name: value for name, value in requested.items() if name in known},
            "additional_parameters": {"requeue": True}
            | {name: value for name, value in requested.items() if name not in known},
            "stderr_to_stdout": True,
            # srun ignores sbatch's --cpus-per-task, and by default keeps the other ranks alive when one has died
            "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={requested['cpus_per_task']}"],
            # the job imports this repository from any working directory, and no module from that directory
            "setup": [
                f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1",
            ],
        }


def sbatch_script(cluster: Cluster, folder: Path, number: int, after: Sequence[str] = ()) -> str:
    """The sbatch script that `submit` would write for ``number`` runs; ``folder`` and ``after`` as for `submit`."""
    return _make_sbatch_string(
        command=shlex.join([sys.executable, "-u", "-m", "submitit.core._submit", str(folder.absolute())]),
        folder=folder.absolute(),
        map_count=number if number > 1 else None,
        **cluster.submitit_parameters(after),
    )


def submit(cluster: Cluster, specs: Sequence[RunSpec], folder: Path, after: Sequence[str] = ()) -> list[str]:
    """Submit the runs as one job array (a single run as a plain job); returns their job ids.

    Writes ``job.json`` into each output folder: job id, log, arguments, and the submitting environment.

    Args:
        folder: for submitit's files and the logs; on a file system that the nodes share.
        after: ids of jobs that must succeed before these jobs start.
    Raises:
        UserError: sbatch refuses the request.
    """
    # 1. pickle and submit the runs; on a refusal, remove the files that submitit has written
    submitter = environment()
    executor = SlurmExecutor(folder=folder)
    executor.update_parameters(**cluster.submitit_parameters(after))
    commit = submitter["commit"]
    tasks = [SlurmJob(expand_arguments(spec.words), str(spec.folder), spec.epochs, commit) for spec in specs]
    existing = set(folder.iterdir())
    try:
        # submitit also prints the message that its exception carries
        with _submission_environment(cluster), contextlib.redirect_stderr(io.StringIO()):
            jobs = executor.submit_array(tasks)
    except FailedJobError as error:
        for path in set(folder.iterdir()) - existing:
            path.unlink()
        words = "; ".join(str(error).replace("sbatch: error: ", "").splitlines())
        raise UserError(f"sbatch refuses the job: {words}") from None
    # 2. record each submission beside its run
    for spec, job in zip(specs, jobs, strict=True):
        record = {
            "job_id": job.job_id,
            "log": str(job.paths.stdout),
            "words": spec.words,
            "args": vars(spec.args),
            "epochs": spec.epochs,
            "commit": commit,
            "uncommitted_changes": submitter["uncommitted_changes"],
            "python": sys.executable,
            "working_directory": os.getcwd(),
            "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        spec.folder.mkdir(parents=True, exist_ok=True)
        write_json(spec.folder / "job.json", record)
    return [job.job_id for job in jobs]


def submit_all(cluster: Cluster, specs: Sequence[RunSpec], folder: Path) -> None:
    """Submit the runs that are neither finished nor queued, and print a table of all job ids.

    Runs without unfinished dependencies form one job array; runs with the same dependencies form one each.

    Args:
        folder: see `submit`.
    Raises:
        UserError: see `split_unfinished` and `submit`; no Slurm on this machine; a folder that cannot be written.
    """
    _prepare_folder(folder)
    with hold_lock(folder, f"submitting with {folder}"):
        # 1. find out which runs to submit
        queue = jobs_in_queue()
        to_submit, ids = split_unfinished(specs, queue)
        for spec in to_submit:
            if is_locked(spec.folder):
                raise UserError(f"{spec}: another launcher is training it on a machine without Slurm; stop it or wait")
        # 2. submit group after group; the ids of earlier groups are the dependencies of later ones
        states = {name: f"already queued, {queue[job_id]}" for name, job_id in ids.items()}
        for dependencies, group in group_by_dependencies(to_submit, ids).items():
            new = submit(cluster, group, folder, [ids[name] for name in dependencies])
            ids |= {spec.name: job_id for spec, job_id in zip(group, new, strict=True)}
            state = f"submitted, after {', '.join(dependencies)}" if dependencies else "submitted"
            states |= {spec.name: state for spec in group}
    # 3. report
    if to_submit and environment()["uncommitted_changes"]:
        print("warning: uncommitted changes; a job runs the code as it is when the job starts", file=sys.stderr)
    rows = [[spec.name, ids.get(spec.name, "-"), states.get(spec.name, "already finished")] for spec in specs]
    print(format_table(["run", "job", ""], rows))


def split_unfinished(specs: Sequence[RunSpec], queue: dict[str, str]) -> tuple[list[RunSpec], dict[str, str]]:
    """Split the unfinished runs into those to submit, and the job ids (by run name) of those in the queue.

    Raises:
        UserError: a folder or a job in the queue has other arguments.
    """
    unfinished = [spec for spec in specs if epochs_done(spec) < spec.epochs]
    ids = {spec.name: queued_job_id(spec, queue) for spec in unfinished}
    queued = {name: job_id for name, job_id in ids.items() if job_id}
    return [spec for spec in unfinished if spec.name not in queued], queued


def group_by_dependencies(specs: Sequence[RunSpec], queued: Iterable[str]) -> dict[tuple[str, ...], list[RunSpec]]:
    """Group the runs to submit into job arrays; the key is the names of the unfinished runs they depend on.

    Groups keep the order of ``specs``, in which a run follows its dependencies.

    Args:
        specs: the runs to submit.
        queued: names of the runs in the queue.
    """
    unfinished = {spec.name for spec in specs} | set(queued)
    groups: dict[tuple[str, ...], list[RunSpec]] = {}
    for spec in specs:
        groups.setdefault(tuple(name for name in spec.dependencies if name in unfinished), []).append(spec)
    return groups


def print_submission(cluster: Cluster, specs: Sequence[RunSpec], folder: Path) -> None:
    """Print what `submit_all` would submit: each sbatch script, and the command of each run."""
    try:
        queue = jobs_in_queue()
    except UserError as error:
        print(f"# assuming an empty queue: {error}")
        queue = {}
    to_submit, queued = split_unfinished(specs, queue)
    for spec in specs:
        if spec not in to_submit:
            state = f"already queued, job {queued[spec.name]}" if spec.name in queued else "already finished"
            print(f"# {spec}: {state}")
    for dependencies, group in group_by_dependencies(to_submit, queued).items():
        after = [queued.get(name, f"<job of {name}>") for name in dependencies]
        print(f"\n# {len(group)} {'runs, one job array' if len(group) > 1 else 'run, one job'}; sbatch script:")
        print(f"{sbatch_script(cluster, folder, len(group), after)}")
        for index, spec in enumerate(group):
            print(f"# {index}: {spec}\nmain.py {shlex.join(spec.words)}")


@contextlib.contextmanager
def _submission_environment(cluster: Cluster) -> Iterator[None]:
    """Remove Slurm's and submitit's environment variables while sbatch is called.

    sbatch would pass on those of a job in which this program itself runs, and read SBATCH_* variables as options. The
    user's SBATCH_* defaults for SITE_OPTIONS stay where ``cluster`` does not set the option: for sbatch, a variable
    takes precedence over the script.
    """
    given = cluster.slurm_args.keys() | ({"partition"} if cluster.partition else set())
    kept_names = {"SLURM_CONF", "SLURM_CLUSTERS"}
    kept_names |= {f"SBATCH_{name.upper()}" for name in SITE_OPTIONS if name not in given}
    kept = {name: value for name, value in os.environ.items() if name in kept_names}
    with clean_env():
        os.environ.update(kept)
        yield


def _prepare_folder(folder: Path) -> None:
    """Create the folder for submitit's files.

    Raises:
        UserError: no sbatch on this machine, or a folder that cannot be written.
    """
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise UserError("no sbatch on this machine; submit on a login node of the cluster (--local runs without Slurm)")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; choose a writable folder that the nodes share") from None
