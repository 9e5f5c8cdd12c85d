"""The options of ``--task detect``; the defaults are those of Table 5, see ``recipes/detect_voc.args``."""

import argparse

from cli import KeyValues, at_least
from tasks.options import dense
from utils import UserError

HEAD_SIZES = ("channels", "features", "regions", "smallest_anchor", "canonical_size")
"""Arguments of `models.rcnn.Detector` that ``--head-kwargs`` sets."""


def add(parser: argparse.ArgumentParser) -> None:
    """See `tasks.Task.add_options`."""
    dense.add(parser)
    parser.set_defaults(data_set="voc0712")
    add = parser.add_argument_group("detection").add_argument
    add(
        "--masks",
        action="store_true",
        help="Mask R-CNN: also learn the masks of those images that have a file in SegmentationObject",
    )
    add(
        "--head-kwargs",
        nargs="*",
        default={},
        action=KeyValues,
        metavar="KEY=VALUE",
        help="sizes of the heads, such as channels=64 features=256 regions=128 smallest_anchor=16 canonical_size=112",
    )
    positive = at_least(float, 0, open_low=True)
    add("--scale-range", type=positive, nargs=2, default=[0.1, 2.0], help="range of the random size in training")
    add("--hflip", type=at_least(float, 0, 1), default=0.5, help="probability of a horizontal flip")


def check(args: argparse.Namespace) -> None:
    """See `tasks.Task.check`."""
    dense.check(args)
    if args.model.startswith("pvt"):
        raise UserError(
            f"--model {args.model}: --task detect has ViTDet's pyramid, which needs a ViT, such as vit_small"
        )
    if args.patch_size % 4:
        raise UserError(f"--patch-size {args.patch_size}: --task detect needs a multiple of 4, such as 16")
    low, high = args.scale_range
    if low > high:
        raise UserError(f"--scale-range {low:g} {high:g}: the smaller number comes first")
    unknown = sorted(args.head_kwargs.keys() - set(HEAD_SIZES))
    if unknown:
        raise UserError(f"--head-kwargs {unknown[0]}: no such size; known are {', '.join(HEAD_SIZES)}")
    for name, value in args.head_kwargs.items():
        if not (isinstance(value, int) and value >= 1):
            raise UserError(f"--head-kwargs {name}={value}: it must be a whole number of at least 1")
    if args.masks and args.data_set == "folder":
        raise UserError("--masks: --data-set folder has boxes alone; leave --masks out")
