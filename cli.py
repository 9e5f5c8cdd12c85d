"""Command lines: parser, argument types, argument files, and the one way from an error to an exit code."""

import argparse
import ast
import difflib
import math
import os
import shlex
import sys
import textwrap
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from utils import Processes, RunError, UserError, among_processes, processes_here

EXPECTED = (UserError, RunError, OSError)
"""Errors whose message is all that a user needs."""

# Options of DeiT that this program has no use for, and why.
NOT_NEEDED = {
    "--decay-epochs": "of --sched step, which is gone; cosine and constant are left",
    "--decay-rate": "of --sched step and poly, which are gone; cosine and constant are left",
    "--mixup-mode": "Mixup draws once for each batch; pair and elem are gone",
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


class KeyValues(argparse.Action):
    """Words KEY=VALUE as a dict; a value that is no Python literal is a string, as in timm."""

    def __call__(self, parser, namespace, values, option_string=None):
        pairs = {}
        for word in values:
            key, equals, value = word.partition("=")
            if not equals:
                parser.error(f"{option_string}: {word!r} is not KEY=VALUE")
            try:
                pairs[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                pairs[key] = value
        setattr(namespace, self.dest, pairs)


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


class Exit:
    """The way from an error to one line and an exit code; for a whole program: ``with Exit() as end: end.code = ...``.

    130 after Ctrl-C, 2 where the user's input cannot be used, 1 for what else can happen to a run. An error that nobody
    foresaw goes on, with its traceback; among several processes it is told here and ends this one.

    Attributes:
        code: the exit code.
        processes: this process among several, once it has joined them; they are told why it ends.
    """

    def __init__(self):
        self.code = 0
        self.processes: Processes | None = None

    def __enter__(self) -> "Exit":
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> bool:
        if isinstance(error, KeyboardInterrupt):
            self.code = 130
            return True
        if not isinstance(error, Exception):
            return False
        traceback.clear_frames(trace)  # they hold a loader, whose processes would never end
        told = self.processes.explain(error) if self.processes is not None else error
        if not isinstance(told, EXPECTED) and not among_processes():
            return False
        self.code = report_error(told)
        return True


def exit_code(work: Callable[[], int]) -> int:
    """What ``work`` returns, or the exit code of the error that ended it; see `Exit`."""
    with Exit() as end:
        end.code = work()
    return end.code


def report_error(error: Exception) -> int:
    """Say on standard error what ended this process; returns the exit code.

    One among several ends at once: the others wait for it, and a clean farewell would wait for them.
    """
    expected, (rank, _, _) = isinstance(error, EXPECTED), processes_here()
    if expected and rank > 0:
        time.sleep(2)  # rank 0 has mostly the same to say, and what started the processes then ends this one
    text = f"error: {error}\n" if expected else "".join(traceback.format_exception(error))
    mark = f"[rank {rank}] " if rank > 0 else ""
    print(textwrap.indent(text, mark), end="", file=sys.stderr, flush=True)
    code = 2 if isinstance(error, UserError) else 1
    if among_processes():
        os._exit(code)
    return code
