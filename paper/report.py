"""Compare a table of the paper with this program's runs of it, read from their logs.

    python -m paper report OUT/table1b
    python -m paper report OUT/table1b --figure curves.png

OUT/table1b is the output of the table's script: one folder per row, with protocol.json (the arguments of the paper's
protocol) and seed0, seed1, ... (output folders of main.py). The report is printed, and written there as report.md and
report.csv; fig3 also gets its picture, fig3.png.

"Ours" is the metric of the weights that --report selects: mean and sample standard deviation over the seeds, after
the last evaluated epoch and at each seed's best epoch. If the logs name another metric than the table's, the report
gives that one under its name. A row is not comparable with the paper if an argument that changes the mathematics
differs from the protocol, the protocol differs from the paper's (Table 6), the metric differs, epochs are missing, or
the data set has another number of images.

In measuring rows (Table 8, Table 11), "ours" was measured on the weights after the last epoch. Their seed0, seed1, ...
are results of analysis.robustness or analysis.jaccard, and trained/<run> holds the training runs in the format of a
row. Both the measurement and the training must follow the paper's protocol for the row to be comparable.
"""

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
from launch.logs import ACCURACY, Epoch, read_epoch
from paper.tables import TABLES
from readers import canonical_name, sets_of
from utils import UserError, write_atomically, write_csv

PAPER = {name: table for name, table in TABLES.items() if "metric" in table}
"""The tables that have numbers to report; the head of ``tables.toml`` describes them."""

# Arguments that may differ between a row's runs and the protocol, or among its seeds. (The table itself sets the path
# of --finetune.)
MAY_DIFFER = NOT_MATHEMATICAL | {"seed", "finetune"}

# Differences from the protocol are listed in this order, then all others; at most MAX_REASONS of them.
REPORTED_FIRST = ("data_set", "sampling_ratio", "epochs", "model", "model_kwargs", "input_size", "total_batch")
MAX_REASONS = 5


@dataclass(frozen=True)
class LoggedRun:
    """One seed of a row: main.py's arguments (args.json) and its log (log.txt)."""

    arguments: dict
    log: list[Epoch]

    @property
    def epochs_done(self) -> int:
        return self.log[-1].done if self.log else 0

    @property
    def epochs_planned(self) -> int:
        return self.arguments["epochs"] + self.arguments["cooldown_epochs"]

    def values(self) -> dict[int, float]:
        """Number of epochs done -> the metric's value, for the evaluated epochs."""
        return {epoch.done: epoch.value for epoch in self.log if epoch.value is not None}


@dataclass(frozen=True)
class ReportRow:
    """A row of a report.

    Attributes:
        paper: the row's entry in ``tables.toml``.
        protocol: the arguments of the paper's protocol.
        runs: the training runs, one per seed; empty if the row was not run.
        results: of a measuring row, the contents of results.json, one per seed; None for a training row.
    """

    paper: dict
    protocol: dict
    runs: list[LoggedRun]
    results: list[dict] | None = None

    def last_values(self) -> list[float]:
        """Each evaluated run's value after its last evaluated epoch, or its measured value."""
        if self.results is not None:
            name = self.paper["measured"]
            return [result[name] for result in self.results if name in result]
        return [values[max(values)] for run in self.runs if (values := run.values())]

    def best_values(self) -> list[float]:
        """Each evaluated run's best value; empty for a measuring row."""
        if self.results is not None:
            return []
        return [max(values.values()) for run in self.runs if (values := run.values())]

    @property
    def metric(self) -> str:
        """The name in log.txt of the paper's metric."""
        return self.paper.get("logged", ACCURACY)

    def other_metrics(self) -> list[str]:
        """The metrics in the runs' logs other than the paper's."""
        if self.results is not None:
            return []
        found = distinct(epoch.metric for run in self.runs for epoch in run.log if epoch.value is not None)
        return [metric for metric in found if metric != self.metric]

    def changed_arguments(self) -> dict[str, list]:
        """Arguments that differ from the protocol: name -> the distinct values of the runs."""
        compared = [name for name in self.protocol if name not in MAY_DIFFER]
        values = {name: distinct(run.arguments.get(name) for run in self.runs) for name in compared}
        return {name: found for name, found in values.items() if found not in ([], [self.protocol[name]])}


