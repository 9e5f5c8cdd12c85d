"""What the commands share that look at trained models: options, models, batches of images, results."""

import argparse
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from analysis.models import TrainedModel, load_model, short_names
from arguments import default_workers
from cli import at_least
from datasets import build_loader
from utils import UserError, environment, prepare_output_dir, write_csv, write_json
from weights import num_heads_of, read_checkpoint


def add_checkpoint_options(parser: argparse.ArgumentParser, required: bool) -> None:
    """Options of commands that compare models."""
    add = parser.add_argument
    add("--checkpoint", action="append", required=required, metavar="FILE", help="of any format; once for each model")
    add("--name", action="append", metavar="LABEL", help="of each model, in the same order (default: by their paths)")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options that say how a checkpoint is to be read."""
    add = parser.add_argument
    add("--checkpoint-key", metavar="KEY", help="which weights of the file: ema, teacher, momentum, ...")
    add("--num-heads", type=at_least(int, 1), metavar="N", help="of a ViT whose file does not tell")
    add("--device", default="auto", metavar="NAME", help="auto (a GPU if there is one), cpu or cuda")


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """Options of commands that take many images through a model."""
    add = parser.add_argument
    workers = default_workers()
    add("--batch-size", type=at_least(int, 1), default=32, metavar="N", help="images at once (default: %(default)s)")
    add("--num-workers", type=at_least(int, 0), default=workers, metavar="N", help="loading processes")


def load_models(args: argparse.Namespace, device: torch.device, positions: str = "timm") -> list[TrainedModel]:
    """The model of every ``--checkpoint``, under names that tell them apart.

    Raises:
        UserError: see ``load_model``; names that do not; heads that one of several files tells otherwise.
    """
    names = short_names(args.checkpoint)
    if args.name:
        if len(args.name) != len(names):
            raise UserError(f"{len(args.name)} --name for {len(names)} --checkpoint; give each one or none")
        names = [name.strip() for name in args.name]
    if len(set(names)) < len(names) or "" in names:
        raise UserError(f"the models' names must be told apart, not {', '.join(map(repr, names))}; give other --name")
    models = []
    for path, name in zip(args.checkpoint, names, strict=True):
        checkpoint = read_checkpoint(path, lazily=True)
        known = num_heads_of(checkpoint, args.checkpoint_key)
        if len(names) > 1 and None not in (known, args.num_heads) and known != args.num_heads:
            raise UserError(
                f"{path} has {known} heads by its layout, and --num-heads {args.num_heads} is for all; look at it alone"
            )
        how = {"key": args.checkpoint_key, "num_heads": args.num_heads, "input_size": args.input_size}
        models.append(replace(load_model(path, device, positions=positions, **how), name=name))
    return models


def result_folders(args: argparse.Namespace, models: list[TrainedModel]) -> list[Path | None]:
    """``--out`` for one model, a folder in it for each of several; made, and tried to be written to."""
    names = [re.sub(r"[^\w.,=+-]+", "_", model.name) for model in models]
    folders = [args.out] if len(models) == 1 else [args.out and args.out / name for name in names]
    for folder in filter(None, folders):
        prepare_output_dir(folder, "--out")
    return folders


def load_batches(dataset: Dataset, args: argparse.Namespace, device: torch.device) -> DataLoader:
    """The items of a data set in their order, as batches."""
    sampler = SequentialSampler(dataset)
    return build_loader(dataset, sampler, args.batch_size, args.num_workers, pin_memory=device.type == "cuda")


def write_results(folder: Path, tables: dict[str, list[dict]], figures: dict) -> None:
    """Each table as a CSV file, and the figures, with what they depend on, as results.json."""
    for name, rows in tables.items():
        write_csv(folder / name, rows)
    write_json(folder / "results.json", figures | {"environment": environment()})
