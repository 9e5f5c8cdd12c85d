"""Command lines: parser, argument types, argument files, and the one way from an error to an exit code."""

import argparse
import difflib
import math
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from utils import RunError, UserError

# Options of DeiT that this program has no use for, and why.
NOT_NEEDED = {
    "--dist-eval": "evaluation is always distributed, and counts every image once",
    "--pin-mem": "memory is pinned wherever there is a GPU",
    "--no-pin-mem": "memory is pinned wherever there is a GPU",
    "--start-epoch": "a checkpoint knows its epoch",
    "--dist-url": "the environment of torchrun or srun says where the other processes are",
    "--world-size": "the environment of torchrun or srun says how many processes there are",
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and name the nearest option to a mistyped one."""

    def error(self, message: str):
        unknown = message.removeprefix("unrecognized arguments:").split()
        if message.startswith("unrecognized") and unknown and unknown[0].startswith("--"):
            name = unknown[0].partition("=")[0]
            if name in NOT_NEEDED:
                raise UserError(f"leave {name} out: {NOT_NEEDED[name]}")
            message = f"no option {name}" + nearest(name, self._option_string_actions)
        raise UserError(message)


class HelpFormatter(argparse.HelpFormatter):
    """Shows the default of every option that has one, and N for a value where nothing says more."""

    def _get_help_string(self, action):
        shown = repr(action.default) not in ("None", "False", "''", "{}", repr(argparse.SUPPRESS))
        text = action.help or ""
        return f"{text} (default: %(default)s)".strip() if shown else text

    def _get_default_metavar_for_optional(self, action):
        return "N"


def nearest(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def at_least(convert, low, high=math.inf, open_low=False):
    """A type for argparse: ``convert(text)`` within bounds, or an error that states them."""
    kind = "a whole number" if convert is int else "a number"
    bounds = f"{'above' if open_low else 'of at least'} {low}"
    bounds += f" and at most {high}" if high < math.inf else ""

    def parse(text: str):
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and (low < value if open_low else low <= value) and value <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind} {bounds}")
        return value

    return parse


def expand_arguments(argv: list[str]) -> list[str]:
    """Put the content of leading ``@file`` arguments in their place and turn DeiT's underscores to hyphens.

    A file may begin with ``@file`` itself, named as seen from its own folder.

    Raises:
        UserError: a file that cannot be read, that includes itself, or that stands after an option.
    """
    return [_with_hyphens(word) for word in _expand(list(argv), Path(), ())]


def _expand(words: list[str], folder: Path, inside: tuple[Path, ...]) -> list[str]:
    """``words`` with its leading files, which lie in ``folder``; ``inside`` are the files being read."""
    expanded = []
    while words and words[0].startswith("@"):
        path = folder / words.pop(0)[1:]
        if path.resolve() in inside:
            raise UserError(f"argument file {path} includes itself")
        try:
            content = shlex.split(path.read_text(), comments=True)
        except (OSError, ValueError) as error:
            raise UserError(f"argument file {path}: {getattr(error, 'strerror', None) or error}") from None
        expanded += _expand(content, path.parent, (*inside, path.resolve()))
    late = [word for word in words if word.startswith("@")]
    if late:
        raise UserError(f"{late[0]} must stand before all options (what comes later wins)")
    return expanded + words


def _with_hyphens(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def exit_code(work: Callable[[], int]) -> int:
    """What ``work`` returns, or the code of the error that it prints: 1, or 2 where the user's input cannot be used."""
    try:
        return work()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        # The frames of an error keep a loader, whose processes would never end.
        traceback.clear_frames(error.__traceback__)
        if not isinstance(error, UserError | RunError | OSError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
