"""A table of the paper beside one's own runs of it, read from their logs.

    python -m paper report OUT/table1b
    python -m paper report OUT/table1b --figure curves.png

OUT/table1b is what the table's script leaves: a folder a row, in it protocol.json (the arguments of the paper's
protocol) and seed0, seed1, ... (output folders of main.py). The report is printed, and kept there as report.md
and report.csv; fig3 also gets its picture, fig3.png.

"Ours" is the accuracy of the weights that --report names: mean and sample deviation over the seeds, after the
last evaluated epoch and at each seed's best one. (Logs that name another metric give that one's values, under its
name.) A row is not comparable with the paper where an argument that changes the mathematics differs from the
protocol, the metric is another one, epochs are missing, or the data set has other numbers of images.

In some rows (Table 8, Table 11) "ours" was measured of the weights after the last epoch: their seed0, seed1, ... are
what analysis.robustness or analysis.jaccard left, and the runs that trained the weights lie in trained/<run>, as a row
of their own. Both must be the paper's for the row to be comparable.
"""

import argparse
import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from arguments import NOT_MATHEMATICAL, default_arguments
from cli import Parser, exit_code
from datasets import DATASETS, canonical_name
from paper.tables import TABLES
from utils import UserError, write_atomically, write_csv

PAPER = {name: table for name, table in TABLES.items() if "metric" in table}
"""The tables that have numbers to report; the head of ``tables.toml`` describes them."""

ACCURACY = "acc1"
"""What log.txt calls the metric of the paper's tables that are trained: top-1 accuracy (percent)."""

# What may differ between a row's runs and the protocol, or among its seeds. (Which weights --finetune takes is the
# table's own doing.)
MAY_DIFFER = NOT_MATHEMATICAL | {"seed", "finetune"}

# Told first where a row has many departures from the protocol; no more than REASONS of them are told.
FOREMOST = ("data_set", "sampling_ratio", "epochs", "model", "model_kwargs", "input_size", "total_batch")
REASONS = 5


@dataclass(frozen=True)
class Epoch:
    """One line of log.txt; ``value`` of its metric is the reported weights', None where nothing was evaluated."""

    done: int
    metric: str
    value: float | None
    test_images: int | None
    train_images: int | None


@dataclass(frozen=True)
class TrainingRun:
    """One seed of a row: what main.py was told, and how its epochs ended."""

    arguments: dict
    log: list[Epoch]

    @property
    def epochs_done(self) -> int:
        return self.log[-1].done if self.log else 0

    @property
    def epochs_planned(self) -> int:
        return self.arguments["epochs"] + self.arguments["cooldown_epochs"]

    def values(self) -> dict[int, float]:
        """The metric's value by epochs done, where it was evaluated."""
        return {epoch.done: epoch.value for epoch in self.log if epoch.value is not None}


@dataclass(frozen=True)
class Row:
    """A row of a table: the paper's entry, the protocol's arguments, and the runs there are (none: not run).

    Where something is measured of the runs, ``results`` is what came of it, a seed each; None where it is not.
    """

    paper: dict
    protocol: dict
    runs: list[TrainingRun]
    results: list[dict] | None = None

    def last(self) -> list[float]:
        """Each evaluated run's value after its last evaluated epoch, or what was measured of it then."""
        if self.results is not None:
            name = self.paper["measured"]
            return [result[name] for result in self.results if name in result]
        return [values[max(values)] for run in self.runs if (values := run.values())]

    def best(self) -> list[float]:
        """Each evaluated run's best value; none where something is measured of the last epoch."""
        if self.results is not None:
            return []
        return [max(values.values()) for run in self.runs if (values := run.values())]

    def other_metrics(self) -> list[str]:
        """The metrics of its runs' logs that are not the paper's accuracy."""
        if self.results is not None:
            return []
        return distinct(e.metric for run in self.runs for e in run.log if e.value is not None and e.metric != ACCURACY)

    def departures(self) -> dict[str, list]:
        """Arguments that are not the protocol's: name -> the runs' values, each once."""
        compared = [name for name in self.protocol if name not in MAY_DIFFER]
        values = {name: distinct(run.arguments.get(name) for run in self.runs) for name in compared}
        return {name: found for name, found in values.items() if found not in ([], [self.protocol[name]])}


def distinct(values) -> list:
    """The values in their order, each once (they may be lists and dicts)."""
    found = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


