"""The options of this program's tasks: one module a task, with ``add(parser)`` and ``check(args)``.

Torch is not imported here, so that ``--help`` and errors of the command line are immediate.
"""

import argparse

from readers import DATASETS
from utils import UserError


def check_classes(args: argparse.Namespace) -> None:
    """Refuse images without classes, for a task that needs them.

    Raises:
        UserError: see `tasks.Task.check`.
    """
    if not DATASETS[args.data_set].has_classes:
        raise UserError(f"--data-set {args.data_set} has no classes, which --task {args.task} needs; use folder")
