"""The options of ``--task classify``: averaged weights, fine-tuning and augmentation, with DeiT's names and values."""

import argparse
from collections.abc import Mapping
from typing import Any

from cli import at_least
from tasks.options import add_layer_decay, check_classes
from utils import UserError

UPDATES_AN_EPOCH = 16
SMALLEST_BATCH, LARGEST_BATCH, LARGEST_MICRO_BATCH = 16, 1024, 128
EPOCHS, MOST_EPOCHS, IMAGES_SEEN = 100, 300, 120_000
PEAK_LR, REFERENCE_BATCH = 5e-4, 512

_count, _size, _fraction = at_least(int, 1), at_least(float, 0), at_least(float, 0, 1)


def add(parser: argparse.ArgumentParser) -> None:
    """See `tasks.Task.add_options`."""
    _add_loss(parser)
    _add_averaged_weights(parser)
    _add_fine_tuning(parser)
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
    add("--report", choices=("model", "ema"), default="model", help="the weights whose accuracy picks best.pth")


def _add_fine_tuning(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("fine-tuning")
    group.add_argument(
        "--keep-head", action="store_true", help="keep the head of --finetune although its classes have other names"
    )
    add_layer_decay(group, default=1.0)


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


def defaults_of_size(images: int, given: Mapping[str, Any], processes: int) -> dict[str, Any]:
    """Defaults for a user's own training images; see `tasks.defaults_of_size`. Measured in benchmarks/LOG.md.

    The total batch T is the largest power of two that makes at least 16 updates of an epoch, and it is 16 to 1,024. So
    an epoch leaves out less than a 16th of 256 or more images. The peak learning rate is 5e-4 up to T = 512, and then
    DeiT's. A run sees 120,000 images, in 100 to 300 epochs. A tenth of its epochs, at most 5, is warm-up.
    Where processes have no even share of T, as Mixup needs, T is the next multiple of twice their number.
    """
    # 1. total batch: of the images alone, so that a smaller --batch-size keeps it
    power = 1 << max(images // UPDATES_AN_EPOCH, 1).bit_length() - 1
    smallest = min(SMALLEST_BATCH, 1 << images.bit_length() - 1)
    total = min(max(power, smallest), LARGEST_BATCH)
    if processes > 1:
        total = -(-total // (2 * processes)) * 2 * processes
    total = given.get("total_batch") or total
    # 2. batch of a process: as large as it may be, and even, as Mixup pairs images
    share = max(1, total // processes)
    sizes = [size for size in range(1, min(share, LARGEST_MICRO_BATCH) + 1) if share % size == 0]
    batch = max([size for size in sizes if size % 2 == 0] or sizes)
    # 3. length
    epochs = given.get("epochs") or min(max(round(IMAGES_SEEN / images, -1), EPOCHS), MOST_EPOCHS)
    return {
        "total_batch": total,
        "batch_size": batch,
        "epochs": int(epochs),
        "warmup_epochs": min(5, max(1, int(epochs) // 10), int(epochs) - 1),
        "sched_on_updates": True,
        "lr": PEAK_LR if given.get("unscale_lr") else PEAK_LR * max(1.0, REFERENCE_BATCH / total),
        "model_ema": False,
    }


def check(args: argparse.Namespace) -> None:
    """See `tasks.Task.check`."""
    check_classes(args)
    if (args.mixup or args.cutmix) and args.batch_size % 2 and not args.eval:
        raise UserError(
            f"--batch-size {args.batch_size} is odd, but Mixup pairs images; use an even one, or --mixup 0 --cutmix 0"
        )
    if args.model_ema_warmup and not args.model_ema:
        raise UserError("--model-ema-warmup needs --model-ema, which --data-set folder and tar leave out by default")
    if args.report == "ema" and not args.model_ema:
        raise UserError("--report ema needs --model-ema")
