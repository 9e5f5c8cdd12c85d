"""The paper's tables: run their rows, and put the paper's numbers beside one's own.

    python -m paper run table1b --data /data        # what scripts/table1b_components.sh does
    python -m paper run --help                      # all tables
    python -m paper report output/table1b           # paper against own runs, any time

Each of the two has a --help of its own.
"""

import argparse
import sys

from cli import Parser, exit_code
from paper import report, run

COMMANDS = {"run": run.main, "report": report.main}


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; returns the exit code: see the two commands."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    parser = Parser(
        prog="python -m paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=COMMANDS)
    return exit_code(lambda: parser.parse_args(argv))  # help, or an error


if __name__ == "__main__":
    sys.exit(main())
