"""From the arguments of the command line to the settings of models and data sets, for every task."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from datasets import SplitSettings
from holdout import Holdout, has_checkpoint
from losses import PAIRS, max_components
from models import ModelSettings, build_model
from utils import UserError


def model_settings(args: argparse.Namespace, num_classes: int, **sizes: Any) -> ModelSettings:
    """The settings of the model that the arguments describe; ``sizes`` are a task's own, below ``--model-kwargs``."""
    return ModelSettings(
        name=args.model,
        num_classes=num_classes,
        input_size=args.input_size,
        patch_size=args.patch_size,
        last_block=args.last_block,
        similarity=args.sar_similarity,
        similarity_query=args.sar_query,
        drop=args.drop,
        drop_path=args.drop_path,
        sizes=sizes | args.model_kwargs,
    )


def split_settings(args: argparse.Namespace) -> SplitSettings:
    """The settings of the data set that the arguments describe."""
    return SplitSettings(
        name=args.data_set,
        path=args.data_path,
        seed=args.seed,
        skip_unreadable=args.skip_unreadable,
        download=args.download,
        sampling_ratio=args.sampling_ratio,
        sampling_seed=args.sampling_seed,
        pairs=PAIRS if args.drloc_weight > 0 else 0,
        task=args.task,
        holdout=holdout(args),
    )


def holdout(args: argparse.Namespace) -> Holdout | None:
    """The settings of ``--val-split``; None without the option, and to evaluate a run on another kind of data set.

    A run that goes on has chosen before, and so has the one that it resumes from. ``--eval`` looks beside the evaluated
    checkpoint.
    """
    if args.val_split is None or (args.eval and args.data_set != "folder"):
        return None
    checkpoint = args.resume or args.finetune * args.eval
    beside = [Path(checkpoint).parent] if checkpoint else []
    own = [Path(args.output_dir)] if has_checkpoint(Path(args.output_dir)) and not (args.eval and beside) else []
    return Holdout(args.val_split, args.sampling_seed, (*own, *beside), args.eval)


def build_task_model(args: argparse.Namespace, num_classes: int, device: torch.device, **sizes: Any) -> nn.Module:
    """The model that the arguments describe, on ``device``; ``sizes`` as for `model_settings`.

    Raises:
        UserError: see `models.build_model`; or the spatial entropy has a weight and the maps are of at most 2 x 2
            patches, which are one component whatever they hold.
    """
    settings = model_settings(args, num_classes, **sizes)
    model, grid = build_model(settings, device, args.seed)
    if args.sar_weight > 0 and max_components(*grid) == 1:
        raise UserError(
            f"{settings}: S has {grid[0]} x {grid[1]} patches, which are always one component, so its entropy is 0; "
            "give a larger --input-size, a smaller --patch-size, or --sar-weight 0"
        )
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    return model
