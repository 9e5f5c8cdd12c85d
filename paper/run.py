"""Run the rows of one of the paper's tables: plan, check, start what is not finished, report.

    DRY_RUN=1 bash scripts/table1b_components.sh                        # the commands and what they cost
    DATA=/data OUT=output SEEDS="0 1 2" bash scripts/table1b_components.sh
    DATA=/data LAUNCH="submitit --partition gpu" bash scripts/table1b_components.sh        # on a SLURM cluster

The scripts hand over their rows, one a line: id, run, arguments of main.py. A run is a protocol's: rows of several
tables that share one share its folder. The row ``-`` belongs to no table; it is done where another row needs it, by
the word ``run:<run>/<file>``, a file of that run at the same seed. A row whose first argument is a module,
``analysis.<name>``, is no run: that command measures such files, on this machine, when all runs are finished;
``data:<path>`` in it is a path below DATA.

The environment says the rest:
    DATA        the folder with the data sets' folders (data): imagenet/, domainnet/, imagenet-a/, imagenet-c/,
                VOCdevkit/, torchvision's own
    OUT         where everything is written (output; output/smoke for SMOKE=1)
    SEEDS       one run of each row for each (0); what is measured of given weights alone, for the first
    ROWS        only these rows
    LAUNCH      the words before main.py (torchrun with all GPUs of this machine; python where there is one or none,
                but torchrun with 8 for the plan of a machine without any); or "submitit", which gives the runs to a
                SLURM cluster as job arrays, and run_with_submitit.py's options: "submitit --partition gpu --nodes 2"
    OVERRIDES   an argument file whose options come after every row's: for other hardware or data
    DRY_RUN=1   print the plan and the commands, start and write nothing
    SMOKE=1     OVERRIDES=recipes/smoke.args: everything as it is, but tiny, in seconds a row; what is
                measured, is on digits in the sets' layouts, in OUT/toy_data

    OUT/runs/<run>/seed<k>/          main.py's output folder, or what a measurement leaves
    .../seed<k>/launcher.lock        held by the script that trains it; another one waits for that
    OUT/submitit/                    logs of jobs, and what submitit keeps
    OUT/<table>/<row>/seed<k>        a link to it
    OUT/<table>/<row>/protocol.json  the row's arguments before OVERRIDES
    OUT/<table>/<row>/trained/<name> both of them of the runs that the row measures
"""

import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from build import accumulation
from cli import exit_code, expand_arguments
from datasets import read_split
from launch import runs
from launch.runs import epochs_done, finish, locked, warn_of_data_elsewhere
from launch.slurm import Cluster, print_submission, submit_all
from launch.status import refuse_queued
from paper.plan import (
    Job,
    Measurement,
    Row,
    Settings,
    choose,
    hours,
    images,
    in_words,
    plan,
    plan_measurements,
    read_rows,
    saved,
)
from paper.toy_data import write_toy_data
from run_with_submitit import cluster_of
from utils import UserError, write_json

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
    overrides = "recipes/smoke.args" if smoke else overrides
    seeds = (environ.get("SEEDS") or "0").split()
    if not seeds or not all(seed.isdecimal() for seed in seeds):
        raise UserError(f"SEEDS={environ['SEEDS']!r}: use whole numbers with spaces between, for example '0 1 2'")
    launch = launch_words(environ.get("LAUNCH", ""), elsewhere=flags["DRY_RUN"] == "1" and not overrides)
    out = Path(environ.get("OUT") or ("output/smoke" if smoke else "output")).expanduser()
    return Settings(
        data=out / "toy_data" if smoke else Path(environ.get("DATA") or "data").expanduser(),
        out=out,
        seeds=[int(seed) for seed in dict.fromkeys(seeds)],
        rows=environ.get("ROWS", "").split(),
        launch=launch,
        cluster=read_cluster(launch),
        overrides=read_overrides(overrides),
        overrides_path=overrides,
        dry_run=flags["DRY_RUN"] == "1",
        smoke=smoke,
    )