# ----------------------------------------------------------------------------------------------- reading


def read_table(folder: Path) -> tuple[dict, dict[str, Row]]:
    """The paper's table that ``folder`` is named after, and all its rows by name, run or not.

    Raises:
        UserError: no table of the paper, no row in it or an unknown one, or a file that cannot be read.
    """
    name = folder.absolute().name
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name one that a table's script wrote, e.g. output/table1b")
    if name not in PAPER:
        raise UserError(f"{folder}: {name} is no table of the paper; known are {', '.join(PAPER)}")
    table = PAPER[name]
    there = sorted(path.parent.name for path in folder.glob("*/protocol.json"))
    unknown = [row for row in there if row not in table["rows"]]
    if unknown or not there:
        problem = f"no row {unknown[0]} in this table" if unknown else "no row in it has a protocol.json"
        raise UserError(f"{folder}: {problem}; its rows are {', '.join(table['rows'])}")
    return table, {row: read_row(folder / row, paper) for row, paper in table["rows"].items()}


def read_row(folder: Path, paper: dict) -> Row:
    """The row of a table whose runs lie in ``folder``, if there is one.

    Raises:
        UserError: a file that cannot be read.
    """
    if "measured" in paper:
        trained = min(folder.glob("trained/*"), default=folder / "trained")
        row = read_row(trained, {})
        return Row(
            paper, row.protocol, row.runs, [read_result(path) for path in sorted(folder.glob("seed*/results.json"))]
        )
    seeds = sorted(
        path for path in folder.glob("seed*") if (path / "log.txt").exists() or (path / "args.json").exists()
    )
    runs = [TrainingRun(read_arguments(seed / "args.json"), read_log(seed / "log.txt")) for seed in seeds]
    return Row(paper, read_arguments(folder / "protocol.json") if runs else {}, runs)


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.read_text()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}; run the row again") from None


def read_arguments(path: Path) -> dict:
    """The arguments of main.py in a JSON file.

    Raises:
        UserError: they are not in it.
    """
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: {error}; run the row again") from None
    if not isinstance(content, dict) or "data_set" not in content:
        raise UserError(f"{path}: not the arguments of main.py; run the row again")
    return default_arguments(content.get("task", "classify")) | content  # some options are younger than the run


def read_result(path: Path) -> dict:
    """The results.json of a measurement.

    Raises:
        UserError: it cannot be read.
    """
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: {error}; measure it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not the results of a measurement; measure it again")
    return content


def read_log(path: Path) -> list[Epoch]:
    """The lines of a log.txt; none where the first epoch is not over yet.

    Raises:
        UserError: a line that main.py did not write.
    """
    epochs = []
    for number, line in enumerate(read_text(path).splitlines() if path.exists() else [], start=1):
        try:
            epochs.append(read_epoch(json.loads(line)))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number}: not from main.py; delete this run and do it again") from None
    return epochs


def read_epoch(record: dict) -> Epoch:
    """A record of main.py's log; raises ValueError, KeyError or TypeError where it is none."""
    done, metric = int(record["epoch"]) + 1, record.get("metric", ACCURACY)  # older logs name none
    averaged = f"test_{record['reported']}"  # the model's own results have no name of weights in theirs
    weights = averaged if f"{averaged}_{metric}" in record else "test"
    if f"{weights}_{metric}" not in record:
        return Epoch(done, metric, None, None, None)
    value, test_images = float(record[f"{weights}_{metric}"]), int(record[f"{weights}_images"])
    return Epoch(done, metric, value, test_images, record.get("train_images"))


# --------------------------------------------------------------------------------------------- comparing


def summarise(rows: dict[str, Row]) -> list[dict]:
    """The report's numbers and words, a row each; the keys are report.csv's columns (None: there is nothing)."""
    return [summarise_row(name, row, rows.get(row.paper.get("baseline"))) for name, row in rows.items()]


