"""Command lines: parser, argument types, argument files, and the exit code of an error."""

import argparse
import ast
import difflib
import math
import os
import re
import select
import shlex
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from utils import Processes, RunError, UserError, end_workers, in_process_group, processes_here, readable

if sys.platform == "win32":  # before the modules that need fcntl, SIGHUP or fork are imported
    print("error: Windows lacks the signals and file locks that runs need; run this command in WSL 2", file=sys.stderr)
    sys.exit(2)

EXPECTED = (UserError, RunError, OSError)
"""Errors that are reported by their message alone, without a traceback."""

MACHINE_ERRORS = (
    (
        r"out of shared memory|unable to (allocate|open|mmap|resize|write).*(shared memory|/torch_)",
        "no room in /dev/shm, through which loader workers pass their batches: enlarge it (docker run --shm-size=8g), "
        "or give fewer --num-workers; 0 needs none",
    ),
    (
        r"DataLoader worker \(pid.* (is killed by signal: \w+|exited unexpectedly)|MemoryError in DataLoader worker"
        r"|^builtins\.Connection(Reset|Refused)Error",  # killed while it handed over a batch
        "a loader worker was killed or had no memory, as the system does where memory runs out: give fewer "
        "--num-workers, or a smaller --batch-size",
    ),
    (
        r"Too many open files|received 0 items of ancdata",
        "too many open files: raise the limit, ulimit -n 65536, or give fewer --num-workers",
    ),
    (
        r"^torch\._(dynamo|inductor)\.|C compiler",
        "--compile: the network cannot be compiled; install a C++ compiler (g++), or leave --compile out",
    ),
    (
        r"MemoryError|OutOfMemoryError|out of memory|an't allocate memory|Cannot allocate memory|not enough memory"
        r"|ALLOC_FAILED",
        "out of memory: give a smaller --batch-size, which keeps --total-batch, or --grad-checkpointing",
    ),
)
"""Errors of the machine: a pattern of type and message, and the cause with its mend. The first that fits counts."""

# Options of DeiT or of earlier versions that this program does not have, and the reason.
NOT_NEEDED = {
    "--decay-epochs": "it belongs to --sched step, which was removed; use cosine or constant",
    "--decay-rate": "it belongs to --sched step and poly, which were removed; use cosine or constant",
    "--mixup-mode": "Mixup draws once for each batch; pair and elem were removed",
    "--dist-eval": "evaluation is always distributed, and counts every image once",
    "--pin-mem": "memory is pinned wherever there is a GPU",
    "--no-pin-mem": "memory is pinned wherever there is a GPU",
    "--start-epoch": "a checkpoint holds its epoch",
    "--dist-url": "the processes find each other by the environment of torchrun or srun",
    "--world-size": "the number of processes comes from the environment of torchrun or srun",
}


