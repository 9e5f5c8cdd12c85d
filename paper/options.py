"""The command line of ``python -m paper run``, which the table scripts call, parsed into `Settings`."""

import argparse
import math
import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cli import Parser, at_least, expand_arguments, nearest
from fetch import is_name
from launch.runs import ROOT
from launch.slurm import Cluster
from paper.tables import RUNNABLE, TABLES, table_rows
from run_with_submitit import parse_cluster
from utils import UserError, gpu_count

# Options that only some tables have -> the words in the rows that the option changes.
TABLE_SPECIFIC_OPTIONS = {
    "--ckpt-base": ("weights:base", "weights:pvt_base"),
    "--ckpt-sar": ("weights:sar", "weights:pvt_sar"),
    "--ckpt-options": ("weights:base", "weights:pvt_base"),
    "--images": ("--images",),
    "--count": ("--count",),
}

# Environment variables of earlier versions, replaced by options (CKPT_BASE by --ckpt-base). DATA, OUT, IMAGES and COUNT
# are not in the list, as other programs may use them.
REMOVED_VARIABLES = "SEEDS ROWS LAUNCH OVERRIDES DRY_RUN SMOKE CKPT_BASE CKPT_SAR CKPT_OPTIONS".split()


@dataclass(frozen=True)
class Settings:
    """The parsed command line.

    Attributes:
        table: name of the table.
        data, out: folders of the data sets and of the results; relative paths are relative to the repository.
        seeds: one run of each row per seed.
        rows: ids of the rows to run; empty for all.
        launch: the command before ``main.py``.
        cluster: resources to request from Slurm; None if ``launch`` starts the runs on this machine.
        overrides: main.py arguments appended to every row's; ``overrides_path`` is their file.
        weights: name in ``tables.WEIGHTS`` -> the user's file and its options, as words.
        measurement_words: words appended to the command line of every measuring row.
        dry_run: print the plan and the commands only.
        smoke: tiny runs on toy data.
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
    measurement_words: list[str]
    dry_run: bool
    smoke: bool

    @property
    def processes(self) -> int | None:
        """Number of processes of a run; None if the launch command does not give it in plain numbers."""
        return self.cluster.processes if self.cluster else world_size(self.launch)


# ------------------------------------------------------------------------------------------------- the parser


def build_parser(table: str) -> Parser:
    """The parser of a table's options; options of other tables are parsed too, but not shown in --help."""
    title, source = TABLES[table]["title"], TABLES[table]["source"]
    parser = Parser(
        prog=f"python -m paper run {table}",
        usage="%(prog)s [options]",
        description=f"{title}; {source}.\n\n    python -m paper run {table} --data /data --seeds 0 1 2",
        epilog=_format_rows(table),
    )
    _add_options(parser.add_argument)
    _add_table_specific_options(parser, table)
    return parser


def _add_options(add) -> None:
    sets = (
        "imagenet/, domainnet/, imagenet-a/, imagenet-c/, VOCdevkit/, ADEChallengeData2016/ and torchvision's folders"
    )
    add(
        "--data",
        type=path_from_here,
        metavar="DIR",
        help=f"folder with {sets} (default: data/ in the repository)",
    )
    add(
        "--out",
        type=path_from_here,
        metavar="DIR",
        help="output folder (default: output/ in the repository, with --smoke output/smoke/)",
    )
    add(
        "--seeds",
        nargs="+",
        type=at_least(int, 0),
        help="one run of each row per seed (default: 0); measurements of given weights run for the first seed only",
    )
    add("--rows", nargs="+", metavar="ROW", help="run only these rows and the runs they depend on (default: all)")
    add(
        "--launch",
        type=split_words,
        metavar='"COMMAND"',
        help='command before main.py, or "submitit" with the options of run_with_submitit.py for job arrays on a SLURM '
        'cluster: "submitit --partition gpu" (default: torchrun on all GPUs of this machine, or python with at most '
        "one GPU; a dry run on a machine without a GPU assumes 8)",
    )
    add("--overrides", metavar="FILE", help="argument file with options of main.py, appended to every row's")
    add("--dry-run", action="store_true", help="print the plan and the commands; start and write nothing")
    add("--smoke", action="store_true", help="test the pipeline with tiny runs on scanned digits; seconds per row")


