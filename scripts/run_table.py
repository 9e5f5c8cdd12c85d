"""Run the rows of one of the paper's tables: plan, check, start what is not finished, report.

    DRY_RUN=1 bash scripts/table1b_components.sh                        # the commands and what they cost
    DATA=/data OUT=output SEEDS="0 1 2" bash scripts/table1b_components.sh

The scripts hand over their rows, one a line: id, run, arguments of main.py. A run is a protocol's: rows of several
tables that share one share its folder. The row ``-`` belongs to no table; it is done where another row needs it, by
the word ``run:<run>/<file>``, a file of that run at the same seed.

The environment says the rest:
    DATA        the folder with the data sets' folders (data): imagenet/, domainnet/, torchvision's own
    OUT         where everything is written (output; output/smoke for SMOKE=1)
    SEEDS       one run of each row for each (0)
    ROWS        only these rows
    LAUNCH      the words before main.py (torchrun with all GPUs of this machine; python where there is one or none)
    OVERRIDES   an argument file whose options come after every row's: for other hardware or data
    DRY_RUN=1   print the plan and the commands, start and write nothing
    SMOKE=1     OVERRIDES=recipes/smoke.args: everything as it is, but tiny, in seconds a row

    OUT/runs/<run>/seed<k>/          main.py's output folder
    OUT/<table>/<row>/seed<k>        a link to it
    OUT/<table>/<row>/protocol.json  the row's arguments before OVERRIDES
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from arguments import expand_arguments
from datasets import DATASETS
from scripts.plan_table import Job, Row, Settings, choose, epochs_done, hours, images, in_words, plan, read_rows
from utils import RunError, UserError, write_json

# ------------------------------------------------------------------------------------------- what is asked for


def read_settings(environ: Mapping[str, str]) -> Settings:
    """The settings in ``environ``.

    Raises:
        UserError: a value that is not understood, or two that exclude each other.
    """
    flags = {name: environ.get(name, "") for name in ("SMOKE", "DRY_RUN")}
    for name, value in flags.items():
        if value not in ("", "0", "1"):
            raise UserError(f"{name}={value}: use {name}=1, or leave it out")
    smoke = flags["SMOKE"] == "1"
    overrides = environ.get("OVERRIDES", "")
    if smoke and overrides:
        raise UserError("SMOKE=1 is OVERRIDES=recipes/smoke.args; leave one of the two out")
    seeds = (environ.get("SEEDS") or "0").split()
    if not seeds or not all(seed.isdecimal() for seed in seeds):
        raise UserError(f"SEEDS={environ['SEEDS']!r}: use whole numbers with spaces between, for example '0 1 2'")
    return Settings(
        data=Path(environ.get("DATA") or "data").expanduser(),
        out=Path(environ.get("OUT") or ("output/smoke" if smoke else "output")).expanduser(),
        seeds=[int(seed) for seed in dict.fromkeys(seeds)],
        rows=environ.get("ROWS", "").split(),
        launch=launch_words(environ.get("LAUNCH", "")),
        overrides=read_overrides("recipes/smoke.args" if smoke else overrides),
        dry_run=flags["DRY_RUN"] == "1",
    )


def launch_words(text: str) -> list[str]:
    """The words before main.py. ``python`` and ``torchrun`` are those of the environment that runs this."""
    gpus = torch.cuda.device_count()
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"LAUNCH={text}: {error}") from None
    first, *others = words or (["torchrun", f"--nproc_per_node={gpus}"] if gpus > 1 else ["python"])
    own = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    return own.get(first, [first]) + others


def read_overrides(path: str) -> list[str]:
    """The words of the file ``path``; none without one."""
    words = expand_arguments([f"@{path}"]) if path else []
    for option, variable in (("--seed", "SEEDS"), ("--output-dir", "OUT")):
        if option in words:
            raise UserError(f"OVERRIDES={path}: leave {option} out and say it with {variable}")
    return words


def check(settings: Settings, jobs: list[Job]) -> None:
    """Refuse before anything starts what would stop a later row: missing data, no such launcher."""
    if shutil.which(settings.launch[0]) is None:
        raise UserError(f"LAUNCH: no program {settings.launch[0]}; give its path, or leave LAUNCH out")
    for job in jobs:
        path, data_set = job.args.data_path, DATASETS[job.args.data_set]
        if path is None or job.args.download or Path(path).is_dir() or epochs_done(job) == job.epochs:
            continue
        raise UserError(
            f"{path}: no such folder; {job} needs one with {data_set.layout}. DATA names the folder of all data sets"
        )


def print_plan(settings: Settings, table: str, jobs: list[Job]) -> None:
    """A line a run: what is done of it, and what the rest costs."""
    print(f"{table}, {len(jobs)} runs in {settings.out}")
    names, runs = (max(len(getattr(job.row, name)) for job in jobs) for name in ("name", "run"))
    total = 0.0
    for job in jobs:
        done = epochs_done(job)
        state = f"epoch {done} of {job.epochs}" if job.checkpoint.exists() else "not begun"
        state, left = "finished" if done == job.epochs else state, job.epochs - done
        count = "?" if images(job.args) is None else f"{images(job.args):,}"
        cost = f"{left:>5} epochs x {count:>9} images  {in_words(hours(job.args, left))}".rstrip()
        print(f"  {job.row.name:<{names}}  {job.row.run:<{runs}}  seed {job.seed}  {state:<18}{cost}")
        total += hours(job.args, left) or 0.0
    if total:
        print(f"in all {in_words(total)} on 8 x V100 32 GB, the paper's hardware (our estimate; it names no hours)")


# --------------------------------------------------------------------------------------------------- the runs


def record(table_folder: Path, job: Job) -> None:
    """Put the row into the table's folder: its protocol, and a link to the run of this seed."""
    if job.row.name == "-":
        return
    folder = table_folder / job.row.name
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "protocol.json", vars(job.protocol))
    link = folder / f"seed{job.seed}"
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(job.folder, folder))


