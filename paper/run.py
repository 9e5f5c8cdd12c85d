"""Run the rows of one of the paper's tables: plan, check, execute what is not finished, report.

    python -m paper run table1b --dry-run                            # print the commands and the number of images
    python -m paper run table1b --data /data --out output --seeds 0 1 2
    python -m paper run table1b --data /data --launch "submitit --partition gpu"        # on a SLURM cluster

``tables.toml`` lists the rows. Each row names a run; rows of several tables that name the same run share its folder.
Runs that a row depends on are executed before it. A row with an ``analysis.<name>`` command measures finished runs;
measurements run last, on this machine.

    OUT/runs/<run>/seed<k>/          main.py's output folder, or the results of a measurement
    .../seed<k>/launcher.lock        lock of the script that works in the folder; other scripts wait
    OUT/submitit/                    logs of jobs, and submitit's files
    OUT/<table>/<row>/seed<k>        link to the run
    OUT/<table>/<row>/protocol.json  the row's arguments before --overrides
    OUT/<table>/<row>/trained/<name> protocol.json and links of the runs that the row measures
"""

import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import launch.runs
from arguments import accumulation
from cli import exit_code
from launch.runs import LOCK_FILE, ROOT, complete_run, epochs_done, hold_lock, warn_missing_data
from launch.slurm import Cluster, print_submission, submit_all
from launch.status import check_not_queued
from paper.options import Settings, check_removed_variables, read_settings
from paper.plan import (
    Measurement,
    TableRun,
    images_per_epoch,
    plan_measurements,
    plan_runs,
    read_json_if_valid,
    select_rows,
)
from paper.tables import TABLES
from readers import sets_of
from utils import UserError, write_json

# ------------------------------------------------------------------------------------------------- the checks


def check_runs(settings: Settings, runs: list[TableRun]) -> None:
    """Detect before any run starts what would stop one of them; with --smoke, write the toy data first.

    Raises:
        UserError: an unknown launcher, a run that is in Slurm's queue, missing or invalid data.
    """
    from datasets import read_split  # imports torch

    # 1. the launcher
    if settings.cluster is None and shutil.which(settings.launch[0]) is None:
        raise UserError(f"--launch: no program {settings.launch[0]}; give its path, or leave --launch out")
    # 2. the queue, or the data that only the nodes may have
    unfinished, checked = [run for run in runs if epochs_done(run) < run.epochs], set()
    missing = warn_missing_data(unfinished) if settings.cluster else set()
    if settings.cluster is None:
        check_not_queued(unfinished)
    # 3. each data set once
    if settings.smoke:
        from paper.toy_data import write_toy_data  # imports scikit-learn

        write_toy_data(settings.data)
    for run in unfinished:
        data_set, data_path, task = data = (run.args.data_set, run.args.data_path, run.args.task)
        if data not in checked and data_path not in missing and not run.args.download:
            with told_of(run):
                for split in ("train", "val"):
                    read_split(data_set, split, data_path, sets_of(task))
        checked.add(data)


@contextlib.contextmanager
def told_of(run: TableRun) -> Iterator[None]:
    """Add the run, and the options that could mend it, to a UserError."""
    try:
        yield
    except UserError as error:
        hint = "--data is the folder of all data sets, --overrides a file of options for other hardware"
        raise UserError(f"{run}: {error} ({hint})") from None


def check_batches(settings: Settings, runs: list[TableRun]) -> None:
    """Refuse a launcher whose processes cannot form the total batch of an unfinished run.

    Raises:
        UserError: with the batch sizes that fit.
    """
    for run in runs:
        if settings.processes and epochs_done(run) < run.epochs:
            with told_of(run):
                accumulation(run.args, settings.processes)


def check_measurements(settings: Settings, measurements: list[Measurement]) -> None:
    """Detect before any run starts what would stop a measurement.

    Raises:
        UserError: unknown options, missing or invalid data or given weights.
    """
    unfinished = [measurement for measurement in measurements if not measurement.is_measured]
    for measurement in unfinished:
        try:
            check_measurement(*measurement.words, given=measurement.given_checkpoints())
        except UserError as error:
            hint = "--data is the folder of all data sets; --help has the other options"
            raise UserError(f"{measurement}: {error} ({hint})") from None


