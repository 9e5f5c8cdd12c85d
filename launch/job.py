"""The function that a SLURM job executes: main.py's ``main``, then the requeueing of an unfinished run.

Module-level imports stay light on purpose. Before submitit has unpickled the job, its signal handlers are not
installed and a signal would kill the process; slow imports therefore happen inside the functions.
"""

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from submitit import JobEnvironment
from submitit.helpers import DelayedSubmission

CLIENT_SECONDS = 30  # timeout of a Slurm client command


def run_slurm_client(*command: str) -> str:
    """The standard output of a Slurm client command (``squeue``, ``scontrol``, ...).

    Raises:
        OSError: the program is not installed.
        subprocess.SubprocessError: it fails (``stderr`` holds its message) or exceeds CLIENT_SECONDS.
    """
    return subprocess.run(command, capture_output=True, text=True, timeout=CLIENT_SECONDS, check=True).stdout


def failure_reason(error: Exception) -> str:
    """Why `run_slurm_client` failed: the last line of the client's stderr, or the exception's own message."""
    stderr = getattr(error, "stderr", None)
    return (stderr if isinstance(stderr, str) and stderr else str(error)).strip().rpartition("\n")[2]


@dataclass(frozen=True)
class SlurmJob:
    """One training run on the cluster. submitit pickles it; every task of the job calls it after each (re)start.

    Attributes:
        words: main.py's command line, argument files expanded.
        folder: main.py's output folder.
        epochs: number of epochs of the finished run.
        commit: git commit at submission; None outside a git repository.
    """

    words: list[str]
    folder: str
    epochs: int
    commit: str | None

    def __call__(self) -> None:
        """Train, requeue the job if the run is unfinished, and exit; exit code 0 means success."""
        environment = JobEnvironment()
        signal.signal(signal.SIGTERM, _exit_on_sigterm)
        try:
            code: str | int | None = self._train(environment.global_rank)
        except SystemExit as end:
            code = end.code
        if environment.global_rank == 0 and code in (0, os.EX_TEMPFAIL):
            code = self._requeue_if_unfinished(code == os.EX_TEMPFAIL, environment.job_id)
        sys.exit(0 if code == os.EX_TEMPFAIL and environment.global_rank else code)

    def _train(self, rank: int) -> int:
        from main import main

        if rank == 0:
            self._report_code_changes()
        return main(self.words)

    def checkpoint(self) -> DelayedSubmission:
        """submitit's hook for a signal before training: submit this job again. main.py handles later signals."""
        return DelayedSubmission(self)

    def _requeue_if_unfinished(self, interrupted: bool, job_id: str) -> int:
        """Requeue the job after its time limit or a preemption; returns the exit code.

        Args:
            interrupted: main.py stopped because of a signal (exit code EX_TEMPFAIL).
            job_id: Slurm's id of the job.
        """
        from checkpoints import epochs_saved

        done = epochs_saved(Path(self.folder))
        if done == self.epochs and not interrupted:
            return 0
        if _should_requeue(job_id, interrupted):
            return _requeue(job_id)
        _log(f"stopped after {done} of {self.epochs} epochs; run the same command to submit the remaining epochs")
        return os.EX_TEMPFAIL  # not 0: a job that depends on this run's weights must not start

    def _report_code_changes(self) -> None:
        from utils import environment

        now = environment()
        if now["commit"] != self.commit:
            _log(f"warning: submitted at commit {self.commit}, started at {now['commit']}: the code has changed")
        if now["uncommitted_changes"]:
            _log(f"warning: the code has uncommitted changes on top of commit {now['commit']}")


def _should_requeue(job_id: str, interrupted: bool) -> bool:
    """Whether the job ended because of its time limit or a preemption, and not because it was cancelled.

    Slurm does not requeue a preempted job that exits within its grace time. A job that is no longer RUNNING is being
    cancelled, or Slurm requeues it itself; ``scontrol requeue`` would restart a cancelled one.
    """
    try:
        answer = run_slurm_client("scontrol", "-o", "show", "job", job_id)
    except (OSError, subprocess.SubprocessError) as error:
        _log(f"warning: cannot query the state of job {job_id}: {failure_reason(error)}")
        return interrupted
    fields = dict(re.findall(r"(\w+)=(\S*)", answer))
    preempted = fields.get("PreemptTime", "None") not in ("None", "N/A", "Unknown")
    return fields.get("JobState") == "RUNNING" and (interrupted or preempted)


def _requeue(job_id: str) -> int:
    """Requeue the job; returns this task's exit code, 0 on success."""
    try:
        run_slurm_client("scontrol", "requeue", job_id)
    except (OSError, subprocess.SubprocessError) as error:
        reason = failure_reason(error)
        _log(f"error: cannot requeue job {job_id} ({reason}); run the same command to submit the remaining epochs")
        return os.EX_TEMPFAIL
    _log(f"requeued job {job_id}; the checkpoint is saved")
    return 0


def _exit_on_sigterm(number: int, frame) -> None:
    """Handler for SIGTERM outside training, when there is nothing to save; submitit would ignore the signal."""
    sys.exit(0)


def _log(message: str) -> None:
    print(message, flush=True)