def summarise_row(name: str, row: Row, baseline: Row | None) -> dict:
    """One row of :func:`summarise`; differences are to ``baseline``, ours between means of the last epoch."""
    last_mean, last_deviation = mean_and_deviation(row.last())
    best_mean, best_deviation = mean_and_deviation(row.best())
    paper = row.paper["value"]
    paper_difference = difference = None
    if baseline:
        paper_difference = subtract(paper, baseline.paper["value"])
        difference = subtract(last_mean, mean_and_deviation(baseline.last())[0])
    return {
        "row": name,
        "name": row.paper["name"],
        "metric": row.paper.get("metric"),
        "ours_metric": ", ".join(row.other_metrics()) or None,
        "better": row.paper.get("better", "higher"),
        "paper": paper,
        "quoted": row.paper.get("quoted"),
        "last_mean": last_mean,
        "last_deviation": last_deviation,
        "best_mean": best_mean,
        "best_deviation": best_deviation,
        "seeds": len(row.last()),
        "paper_difference": paper_difference,
        "difference": difference,
        "epochs_done": span(run.epochs_done for run in row.runs),
        "epochs_planned": span(run.epochs_planned for run in row.runs),
        "not_comparable": "; ".join(measured_otherwise(row) + otherwise(row) + unfinished(row)) or None,
        "remarks": "; ".join(remarks(row, baseline if difference is not None else None)) or None,
    }


