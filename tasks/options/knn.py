"""The defaults of ``--task knn``: evaluation in float32, as in DINO's ``eval_knn.py``."""

import argparse

from tasks.options import check_classes


def add(parser: argparse.ArgumentParser) -> None:
    """See `tasks.Task.add_options`."""
    parser.set_defaults(eval=True, amp="off")


def check(args: argparse.Namespace) -> None:
    """See `tasks.Task.check`."""
    check_classes(args)