def launch(command: list[str]) -> int:
    """Run the command; its exit code. After SIGTERM or Ctrl-C it has the time to save that it needs."""
    child = subprocess.Popen(command)
    on_terminate = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    on_interrupt = signal.signal(signal.SIGINT, lambda *_: None)  # a terminal sends it to the run, too
    try:
        return child.wait()
    finally:
        signal.signal(signal.SIGTERM, on_terminate)
        signal.signal(signal.SIGINT, on_interrupt)


def finish(settings: Settings, job: Job) -> int:
    """Take the run to its end if it is not there; 0, or the exit code where it did not get there."""
    if epochs_done(job) == job.epochs:
        print(f"{job}: finished before", flush=True)
        return 0
    print(f"{job}: {shlex.join(command(settings, job))}", flush=True)
    code = launch(command(settings, job))
    done = epochs_done(job)
    if done == job.epochs:
        return 0
    where = f"epoch {done} of {job.epochs}"
    print(f"{job}: ended at {where} with exit code {code}; the same command goes on from there", file=sys.stderr)
    return max(code, 1)


def command(settings: Settings, job: Job) -> list[str]:
    """The whole command line of a run, from the repository's folder."""
    return [*settings.launch, "main.py", *job.words]


def run_table(table: str, settings: Settings, rows: list[Row]) -> int:
    """Print the plan, do it, print the report; returns the exit code."""
    jobs = plan(settings, choose(rows, settings.rows))
    print_plan(settings, table, jobs)
    if settings.dry_run:
        for job in jobs:
            print(f"# {job.row.name}: {job}\n{shlex.join(command(settings, job))}")
        return 0
    check(settings, jobs)
    for job in jobs:
        record(settings.out / table, job)
        code = finish(settings, job)
        if code:
            return code
    from analysis.report import report  # draws: Matplotlib is of no use to a plan

    print(report(settings.out / table))
    return 0


def main() -> int:
    """0: all rows are done. 2: the settings cannot be used. Else the exit code of the run that did not finish."""
    try:
        return run_table(sys.argv[1], read_settings(os.environ), read_rows(sys.stdin.read()))
    except (UserError, RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
