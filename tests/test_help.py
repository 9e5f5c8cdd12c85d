"""The help of every program: an example at the top, the default of every switch, and clauses that stand alone."""

import argparse
import importlib
import re
from pathlib import Path

import pytest

from arguments import build_parser
from paper.options import build_parser as build_table_parser
from tasks import TASKS

ROOT = Path(__file__).parents[1]
PROGRAMS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("analysis", "benchmarks", "paper", "readers", ".")
    for path in sorted((ROOT / folder).glob("*.py"))
    if 'if __name__ == "__main__"' in path.read_text() and path.name != "main.py"
]
LONGEST = 25
"""Words of a clause: what is between two of ``. ; :``, or in brackets."""


class Found(Exception):
    """Carries the parser that a program has built."""


def parser_of(program: str, monkeypatch) -> argparse.ArgumentParser:
    """The parser by which a program reads its command line."""

    def stop(parser, *_):
        raise Found(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    with pytest.raises(Found) as found:
        importlib.import_module(program).main(["--status"])
    return found.value.args[0]


def check(parser: argparse.ArgumentParser) -> None:
    # 1. an example before the options
    text, wrong = parser.format_help(), []
    top = text.partition("\noptions:\n")[0]
    assert re.search(r"^ +(python|bash|torchrun) \S", top, re.MULTILINE), top
    assert len([line for line in text.splitlines() if len(line) > 120]) == 0
    # 2. switches and their defaults
    for action in parser._actions:
        if action.dest == "help" or action.help == argparse.SUPPRESS:
            continue
        shown = parser._get_formatter()._expand_help(action)
        if isinstance(action, argparse._StoreTrueAction | argparse.BooleanOptionalAction):
            wrong += [shown] * (not shown.endswith(f"(default: {'on' if action.default else 'off'})"))
        wrong += [shown] * (shown.count("(default") > 1)
        # 3. clauses
        for clause in re.split(r"[.;:](?:\s|$)|[()]", shown):
            wrong += [clause] * (len(clause.split()) >= LONGEST)
    assert not wrong


@pytest.mark.parametrize("task", TASKS)
def test_main(task):
    check(build_parser(task))


@pytest.mark.parametrize("table", ["table1b", "table8", "fig1_fig4"])
def test_tables(table):
    check(build_table_parser(table))


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs(program, monkeypatch):
    check(parser_of(program, monkeypatch))


def test_report(monkeypatch):
    check(parser_of("paper.report", monkeypatch))
