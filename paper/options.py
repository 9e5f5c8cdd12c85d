"""The command line of ``python -m paper run``, which the table scripts call, and what it comes to."""

import argparse
import math
import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from cli import HelpFormatter, Parser, at_least, expand_arguments, nearest
from launch.runs import ROOT
from launch.slurm import Cluster
from paper.tables import RUNNABLE, TABLES, rows_of
from run_with_submitit import cluster_of
from utils import UserError

# Options of some tables alone, and the word of a row that each of them is about.
OF_SOME_TABLES = {
    "--ckpt-base": "weights:base",
    "--ckpt-sar": "weights:sar",
    "--ckpt-options": "weights:base",
    "--images": "--images",
    "--count": "--count",
}

# The options were environment variables once: --ckpt-base was CKPT_BASE. (DATA, OUT, IMAGES and COUNT may well be set
# for other programs.)
OLD_VARIABLES = "SEEDS ROWS LAUNCH OVERRIDES DRY_RUN SMOKE CKPT_BASE CKPT_SAR CKPT_OPTIONS".split()


@dataclass(frozen=True)
class Settings:
    """What the command line says.

    Attributes:
        data, out: folders of the data sets and of the results; relative paths are seen from the repository.
        rows: ids of the rows to run; empty for all.
        launch: the words before main.py.
        cluster: what is asked of Slurm; None where ``launch`` starts the runs here.
        overrides: arguments behind every row's; ``overrides_path`` names their file.
        weights: name in ``tables.WEIGHTS`` -> the user's file and its options, as words.
        measuring: words behind those of every row that measures.
    """

    table: str
    data: Path
    out: Path
    seeds: list[int]
    rows: list[str]
    launch: list[str]
    cluster: Cluster | None
    overrides: list[str]
    overrides_path: str
    weights: dict[str, list[str]]
    measuring: list[str]
    dry_run: bool
    smoke: bool


# ------------------------------------------------------------------------------------------------- the parser