def mean_and_deviation(values: list[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation (n - 1); None where there are too few values."""
    return (
        statistics.mean(values) if values else None,
        statistics.stdev(values) if len(values) > 1 else None,
    )


def subtract(one: float | None, other: float | None) -> float | None:
    """Their difference, without the noise of binary fractions; None where one is missing."""
    return None if one is None or other is None else round(one - other, 6)


def span(values) -> str:
    """``3``, or ``2-5`` where they differ."""
    values = set(values)
    return "-".join(str(value) for value in sorted({min(values), max(values)})) if values else ""


def otherwise(row: Row) -> list[str]:
    """How the runs were not the protocol's, in words."""
    departures = row.departures()
    names = sorted(departures, key=lambda name: FOREMOST.index(name) if name in FOREMOST else len(FOREMOST))
    reasons = [
        f"{words(name)} {' and '.join(map(readable, departures[name]))}, not {readable(row.protocol[name])}"
        for name in names[:REASONS]
    ]
    if len(names) > REASONS:
        reasons.append(f"{len(names) - REASONS} more arguments")
    metrics = [f"metric {name}, not {ACCURACY}" for name in row.other_metrics()]
    return metrics + reasons + distinct(reason for run in row.runs for reason in other_counts(run))


def other_counts(run: TrainingRun) -> list[str]:
    """Where the images of the last evaluated epoch are not as many as the data set is known to have."""
    known = DATASETS[canonical_name(run.arguments["data_set"])].images
    evaluated = [epoch for epoch in run.log if epoch.value is not None]
    if not known or not evaluated:
        return []
    counts = {"test": (evaluated[-1].test_images, known["val"])}
    if run.arguments["sampling_ratio"] == 1 and evaluated[-1].train_images is not None:
        counts["training"] = (evaluated[-1].train_images, known["train"])
    return [f"{here:,} {which} images, not {there:,}" for which, (here, there) in counts.items() if here != there]


def measured_otherwise(row: Row) -> list[str]:
    """How the measurements were not the paper's, in words, beginning with what is no value of the table at all."""
    reasons = [result["instead"] for result in row.results or [] if "instead" in result]
    for name, value in row.paper["conditions"].items():
        others = [found for found in distinct(result.get(name) for result in row.results or []) if found != value]
        if others:
            reasons.append(f"{words(name)} {' and '.join(map(readable, others))}, not {readable(value)}")
    return reasons


def unfinished(row: Row) -> list[str]:
    """That some of the row's epochs are still to come, if they are."""
    runs = [run for run in row.runs if run.epochs_done < run.epochs_planned]
    done, planned = span(run.epochs_done for run in runs), span(run.epochs_planned for run in runs)
    return [f"unfinished, {done} of {planned} epochs"] if runs else []


def remarks(row: Row, baseline: Row | None) -> list[str]:
    """What else there is to say of a row; ``baseline`` is what ours was compared with, if it was."""
    said = [] if row.runs or row.results else ["not run"]
    if row.results == [] and row.runs:
        said = ["not measured"]
    if row.results and not row.runs:
        said = ["of weights that were given"]
    differing = [words(name) for name, values in row.departures().items() if len(values) > 1]
    if differing:
        said.append(f"its seeds differ in {', '.join(differing)}")
    if baseline and alike(row) != alike(baseline):
        said.append("trained otherwise than its baseline, so the difference says little")
    if "printed_difference" in row.paper:
        said.append(f"the paper prints {row.paper['printed_difference']:+}")
    return said + [row.paper[key] for key in ("metric", "source", "note") if key in row.paper]


def alike(row: Row) -> tuple:
    """What must be equal in two rows whose difference is to mean something."""
    return row.departures(), {run.epochs_done for run in row.runs}


def words(name: str) -> str:
    return name.replace("_", " ")


def readable(value) -> str:
    """An argument's value as one would give it."""
    if isinstance(value, dict):
        value = [f"{key}={item}" for key, item in value.items()]
    if isinstance(value, list):
        value = " ".join(map(str, value))
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int):
        return f"{value:,}"
    return "none" if value in (None, "") else str(value)


# ----------------------------------------------------------------------------------------------- writing


def report(folder: Path, figure: Path | None = None) -> str:
    """Write ``report.md`` and ``report.csv`` into a table's folder (and the curves); returns the Markdown.

    Args:
        folder: see :func:`read_table`.
        figure: where to draw accuracy against epochs; ``fig3.png`` in its folder for fig3, none for others.
    Raises:
        UserError: see :func:`read_table`; or a picture that cannot be written there.
        RunError: a report that cannot be written.
    """
    folder = Path(folder)
    table, rows = read_table(folder)
    if figure is None and folder.absolute().name == "fig3":
        figure = folder / "fig3.png"
    summary = summarise(rows)
    text = as_markdown(table, summary)
    if figure is not None:
        try:
            draw(table, rows).savefig(figure, dpi=150)
        except (OSError, ValueError) as error:  # no such folder; no such format
            raise UserError(f"--figure {figure}: {getattr(error, 'strerror', None) or error}") from None
        text += f"\n![accuracy against epochs]({os.path.relpath(figure, folder)})\n"
    write_atomically(folder / "report.md", lambda file: file.write(text.encode()))
    write_csv(folder / "report.csv", summary)
    return text


HEADER = {
    "name": "row",
    "paper": "paper",
    "last": "ours, last epoch",
    "best": "ours, best epoch",
    "paper_difference": "paper − baseline",
    "difference": "ours − baseline",
    "epochs": "epochs",
    "remarks": "remarks",
}


def as_markdown(table: dict, summary: list[dict]) -> str:
    """The table, and below it what its numbers mean."""
    notes = distinct(note for place in (0, 1) for row in summary if (note := footnotes(row)[place]))
    without_best = all("measured" in row for row in table["rows"].values())
    metrics = ", ".join(distinct(row["ours_metric"] for row in summary if row["ours_metric"]))
    header = HEADER | {name: f"{HEADER[name]} ({metrics})" for name in ("last", "best") if metrics}
    header = {name: title for name, title in header.items() if not (name == "best" and without_best)}
    lines = [header.values(), ["---"] + ["---:"] * (len(header) - 2) + ["---"]]
    for row in summary:
        cells = markdown_cells(row, notes)
        lines.append([cells[name] for name in header])
    below = [f"[{number}] {note}" for number, note in enumerate(notes, start=1)]
    below += [
        "The paper's numbers are single runs. Ours: mean ± sample deviation over n seeds.",
        "Differences are between the values shown: the paper's numbers, and our means after the last epoch.",
    ]
    if not without_best:
        below.append(
            "A best epoch is chosen by the accuracy that it reports, so it flatters; a last one is not chosen."
        )
    head = [f"# {table['title']}", "", f"{table['source']}; {table['metric']}.", ""]
    cells, below = (
        [f"| {' | '.join(line)} |" for line in lines],
        [f"- {line}" for line in below + table.get("notes", [])],
    )
    return "\n".join([*head, *cells, "", *below]) + "\n"


def footnotes(row: dict) -> tuple[str | None, str | None]:
    """On the paper's number and on ours; rows may share them."""
    return (
        row["quoted"] and f"Quoted by the paper from {row['quoted']}, not run by its authors.",
        row["not_comparable"] and f"Not comparable with the paper: {row['not_comparable']}.",
    )


def markdown_cells(row: dict, notes: list[str]) -> dict[str, str]:
    """One row of the table, by the names of HEADER."""
    quoted, not_comparable = (f" [{notes.index(note) + 1}]" if note else "" for note in footnotes(row))
    said = [f"**not comparable**{not_comparable}"] if not_comparable else []
    return {
        "name": row["name"],
        "paper": "–" if row["paper"] is None else f"{row['paper']}{quoted}",
        "last": ours(row["last_mean"], row["last_deviation"], row["seeds"]),
        "best": ours(row["best_mean"], row["best_deviation"], row["seeds"]),
        "paper_difference": difference_in_words(row["paper_difference"], row["better"]),
        "difference": difference_in_words(row["difference"], row["better"]),
        "epochs": f"{row['epochs_done']}/{row['epochs_planned']}" if row["epochs_planned"] else "",
        "remarks": "; ".join([*said, row["remarks"]] if row["remarks"] else said),
    }


def difference_in_words(difference: float | None, better: str) -> str:
    """A signed number; where lower is better, also whether it is."""
    if difference is None:
        return ""
    text = f"{difference:+z.2f}"
    if better == "higher" or float(text) == 0:
        return text
    return f"{text} ({'better' if difference < 0 else 'worse'})"


def ours(mean: float | None, deviation: float | None, seeds: int) -> str:
    if mean is None:
        return "–"
    return f"{mean:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}") + f" (n = {seeds})"


