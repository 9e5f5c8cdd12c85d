"""The options of ``--task dino``: DINO's names and default values (facebookresearch/dino, ``main_dino.py``)."""

import argparse

from cli import at_least
from tasks.options import check_self_supervised
from utils import UserError

_count, _index, _fraction = at_least(int, 1), at_least(int, 0), at_least(float, 0, 1)
_positive, _size = at_least(float, 0, open_low=True), at_least(float, 0)

DEFAULTS = {  # of shared options; 512 images are the README's 8 GPUs with 64 each
    "model": "vit_small",
    "batch_size": 64,
    "total_batch": 512,
    "epochs": 100,
    "lr": 5e-4,
    "warmup_epochs": 10,
    "warmup_lr": 0.0,
    "min_lr": 1e-6,
    "sched_on_updates": True,
    "weight_decay": 0.04,
    "clip_grad": 3.0,
}


def add(parser: argparse.ArgumentParser) -> None:
    """See `tasks.Task.add_options`."""
    parser.set_defaults(**DEFAULTS)
    _add_views(parser)
    _add_method(parser)


def _add_views(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("views of DINO").add_argument
    scale = {"type": _fraction, "nargs": 2}
    add("--global-crops-scale", **scale, default=[0.4, 1.0], help="range of the area of both global crops")
    add("--local-crops-number", type=_index, default=8, help="number of local crops; 0: none")
    add("--local-crops-scale", **scale, default=[0.05, 0.4], help="range of the area of the local crops")
    add(
        "--local-crops-size",
        type=_count,
        default=None,
        metavar="PX",
        help="side of the local crops (default: 3/7 of --input-size in whole patches: 96 of 224 px)",
    )
    add(
        "--sar-views",
        choices=("global", "all"),
        default="global",
        help="crops whose similarity maps enter the loss: the student's two global ones, or all",
    )


def _add_method(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("DINO").add_argument
    add("--out-dim", type=_count, default=65536, help="number of prototypes K; fewer for small sets")
    add(
        "--norm-last-layer",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the norm of each prototype at 1",
    )
    add("--use-bn-in-head", action="store_true", help="batch normalisation in the projection heads")
    add("--momentum-teacher", type=_fraction, default=0.996, help="teacher's momentum at the start; it rises to 1")
    add("--warmup-teacher-temp", type=_positive, default=0.04, help="teacher's temperature in the first epoch")
    add("--teacher-temp", type=_positive, default=0.04, help="teacher's temperature after its warm-up")
    add("--warmup-teacher-temp-epochs", type=_index, default=0, help="epochs of linear warm-up of the temperature")
    add("--freeze-last-layer", type=_index, default=1, help="epochs in which the student's prototypes are not updated")
    add("--weight-decay-end", type=_size, default=0.4, help="weight decay at the end; a cosine leads to it")


def local_size(args: argparse.Namespace) -> int:
    """Side of the local crops, px."""
    if args.local_crops_size is not None:
        return args.local_crops_size
    return max(1, round(3 * args.input_size / (7 * args.patch_size))) * args.patch_size


def check(args: argparse.Namespace) -> None:
    """See `tasks.Task.check`."""
    check_self_supervised(args)
    side, patch = local_size(args), args.patch_size
    if side % patch:
        raise UserError(f"--local-crops-size {side} is not divisible by --patch-size {patch}")
    if side > args.input_size:
        raise UserError(f"--local-crops-size {side} is larger than the global crops, --input-size {args.input_size}")
    if args.sar_views == "all" and args.sar_weight > 0 and args.local_crops_number and side == patch:
        raise UserError(
            f"--sar-views all: a local crop of {side} px is a single patch and has no entropy; use global, "
            "or a larger --local-crops-size"
        )
    for name in ("global_crops_scale", "local_crops_scale"):
        low, high = getattr(args, name)
        if low > high:
            raise UserError(f"--{name.replace('_', '-')} {low} {high}: the smaller area comes first")


def against_accumulation(args: argparse.Namespace) -> str:
    """See `tasks.Task.against_accumulation`."""
    return "--use-bn-in-head normalises over the images of one forward pass" if args.use_bn_in_head else ""