# Options of timm, MAE, DINO, Hugging Face and DeiT by their names there -> what to give here.
ELSEWHERE = {
    "--wd": "--weight-decay",
    "--momentum": "--opt-betas, or --opt momentum",
    "--workers": "--num-workers",
    "--n-worker": "--num-workers",
    "--dataloader-num-workers": "--num-workers",
    "--num-classes": "nothing: the classes are those of the data",
    "--nb-classes": "nothing: the classes are those of the data",
    "--accum-iter": "--total-batch, and --batch-size for what a process computes at once",
    "--grad-accum-steps": "--total-batch, and --batch-size for what a process computes at once",
    "--gradient-accumulation-steps": "--total-batch, and --batch-size for what a process computes at once",
    "--batch-size-per-gpu": "--batch-size",
    "--per-device-train-batch-size": "--batch-size",
    "--blr": "--lr, which is scaled with --total-batch",
    "--learning-rate": "--lr",
    "--clip-max-norm": "--clip-grad",
    "--max-grad-norm": "--clip-grad",
    "--img-size": "--input-size",
    "--image-size": "--input-size",
    "--data-dir": "--data-path",
    "--dataset": "--data-set",
    "--output": "--output-dir",
    "--pretrained": "--finetune timm:NAME",
    "--initial-checkpoint": "--finetune FILE",
    "--num-train-epochs": "--epochs",
    "--warmup-iters": "--warmup-epochs",
    "--use-fp16": "--amp fp16",
    "--fp16": "--amp fp16",
    "--bf16": "--amp bf16",
    "--arch": "--model",
    "--saveckp-freq": "--save-every",
    "--log-interval": "--print-every",
    "--epochs-warmup": "--warmup-epochs",
    "-b": "--batch-size",
    "-j": "--num-workers",
    "-a": "--model",
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, with similar options for a mistyped one.

    In the values of options with the metavar FILE or DIR, a leading ``~`` is the home folder: a shell leaves it as it
    is in ``--out=~/run``. Help is that of `HelpFormatter`, and options cannot be abbreviated.
    """

    def __init__(self, **settings):
        super().__init__(**{"formatter_class": HelpFormatter, "allow_abbrev": False} | settings)

    def parse_known_args(self, args=None, namespace=None):
        known, unknown = super().parse_known_args(args, namespace)
        for action in self._actions:
            if action.metavar in ("FILE", "DIR"):
                setattr(known, action.dest, _from_home(getattr(known, action.dest)))
        return known, unknown

    def error(self, message: str):
        unknown = message.removeprefix("unrecognized arguments:").split()
        if message.startswith("unrecognized") and unknown and unknown[0].startswith("-"):
            name = unknown[0].partition("=")[0]
            if name in ELSEWHERE:
                raise UserError(f"no option {name}; here it is {ELSEWHERE[name]}")
            if name in NOT_NEEDED:
                raise UserError(f"leave {name} out: {NOT_NEEDED[name]}")
            message = f"no option {name}" + nearest(name, self._option_string_actions)
        raise UserError(message)


def _from_home(value):
    """A path, a list of paths or None, with the home folder in the place of a leading ``~``."""
    if isinstance(value, list):
        return [_from_home(path) for path in value]
    return type(value)(os.path.expanduser(value)) if isinstance(value, str | Path) else value


class KeyValues(argparse.Action):
    """Words KEY=VALUE as a dict, added to the default; a value that is not a Python literal is a string, as in timm."""

    def __call__(self, parser, namespace, values, option_string=None):
        pairs = dict(parser.get_default(self.dest) or {})
        for word in values:
            key, equals, value = word.partition("=")
            if not equals:
                parser.error(f"{option_string}: {word!r} is not KEY=VALUE")
            try:
                pairs[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                pairs[key] = value
        setattr(namespace, self.dest, pairs)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the default of every switch and of every option that has one, and N for values without a metavar."""

    def _get_help_string(self, action):
        text = (action.help or "").removesuffix(" (default: %(default)s)")  # of BooleanOptionalAction in Python 3.11
        if isinstance(action.default, bool):
            return f"{text} (default: {'on' if action.default else 'off'})".strip()
        if isinstance(action.default, list | tuple):
            return f"{text} (default: {' '.join(map(str, action.default))})".strip()
        shown = "(default" not in text and repr(action.default) not in ("None", "''", "{}", repr(argparse.SUPPRESS))
        return f"{text} (default: %(default)s)".strip() if shown else text

    def _get_default_metavar_for_optional(self, action):
        return "N"


def nearest(name: str, known) -> str:
    """A hint at the names most similar to a mistyped one; empty if none is similar."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def at_least(convert, low, high=math.inf, open_low=False):
    """A type for argparse: ``convert(text)`` within bounds, else an error that states the bounds."""
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
    """Replace leading ``@file`` arguments by the file's content, and DeiT's underscores by hyphens.

    A file may itself begin with ``@file``, with a path relative to its own folder. It is UTF-8, with or without a byte
    order mark.

    Raises:
        UserError: a file cannot be read, includes itself, or follows an option.
    """
    return [_with_hyphens(word) for word in _expand(list(argv), Path(), ())]


def _expand(words: list[str], folder: Path, inside: tuple[Path, ...]) -> list[str]:
    """Expand the leading files of ``words``, relative to ``folder``; ``inside`` are the files being read."""
    expanded = []
    while words and words[0].startswith("@"):
        path = folder / os.path.expanduser(words.pop(0)[1:])
        if path.resolve() in inside:
            raise UserError(f"argument file {path} includes itself")
        try:
            content = shlex.split(path.read_text(encoding="utf-8-sig"), comments=True)
        except UnicodeDecodeError:
            raise UserError(f"argument file {path}: not UTF-8 text; save it as UTF-8") from None
        except (OSError, ValueError) as error:
            raise UserError(f"argument file {path}: {getattr(error, 'strerror', None) or error}") from None
        expanded += _expand(content, path.parent, (*inside, path.resolve()))
    late = [word for word in words if word.startswith("@")]
    if late:
        raise UserError(f"{late[0]} must come before all options (later options override it)")
    return expanded + words


def _with_hyphens(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


class Exit:
    """Turns an error of a program into one line and an exit code: ``with Exit() as end: end.code = ...``.

    The code is 130 after Ctrl-C, 2 if the user's input cannot be used, and 1 for other expected errors. An unexpected
    error propagates with its traceback; in a process group it is reported here and ends the process.

    Attributes:
        code: the exit code.
        processes: set when this process has joined a process group, which then learns why it ends.
    """

    def __init__(self):
        self.code = 0
        self.processes: Processes | None = None

    def __enter__(self) -> "Exit":
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> bool:
        if error is not None:
            end_workers()
        if isinstance(error, KeyboardInterrupt):
            self.code = 130
            if in_process_group():  # leaving it would wait for the others
                os._exit(self.code)
            return True
        if not isinstance(error, Exception):
            return False
        error = in_one_line(error)
        reported = self.processes.explain(error) if self.processes is not None else error
        if not isinstance(reported, EXPECTED) and not in_process_group():
            return False
        self.code = report_error(reported)
        return True


def in_one_line(error: Exception) -> Exception:
    """The error, or a RunError with the cause and the mend if it is one of MACHINE_ERRORS."""
    if isinstance(error, (UserError, RunError)):
        return error
    kind = type(error)
    text = f"{kind.__module__}.{kind.__qualname__}: {error}"
    for pattern, words in MACHINE_ERRORS:
        if re.search(pattern, text):
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [kind.__name__]
            cause = lines[-1 if lines[0].startswith("Caught ") else 0]  # a worker's traceback comes before its error
            # torch goes on with the memory of all processes and advice of its own
            cause = re.sub(r"(out of memory\. Tried to allocate [\d.]+ \w+)\. .*", r"\1", cause)
            known = RunError(f"{words} ({' '.join([cause, *getattr(error, '__notes__', ())])})")
            known.__cause__ = error
            return known
    return error


def leave(program: Callable[[], int]) -> NoReturn:
    """Run a program and end this process with its exit code: after an error at once, as threads may be stuck."""
    try:
        code = program()
    except Exception:
        traceback.print_exc()
        code = 1
    if code:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def exit_code(work: Callable[[], int]) -> int:
    """The result of ``work``, or the exit code of the error that ended it; see `Exit`.

    As for other Unix programs, it is no error that the reader of standard output has left (``| head``): the code is
    128 + SIGPIPE, and nothing is printed.
    """
    with Exit() as end:
        try:
            end.code = work()
            sys.stdout.flush()
        except BrokenPipeError:
            if not _reader_has_left():
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes what is left at its end
            end.code = 128 + signal.SIGPIPE
    return end.code


def _reader_has_left() -> bool:
    """Whether nothing reads standard output any more. A BrokenPipeError can also be that of another pipe."""
    pipe = select.poll()
    pipe.register(sys.stdout, 0)  # no event is asked for: an error of the pipe is reported in any case
    return bool(pipe.poll(0))


def report_error(error: Exception) -> int:
    """Print the error that ends this process to standard error; returns the exit code.

    In a process group the process exits at once: leaving the group would wait for processes that wait for this one.
    """
    expected, rank = isinstance(error, EXPECTED), 0
    with suppress(UserError):  # it may be the error that is reported
        rank, _, _ = processes_here()
    if expected and rank > 0:
        time.sleep(2)  # rank 0 usually reports the same error, and the launcher then ends this process
    text = f"error: {readable(str(error))}\n" if expected else "".join(traceback.format_exception(error))
    mark = f"[rank {rank}] " if rank > 0 else ""
    print(textwrap.indent(text, mark), end="", file=sys.stderr, flush=True)
    code = 2 if isinstance(error, UserError) else 1
    if in_process_group():
        os._exit(code)
    return code
