"""The state of submitted runs, read from their job.json files, Slurm's queue and their logs."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from arguments import differences
from launch.job import failure_reason, run_slurm_client
from launch.logs import last_and_best
from launch.runs import RunSpec, is_locked
from utils import UserError


def jobs_in_queue() -> dict[str, str]:
    """The state of each of this user's pending and running jobs, by job id (``12``, or ``12_3`` in an array).

    A state is ``running``, ``pending: <Slurm's reason>``, or another of Slurm's states in lower case.

    Raises:
        UserError: ``squeue`` is not installed, fails or does not answer.
    """
    try:
        lines = run_slurm_client("squeue", "-h", "-r", "-u", str(os.getuid()), "-o", "%i %T %r").splitlines()
    except FileNotFoundError:
        raise UserError("no squeue on this machine; run this on a login node of the cluster") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"Slurm does not answer ({failure_reason(error)}); try again later") from None
    jobs = (line.split(maxsplit=2) for line in lines)
    return {job_id: f"pending: {reason}" if state == "PENDING" else state.lower() for job_id, state, reason in jobs}


def read_job(folder: Path) -> dict | None:
    """The ``job.json`` of the run's last submission; None if the run was never submitted.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / "job.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"{path} cannot be read; remove it if no job of this run is in the queue") from None


def queued_job_id(spec: RunSpec, queue: dict[str, str]) -> str | None:
    """The id of the job in ``queue`` that executes this run; None if there is none.

    Raises:
        UserError: that job has other arguments, or is about to end.
    """
    job = read_job(spec.folder)
    if job is None or job["job_id"] not in queue:
        return None
    if queue[job["job_id"]] == "completing":
        raise UserError(f"{spec}: its job {job['job_id']} is about to end; repeat the command in a minute")
    requested = json.loads(json.dumps(vars(spec.args)))  # the same types as in job.json: lists for tuples
    different = differences(requested, job["args"])
    if different:
        listed = "; ".join(line.replace("in the checkpoint", "in the job") for line in different)
        raise UserError(f"{spec.folder}: job {job['job_id']} has other arguments; scancel it first ({listed})")
    return job["job_id"]


def check_not_queued(specs: Iterable[RunSpec]) -> None:
    """Refuse to train runs on this machine that a job in the queue executes.

    Raises:
        UserError: one of the runs is in the queue.
    """
    submitted = [spec for spec in specs if read_job(spec.folder)]
    try:
        queue = jobs_in_queue() if submitted else {}
    except UserError as error:
        names = ", ".join(map(str, submitted))
        print(f"warning: {error}; make sure that no job is training {names}", file=sys.stderr)
        return
    for spec in submitted:
        job_id = queued_job_id(spec, queue)
        if job_id:
            raise UserError(f"{spec}: job {job_id} executes this run ({queue[job_id]}); wait or scancel {job_id}")


def describe_state(folder: Path, queue: dict[str, str] | None) -> tuple[str, str]:
    """The state of a run, and details for the user (one or more lines).

    States: finished, failed, stopped (interrupted without an error), unknown, or one of `jobs_in_queue`.

    Args:
        folder: the run's output folder.
        queue: from `jobs_in_queue`; None if Slurm did not answer.
    """
    from checkpoints import epochs_saved  # imports torch

    # 1. from the checkpoint: finished runs, and damaged files
    job = read_job(folder) or local_run(folder)
    try:
        done = epochs_saved(folder)
    except UserError as error:
        return "failed", str(error)
    progress = f"{done} of {job['epochs']} epochs"
    if done >= job["epochs"]:
        return "finished", progress
    # 2. from the lock of a launcher that trains without Slurm; from the queue: pending and running jobs
    if is_locked(folder):
        return "running", f"{progress} (without Slurm)"
    if "log" not in job:
        return "stopped", f"{progress} (without Slurm)"
    if queue is None:
        return "unknown", progress
    if job["job_id"] in queue:
        state, _, reason = queue[job["job_id"]].partition(": ")
        return state, f"{progress} ({reason})" if reason else progress
    # 3. from the log: the job has ended early
    log = Path(job["log"])
    run_error, slurm_error = last_errors(log)
    lines = [progress, run_error or slurm_error, f"log: {log}" if log.exists() else "the job never started"]
    interrupted = not slurm_error or re.search("CANCELLED|exit code 75", slurm_error)
    return ("stopped" if interrupted and not run_error else "failed"), "\n".join(filter(None, lines))


