"""The options that segmentation and detection share: ViTDet's optimisation, and what these tasks do not have."""

import argparse

from cli import at_least
from tasks.options import add_layer_decay
from utils import UserError

_index, _positive = at_least(int, 0), at_least(float, 0, open_low=True)

DEFAULTS = {  # of shared options: the paper's for Tables 5 and 6, and ViTDet's where it is silent
    "model": "vit_small",
    "input_size": 512,
    "batch_size": 2,
    "total_batch": 8,
    "epochs": 25,
    "lr": 1e-4,
    "weight_decay": 0.1,
    "drop_path": 0.1,
    "sar_weight": 0.0,
    "sar_query": "mean",
    "warmup_epochs": 0,
}
# Shared options without a meaning for these tasks, with the only value that they may have.
WITHOUT = {
    "sched": "cosine",
    "sched_on_updates": False,
    "warmup_epochs": 0,
    "warmup_lr": 1e-6,
    "min_lr": 1e-5,
    "cooldown_epochs": 0,
    "unscale_lr": False,
    "crop_pct": None,
    "sar_query": "mean",
    "drloc_weight": 0.0,
    "log_attention": 0,
    "cache_images": False,
    "export": "",
}
BACKBONES = ("vit_base", "vit_small", "vit_tiny", "pvt_small")
"""Models that dense tasks know, each also with ``_sar``."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options that dense tasks share, and set their defaults."""
    parser.set_defaults(**DEFAULTS)
    group = parser.add_argument_group("optimisation of dense tasks")
    add = group.add_argument
    add(
        "--lr-schedule",
        choices=("steps", "poly"),
        default="steps",
        help="factor of --lr, by update: steps (ViTDet: 0.1 from 8/9, 0.01 from 26/27) or poly (mmsegmentation)",
    )
    add("--warmup-updates", type=_index, default=250, help="updates of linear warm-up from 0.001 x --lr")
    add_layer_decay(group, default=0.7)
    add("--decay-all", action="store_true", help="weight decay of biases, norms and positions, too")


def check(args: argparse.Namespace) -> None:
    """Refuse what dense tasks cannot do; see `tasks.Task.check`."""
    name = args.model.removesuffix("_sar")
    if name not in BACKBONES:
        raise UserError(f"--model {args.model}: --task {args.task} knows {', '.join(BACKBONES)}, each also with _sar")
    if name.startswith("pvt") and args.layer_decay != 1:
        raise UserError(
            f"--layer-decay {args.layer_decay:g} is for ViTs; give --layer-decay 1 with --model {args.model}"
        )
    for option, only in WITHOUT.items():
        if getattr(args, option) != only:
            raise UserError(f"--{option.replace('_', '-')} has no effect in --task {args.task}; leave it out")