def distinct(values) -> list:
    """The distinct values in their order; unlike for ``dict.fromkeys``, they may be lists and dicts."""
    found = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


# ----------------------------------------------------------------------------------------------- reading


def read_table(folder: Path) -> tuple[dict, dict[str, ReportRow]]:
    """The paper's table that ``folder`` is named after, and all its rows by id, including rows that were not run.

    Raises:
        UserError: not a table of the paper, no row in it or an unknown one, or a file that cannot be read.
    """
    name = folder.absolute().name
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one that a table's script wrote, e.g. output/table1b")
    if name not in PAPER:
        raise UserError(f"{folder}: {name} is not a table of the paper; known are {', '.join(PAPER)}")
    table = PAPER[name]
    found = sorted(path.parent.name for path in folder.glob("*/protocol.json"))
    unknown = [row for row in found if row not in table["rows"]]
    if unknown or not found:
        problem = f"no row {unknown[0]} in this table" if unknown else "no row in it has a protocol.json"
        raise UserError(f"{folder}: {problem}; its rows are {', '.join(table['rows'])}")
    return table, {row: read_row(folder / row, paper) for row, paper in table["rows"].items()}


def read_row(folder: Path, paper: dict) -> ReportRow:
    """The row of a table whose runs are in ``folder``; without runs if the folder does not exist.

    Args:
        folder: ``OUT/<table>/<row>``.
        paper: the row's entry in ``tables.toml``.

    Raises:
        UserError: a file that cannot be read.
    """
    if "measured" in paper:
        trained = min(folder.glob("trained/*"), default=folder / "trained")
        row = read_row(trained, {})
        return ReportRow(
            paper, row.protocol, row.runs, [read_result(path) for path in sorted(folder.glob("seed*/results.json"))]
        )
    seeds = sorted(
        path for path in folder.glob("seed*") if (path / "log.txt").exists() or (path / "args.json").exists()
    )
    runs = [LoggedRun(read_arguments(seed / "args.json"), read_log(seed / "log.txt")) for seed in seeds]
    return ReportRow(paper, read_arguments(folder / "protocol.json") if runs else {}, runs)


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
    """main.py's arguments in a JSON file, with defaults for options that are younger than the run.

    Raises:
        UserError: the file cannot be read or holds something else.
    """
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: {error}; run the row again") from None
    if not isinstance(content, dict) or "data_set" not in content:
        raise UserError(f"{path}: not the arguments of main.py; run the row again")
    return default_arguments(content.get("task", "classify")) | content


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
    """The epochs of a log.txt; empty before the end of the first epoch.

    Raises:
        UserError: a line that main.py did not write.
    """
    epochs = []
    for number, line in enumerate(read_text(path).splitlines() if path.exists() else [], start=1):
        try:
            epochs.append(read_epoch(line))
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}, line {number}: not written by main.py; delete this run and run the row again"
            ) from None
    return epochs


# --------------------------------------------------------------------------------------------- comparing


def summarise(rows: dict[str, ReportRow]) -> list[dict]:
    """The contents of the report, one dict per row; the keys are the columns of report.csv, None for an empty field."""
    return [summarise_row(name, row, rows.get(row.paper.get("baseline", ""))) for name, row in rows.items()]


def summarise_row(name: str, row: ReportRow, baseline: ReportRow | None) -> dict:
    """One row of :func:`summarise`.

    The differences are relative to ``baseline``; ``difference`` is between the means of the last epoch.
    """
    # 1. means and deviations over the seeds
    last_mean, last_deviation = mean_and_deviation(row.last_values())
    best_mean, best_deviation = mean_and_deviation(row.best_values())
    # 2. differences from the baseline row
    paper = row.paper["value"]
    paper_difference = difference = None
    if baseline:
        paper_difference = subtract(paper, baseline.paper["value"])
        difference = subtract(last_mean, mean_and_deviation(baseline.last_values())[0])
    # 3. numbers first, then what limits their comparison with the paper
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
        "seeds": len(row.last_values()),
        "paper_difference": paper_difference,
        "difference": difference,
        "epochs_done": format_range(run.epochs_done for run in row.runs),
        "epochs_planned": format_range(run.epochs_planned for run in row.runs),
        "not_comparable": "; ".join(measurement_differences(row) + protocol_differences(row) + missing_epochs(row))
        or None,
        "remarks": "; ".join(list_remarks(row, baseline if difference is not None else None)) or None,
    }