def launch_words(text: str, elsewhere: bool = False) -> list[str]:
    """The words before main.py. ``python`` and ``torchrun`` are those of the environment that runs this.

    ``elsewhere``: the runs are meant for the hardware that the hours are told for if there is no GPU here.
    """
    gpus = torch.cuda.device_count() or (8 if elsewhere else 0)
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"LAUNCH={text}: {error}") from None
    first, *others = words or (["torchrun", f"--nproc_per_node={gpus}"] if gpus > 1 else ["python"])
    own = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    return own.get(first, [first]) + others


def read_cluster(launch: list[str]) -> Cluster | None:
    """What is asked of Slurm; None where these words start the runs here."""
    if launch[0] != "submitit":
        return None
    try:
        return cluster_of(launch[1:])
    except UserError as error:
        raise UserError(f"LAUNCH={shlex.join(launch)}: {error}") from None


def world_size(launch: list[str]) -> int | None:
    """How many processes these words start; None where they do not say it as plain numbers."""
    if launch[0] == sys.executable and "-m" not in launch:
        return 1
    said = dict(re.findall(r"--(nproc|nnodes)(?:[-_]per[-_]node)?[= ](\S+)", " ".join(launch)))
    numbers = (said.get("nproc", ""), said.get("nnodes", "1"))
    return math.prod(map(int, numbers)) if all(number.isdecimal() for number in numbers) else None


def read_overrides(path: str) -> list[str]:
    """The words of the file ``path``; none without one."""
    try:
        words = expand_arguments([f"@{path}"]) if path else []
    except UserError as error:
        raise UserError(f"OVERRIDES={path}: {error}") from None
    for option, variable in (("--seed", "SEEDS"), ("--output-dir", "OUT")):
        if option in [word.partition("=")[0] for word in words]:
            raise UserError(f"OVERRIDES={path}: leave {option} out and say it with {variable}")
    return words


def check(settings: Settings, jobs: list[Job]) -> None:
    """Refuse before anything starts what would stop a later row.

    Raises:
        UserError: no such launcher, a run that a job in Slurm's queue has, data that are not there or not as they
            should be, processes that cannot make up a total batch.
    """
    if settings.cluster is None and shutil.which(settings.launch[0]) is None:
        raise UserError(f"LAUNCH: no program {settings.launch[0]}; give its path, or leave LAUNCH out")
    processes = settings.cluster.processes if settings.cluster else world_size(settings.launch)
    unfinished, seen = [job for job in jobs if epochs_done(job) < job.epochs], set()
    elsewhere = warn_of_data_elsewhere(unfinished) if settings.cluster else set()
    if settings.cluster is None:
        refuse_queued(unfinished)
    for job in unfinished:
        data = (job.args.data_set, job.args.data_path)
        try:
            if processes:
                accumulation(job.args, processes)
            if data not in seen and data[1] not in elsewhere and not job.args.download:
                for split in ("train", "val"):
                    read_split(data[0], split, data[1])
        except UserError as error:
            mend = "DATA is the folder of all data sets, OVERRIDES a file of options for other hardware"
            raise UserError(f"{job}: {error} ({mend})") from None
        seen.add(data)


def check_measurements(settings: Settings, measurements: list[Measurement]) -> None:
    """Refuse what could not be measured when the runs are finished; SMOKE's data are made first.

    Raises:
        UserError: options that are none, data or given weights that are not there or not as they should be.
    """
    unfinished = [measurement for measurement in measurements if not measurement.measured]
    if unfinished and settings.smoke:
        write_toy_data(settings.data)
    for measurement in unfinished:
        try:
            check_measurement(*measurement.words, given=measurement.given())
        except UserError as error:
            mend = "DATA is the folder of all data sets; the script's head has the other settings"
            raise UserError(f"{measurement}: {error} ({mend})") from None


