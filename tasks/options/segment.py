"""The options of ``--task segment``; the defaults are those of Table 6, see ``recipes/segment_voc.args``."""

import argparse

from cli import at_least
from tasks.options import dense
from utils import UserError

_count, _fraction = at_least(int, 1), at_least(float, 0, 1)
_positive = at_least(float, 0, open_low=True)


def add(parser: argparse.ArgumentParser) -> None:
    """See `tasks.Task.add_options`."""
    dense.add(parser)
    parser.set_defaults(data_set="voc2012")
    add = parser.add_argument_group("segmentation").add_argument
    add(
        "--head-norm",
        choices=("group", "batch"),
        default="group",
        help="Semantic FPN with GroupNorm (detectron2), or with BatchNorm and dropout (mmsegmentation)",
    )
    add(
        "--loss-pixels",
        choices=("valid", "all"),
        default="valid",
        help="pixels that the sum of the cross-entropies is divided by: without void (torch), or all (mmsegmentation)",
    )
    add(
        "--longer-side",
        type=_count,
        default=None,
        metavar="PX",
        help="limit of the longer side, beside --input-size for the shorter one (default: --input-size)",
    )
    add("--scale-range", type=_positive, nargs=2, default=[0.5, 2.0], help="range of the random size in training")
    add("--hflip", type=_fraction, default=0.5, help="probability of a horizontal flip")
    add(
        "--most-of-one-class",
        type=at_least(float, 0, 1, open_low=True),
        default=1.0,
        help="draw a crop again where one class has this share of its pixels; 1: never",
    )
    add("--photometric", action="store_true", help="random brightness, contrast, saturation and hue")
    add(
        "--write-predictions",
        default="",
        metavar="DIR",
        help="with --eval: write the predicted classes as palette PNGs, as PASCAL VOC's server takes them",
    )


def check(args: argparse.Namespace) -> None:
    """See `tasks.Task.check`."""
    dense.check(args)
    low, high = args.scale_range
    if low > high:
        raise UserError(f"--scale-range {low:g} {high:g}: the smaller number comes first")
    if args.longer_side is not None and args.longer_side < args.input_size:
        raise UserError(f"--longer-side {args.longer_side} is less than --input-size {args.input_size}")
    if args.write_predictions and not args.eval:
        raise UserError("--write-predictions needs --eval; train first, then give both with --resume best.pth")
