"""Reads ``tables.toml``: the command line of each table's rows, and the paper's numbers for them."""

import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path

_DATA = tomllib.loads(Path(__file__).with_name("tables.toml").read_text(encoding="utf-8"))

RUNS: dict[str, list[str]] = {
    f"{protocol}/{name}": shlex.split(line) for protocol, runs in _DATA["runs"].items() for name, line in runs.items()
}
"""The command line of each run: arguments of main.py, or ``analysis.<name>`` and the arguments of that command."""

WEIGHTS: dict[str, str] = _DATA["weights"]
"""The replacement of ``weights:<name>`` in a command line, unless the user gives a file of weights."""


def _with_defaults(table: dict) -> dict:
    """The table with its ``measured``, ``logged`` and ``conditions`` in its rows; a missing value becomes None."""
    inherited = {"value": None} | {key: table[key] for key in ("measured", "logged") if key in table}
    conditions = table.get("conditions", {})
    rows = {
        name: inherited | row | {"conditions": conditions | row.get("conditions", {})}
        for name, row in table["rows"].items()
    }
    return table | {"rows": rows}


TABLES: dict[str, dict] = {name: _with_defaults(table) for name, table in _DATA["tables"].items()}
"""All tables by name; the head of ``tables.toml`` describes the format."""

RUNNABLE = [name for name, table in TABLES.items() if all("run" in row for row in table["rows"].values())]
"""The tables whose rows this program can run."""


@dataclass(frozen=True)
class TableRow:
    """A row of a table.

    Attributes:
        name: the row's id in the table; ``-`` for a run that is in no row, but whose files a row needs.
        run: the key of its run in `RUNS`.
        words: the run's command line.
    """

    name: str
    run: str
    words: list[str]

    @property
    def is_measurement(self) -> bool:
        """Whether the command measures trained models (``analysis.<name>``) instead of training one."""
        return self.words[0].startswith("analysis.")

    def dependencies(self) -> list[str]:
        """Keys of the runs whose files the command line names (``run:<run>/<file>``)."""
        return [word.removeprefix("run:").rpartition("/")[0] for word in self.words if word.startswith("run:")]


def table_rows(table: str) -> list[TableRow]:
    """The rows of one of the RUNNABLE tables."""
    return [TableRow(name, row["run"], RUNS[row["run"]]) for name, row in TABLES[table]["rows"].items()]
