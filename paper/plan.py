"""Turns the rows of a table into runs and measurements."""

import argparse
import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path

from arguments import parse_arguments
from cli import expand_arguments
from launch.runs import RunSpec
from paper.options import Settings
from paper.tables import RUNS, WEIGHTS, TableRow, table_rows
from readers import sets_of
from tasks import against_accumulation
from utils import UserError


@dataclass(frozen=True)
class TableRun(RunSpec):
    """The run of a row with one seed.

    Attributes:
        row: the row it belongs to.
        seed: the run's random seed.
        protocol: the arguments without --overrides and --smoke, as in the paper.
    """

    row: TableRow
    seed: int
    protocol: argparse.Namespace

    @property
    def dependencies(self) -> tuple[str, ...]:
        return tuple(run_title(run, self.seed) for run in sorted(set(self.row.dependencies())))


@dataclass(frozen=True)
class Measurement:
    """The measuring command of a row with one seed.

    Attributes:
        row: the row it belongs to.
        seed: of the runs that are measured.
        words: the command line after ``python -m``.
        folder: where the command writes its results.
    """

    row: TableRow
    seed: int
    words: list[str]
    folder: Path

    @property
    def is_measured(self) -> bool:
        """Whether it was completed for the present command line and checkpoints."""
        return self.matches_state("measured.json")

    def matches_state(self, name: str) -> bool:
        """Whether the state saved in the file ``name`` of its folder equals the present `state`."""
        try:
            return read_json_if_valid(self.folder / name) == self.state()
        except OSError:  # a checkpoint does not exist yet, or was deleted
            return False

    @property
    def is_partial(self) -> bool:
        """Whether the results cover only a part of the data set (key ``instead``), so that it must run again."""
        return "instead" in (read_json_if_valid(self.folder / "results.json") or {})

    def state(self) -> dict:
        """What the results depend on: the row's command line, and size and modification time of each checkpoint.

        Raises:
            OSError: a checkpoint does not exist.
        """
        stats = [os.stat(path) for path in self.checkpoints()]
        return {"words": self.row.words, "checkpoints": [[stat.st_size, stat.st_mtime_ns] for stat in stats]}

    def checkpoints(self) -> list[str]:
        """Paths of the checkpoints that the command reads."""
        return [path for option, path in itertools.pairwise(self.words) if option == "--checkpoint"]

    def given_checkpoints(self) -> list[str]:
        """Those of its checkpoints that the user gave (--ckpt-base, --ckpt-sar), and that no run writes."""
        return [path for path in self.checkpoints() if path in self.row.words]

    def __str__(self) -> str:
        return run_title(self.row.run, self.seed)


def run_title(run: str, seed: int) -> str:
    """The name of a run with one seed in tables and messages."""
    return f"{run}, seed {seed}"


