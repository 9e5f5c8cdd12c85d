"""Run the rows of one of the paper's tables: plan, check, start what is not finished, report.

    python -m paper run table1b --dry-run                            # the commands and what they cost
    python -m paper run table1b --data /data --out output --seeds 0 1 2
    python -m paper run table1b --data /data --launch "submitit --partition gpu"        # on a SLURM cluster

``tables.toml`` has the rows: each names a run, and rows of several tables that share one share its folder. Runs whose
files a row needs are done before it. A row of ``analysis.<name>`` measures finished runs, on this machine, at the end.

    OUT/runs/<run>/seed<k>/          main.py's output folder, or what a measurement leaves
    .../seed<k>/launcher.lock        held by the script that trains it; another one waits for that
    OUT/submitit/                    logs of jobs, and what submitit keeps
    OUT/<table>/<row>/seed<k>        a link to it
    OUT/<table>/<row>/protocol.json  the row's arguments before --overrides
    OUT/<table>/<row>/trained/<name> both of them of the runs that the row measures
"""

import os
import shlex
import shutil
import sys
from pathlib import Path

from build import accumulation
from cli import exit_code
from datasets import read_split
from launch import runs
from launch.runs import ROOT, epochs_done, finish, locked, warn_of_data_elsewhere
from launch.slurm import print_submission, submit_all
from launch.status import refuse_queued
from paper import report
from paper.options import Settings, read_settings, refuse_old_variables, world_size
from paper.plan import Job, Measurement, choose, hours, images, in_words, plan, plan_measurements, saved
from paper.tables import TABLES
from paper.toy_data import write_toy_data
from utils import UserError, write_json

# ------------------------------------------------------------------------------------------- before it starts


def check(settings: Settings, jobs: list[Job]) -> None:
    """Refuse before anything starts what would stop a later row.

    Raises:
        UserError: no such launcher, a run that a job in Slurm's queue has, data that are not there or not as they
            should be, processes that cannot make up a total batch.
    """
    if settings.cluster is None and shutil.which(settings.launch[0]) is None:
        raise UserError(f"--launch: no program {settings.launch[0]}; give its path, or leave --launch out")
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
            mend = "--data is the folder of all data sets, --overrides a file of options for other hardware"
            raise UserError(f"{job}: {error} ({mend})") from None
        seen.add(data)


def check_measurements(settings: Settings, measurements: list[Measurement]) -> None:
    """Refuse what could not be measured when the runs are finished; --smoke's data are made first.

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
            mend = "--data is the folder of all data sets; --help has the other options"
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


def print_plan(settings: Settings, jobs: list[Job], measurements: list[Measurement]) -> None:
    """A line a run: what is done of it, and what the rest costs; and one for each that is measured then."""
    print(f"{settings.table}, {len(jobs)} runs in {settings.out.absolute()}")
    print(f"started by {shlex.join(settings.launch)} (--launch names another launcher)")
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


def finish_all(settings: Settings, jobs: list[Job], measurements: list[Measurement]) -> int:
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
                record_measurement(settings.out / settings.table, planned, jobs)
            else:
                record(settings.out / settings.table, planned)
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


def submit_table(settings: Settings, jobs: list[Job], measurements: list[Measurement]) -> int:
    """Give Slurm what is neither finished nor queued; always 0: what becomes of it, the jobs tell."""
    submit_all(settings.cluster, jobs, settings.out / "submitit")
    for job in jobs:
        record(settings.out / settings.table, job)
    print(f"how far they are: python run_with_submitit.py --job-dir {shlex.quote(str(settings.out))} --status")
    then = "measures, on this machine, and prints the report" if measurements else "prints the report"
    print(f"when all are finished, the same command {then}")
    return 0


def print_commands(settings: Settings, jobs: list[Job], measurements: list[Measurement]) -> None:
    """What would be started, as it can be typed."""
    if settings.cluster:
        print_submission(settings.cluster, jobs, settings.out / "submitit")
    here = [*([] if settings.cluster else jobs), *measurements]
    if here:
        print(f"cd {shlex.quote(str(ROOT))}")
    for planned in here:
        print(f"# {planned.row.name}: {planned}\n{shlex.join(command(settings, planned))}")


def run_table(settings: Settings) -> int:
    """Print the plan, do it, print the report; returns the exit code."""
    rows = choose(settings)
    jobs, measurements = plan(settings, rows), plan_measurements(settings, rows)
    print_plan(settings, jobs, measurements)
    if settings.dry_run:
        print_commands(settings, jobs, measurements)
        return 0
    check(settings, jobs)
    if measurements:
        check_measurements(settings, measurements)
    if settings.cluster and any(epochs_done(job) < job.epochs for job in jobs):
        return submit_table(settings, jobs, measurements)
    code = finish_all(settings, jobs, measurements)
    if code > 1:
        return code
    folder = settings.out / settings.table
    print(report.report(folder) if "metric" in TABLES[settings.table] else f"in {folder.absolute()}")
    return code


def run(argv: list[str]) -> int:
    """Do what the command line says, in the repository's folder: recipes and main.py are named as seen from there."""
    settings = read_settings(argv)
    refuse_old_variables(os.environ)
    os.chdir(ROOT)
    if settings.smoke:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads would slow a tiny model
    return run_table(settings)


def main(argv: list[str]) -> int:
    """0: all rows are done. 1: a row failed. 2: it cannot be done so. Above 128: 128 + the signal to stop."""
    return exit_code(lambda: run(argv))