def check_measurement(module: str, *words: str, given: list[str]) -> None:
    """Parse a measuring command's options and read its data and the ``given`` checkpoints, as it will itself.

    Args:
        module: ``analysis.<name>``.
        words: its command line.
        given: paths of the user's checkpoints; those of runs may not exist yet.
    """
    from analysis import figures, jaccard, robustness  # imported here because planning does not need them
    from analysis.models import CPU, load_model
    from readers.files import list_images
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


def print_plan(settings: Settings, runs: list[TableRun], measurements: list[Measurement]) -> None:
    """Print one line per run (state, remaining epochs) and per measurement, and the number of images to train on."""
    print(f"{settings.table}, {len(runs)} runs in {settings.out.absolute()}")
    print(f"launcher: {shlex.join(settings.launch)} (change it with --launch)")
    rows = [run.row for run in runs] + [measurement.row for measurement in measurements]
    name_width, run_width = (max(len(getattr(row, name)) for row in rows) for name in ("name", "run"))
    total = 0
    for run in runs:
        done = epochs_done(run)
        state = f"epoch {done} of {run.epochs}" if run.checkpoint.exists() else "not started"
        state, left = "finished" if done == run.epochs else state, run.epochs - done
        images = images_per_epoch(run.args)
        cost = f"{left:>5} epochs x {'?' if images is None else f'{images:,}':>9} images"
        print(f"  {run.row.name:<{name_width}}  {run.row.run:<{run_width}}  seed {run.seed}  {state:<18}{cost}")
        total += left * (images or 0)
    for measurement in measurements:
        row, state = measurement.row, "measured" if measurement.is_measured else f"to measure: {measurement.words[0]}"
        print(f"  {row.name:<{name_width}}  {row.run:<{run_width}}  seed {measurement.seed}  {state}")
    if total:
        print(f"total: {total:,} images (docs/reproduce.md has a rule for the hours)")


# --------------------------------------------------------------------------------------------------- the runs


def record_run(table_folder: Path, run: TableRun) -> None:
    """Write the row's folder in the table's folder: its protocol, and a link to the run of this seed."""
    if run.row.name != "-":
        _write_row(table_folder / run.row.name, vars(run.protocol), run)


def record_measurement(table_folder: Path, measurement: Measurement, runs: list[TableRun]) -> None:
    """Write a measuring row's folder, and in its ``trained`` folder the runs that it measures.

    Links to earlier results are removed if they were measured with another command line or on given weights.
    """
    folder, protocol = table_folder / measurement.row.name, {"words": measurement.row.words}
    if not measurement.row.dependencies() or read_json_if_valid(folder / "protocol.json") != protocol:
        shutil.rmtree(folder / "trained", ignore_errors=True)
        for link in folder.glob("seed*"):
            link.unlink()
    _write_row(folder, protocol, measurement)
    for run in runs:
        if run.seed == measurement.seed and run.row.run in measurement.row.dependencies():
            _write_row(folder / "trained" / Path(run.row.run).name, vars(run.protocol), run)


def _write_row(folder: Path, protocol: dict, planned: TableRun | Measurement) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "protocol.json", protocol)
    link = folder / f"seed{planned.seed}"
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(planned.folder, folder))


def complete_all(settings: Settings, runs: list[TableRun], measurements: list[Measurement]) -> int:
    """Execute all runs, then all measurements; returns 0, or the first nonzero exit code.

    A run that fails (exit code 1) stops only the runs and measurements that depend on it. A signal or bad usage stops
    everything.
    """
    failed: set[tuple[str, int]] = set()
    everything: list[TableRun | Measurement] = [*runs, *measurements]
    for planned in everything:
        failed_dependencies = {(run, planned.seed) for run in planned.row.dependencies()} & failed
        with hold_lock(planned.folder, f"{'measuring' if planned.row.is_measurement else 'training'} {planned}"):
            # 1. the row's folder in the table; 2. the run itself
            folder, command, code = settings.out / settings.table, command_line(settings, planned), 1
            if isinstance(planned, Measurement):
                record_measurement(folder, planned, runs)
                code = 1 if failed_dependencies else complete_measurement(planned, command)
            else:
                record_run(folder, planned)
                code = 1 if failed_dependencies else complete_run(planned, command)
        # 3. stop, or note the failure for the runs that depend on this one
        if code > 1:
            return code
        if failed_dependencies:
            names = ", ".join(run for run, _ in failed_dependencies)
            print(f"{planned}: skipped, because it depends on {names}, which failed", file=sys.stderr)
        if code:
            failed.add((planned.row.run, planned.seed))
    return 1 if failed else 0