# ----------------------------------------------------------------------------------------------- drawing


def draw(table: dict, rows: dict[str, Row]) -> Figure:
    """Accuracy against epochs (Fig. 3), a line a row: the mean over its seeds, in a band from least to most.

    The right half is the second half of the epochs once more, larger. A star is the paper's final number; a row
    gets none where its runs were not the protocol's.
    """
    rows = [row for row in rows.values() if row.results is None and row.last()]
    figure = Figure(figsize=(10, 4.2 + 0.08 * len(rows)), layout="constrained")
    figure.suptitle(table["title"] + ("\nnot the paper's protocol" if any(map(otherwise, rows)) else ""))
    whole, end = figure.subplots(1, 2)
    longest = max((max(run.values(), default=0) for row in rows for run in row.runs), default=0)
    draw_curves(whole, rows, first=0)
    draw_curves(end, rows, first=longest // 2)
    whole.set_ylabel(", ".join(distinct(name for row in rows for name in row.other_metrics())) or table["metric"])
    if any(line.get_marker() == "*" for line in whole.lines):
        whole.plot([], [], "*", color="white", ms=11, mec="black", mew=0.6, label="the paper's last epoch")
    handles, labels = whole.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def draw_curves(axis, rows: list[Row], first: int) -> None:
    """The rows' lines, bands and stars from epoch ``first`` on."""
    colours = matplotlib.color_sequences["petroff10"]  # told apart by colour-blind readers too
    styles = [(colour, line) for line in ("-", "--") for colour in colours]
    for row, (colour, line) in zip(rows, styles, strict=False):
        epochs, values = curve(row)
        shown = epochs >= first
        epochs, values = epochs[shown], values[:, shown]
        label = f"{row.paper['name']} ({len(values)} seed{'s' if len(values) > 1 else ''})"
        marker = "o" if len(epochs) < 10 else None
        axis.plot(epochs, values.mean(axis=0), line, color=colour, linewidth=1.3, marker=marker, ms=4, label=label)
        if len(values) > 1:
            axis.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, linewidth=0)
        if row.paper["value"] is not None and not otherwise(row):
            last = row.protocol["epochs"] + row.protocol["cooldown_epochs"]
            axis.plot(last, row.paper["value"], "*", color=colour, ms=11, mec="black", mew=0.6, zorder=3)
    axis.set_xlabel("epochs")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def curve(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Epochs done at which every evaluated run of the row was, and their values ``(runs, epochs)``."""
    runs = [values for run in row.runs if (values := run.values())]
    epochs = sorted(set.intersection(*(set(run) for run in runs)))
    return np.array(epochs, dtype=int), np.array([[run[epoch] for epoch in epochs] for run in runs])


def main(argv: list[str]) -> int:
    """Report on the folder that the command line names; returns the exit code (2: it cannot be used)."""
    parser = Parser(
        prog="python -m paper report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="OUT/TABLE", help=f"OUT/ and one of {', '.join(PAPER)}")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw accuracy against epochs of all rows here")

    def work() -> int:
        arguments = parser.parse_args(argv)
        print(report(arguments.folder, arguments.figure))
        return 0

    return exit_code(work)