def local_run(folder: Path) -> dict:
    """What a ``job.json`` would tell of a run that was never submitted, from its ``args.json``.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / "args.json"
    try:
        args = json.loads(path.read_text())
        return {"job_id": "-", "epochs": args["epochs"] + args["cooldown_epochs"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} cannot be read; remove the folder, or give the run's command again") from None


def last_errors(log: Path) -> tuple[str, str]:
    """The last error line of the run and of Slurm, in the logs of all tasks since their last start; "" for none."""
    run_errors, step_errors, srun_errors = [""], [""], [""]
    for path in sorted(log.parent.glob(log.name.replace("_0_log", "_*_log"))):
        text = path.read_text(errors="replace").rpartition("Starting with JobEnvironment")[2]
        run_errors += re.findall(r"^(?:\[rank \d+\] )?(?:error|[\w.]*(?:Error|Exception)): .*", text, re.MULTILINE)
        step_errors += re.findall(r"^slurmstepd\S*: error: .*", text, re.MULTILINE)
        srun_errors += re.findall(r"^srun: error: .*", text, re.MULTILINE)
    return run_errors[-1], step_errors[-1] or srun_errors[-1]  # slurmstepd names the cause; srun only the exit


def format_status(job_dir: Path, as_csv: bool = False) -> str:
    """The state of every run below the folder, submitted or not; symbolic links are not followed.

    Args:
        job_dir: the folder.
        as_csv: as CSV with a header; else as a table for the terminal, in which a column without values is left out.
    """
    # 1. find the runs, and ask the queue
    folders = sorted(Path(folder) for folder, _, files in os.walk(job_dir) if {"job.json", "args.json"} & {*files})
    if not folders:
        return f"nothing was submitted in {job_dir}"
    jobs = {folder: read_job(folder) or local_run(folder) for folder in folders}
    queue: dict[str, str] | None
    try:
        queue, note = jobs_in_queue() if any("log" in job for job in jobs.values()) else {}, ""
    except UserError as error:
        queue, note = None, f"\nunknown: the run may be pending, running or stopped, as the queue is unknown: {error}"
    # 2. a row of each
    rows = []
    for folder, job in jobs.items():
        name = str(folder.relative_to(job_dir))
        state, details = describe_state(folder, queue)
        metric, last, best = last_and_best(folder) or ("", None, None)
        numbers = ["" if value is None else f"{value:.3f}" for value in (last, best)]
        rows.append([job_dir.name if name == "." else name, job["job_id"], state, metric, *numbers, details])
    if as_csv:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(
            [["run", "job", "state", "metric", "last", "best", "details"], *rows]
        )
        return text.getvalue().rstrip("\n")
    # 3. the table, and a summary
    head = ["run", "job", "state", "metric", "last", "best", ""]
    if not any(row[3] for row in rows):
        head, *rows = ([*row[:3], row[-1]] for row in [head, *rows])
    counts = [f"{sum(row[2] == state for row in rows)} {state}" for state in dict.fromkeys(row[2] for row in rows)]
    return f"{format_table(head, rows)}\n{len(rows)} runs: {', '.join(counts)}{note}"


def format_table(head: list[str], rows: list[list[str]]) -> str:
    """A text table with aligned columns; the second and later lines of a cell follow its row, indented."""
    lines = []
    cells = [[cell.partition("\n")[0] for cell in row] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row, first in zip([head, *rows], cells, strict=True):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(first, widths, strict=True)).rstrip())
        lines += [f"    {line}" for cell in row for line in cell.splitlines()[1:]]
    return "\n".join(lines)
