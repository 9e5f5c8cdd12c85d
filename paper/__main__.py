"""Reproduce the paper's tables: run their rows, and compare the results with the paper's numbers.

    python -m paper run table1b --data /data        # the command that scripts/table1b_components.sh executes
    python -m paper run --help                      # list all tables
    python -m paper report output/table1b           # compare the paper with the runs so far

Both commands have their own --help.
"""

import importlib
import sys

from cli import Parser, exit_code

COMMANDS = ("run", "report")
"""The modules beside this one that have a ``main``; each is imported when it is asked for."""


def main(argv: list[str] | None = None) -> int:
    """Execute the command line; returns the exit code of the command that it names."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return importlib.import_module(f"paper.{argv[0]}").main(argv[1:])
    parser = Parser(
        prog="python -m paper",
        description=__doc__,
    )
    parser.add_argument("command", choices=COMMANDS)
    return exit_code(lambda: len(vars(parser.parse_args(argv))))  # prints help, or reports an unknown command


if __name__ == "__main__":
    sys.exit(main())
