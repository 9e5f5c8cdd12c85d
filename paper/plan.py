"""What the rows of a table come to: their runs, how far each is, and what the rest costs at the paper's hardware."""

import argparse
import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path

from arguments import parse_arguments
from cli import expand_arguments
from datasets import DATASETS
from launch.runs import Point
from models import MODELS
from paper.options import Settings
from paper.tables import RUNS, WEIGHTS, Row, rows_of
from utils import UserError

# What a run costs at the paper's hardware is an estimate: DeiT's paper has (from memory) 53 hours for ViT-B, 300
# epochs of 1,281,167 images, on a node of 8 V100; other sizes and architectures are scaled by their GFLOPs an image at
# 224 px (T2T-ViT's from memory; the paper has that of the variant with transformers).
GFLOPS = {"vit_tiny": 1.3, "vit_small": 4.6, "vit_base": 17.6, "t2t_vit_14": 4.8, "pvt_small": 3.8, "cvt_13": 4.5}
VIT_BASE_IMAGES_AN_HOUR = 300 * 1_281_167 / 53


@dataclass(frozen=True)
class Job(Point):
    """One seed of a row; ``protocol`` is what its words come to without --overrides and --smoke."""

    row: Row
    seed: int
    protocol: argparse.Namespace

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(name_of(run, self.seed) for run in sorted(set(self.row.needs())))


@dataclass(frozen=True)
class Measurement:
    """One seed of a row that measures; ``words`` follow ``python -m``, and ``folder`` gets what comes of it."""

    row: Row
    seed: int
    words: list[str]
    folder: Path

    @property
    def lock(self) -> Path:
        """Held by the script that measures."""
        return self.folder / "launcher.lock"

    @property
    def measured(self) -> bool:
        """Whether it was done, of the files that are there now."""
        return self.noted("measured.json")

    def noted(self, name: str) -> bool:
        """Whether the file ``name`` in its folder has the state of now."""
        try:
            return saved(self.folder / name) == self.state()
        except OSError:  # a checkpoint is not there yet, or not any more
            return False

    @property
    def partial(self) -> bool:
        """Whether its results are over less than the data set (``instead``), so that more of it may come."""
        return "instead" in (saved(self.folder / "results.json") or {})

    def state(self) -> dict:
        """What it measures: the row's words, wherever data and runs lie, and the size and time of each checkpoint."""
        stats = [os.stat(path) for path in self.checkpoints()]
        return {"words": self.row.words, "checkpoints": [[stat.st_size, stat.st_mtime_ns] for stat in stats]}

    def checkpoints(self) -> list[str]:
        return [path for option, path in itertools.pairwise(self.words) if option == "--checkpoint"]

    def given(self) -> list[str]:
        """Those of its checkpoints that no run of ours writes."""
        return [path for path in self.checkpoints() if path in self.row.words]

    def __str__(self) -> str:
        return name_of(self.row.run, self.seed)


def name_of(run: str, seed: int) -> str:
    """One seed of a run, for people."""
    return f"{run}, seed {seed}"