def mean_and_deviation(values: list[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation (n - 1); None for too few values."""
    return (
        statistics.mean(values) if values else None,
        statistics.stdev(values) if len(values) > 1 else None,
    )


def subtract(one: float | None, other: float | None) -> float | None:
    """Their difference, rounded to remove floating-point noise; None if one is missing."""
    return None if one is None or other is None else round(one - other, 6)


def format_range(values) -> str:
    """Integers as a range: ``3`` if all are equal, ``2-5`` from least to greatest, "" for none."""
    values = set(values)
    return "-".join(str(value) for value in sorted({min(values), max(values)})) if values else ""


def protocol_differences(row: ReportRow) -> list[str]:
    """How the runs differ from the protocol: metric, arguments and numbers of images."""
    changed = row.changed_arguments()
    names = sorted(
        changed, key=lambda name: REPORTED_FIRST.index(name) if name in REPORTED_FIRST else len(REPORTED_FIRST)
    )
    reasons = [
        f"{format_name(name)} {' and '.join(map(format_value, changed[name]))}, not {format_value(row.protocol[name])}"
        for name in names[:MAX_REASONS]
    ]
    if len(names) > MAX_REASONS:
        reasons.append(f"{len(names) - MAX_REASONS} more arguments")
    metrics = [f"metric {name}, not {row.metric}" for name in row.other_metrics()]
    own = [row.paper["differs"]] if row.runs and "differs" in row.paper else []
    return metrics + own + reasons + distinct(reason for run in row.runs for reason in image_count_differences(run))


def image_count_differences(run: LoggedRun) -> list[str]:
    """Splits whose number of images in the last evaluated epoch differs from the published number."""
    sets = sets_of(run.arguments["task"])
    known = sets[canonical_name(run.arguments["data_set"], sets)].images
    evaluated = [epoch for epoch in run.log if epoch.value is not None]
    if not known or not evaluated:
        return []
    counts = {"test": (evaluated[-1].test_images, known["val"])}
    if run.arguments["sampling_ratio"] == 1 and evaluated[-1].train_images is not None:
        counts["training"] = (evaluated[-1].train_images, known["train"])
    return [f"{here:,} {which} images, not {there:,}" for which, (here, there) in counts.items() if here != there]


def measurement_differences(row: ReportRow) -> list[str]:
    """How the measurements differ from the paper's: partial results (``instead``) first, then other conditions."""
    reasons = [result["instead"] for result in row.results or [] if "instead" in result]
    for name, value in row.paper["conditions"].items():
        others = [found for found in distinct(result.get(name) for result in row.results or []) if found != value]
        if others:
            reasons.append(f"{format_name(name)} {' and '.join(map(format_value, others))}, not {format_value(value)}")
    return reasons


def missing_epochs(row: ReportRow) -> list[str]:
    """A message if some of the row's epochs are not done yet; empty if all are."""
    runs = [run for run in row.runs if run.epochs_done < run.epochs_planned]
    done, planned = format_range(run.epochs_done for run in runs), format_range(run.epochs_planned for run in runs)
    return [f"unfinished, {done} of {planned} epochs"] if runs else []


def list_remarks(row: ReportRow, baseline: ReportRow | None) -> list[str]:
    """Further remarks on a row; ``baseline`` is the row that ours was compared with, None for no comparison."""
    remarks = [] if row.runs or row.results else ["not run"]
    if row.results == [] and row.runs:
        remarks = ["not measured"]
    if row.results and not row.runs:
        remarks = ["measured on given weights"]
    differing = [format_name(name) for name, values in row.changed_arguments().items() if len(values) > 1]
    if differing:
        remarks.append(f"its seeds differ in {', '.join(differing)}")
    if baseline and training_conditions(row) != training_conditions(baseline):
        remarks.append("trained differently from its baseline, so the difference is not meaningful")
    if "printed_difference" in row.paper:
        remarks.append(f"the paper prints {row.paper['printed_difference']:+}")
    return remarks + [row.paper[key] for key in ("metric", "source", "note") if key in row.paper]


def training_conditions(row: ReportRow) -> tuple:
    """The changed arguments and epochs done; equal for two rows whose difference is meaningful."""
    return row.changed_arguments(), {run.epochs_done for run in row.runs}


def format_name(name: str) -> str:
    """An argument's name in a sentence."""
    return name.replace("_", " ")


def format_value(value) -> str:
    """An argument's value as on the command line."""
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


def write_report(folder: Path, figure: Path | None = None) -> str:
    """Write ``report.md``, ``report.csv`` and optionally the curves into a table's folder; returns the Markdown.

    Args:
        folder: see :func:`read_table`.
        figure: file for the plot of accuracy against epochs. Default: ``fig3.png`` in the folder for fig3, else none.
    Raises:
        UserError: see :func:`read_table`; or the figure cannot be written.
        RunError: the report cannot be written.
    """
    # 1. read and summarise
    folder = Path(folder)
    table, rows = read_table(folder)
    if figure is None and folder.absolute().name == "fig3":
        figure = folder / "fig3.png"
    summary = summarise(rows)
    text = as_markdown(table, summary)
    # 2. draw the curves
    if figure is not None:
        try:
            draw(table, rows).savefig(figure, dpi=150)
        except (OSError, ValueError) as error:  # no such folder; no such format
            raise UserError(f"--figure {figure}: {getattr(error, 'strerror', None) or error}") from None
        text += f"\n![accuracy against epochs]({os.path.relpath(figure, folder)})\n"
    # 3. write the report
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
    """The report in Markdown: the table, footnotes, and explanations of its numbers."""
    # 1. the columns
    notes = distinct(note for place in (0, 1) for row in summary if (note := footnotes(row)[place]))
    without_best = all("measured" in row for row in table["rows"].values())
    metrics = ", ".join(distinct(row["ours_metric"] for row in summary if row["ours_metric"]))
    header = HEADER | {name: f"{HEADER[name]} ({metrics})" for name in ("last", "best") if metrics}
    header = {name: title for name, title in header.items() if not (name == "best" and without_best)}
    # 2. the rows
    lines = [header.values(), ["---"] + ["---:"] * (len(header) - 2) + ["---"]]
    for row in summary:
        cells = markdown_cells(row, notes)
        lines.append([cells[name] for name in header])
    # 3. footnotes and explanations
    below = [f"[{number}] {note}" for number, note in enumerate(notes, start=1)]
    below += [
        "The paper's numbers are single runs. Ours: mean ± sample deviation over n seeds.",
        "Differences compare the values shown: the paper's numbers, and our means after the last epoch.",
    ]
    if not without_best:
        below.append(
            "The best epoch is selected by the reported accuracy, which biases it upwards; the last one is not."
        )
    head = [f"# {table['title']}", "", f"{table['source']}; {table['metric']}.", ""]
    table_lines = [f"| {' | '.join(line)} |" for line in lines]
    note_lines = [f"- {line}" for line in below + table.get("notes", [])]
    return "\n".join([*head, *table_lines, "", *note_lines]) + "\n"


def footnotes(row: dict) -> tuple[str | None, str | None]:
    """The footnotes on the paper's number and on ours, None for none; rows may share a footnote."""
    return (
        row["quoted"] and f"Quoted by the paper from {row['quoted']}, not run by its authors.",
        row["not_comparable"] and f"Not comparable with the paper: {row['not_comparable']}.",
    )


def markdown_cells(row: dict, notes: list[str]) -> dict[str, str]:
    """The cells of one row by the keys of HEADER; ``notes`` are the numbered footnotes."""
    quoted, not_comparable = (f" [{notes.index(note) + 1}]" if note else "" for note in footnotes(row))
    remarks = [f"**not comparable**{not_comparable}"] if not_comparable else []
    return {
        "name": row["name"],
        "paper": "–" if row["paper"] is None else f"{row['paper']}{quoted}",
        "last": format_ours(row["last_mean"], row["last_deviation"], row["seeds"]),
        "best": format_ours(row["best_mean"], row["best_deviation"], row["seeds"]),
        "paper_difference": format_difference(row["paper_difference"], row["better"]),
        "difference": format_difference(row["difference"], row["better"]),
        "epochs": f"{row['epochs_done']}/{row['epochs_planned']}" if row["epochs_planned"] else "",
        "remarks": "; ".join([*remarks, row["remarks"]] if row["remarks"] else remarks),
    }


def format_difference(difference: float | None, better: str) -> str:
    """A signed number with two decimals; if lower is better, followed by "better" or "worse"."""
    if difference is None:
        return ""
    text = f"{difference:+z.2f}"
    if better == "higher" or float(text) == 0:
        return text
    return f"{text} ({'better' if difference < 0 else 'worse'})"


def format_ours(mean: float | None, deviation: float | None, seeds: int) -> str:
    """``mean ± deviation (n = seeds)``, or a dash for no value."""
    if mean is None:
        return "–"
    return f"{mean:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}") + f" (n = {seeds})"


# ----------------------------------------------------------------------------------------------- drawing


def draw(table: dict, rows: dict[str, ReportRow]) -> Figure:
    """Plot accuracy against epochs (Fig. 3): per row the mean over its seeds, and a band from minimum to maximum.

    A right panel enlarges the second half of the epochs, unless it would show the same. A star marks the paper's final
    number, for rows that follow the protocol.
    """
    # 1. what the panels show
    drawn = [row for row in rows.values() if row.results is None and row.last_values()]
    reached = [epoch for row in drawn for epoch in common_curve(row)[0].tolist()]
    half = max(reached, default=0) // 2
    firsts = {"All epochs": 0} | ({f"From epoch {half} on": half} if min(reached, default=0) < half else {})
    # 2. draw them
    figure = Figure(figsize=(10, 4.2 + 0.08 * len(drawn)), layout="constrained")
    figure.suptitle(table["title"] + ("\nnot the paper's protocol" if any(map(protocol_differences, drawn)) else ""))
    panels = figure.subplots(1, len(firsts), squeeze=False)[0]
    value = ", ".join(distinct(name for row in drawn for name in row.other_metrics())) or table["metric"]
    for panel, (title, first) in zip(panels, firsts.items(), strict=True):
        draw_curves(panel, drawn, first)
        panel.set(title=title, ylabel=value)
    # 3. one legend for all
    whole = panels[0]
    if any(line.get_marker() == "*" for line in whole.lines):
        whole.plot([], [], "*", color="white", ms=11, mec="black", mew=0.6, label="the paper's last epoch")
    handles, labels = whole.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def draw_curves(axis, rows: list[ReportRow], first: int) -> None:
    """Draw the rows' lines, bands and stars from epoch ``first`` on."""
    colours = matplotlib.color_sequences["petroff10"]  # distinguishable for colour-blind readers
    styles = [(colour, line) for line in ("-", "--") for colour in colours]
    for row, (colour, line) in zip(rows, styles, strict=False):
        epochs, values = common_curve(row)
        shown = epochs >= first
        epochs, values = epochs[shown], values[:, shown]
        label = f"{row.paper['name']} ({len(values)} seed{'s' if len(values) > 1 else ''})"
        marker = "o" if len(epochs) < 10 else None
        axis.plot(epochs, values.mean(axis=0), line, color=colour, linewidth=1.3, marker=marker, ms=4, label=label)
        if len(values) > 1:
            axis.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, linewidth=0)
        if row.paper["value"] is not None and not protocol_differences(row):
            last = row.protocol["epochs"] + row.protocol["cooldown_epochs"]
            axis.plot(last, row.paper["value"], "*", color=colour, ms=11, mec="black", mew=0.6, zorder=3)
    axis.set_xlabel("epochs")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def common_curve(row: ReportRow) -> tuple[np.ndarray, np.ndarray]:
    """The epochs ``(epochs,)`` at which every evaluated run has a value, and the values ``(runs, epochs)``."""
    runs = [values for run in row.runs if (values := run.values())]
    epochs = sorted(set.intersection(*(set(run) for run in runs)))
    return np.array(epochs, dtype=int), np.array([[run[epoch] for epoch in epochs] for run in runs])


def main(argv: list[str]) -> int:
    """Report on the folder that the command line names; returns the exit code (2: bad usage)."""
    parser = Parser(
        prog="python -m paper report",
        description=__doc__,
    )
    parser.add_argument(
        "folder",
        type=Path,
        metavar="OUT/TABLE",
        help=f"output folder of a table's script: OUT/ and one of {', '.join(PAPER)}",
    )
    parser.add_argument(
        "--figure", type=Path, metavar="FILE", help="plot accuracy against epochs of all rows into this file"
    )

    def work() -> int:
        arguments = parser.parse_args(argv)
        print(write_report(arguments.folder, arguments.figure))
        return 0

    return exit_code(work)