class _Help(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults are shown, and the lines of an epilog stay as they are."""


def build_parser(table: str) -> Parser:
    """The options of a table; what it has no use for is known, but not shown."""
    title, source = TABLES[table]["title"], TABLES[table]["source"]
    parser = Parser(
        prog=f"python -m paper run {table}",
        usage="%(prog)s [options]",
        description=f"{title}; {source}.",
        epilog=_rows_in_words(table),
        formatter_class=_Help,
        allow_abbrev=False,
    )
    _add_options(parser.add_argument)
    _add_options_of_some_tables(parser, table)
    return parser


def _add_options(add) -> None:
    sets = "imagenet/, domainnet/, imagenet-a/, imagenet-c/, VOCdevkit/ and torchvision's own folders"
    add("--data", type=from_here, metavar="DIR", help=f"holds {sets} (default: the repository's data/)")
    place = "where everything is written (default: the repository's output/, with --smoke output/smoke/)"
    add("--out", type=from_here, metavar="DIR", help=place)
    runs = "a run of each row for each (default: 0); what is measured of given weights alone, for the first"
    add("--seeds", nargs="+", type=at_least(int, 0), help=runs)
    add("--rows", nargs="+", metavar="ROW", help="only these, and what they need (default: all)")
    add(
        "--launch",
        type=words_in,
        metavar='"COMMAND"',
        help="the words before main.py (default: torchrun with all GPUs of this machine, python where there is one or "
        'none; a dry run on a machine without a GPU assumes 8), or "submitit" with run_with_submitit.py\'s options, '
        'for job arrays on a SLURM cluster: "submitit --partition gpu"',
    )
    add("--overrides", metavar="FILE", help="an argument file whose options come after every row's")
    add("--dry-run", action="store_true", help="print the plan and the commands; start and write nothing")
    add("--smoke", action="store_true", help="everything as it is, but tiny and on scanned digits: seconds a row")


def _add_options_of_some_tables(parser: Parser, table: str) -> None:
    def add(name: str, text: str, **how) -> None:
        parser.add_argument(name, help=text if has_use(table, name) else argparse.SUPPRESS, **how)

    weights = {"type": file_here, "metavar": "FILE"}
    add("--ckpt-base", "weights that you have, in place of Table 4's ViT-S/16", **weights)
    add("--ckpt-sar", "weights that you have, in place of Table 4's ViT-S/16 + SAR", **weights)
    example = 'what these files do not tell: "--num-heads 6 --checkpoint-key ema"'
    add("--ckpt-options", example, type=words_in, metavar='"OPTIONS"')
    add("--images", "a folder of images (default: imagenet/val in --data)", type=from_here, metavar="DIR")
    add("--count", "how many of these images", type=at_least(int, 1))


def has_use(table: str, option: str) -> bool:
    """Whether a row of the table has to do with this one of OF_SOME_TABLES."""
    return any(OF_SOME_TABLES[option] in row.words for row in rows_of(table))


def _rows_in_words(table: str) -> str:
    rows = TABLES[table]["rows"]
    width = max(map(len, rows))
    values = {name: "" if row["value"] is None else f" ({row['value']} in the paper)" for name, row in rows.items()}
    return "\n".join(["rows:", *(f"  {name:<{width}}  {row['name']}{values[name]}" for name, row in rows.items())])


# -------------------------------------------------------------------------------------------- types of values


def from_here(text: str) -> Path:
    """A path as typed in the current folder, as the repository's folder sees it: relative in it, absolute elsewhere."""
    path = Path(os.path.abspath(Path(text).expanduser()))
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def file_here(text: str) -> Path:
    """`from_here` for a file that must be there."""
    if not Path(text).expanduser().is_file():
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return from_here(text)


def words_in(text: str) -> list[str]:
    """A command line in one word of the shell's."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


def a_table(text: str) -> str:
    """The name of one of the RUNNABLE tables."""
    if text not in RUNNABLE:
        meant = nearest(text, RUNNABLE) or f"; there are {', '.join(RUNNABLE)}"
        raise argparse.ArgumentTypeError(f"no table {text}{meant}")
    return text


# ------------------------------------------------------------------------------------------------ the settings


def read_settings(argv: list[str]) -> Settings:
    """What ``TABLE [options]`` says; paths in it are seen from the current folder.

    Raises:
        UserError: a word that is not understood, options that exclude each other or that the table has no use for.
    """
    table = read_table(argv[:1])
    args = build_parser(table).parse_args(_with_equals_sign(argv[1:]))
    refuse_useless(table, args)
    overrides = read_overrides(args.overrides) if args.overrides else []
    launch = launch_words(args.launch, elsewhere=args.dry_run and not (overrides or args.smoke))
    out = args.out or Path("output/smoke" if args.smoke else "output")
    given = {"base": args.ckpt_base, "sar": args.ckpt_sar}
    return Settings(
        table=table,
        data=out / "toy_data" if args.smoke else args.data or Path("data"),
        out=out,
        seeds=list(dict.fromkeys(args.seeds or [0])),
        rows=args.rows or [],
        launch=launch,
        cluster=read_cluster(launch),
        overrides=overrides,
        overrides_path=args.overrides,
        weights={name: [str(path), *(args.ckpt_options or [])] for name, path in given.items() if path},
        measuring=measuring_words(table, args),
        dry_run=args.dry_run,
        smoke=args.smoke,
    )


def read_table(words: list[str]) -> str:
    """The table that the first word names."""
    parser = Parser(
        prog="python -m paper run",
        usage="%(prog)s TABLE [options]",
        description="Run the rows of a table: plan, check, start what is not finished, print the report. "
        "TABLE --help lists its options and rows.",
        epilog="tables:\n" + "\n".join(f"  {name:<10}  {TABLES[name]['title']}" for name in RUNNABLE),
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("table", type=a_table, metavar="TABLE", help="one of those below; it comes first")
    return parser.parse_args(words).table


def measuring_words(table: str, args: argparse.Namespace) -> list[str]:
    """Words behind those of every row of the table that measures."""
    words = shlex.split(TABLES[table].get("smoke", "")) if args.smoke else []
    for name in ("images", "count"):
        if (value := getattr(args, name)) is not None:
            words += [f"--{name}", str(value)]
    return words


def _with_equals_sign(argv: list[str]) -> list[str]:
    """``--ckpt-options=WORDS`` for ``--ckpt-options WORDS``: argparse would take ``--num-heads=6`` for an option."""
    words = []
    for word in argv:
        if words and words[-1] == "--ckpt-options":
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def refuse_useless(table: str, args: argparse.Namespace) -> None:
    """Raises UserError for an option that would change nothing."""
    for option in OF_SOME_TABLES:
        if getattr(args, option.removeprefix("--").replace("-", "_")) is not None and not has_use(table, option):
            users = ", ".join(name for name in RUNNABLE if has_use(name, option))
            raise UserError(
                f"leave {option} out: {table} has no use for it ({users} {'have' if ',' in users else 'has'})"
            )
    if args.ckpt_options is not None and not (args.ckpt_base or args.ckpt_sar):
        raise UserError("--ckpt-options is about given weights: give --ckpt-base or --ckpt-sar, or leave it out")
    if args.smoke and args.overrides:
        raise UserError("--smoke is --overrides recipes/smoke.args; leave one of the two out")
    if args.smoke and args.data:
        raise UserError("--smoke makes its own data; leave --data out")


def refuse_old_variables(environ: Mapping[str, str]) -> None:
    """Raises UserError for a variable that an option has taken the place of: nothing that is said goes unheard."""
    for name in OLD_VARIABLES:
        if environ.get(name):
            option = f"--{name.lower().replace('_', '-')}"
            raise UserError(f"the environment variable {name} is not read any more: unset it, and say it with {option}")


# ---------------------------------------------------------------------------------- launcher and overrides


def launch_words(words: list[str] | None, elsewhere: bool = False) -> list[str]:
    """The words before main.py. ``python`` and ``torchrun`` are those of the environment that runs this.

    Args:
        words: as given; None for what suits this machine.
        elsewhere: the runs are meant for the hardware that the hours are told for, if there is no GPU here.
    """
    gpus = torch.cuda.device_count() or (8 if elsewhere else 0)
    first, *others = words or (["torchrun", f"--nproc_per_node={gpus}"] if gpus > 1 else ["python"])
    own = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    return own.get(first, [os.path.abspath(first) if os.sep in first else first]) + others


def read_cluster(launch: list[str]) -> Cluster | None:
    """What is asked of Slurm; None where these words start the runs here."""
    if launch[0] != "submitit":
        return None
    try:
        return cluster_of(launch[1:])
    except UserError as error:
        raise UserError(f"--launch {shlex.quote(shlex.join(launch))}: {error}") from None


def world_size(launch: list[str]) -> int | None:
    """How many processes these words start; None where they do not say it as plain numbers."""
    if launch[0] == sys.executable and "-m" not in launch:
        return 1
    said = dict(re.findall(r"--(nproc|nnodes)(?:[-_]per[-_]node)?[= ](\S+)", " ".join(launch)))
    numbers = (said.get("nproc", ""), said.get("nnodes", "1"))
    return math.prod(map(int, numbers)) if all(number.isdecimal() for number in numbers) else None


def read_overrides(path: str) -> list[str]:
    """The words of an argument file, which leaves to this command line what that says."""
    try:
        words = expand_arguments([f"@{path}"])
    except UserError as error:
        raise UserError(f"--overrides {path}: {error}") from None
    for option, mine in (("--seed", "--seeds"), ("--output-dir", "--out")):
        if option in [word.partition("=")[0] for word in words]:
            raise UserError(f"--overrides {path}: leave {option} out and say it with {mine}")
    return words
