"""The options of this program's tasks: one module a task, with ``add(parser)`` and ``check(args)``.

Torch is not imported here, so that ``--help`` and errors of the command line are immediate.
"""

import argparse

from cli import at_least
from models import MODELS
from readers import DATASETS
from utils import UserError


def add_layer_decay(group: argparse._ArgumentGroup, default: float) -> None:
    """Add ``--layer-decay`` to the options of a task that fine-tunes; see `timm.optim.param_groups_layer_decay`."""
    group.add_argument(
        "--layer-decay",
        type=at_least(float, 0, 1, open_low=True),
        default=default,
        help="factor of the learning rate from each block to the one before it; 1: the same for all",
    )


def check_classes(args: argparse.Namespace) -> None:
    """Refuse images without classes, for a task that needs them.

    Raises:
        UserError: see `tasks.Task.check`.
    """
    if not DATASETS[args.data_set].has_classes:
        raise UserError(f"--data-set {args.data_set} has no classes, which --task {args.task} needs; use folder")


def check_self_supervised(args: argparse.Namespace) -> None:
    """Refuse other models than ViTs, and shared options that DINO's and MoCo-v3's schedules and losses do not have.

    Raises:
        UserError: see `tasks.Task.check`.
    """
    if MODELS[args.model].module != "models_sar":
        raise UserError(f"--model {args.model}: --task {args.task} trains ViTs: vit_tiny, vit_small, vit_base, or _sar")
    if args.sched != "cosine" or not args.sched_on_updates or args.cooldown_epochs:
        raise UserError(
            "--sched, --no-sched-on-updates and --cooldown-epochs: leave them out; "
            f"--task {args.task} has a cosine of its own, with a value for each update"
        )
    if args.drloc_weight > 0:
        raise UserError(f"--drloc-weight: --task {args.task} has no DRLoc loss; leave it out")
