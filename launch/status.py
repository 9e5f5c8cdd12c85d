"""What became of submitted runs: from job.json in their folders, Slurm's queue and their logs."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from arguments import differences
from checkpoints import epochs_saved
from launch.job import ask_slurm, reason_of
from launch.runs import Point
from utils import UserError


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
    mine = json.loads(json.dumps(vars(point.args)))  # as job.json keeps it
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
