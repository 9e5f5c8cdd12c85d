"""The options of ``--task linear``; the defaults are those of DINO's linear evaluation of a ViT-S."""

import argparse

from cli import at_least
from tasks.options import check_classes
from utils import UserError


def add(parser: argparse.ArgumentParser) -> None:
    """See `tasks.Task.add_options`."""
    parser.set_defaults(
        amp="off",
        epochs=100,
        lr=1e-3,
        min_lr=0.0,
        opt="momentum",
        sar_weight=0.0,
        warmup_epochs=0,
        weight_decay=0.0,
    )
    add = parser.add_argument_group("linear probe").add_argument
    add(
        "--probe-blocks",
        type=at_least(int, 1),
        nargs="+",
        default=[4],
        metavar="N",
        help="train classifiers on the [CLS] tokens of the last N blocks; DINO: 4 for ViT-S, 1 for ViT-B; MoCo-v3: 1",
    )
    add(
        "--lr-factors",
        type=at_least(float, 0, open_low=True),
        nargs="+",
        default=[1.0],
        metavar="FACTOR",
        help="train a classifier at each of these multiples of --lr, all in one pass",
    )
    add(
        "--avgpool-patchtokens",
        action="store_true",
        help="add the mean of the last block's patch tokens to the features, as DINO does for ViT-B",
    )
    add("--hflip", type=at_least(float, 0, 1), default=0.5, help="probability of a horizontal flip")
    add(
        "--eval-interpolation",
        choices=("bicubic", "bilinear"),
        default="bicubic",
        help="interpolation of validation images: bicubic (DINO) or bilinear (MoCo-v3)",
    )
    add(
        "--classifier",
        default="",
        metavar="FILE",
        help="with --eval: a linear classifier that DINO's program wrote, for the trunk of --finetune",
    )


def check(args: argparse.Namespace) -> None:
    """See `tasks.Task.check`."""
    check_classes(args)
    if args.avgpool_patchtokens and args.probe_blocks != [1]:
        raise UserError("--avgpool-patchtokens needs --probe-blocks 1, as in DINO's program")
    if args.eval:
        return
    if not (args.finetune or args.resume):
        raise UserError("--task linear needs a trained model; name its checkpoint with --finetune FILE")
    for option in ("sar_weight", "drloc_weight", "log_attention", "classifier"):
        if getattr(args, option):
            raise UserError(f"--{option.replace('_', '-')} has no effect on the training of a linear probe; remove it")