def check_measurement(module: str, *words: str, given: list[str]) -> None:
    """Read the words, the data and the ``given`` weights of a command as it will itself."""
    from analysis import figures, jaccard, robustness  # a plan has no use for them
    from analysis.models import CPU, load_model
    from readers.images import list_images
    from readers.masks import read_masked_images

    def check_robustness(args, models):
        parts = robustness.find_parts(args.data_set, args.data_path)
        for model in models:
            robustness.build_evaluation(args, model, parts, CPU)

    parse, check_data = {
        "analysis.figures": (figures.build_parser().parse_args, lambda args, _: list_images(args.images)),
        "analysis.jaccard": (jaccard.parse_args, lambda args, _: read_masked_images(args.data_path)),
        "analysis.robustness": (robustness.build_command_line().parse_args, check_robustness),
    }[module]
    args = parse(words)
    check_data(args, [load_model(path, CPU, args.checkpoint_key, args.num_heads, args.input_size) for path in given])


def print_plan(settings: Settings, table: str, jobs: list[Job], measurements: list[Measurement]) -> None:
    """A line a run: what is done of it, and what the rest costs; and one for each that is measured then."""
    print(f"{table}, {len(jobs)} runs in {settings.out}")
    print(f"started by {shlex.join(settings.launch)} (LAUNCH names another launcher)")
    rows = [planned.row for planned in [*jobs, *measurements]]
    names, runs = (max(len(getattr(row, name)) for row in rows) for name in ("name", "run"))
    total = 0.0
    for job in jobs:
        done = epochs_done(job)
        state = f"epoch {done} of {job.epochs}" if job.checkpoint.exists() else "not begun"
        state, left = "finished" if done == job.epochs else state, job.epochs - done
        count = "?" if images(job.args) is None else f"{images(job.args):,}"
        cost = f"{left:>5} epochs x {count:>9} images  {in_words(hours(job.args, left))}".rstrip()
        print(f"  {job.row.name:<{names}}  {job.row.run:<{runs}}  seed {job.seed}  {state:<18}{cost}")
        total += hours(job.args, left) or 0.0
    for measurement in measurements:
        row, state = measurement.row, "measured" if measurement.measured else f"then {measurement.words[0]}"
        print(f"  {row.name:<{names}}  {row.run:<{runs}}  seed {measurement.seed}  {state}")
    if total:
        print(f"in all {in_words(total)} on 8 x V100 32 GB, the paper's hardware (our estimate; it names no hours)")


# --------------------------------------------------------------------------------------------------- the runs


def record(table_folder: Path, job: Job) -> None:
    """Put the row into the table's folder: its protocol, and a link to the run of this seed."""
    if job.row.name != "-":
        _record(table_folder / job.row.name, vars(job.protocol), job)


def record_measurement(table_folder: Path, measurement: Measurement, jobs: list[Job]) -> None:
    """The same for a row that measures, and in ``trained`` for the runs that it measures.

    What was measured with other words, of other weights, is no seed of this row any more; given weights have no others.
    """
    folder, protocol = table_folder / measurement.row.name, {"words": measurement.row.words}
    if not measurement.row.needs() or saved(folder / "protocol.json") != protocol:
        shutil.rmtree(folder / "trained", ignore_errors=True)
        for link in folder.glob("seed*"):
            link.unlink()
    _record(folder, protocol, measurement)
    for job in jobs:
        if job.seed == measurement.seed and job.row.run in measurement.row.needs():
            _record(folder / "trained" / Path(job.row.run).name, vars(job.protocol), job)


def _record(folder: Path, protocol: dict, planned: Job | Measurement) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "protocol.json", protocol)
    link = folder / f"seed{planned.seed}"
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(planned.folder, folder))