def _add_table_specific_options(parser: Parser, table: str) -> None:
    def add(name: str, text: str, **how) -> None:
        parser.add_argument(name, help=text if uses_option(table, name) else argparse.SUPPRESS, **how)

    weights = {"type": weights_here, "metavar": "FILE"}
    add("--ckpt-base", "ImageNet-1K weights to use instead of this program's without SAR", **weights)
    add("--ckpt-sar", "ImageNet-1K weights to use instead of this program's with SAR", **weights)
    example = 'options for reading the given checkpoints: "--num-heads 6 --checkpoint-key ema"'
    add("--ckpt-options", example, type=split_words, metavar='"OPTIONS"')
    add("--images", "folder of images (default: imagenet/val in --data)", type=path_from_here, metavar="DIR")
    add("--count", "number of these images to draw", type=at_least(int, 1))


def uses_option(table: str, option: str) -> bool:
    """Whether one of TABLE_SPECIFIC_OPTIONS changes a row of the table."""
    return any(word in row.words for row in table_rows(table) for word in TABLE_SPECIFIC_OPTIONS[option])


def _format_rows(table: str) -> str:
    rows = TABLES[table]["rows"]
    width = max(map(len, rows))
    values = {name: "" if row["value"] is None else f" ({row['value']} in the paper)" for name, row in rows.items()}
    return "\n".join(["rows:", *(f"  {name:<{width}}  {row['name']}{values[name]}" for name, row in rows.items())])


# -------------------------------------------------------------------------------------------- types of values


def path_from_here(text: str) -> Path:
    """A path given relative to the current folder: relative to the repository if inside it, else absolute."""
    path = Path(os.path.abspath(Path(text).expanduser()))
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def existing_file(text: str) -> Path:
    """`path_from_here` for a file that must exist."""
    if not Path(text).expanduser().is_file():
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return path_from_here(text)


def weights_here(text: str) -> str:
    """The path of an `existing_file` of weights, or their name; what it names is fetched."""
    if not is_name(text):
        return str(existing_file(text))
    from weights import weights_file  # imports torch

    weights_file(text)
    return text


