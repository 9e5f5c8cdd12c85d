"""The options of ``--task classify``: averaged weights and augmentation, with DeiT's names and values."""

import argparse

from cli import at_least
from tasks.options import check_classes
from utils import UserError

_count, _size, _fraction = at_least(int, 1), at_least(float, 0), at_least(float, 0, 1)


def add(parser: argparse.ArgumentParser) -> None:
    """See `tasks.Task.add_options`."""
    _add_loss(parser)
    _add_averaged_weights(parser)
    _add_augmentation(parser)


def _add_loss(parser: argparse.ArgumentParser) -> None:
    parser.add_argument_group("cross-entropy").add_argument(
        "--class-weights",
        choices=("none", "balanced"),
        default="none",
        help="weights of the classes in the training loss; balanced: n / (k n_c) for n_c of n images of k classes",
    )


def _add_averaged_weights(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("averaged weights").add_argument
    add(
        "--model-ema",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep an exponential moving average of the weights",
    )
    add("--model-ema-decay", type=_fraction, default=0.99996, help="decay of the averaged weights at each update")
    add(
        "--model-ema-warmup",
        action="store_true",
        help="timm's warm-up of the decay, for short runs: 1 - (1 + t) ** (-2 / 3) after t updates, up to "
        "--model-ema-decay",
    )
    add("--keep-head", action="store_true", help="keep the head of --finetune although its classes have other names")
    add("--report", choices=("model", "ema"), default="model", help="the weights whose accuracy picks best.pth")


def _add_augmentation(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("augmentation").add_argument
    add(
        "--repeated-aug",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="train on three augmented views of a third of the images in each epoch",
    )
    add(
        "--color-jitter",
        type=_size,
        default=0.4,
        help="strength of colour jitter; only used with --aa none, as in timm",
    )
    add(
        "--aa",
        default="rand-m9-mstd0.5-inc1",
        metavar="POLICY",
        help="augmentation policy by timm's name, or none",
    )
    add(
        "--train-interpolation",
        choices=("bicubic", "bilinear", "random"),
        default="bicubic",
        help="interpolation of the random crop",
    )
    add(
        "--scale",
        type=_fraction,
        nargs=2,
        default=[0.08, 1.0],
        help="range of the random crop's area, as a fraction of the image",
    )
    add("--hflip", type=_fraction, default=0.5, help="probability of a horizontal flip")
    add("--reprob", type=_fraction, default=0.25, help="probability of random erasing")
    add(
        "--remode",
        choices=("const", "rand", "pixel"),
        default="pixel",
        help="content of erased areas: constant, one random colour, or random pixels",
    )
    add("--recount", type=_count, default=1, help="number of erased areas per image")
    add("--smoothing", type=_fraction, default=0.1, help="label smoothing")
    add("--mixup", type=_size, default=0.8, help="alpha of Mixup; 0 turns it off")
    add("--cutmix", type=_size, default=1.0, help="alpha of CutMix; 0 turns it off")
    add("--mixup-prob", type=_fraction, default=1.0, help="probability that Mixup or CutMix is applied to a batch")
    add(
        "--mixup-switch-prob",
        type=_fraction,
        default=0.5,
        help="probability of CutMix in place of Mixup, if both are on",
    )


def check(args: argparse.Namespace) -> None:
    """See `tasks.Task.check`."""
    check_classes(args)
    if (args.mixup or args.cutmix) and args.batch_size % 2 and not args.eval:
        raise UserError(
            f"--batch-size {args.batch_size} is odd, but Mixup pairs images; use an even one, or --mixup 0 --cutmix 0"
        )
    if args.report == "ema" and not args.model_ema:
        raise UserError("--report ema needs --model-ema")
