"""What a SLURM job runs: main.py's ``main``, and then what Slurm has to be told.

This module imports next to nothing: until submitit has loaded the job a signal would end the process, so everything
heavy waits until submitit's handlers are in place.
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

CLIENT_SECONDS = 30  # the longest that a Slurm client may take to answer


def ask_slurm(*command: str) -> str:
    """What a Slurm client prints.

    Raises:
        OSError, subprocess.SubprocessError: it is not there, fails (``stderr`` says why), or does not answer.
    """
    return subprocess.run(command, capture_output=True, text=True, timeout=CLIENT_SECONDS, check=True).stdout


def reason_of(error: Exception) -> str:
    """What went wrong in `ask_slurm`: the last line that the client said, or what became of it."""
    said = getattr(error, "stderr", None)
    return (said if isinstance(said, str) and said else str(error)).strip().rpartition("\n")[2]


@dataclass(frozen=True)
class Job:
    """Train on the cluster; one call is one task of one life of a job.

    Attributes:
        words: main.py's command line.
        folder: its output folder.
        epochs: at the end of the run.
        commit: of the files when the job was submitted; None outside a git repository.
    """

    words: list[str]
    folder: str
    epochs: int
    commit: str | None

    def __call__(self) -> None:
        """Train, tell Slurm if the job has to come back, and end with an exit code, 0 if all is well."""
        environment = JobEnvironment()
        signal.signal(signal.SIGTERM, _end)
        try:
            code = self._train(environment.global_rank)
        except SystemExit as end:
            code = end.code
        if environment.global_rank == 0 and code in (0, os.EX_TEMPFAIL):
            code = self._come_back(code == os.EX_TEMPFAIL, environment.job_id)
        sys.exit(0 if code == os.EX_TEMPFAIL and environment.global_rank else code)

    def _train(self, rank: int) -> int:
        from main import main

        if rank == 0:
            self._compare_commit()
        return main(self.words)

    def checkpoint(self) -> DelayedSubmission:
        """For a signal that comes before training: begin once more. (In training, main.py's own handlers save.)"""
        return DelayedSubmission(self)

    def _come_back(self, told_to: bool, job_id: str) -> int:
        """Requeue the job if its time was up or if it is being preempted; returns the exit code."""
        from checkpoints import epochs_saved

        done = epochs_saved(Path(self.folder))
        if done == self.epochs and not told_to:
            return 0
        if _is_wanted_back(job_id, told_to):
            return _requeue(job_id)
        _say(f"stopped after {done} of {self.epochs} epochs; the same command submits what is left")
        return os.EX_TEMPFAIL  # not 0: a job that waits for this run's weights must not start

    def _compare_commit(self) -> None:
        from utils import environment

        now = environment()
        if now["commit"] != self.commit:
            _say(f"submitted at commit {self.commit}, started at {now['commit']}: the files have changed since")
        if now["uncommitted_changes"]:
            _say(f"the files have uncommitted changes beside commit {now['commit']}")


def _is_wanted_back(job_id: str, told_to: bool) -> bool:
    """Whether to requeue the job: its time was up, or another job needs the place.

    Slurm does not requeue one that ends before it is killed for that. A job that is no longer RUNNING is being
    cancelled (or requeued by Slurm itself), and would rise again.
    """
    try:
        answer = ask_slurm("scontrol", "-o", "show", "job", job_id)
    except (OSError, subprocess.SubprocessError) as error:
        _say(f"cannot ask what Slurm does with the job: {reason_of(error)}")
        return told_to
    facts = dict(re.findall(r"(\w+)=(\S*)", answer))
    preempted = facts.get("PreemptTime", "None") not in ("None", "N/A", "Unknown")
    return facts.get("JobState") == "RUNNING" and (told_to or preempted)


def _requeue(job_id: str) -> int:
    """Put the job back into the queue; the exit code of this task, 0 if that worked."""
    try:
        ask_slurm("scontrol", "requeue", job_id)
    except (OSError, subprocess.SubprocessError) as error:
        _say(f"error: job {job_id} cannot be requeued ({reason_of(error)}); the same command submits what is left")
        return os.EX_TEMPFAIL
    _say(f"requeued job {job_id}; everything is saved")
    return 0


def _end(number: int, frame) -> None:
    """For SIGTERM outside of training, which submitit would ignore: there is nothing to save, so end."""
    sys.exit(0)


def _say(text: str) -> None:
    print(text, flush=True)
