"""Shared parts of the analysis commands: options, loading of models and images, writing of results."""

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, SequentialSampler

from analysis.models import TrainedModel, load_model, short_names
from arguments import default_workers
from cli import at_least
from datasets import build_loader
from utils import UserError, environment, prepare_output_dir, write_csv, write_json
from weights import num_heads_of, read_checkpoint


def add_checkpoint_options(parser: argparse.ArgumentParser, required: bool) -> None:
    """Add the options of commands that compare models."""
    add = parser.add_argument
    add(
        "--checkpoint",
        action="append",
        required=required,
        metavar="FILE",
        help="checkpoint of any supported format, or its name (hf-hub:, timm:, https://); repeat it for more models",
    )
    add(
        "--name",
        action="append",
        metavar="LABEL",
        help="name of each model, in the same order (default: from the paths)",
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for reading a checkpoint of any program."""
    add = parser.add_argument
    add("--num-heads", type=at_least(int, 1), metavar="N", help="number of heads of a ViT whose file does not give it")
    add_device_options(parser)


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that read a checkpoint of this program."""
    add = parser.add_argument
    add("--checkpoint-key", metavar="KEY", help="which weights of the file to use: ema, teacher, momentum, ...")
    add(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto (a CUDA GPU if there is one, else the CPU), cpu, cuda, cuda:0 or mps (Apple)",
    )


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that evaluate models on many images."""
    add = parser.add_argument
    workers = default_workers()
    add("--batch-size", type=at_least(int, 1), default=32, metavar="N", help="images per batch (default: %(default)s)")
    add("--num-workers", type=at_least(int, 0), default=workers, metavar="N", help="loading processes")


def load_models(args: argparse.Namespace, device: torch.device, positions: str = "timm") -> list[TrainedModel]:
    """The model of every ``--checkpoint``, under distinct names.

    Args:
        args: with the options above and ``input_size``.
        device: to load the models on.
        positions: see ``load_model``.
    Raises:
        UserError: see ``load_model``; equal names; several files of which one contradicts --num-heads.
    """
    # 1. distinct names
    names = short_names(args.checkpoint)
    if args.name:
        if len(args.name) != len(names):
            raise UserError(f"{len(args.name)} --name for {len(names)} --checkpoint; name all of them or none")
        names = [name.strip() for name in args.name]
    if len(set(names)) < len(names) or "" in names:
        raise UserError(f"the models need distinct names, not {', '.join(map(repr, names))}; change --name")
    # 2. load each; --num-heads holds for all, so it must not contradict one of several files
    models = []
    for path, name in zip(args.checkpoint, names, strict=True):
        checkpoint = read_checkpoint(path, lazily=True)
        known = num_heads_of(checkpoint, args.checkpoint_key)
        if len(names) > 1 and None not in (known, args.num_heads) and known != args.num_heads:
            raise UserError(
                f"{path} has {known} heads by its layout, but --num-heads {args.num_heads} is for all; analyse it alone"
            )
        options = {"key": args.checkpoint_key, "num_heads": args.num_heads, "input_size": args.input_size}
        models.append(replace(load_model(path, device, positions=positions, **options), name=name))
    return models


def result_folders(args: argparse.Namespace, models: list[TrainedModel]) -> list[Path | None]:
    """Create the output folder of each model: --out for a single model, one subfolder each for several."""
    names = [re.sub(r"[^\w.,=+-]+", "_", model.name) for model in models]
    folders = [args.out] if len(models) == 1 else [args.out and args.out / name for name in names]
    for folder in filter(None, folders):
        prepare_output_dir(folder, "--out")
    return folders


def load_batches(dataset: Any, args: argparse.Namespace, device: torch.device) -> DataLoader:
    """A loader of a data set's items in order, in batches of --batch-size."""
    sampler: Any = SequentialSampler(dataset)
    return build_loader(dataset, sampler, args.batch_size, args.num_workers, pin_memory=device.type == "cuda")


def remove_pages(folder: Path, kind: str, first: int) -> None:
    """Remove ``<kind>-<number>.png`` from number ``first`` on, which an earlier call with more images has left."""
    while (leftover := folder / f"{kind}-{first}.png").exists():
        leftover.unlink()
        first += 1


def write_results(folder: Path, tables: dict[str, list[dict]], figures: dict) -> None:
    """Write each table as a CSV file, and the figures and the software environment as results.json."""
    for name, rows in tables.items():
        write_csv(folder / name, rows)
    write_json(folder / "results.json", figures | {"environment": environment()})