def finish_all(settings: Settings, table: str, jobs: list[Job], measurements: list[Measurement]) -> int:
    """Take all runs to their end, then measure; 0, or the first exit code that is not.

    What fails by itself leaves the others theirs, but for those that need its files. Whatever else ended one would meet
    the next, too.
    """
    failed = set()
    for planned in [*jobs, *measurements]:
        lost = {(run, planned.seed) for run in planned.row.needs()} & failed
        doing = "measuring" if planned.row.measures else "training"
        with locked(planned.lock, f"{doing} {planned}"):
            if planned.row.measures:
                record_measurement(settings.out / table, planned, jobs)
            else:
                record(settings.out / table, planned)
            do = measure if planned.row.measures else finish
            code = 1 if lost else do(planned, command(settings, planned))
        if code > 1:
            return code
        if lost:
            names = ", ".join(run for run, _ in lost)
            print(f"{planned}: left out; {names} failed, and it needs that", file=sys.stderr)
        if code:
            failed.add((planned.row.run, planned.seed))
    return 1 if failed else 0


def measure(measurement: Measurement, command: list[str]) -> int:
    """Measure what is not measured yet; 0, 1 if it failed, or 128 + the signal that ended it.

    What was measured on less than the data set is looked at anew each time: its command goes on with what has come.
    """
    if measurement.measured:
        print(f"{measurement}: measured before", flush=True)
        return 0
    if not measurement.noted("begun.json"):
        begin(measurement)
    print(f"{measurement}: {shlex.join(command)}", flush=True)
    code = runs.launch(command)
    if code == 0 and not measurement.partial:
        write_json(measurement.folder / "measured.json", measurement.state())
    if code:
        print(f"{measurement}: ended with exit code {code}", file=sys.stderr)
    return 1 if code == 2 else code  # input that cannot be used is this row's alone


def begin(measurement: Measurement) -> None:
    """Clear away what was measured with other words or of another checkpoint, and note what is measured now."""
    for path in measurement.folder.iterdir():
        if path.is_file() and path != measurement.lock:
            path.unlink()
    write_json(measurement.folder / "begun.json", measurement.state())


def command(settings: Settings, planned: Job | Measurement) -> list[str]:
    """The whole command line of a run or a measurement, from the repository's folder."""
    if planned.row.measures:
        return [sys.executable, "-m", *planned.words]
    return [*settings.launch, "main.py", *planned.words]


def submit_table(settings: Settings, table: str, jobs: list[Job], measurements: list[Measurement]) -> int:
    """Give Slurm what is neither finished nor queued; always 0: what becomes of it, the jobs tell."""
    submit_all(settings.cluster, jobs, settings.out / "submitit")
    for job in jobs:
        record(settings.out / table, job)
    print(f"how far they are: python run_with_submitit.py --job-dir {shlex.quote(str(settings.out))} --status")
    then = "measures, on this machine, and prints the report" if measurements else "prints the report"
    print(f"when all are finished, the same command {then}")
    return 0


def print_commands(settings: Settings, jobs: list[Job], measurements: list[Measurement]) -> None:
    """What would be started."""
    if settings.cluster:
        print_submission(settings.cluster, jobs, settings.out / "submitit")
    for planned in [*([] if settings.cluster else jobs), *measurements]:
        print(f"# {planned.row.name}: {planned}\n{shlex.join(command(settings, planned))}")


def run_table(table: str, settings: Settings, rows: list[Row]) -> int:
    """Print the plan, do it, print the report; returns the exit code."""
    rows = choose(rows, settings.rows)
    jobs, measurements = plan(settings, rows), plan_measurements(settings, rows)
    print_plan(settings, table, jobs, measurements)
    if settings.dry_run:
        print_commands(settings, jobs, measurements)
        return 0
    check(settings, jobs)
    if measurements:
        check_measurements(settings, measurements)
    if settings.cluster and any(epochs_done(job) < job.epochs for job in jobs):
        return submit_table(settings, table, jobs, measurements)
    code = finish_all(settings, table, jobs, measurements)
    if code > 1:
        return code
    from paper.report import PAPER, report

    print(report(settings.out / table) if table in PAPER else f"in {settings.out / table}")
    return code


def main() -> int:
    """0: all rows are done. 1: a row failed. 2: the settings cannot be used. Above 128: 128 + the signal to stop."""
    return exit_code(lambda: run_table(sys.argv[1], read_settings(os.environ), read_rows(sys.stdin.read())))


if __name__ == "__main__":
    sys.exit(main())