def complete_measurement(measurement: Measurement, command: list[str]) -> int:
    """Run a measuring command unless its results are complete.

    A measurement of a part of the data set is repeated each time; the command skips what it has measured.

    Returns:
        0: measured. 1: failed. Above 128: 128 + the signal that ended it.
    """
    if measurement.is_measured:
        print(f"{measurement}: already measured", flush=True)
        return 0
    if not measurement.matches_state("begun.json"):
        clear_results(measurement)
    print(f"{measurement}: {shlex.join(command)}", flush=True)
    code = launch.runs.run_command(command)
    if code == 0 and not measurement.is_partial:
        write_json(measurement.folder / "measured.json", measurement.state())
    if code:
        print(f"{measurement}: stopped with exit code {code}", file=sys.stderr)
    return 1 if code == 2 else code  # bad usage concerns this row alone


def clear_results(measurement: Measurement) -> None:
    """Delete results of another command line or checkpoint, and record the present state in begun.json."""
    for path in measurement.folder.iterdir():
        if path.is_file() and path.name != LOCK_FILE:
            path.unlink()
    write_json(measurement.folder / "begun.json", measurement.state())


def command_line(settings: Settings, planned: TableRun | Measurement) -> list[str]:
    """The whole command line of a run or a measurement, for the repository's folder."""
    if planned.row.is_measurement:
        return [sys.executable, "-m", *planned.words]
    return [*settings.launch, "main.py", *planned.words]


def submit_table(settings: Settings, runs: list[TableRun], measurements: list[Measurement]) -> int:
    """Submit the runs that are neither finished nor queued; returns 0."""
    submit_all(cast(Cluster, settings.cluster), runs, settings.out / "submitit")
    for run in runs:
        record_run(settings.out / settings.table, run)
    print(f"state of the runs: python run_with_submitit.py --job-dir {shlex.quote(str(settings.out))} --status")
    action = "measures, on this machine, and prints the report" if measurements else "prints the report"
    print(f"when all are finished, the same command {action}")
    return 0


def print_commands(settings: Settings, runs: list[TableRun], measurements: list[Measurement]) -> None:
    """Print what would be started, as commands for a shell."""
    if settings.cluster:
        print_submission(settings.cluster, runs, settings.out / "submitit")
    local: list[TableRun | Measurement] = [*([] if settings.cluster else runs), *measurements]
    if local:
        print(f"cd {shlex.quote(str(ROOT))}")
    for planned in local:
        print(f"# {planned.row.name}: {planned}\n{shlex.join(command_line(settings, planned))}")


def run_table(settings: Settings) -> int:
    """Print the plan, execute or submit it, print the report; returns the exit code."""
    # 1. plan
    rows = select_rows(settings)
    runs, measurements = plan_runs(settings, rows), plan_measurements(settings, rows)
    print_plan(settings, runs, measurements)
    check_batches(settings, runs)
    if settings.dry_run:
        print_commands(settings, runs, measurements)
        return 0
    # 2. check
    check_runs(settings, runs)
    if measurements:
        check_measurements(settings, measurements)
    # 3. submit, or execute here
    if settings.cluster and any(epochs_done(run) < run.epochs for run in runs):
        return submit_table(settings, runs, measurements)
    code = complete_all(settings, runs, measurements)
    if code > 1:
        return code
    # 4. report
    folder = settings.out / settings.table
    has_report = "metric" in TABLES[settings.table]
    from paper import report  # imports Matplotlib

    print(report.write_report(folder) if has_report else f"results: {folder.absolute()}")
    return code


def run(argv: list[str]) -> int:
    """Execute the command line in the repository's folder, to which paths of recipes and of main.py are relative."""
    settings = read_settings(argv)
    check_removed_variables(os.environ)
    os.chdir(ROOT)
    if settings.smoke:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads slow a tiny model down
    return run_table(settings)


def main(argv: list[str]) -> int:
    """Exit code 0: all rows are done. 1: a row failed. 2: bad usage. Above 128: 128 + the stop signal."""
    return exit_code(lambda: run(argv))