def read_json_if_valid(path: Path) -> dict | None:
    """The content of a JSON file; None if it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def select_rows(settings: Settings) -> list[TableRow]:
    """The rows that --rows names (default: all), preceded by the runs that they depend on.

    Raises:
        UserError: the table has no such row.
    """
    rows = table_rows(settings.table)
    known = [row.name for row in rows]
    unknown = [name for name in settings.rows if name not in known]
    if unknown:
        raise UserError(f"--rows: no row {', '.join(unknown)}; this table has {' '.join(known)}")
    selected = [resolve_weights(row, settings) for row in rows if row.name in (settings.rows or known)]
    dependencies = dict.fromkeys(run for row in selected for run in row.dependencies())
    return [*(TableRow("-", run, RUNS[run]) for run in dependencies), *selected]


def resolve_weights(row: TableRow, settings: Settings) -> TableRow:
    """The row with ``weights:<name>`` replaced by a path, and with the measurement options appended.

    A run that uses given weights has another key (``<protocol>_given/<name>``) than one that uses this program's.
    """
    words, suffix = [], ""
    for word in row.words:
        kind, _, name = word.partition(":")
        if kind != "weights":
            words.append(word)
        elif name in settings.weights:
            words, suffix = words + settings.weights[name], "_given"
        else:
            words.append(WEIGHTS[name])
    protocol, _, name = row.run.partition("/")
    measurement_words = settings.measurement_words if row.is_measurement else []
    return TableRow(row.name, f"{protocol}{suffix}/{name}", words + measurement_words)


def plan_measurements(settings: Settings, rows: list[TableRow]) -> list[Measurement]:
    """The measurements of the rows, seed by seed; those of given weights alone for the first seed only."""
    measurements = []
    for seed in settings.seeds:
        for row in rows:
            if not row.is_measurement or not (row.dependencies() or seed == settings.seeds[0]):
                continue
            folder = settings.out / "runs" / row.run / f"seed{seed}"
            words = [resolve_path(word, settings, seed) for word in row.words]
            measurements.append(Measurement(row, seed, [*words, "--out", str(folder)], folder))
    return measurements


def plan_runs(settings: Settings, rows: list[TableRow]) -> list[TableRun]:
    """The training runs of the rows, seed by seed, with their command lines parsed as main.py will parse them.

    Raises:
        UserError: see ``parse_arguments``.
    """
    runs: list[TableRun] = []
    planned: dict[str, argparse.Namespace] = {}  # by the path of the checkpoint, for the runs that start from it
    protocols: dict[str, argparse.Namespace] = {}
    for seed in settings.seeds:
        for row in itertools.filterfalse(lambda row: row.is_measurement, rows):
            folder = settings.out / "runs" / row.run / f"seed{seed}"
            # 1. the row's own arguments: the paper's protocol
            words = [resolve_path(word, settings, seed) for word in row.words]
            protocol = args = parse_arguments(words, planned=protocols)
            # 2. the arguments of --smoke or --overrides, which take precedence
            if more := smoke_words(args) if settings.smoke else settings.overrides:
                words += more
                try:
                    args = parse_arguments(words, planned=planned)
                except UserError as error:
                    raise UserError(f"--overrides {settings.overrides_path}: {error}") from None
            # 3. seed and folders; parsing them again would read the weights to fine-tune again
            last = batch_words(args, settings.processes) | {"seed": seed, "output_dir": str(folder)}
            data_set = sets_of(args.task)[args.data_set]
            if data_set.layout and args.data_path is None:
                last["data_path"] = str(settings.data / data_set.folder)
            for name, value in last.items():
                words += [f"--{name.replace('_', '-')}", str(value)]
            args = argparse.Namespace(**vars(args) | last)
            planned[str(folder / "checkpoint.pth")], protocols[str(folder / "checkpoint.pth")] = args, protocol
            runs.append(TableRun(run_title(row.run, seed), words, args, row, seed, protocol))
    return runs


def smoke_words(args: argparse.Namespace) -> list[str]:
    """The arguments of --smoke: recipes/smoke_<task>_<family>.args, smoke_<task>, smoke_<family> or smoke.args."""
    family = args.model.split("_")[0]
    names = [f"recipes/smoke{kind}.args" for kind in (f"_{args.task}_{family}", f"_{args.task}", f"_{family}", "")]
    return expand_arguments([f"@{next(filter(os.path.exists, names))}"])


def batch_words(args: argparse.Namespace, processes: int | None) -> dict[str, int]:
    """The batch of each of so many processes (None: not known), where the protocol's does not fit; else nothing.

    It is too large for more processes than the paper's, and too small where a task cannot accumulate.
    """
    size, rest = divmod(args.total_batch, processes or args.total_batch + 1)
    if rest or size == args.batch_size:
        return {}
    return {"batch_size": size} if size < args.batch_size or against_accumulation(args) else {}


def resolve_path(word: str, settings: Settings, seed: int) -> str:
    """``run:<run>/<file>`` and ``data:<path below --data>`` as paths; any other word unchanged."""
    kind, _, place = word.partition(":")
    if kind == "data":
        return str(settings.data / place)
    if kind == "run":
        run, _, file = place.rpartition("/")
        return str(settings.out / "runs" / run / f"seed{seed}" / file)
    return word


def images_per_epoch(args: argparse.Namespace) -> int | None:
    """Number of training images of an epoch; None for a data set of unknown size."""
    known = sets_of(args.task)[args.data_set].images.get("train")
    return None if known is None else round(known * args.sampling_ratio)
