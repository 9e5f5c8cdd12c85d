"""The options of ``--task moco``: MoCo-v3's names, and the values of its ViT-S recipe (facebookresearch/moco-v3)."""

import argparse

from cli import at_least
from tasks.options import check_self_supervised
from utils import UserError

_count, _fraction, _positive = at_least(int, 1), at_least(float, 0, 1), at_least(float, 0, open_low=True)

DEFAULTS = {  # of shared options; the README's recipe of ViT-S: 1024 images on the 8 GPUs of a machine
    "model": "vit_small",
    "batch_size": 128,
    "total_batch": 1024,
    "epochs": 300,
    "lr": 1.5e-4,
    "warmup_epochs": 40,
    "warmup_lr": 0.0,
    "min_lr": 0.0,
    "sched_on_updates": True,
    "weight_decay": 0.1,
    "drop_path": 0.0,
}


def add(parser: argparse.ArgumentParser) -> None:
    """See `tasks.Task.add_options`."""
    parser.set_defaults(**DEFAULTS)
    add = parser.add_argument_group("MoCo-v3").add_argument
    area = at_least(float, 0, 1, open_low=True)
    add("--crop-min", type=area, default=0.08, help="smallest area of a crop, as a fraction of the image")
    add("--moco-dim", type=_count, default=256, help="width of queries and keys")
    add("--moco-mlp-dim", type=_count, default=4096, help="width of the hidden layers of projectors and predictor")
    add("--moco-m", type=_fraction, default=0.99, help="momentum of the momentum encoder, at the start")
    add(
        "--moco-m-cos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let the momentum rise to 1 by half a cosine; the official code does so only on request, its recipes do",
    )
    add(
        "--moco-t",
        type=_positive,
        default=0.2,
        help="temperature T of the contrastive loss; 0.2 is that of the official recipes, 1.0 that of the code",
    )
    add(
        "--stop-grad-conv1",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the patch embedding as it was drawn; the official code does so only on request, its ViT recipes do",
    )


def check(args: argparse.Namespace) -> None:
    """See `tasks.Task.check`."""
    check_self_supervised(args)
    width = args.model_kwargs.get("embed_dim", 4)
    if width % 4:
        raise UserError(f"--model-kwargs embed_dim={width}: MoCo-v3's positions need a multiple of 4")


def against_accumulation(args: argparse.Namespace) -> str:
    """See `tasks.Task.against_accumulation`."""
    return "MoCo-v3 contrasts the images of one forward pass and normalises over them"