def split_words(text: str) -> list[str]:
    """Split a quoted command line into words, as a shell does."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


def table_name(text: str) -> str:
    """Check the name of one of the RUNNABLE tables; suggest the nearest one."""
    if text not in RUNNABLE:
        suggestion = nearest(text, RUNNABLE) or f"; there are {', '.join(RUNNABLE)}"
        raise argparse.ArgumentTypeError(f"no table {text}{suggestion}")
    return text


# ------------------------------------------------------------------------------------------------ the settings


def read_settings(argv: list[str]) -> Settings:
    """Parse ``TABLE [options]``; paths are relative to the current folder.

    Raises:
        UserError: an unknown option, options that exclude each other, or one that the table does not use.
    """
    table = parse_table_name(argv[:1])
    args = build_parser(table).parse_args(_join_ckpt_options(argv[1:]))
    check_options(table, args)
    overrides = read_overrides(args.overrides) if args.overrides else []
    launch = launch_words(args.launch, paper_hardware=args.dry_run and not (overrides or args.smoke))
    out = args.out or Path("output/smoke" if args.smoke else "output")
    given = dict.fromkeys(TABLE_SPECIFIC_OPTIONS["--ckpt-base"], args.ckpt_base)
    given |= dict.fromkeys(TABLE_SPECIFIC_OPTIONS["--ckpt-sar"], args.ckpt_sar)
    return Settings(
        table=table,
        data=out / "toy_data" if args.smoke else args.data or Path("data"),
        out=out,
        seeds=list(dict.fromkeys(args.seeds or [0])),
        rows=args.rows or [],
        launch=launch,
        cluster=cluster_from_launch(launch),
        overrides=overrides,
        overrides_path=args.overrides,
        weights={
            word.removeprefix("weights:"): [file, *(args.ckpt_options or [])] for word, file in given.items() if file
        },
        measurement_words=measurement_words(table, args),
        dry_run=args.dry_run,
        smoke=args.smoke,
    )


def parse_table_name(words: list[str]) -> str:
    """Parse the first word, the name of a table."""
    parser = Parser(
        prog="python -m paper run",
        usage="%(prog)s TABLE [options]",
        description="Run the rows of a table: plan, check, execute what is not finished, print the report. "
        "TABLE --help lists its options and rows.",
        epilog="tables:\n" + "\n".join(f"  {name:<10}  {TABLES[name]['title']}" for name in RUNNABLE),
    )
    parser.add_argument("table", type=table_name, metavar="TABLE", help="one of the tables below; it comes first")
    return parser.parse_args(words).table


def measurement_words(table: str, args: argparse.Namespace) -> list[str]:
    """The words to append to the command line of every measuring row of the table."""
    words = shlex.split(TABLES[table].get("smoke", "")) if args.smoke else []
    for name in ("images", "count"):
        if (value := getattr(args, name)) is not None:
            words += [f"--{name}", str(value)]
    return words


def _join_ckpt_options(argv: list[str]) -> list[str]:
    """Join ``--ckpt-options`` and its value by "="; argparse would read the value ``--num-heads=6`` as an option."""
    words = []
    for word in argv:
        if words and words[-1] == "--ckpt-options":
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def check_options(table: str, args: argparse.Namespace) -> None:
    """Raise UserError for options that the table does not use or that exclude each other."""
    for option in TABLE_SPECIFIC_OPTIONS:
        if getattr(args, option.removeprefix("--").replace("-", "_")) is not None and not uses_option(table, option):
            users = ", ".join(name for name in RUNNABLE if uses_option(name, option))
            raise UserError(f"leave {option} out: {table} does not use it ({users} {'do' if ',' in users else 'does'})")
    if args.ckpt_options is not None and not (args.ckpt_base or args.ckpt_sar):
        raise UserError("--ckpt-options needs --ckpt-base or --ckpt-sar; give one of them, or leave it out")
    if args.smoke and args.overrides:
        raise UserError("--smoke already sets --overrides recipes/smoke.args; leave one of the two out")
    if args.smoke and args.data:
        raise UserError("--smoke generates its own data; leave --data out")


def check_removed_variables(environ: Mapping[str, str]) -> None:
    """Raise UserError for an environment variable that an option has replaced, so that it is not silently ignored."""
    for name in REMOVED_VARIABLES:
        if environ.get(name):
            option = f"--{name.lower().replace('_', '-')}"
            raise UserError(f"the environment variable {name} is no longer read; unset it and use {option}")


# ---------------------------------------------------------------------------------- launcher and overrides


def launch_words(words: list[str] | None, paper_hardware: bool = False) -> list[str]:
    """The command before main.py, with ``python`` and ``torchrun`` of the running Python environment.

    Args:
        words: from --launch; None for torchrun on all GPUs of this machine, or python with at most one.
        paper_hardware: assume the paper's 8 GPUs if this machine has none (dry runs).
    """
    gpus = gpu_count() or (8 if paper_hardware else 0)
    first, *others = words or (["torchrun", f"--nproc_per_node={gpus}"] if gpus > 1 else ["python"])
    own = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    return own.get(first, [os.path.abspath(first) if os.sep in first else first]) + others


def cluster_from_launch(launch: list[str]) -> Cluster | None:
    """The resources to request from Slurm; None if the words of --launch start the runs on this machine."""
    if launch[0] != "submitit":
        return None
    try:
        return parse_cluster(launch[1:])
    except UserError as error:
        raise UserError(f"--launch {shlex.quote(shlex.join(launch))}: {error}") from None


def world_size(launch: list[str]) -> int | None:
    """Number of processes that a launch command starts; None if it does not give it in plain numbers."""
    if launch[0] == sys.executable and "-m" not in launch:
        return 1
    counts = dict(re.findall(r"--(nproc|nnodes)(?:[-_]per[-_]node)?[= ](\S+)", " ".join(launch)))
    numbers = (counts.get("nproc", ""), counts.get("nnodes", "1"))
    return math.prod(map(int, numbers)) if all(number.isdecimal() for number in numbers) else None


def read_overrides(path: str) -> list[str]:
    """The words of an argument file for main.py.

    Raises:
        UserError: no such file, or it sets the seed or the output folder.
    """
    try:
        words = expand_arguments([f"@{path}"])
    except UserError as error:
        raise UserError(f"--overrides {path}: {error}") from None
    for option, replacement in (("--seed", "--seeds"), ("--output-dir", "--out")):
        if option in [word.partition("=")[0] for word in words]:
            raise UserError(f"--overrides {path}: leave {option} out and use {replacement}")
    return words
