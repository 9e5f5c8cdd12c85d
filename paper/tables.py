"""Reads ``tables.toml``: what the rows of each table run, and the paper's numbers for them."""

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
"""What ``weights:<name>`` in a command line stands for, where the user gives no file of weights."""


def _completed(table: dict) -> dict:
    """The table, its rows with ``measured`` and ``conditions`` that they have from it, and None for a missing value."""
    inherited = {"value": None} | {key: table[key] for key in ("measured",) if key in table}
    conditions = table.get("conditions", {})
    rows = {
        name: inherited | row | {"conditions": conditions | row.get("conditions", {})}
        for name, row in table["rows"].items()
    }
    return table | {"rows": rows}


TABLES: dict[str, dict] = {name: _completed(table) for name, table in _DATA["tables"].items()}
"""All tables by name, as the head of ``tables.toml`` describes them."""

RUNNABLE = [name for name, table in TABLES.items() if all("run" in row for row in table["rows"].values())]
"""The tables whose rows this program can run."""


@dataclass(frozen=True)
class Row:
    """A row of a table: its id, its run's key, and the words of the run's command line.

    The id ``-`` is that of a run which belongs to no row, and is done because a row needs its files.
    """

    name: str
    run: str
    words: list[str]

    @property
    def measures(self) -> bool:
        """Whether it is no training run, but a command that measures finished ones."""
        return self.words[0].startswith("analysis.")

    def needs(self) -> list[str]:
        """The runs whose files its words name."""
        return [word.removeprefix("run:").rpartition("/")[0] for word in self.words if word.startswith("run:")]


def rows_of(table: str) -> list[Row]:
    """The rows of one of the RUNNABLE tables."""
    return [Row(name, row["run"], RUNS[row["run"]]) for name, row in TABLES[table]["rows"].items()]