def saved(path: Path) -> dict | None:
    """The content of a JSON file; None where none can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def choose(settings: Settings) -> list[Row]:
    """The rows that are asked for, after the runs that they need.

    Raises:
        UserError: the table has no such row.
    """
    rows = rows_of(settings.table)
    known = [row.name for row in rows]
    unknown = [name for name in settings.rows if name not in known]
    if unknown:
        raise UserError(f"--rows: no row {', '.join(unknown)}; this table has {' '.join(known)}")
    chosen = [with_weights(row, settings) for row in rows if row.name in (settings.rows or known)]
    needed = dict.fromkeys(run for row in chosen for run in row.needs())
    return [*(Row("-", run, RUNS[run]) for run in needed), *chosen]


def with_weights(row: Row, settings: Settings) -> Row:
    """The row with a path for ``weights:<name>``, and behind its words what is said of all that is measured.

    What goes on from given weights is another run than what goes on from those of our runs.
    """
    words, given = [], ""
    for word in row.words:
        kind, _, name = word.partition(":")
        if kind != "weights":
            words.append(word)
        elif name in settings.weights:
            words, given = words + settings.weights[name], "_given"
        else:
            words.append(WEIGHTS[name])
    protocol, _, name = row.run.partition("/")
    return Row(row.name, f"{protocol}{given}/{name}", words + settings.measuring * row.measures)


def plan_measurements(settings: Settings, rows: list[Row]) -> list[Measurement]:
    """What the rows measure, a whole table of one seed after the other; of given weights alone, once."""
    measurements = []
    for seed in settings.seeds:
        for row in filter(lambda row: row.measures and (row.needs() or seed == settings.seeds[0]), rows):
            folder = settings.out / "runs" / row.run / f"seed{seed}"
            words = [locate(word, settings, seed) for word in row.words]
            measurements.append(Measurement(row, seed, [*words, "--out", str(folder)], folder))
    return measurements


def plan(settings: Settings, rows: list[Row]) -> list[Job]:
    """All runs of the rows, parsed as main.py will; a whole table of one seed after the other.

    Raises:
        UserError: see ``parse_arguments``.
    """
    jobs, weights = [], {}
    for seed in settings.seeds:
        for row in itertools.filterfalse(lambda row: row.measures, rows):
            folder = settings.out / "runs" / row.run / f"seed{seed}"
            words = [locate(word, settings, seed) for word in row.words]
            protocol = args = resolve(words, weights)
            if more := smoke_of(args.model) if settings.smoke else settings.overrides:
                words += more
                try:
                    args = resolve(words, weights)
                except UserError as error:
                    raise UserError(f"--overrides {settings.overrides_path}: {error}") from None
            last = {"seed": seed, "output_dir": str(folder)}
            data_set = DATASETS[args.data_set]
            if data_set.layout and args.data_path is None:
                last["data_path"] = str(settings.data / data_set.folder)
            for name, value in last.items():
                words += [f"--{name.replace('_', '-')}", str(value)]
            args = argparse.Namespace(**vars(args) | last)
            weights[str(folder / "checkpoint.pth")] = args.last_block
            jobs.append(Job(name_of(row.run, seed), words, args, row, seed, protocol))
    return jobs


def smoke_of(model: str) -> list[str]:
    """--smoke's arguments for a model: those of its family, if it has its own."""
    own = Path(f"recipes/smoke_{model.split('_')[0]}.args")
    return expand_arguments([f"@{own if own.exists() else 'recipes/smoke.args'}"])


def locate(word: str, settings: Settings, seed: int) -> str:
    """``run:<run>/<file>`` and ``data:<path below --data>`` as paths; any other word as it is."""
    kind, _, place = word.partition(":")
    if kind == "data":
        return str(settings.data / place)
    if kind == "run":
        run, _, file = place.rpartition("/")
        return str(settings.out / "runs" / run / f"seed{seed}" / file)
    return word


def resolve(words: list[str], weights: dict[str, str]) -> argparse.Namespace:
    """What main.py will make of ``words``, although a run before may still have to write the weights they name.

    Args:
        words: an argument list.
        weights: the last block of each file that a run before writes; fine-tuning follows it (appendix E.4).
    """
    at = words.index("--finetune") if "--finetune" in words else None
    if at is None or words[at + 1] not in weights:
        return parse_arguments(words)
    args = parse_arguments(words[:at] + words[at + 2 :])
    args.finetune = words[at + 1]
    if "--last-block" not in words:
        args.last_block = weights[args.finetune]
    return args


def images(args: argparse.Namespace) -> int | None:
    """Training images of an epoch; None for a data set of unknown size."""
    known = DATASETS[args.data_set].images.get("train")
    return None if known is None else round(known * args.sampling_ratio)


def hours(args: argparse.Namespace, epochs: int) -> float | None:
    """Hours on 8 x V100 32 GB; None but for the paper's models at 224 px and data of known size."""
    plain = args.model.removesuffix("_sar")
    own = (args.input_size, args.patch_size) == (224, MODELS[args.model].patch_size)
    if images(args) is None or args.model_kwargs or not own or plain not in GFLOPS:
        return None
    scale = GFLOPS[plain] / GFLOPS["vit_base"]
    return epochs * images(args) * scale / VIT_BASE_IMAGES_AN_HOUR


def in_words(number: float | None) -> str:
    """Hours as they deserve to be read."""
    if number is None:
        return ""
    return "under 0.1 hours" if number < 0.1 else f"about {number:.{1 if number < 10 else 0}f} hours"
