"""Tasks by name. A task defines the model that is trained, its loss, and how it is evaluated.

`main.py` trains every task with the loop of `engine.py`. ``--task`` is a key of `TASKS`, or ``module:Class`` for a task
of your own. A new task is a class derived from `Task`, in a file of its own, and one line in `TASKS`. The options of
this program's tasks are in modules of the same name in ``options/``, so that ``--help`` does not import torch.
"""

import argparse
import difflib
import importlib
from collections.abc import Mapping
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from utils import UserError

if TYPE_CHECKING:
    from tasks.task import Evaluator, Task

__all__ = [
    "TASKS",
    "Evaluator",
    "Task",
    "add_options",
    "against_accumulation",
    "check_options",
    "defaults_of_size",
    "has_defaults_of_size",
    "load_task",
]

TASKS = {
    "classify": "tasks.classify:Classification",
    "detect": "tasks.detect:Detection",
    "dino": "tasks.dino:DINO",
    "moco": "tasks.moco:MoCo",
    "knn": "tasks.knn:NearestNeighbourProbe",
    "linear": "tasks.linear:LinearClassification",
    "segment": "tasks.segment:Segmentation",
}


def __getattr__(name: str):
    """Import `Task` and `Evaluator` at their first use, as importing torch takes seconds."""
    if name in ("Task", "Evaluator"):
        return getattr(importlib.import_module("tasks.task"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load_task(name: str) -> "type[Task]":
    """The class of a task.

    Args:
        name: a key of `TASKS`, or ``module:Class`` with a module on Python's path.

    Raises:
        UserError: there is no such task; the message names similar ones.
    """
    place = TASKS.get(name, name)
    module, colon, attribute = place.partition(":")
    if not colon:
        close = difflib.get_close_matches(name, TASKS)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(TASKS)}, or module:Class"
        raise UserError(f"--task {name}: no such task; {hint}")
    try:
        task = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--task {name}: {error}; its module must be on PYTHONPATH") from error
    from tasks.task import Task

    if not (isinstance(task, type) and issubclass(task, Task)):
        raise UserError(f"--task {name}: {attribute} is not derived from tasks.Task")
    return task


def add_options(name: str, parser: argparse.ArgumentParser) -> None:
    """Add the options of the task ``name`` to a parser; see `load_task`, also for errors."""
    module = _options_module(name)
    (module.add if module else load_task(name).add_options)(parser)


def check_options(args: argparse.Namespace) -> None:
    """Refuse arguments that the task cannot work with; see `Task.check`."""
    module = _options_module(args.task)
    (module.check if module else load_task(args.task).check)(args)


def against_accumulation(args: argparse.Namespace) -> str:
    """Why the task cannot accumulate gradients; see `Task.against_accumulation`."""
    module = _options_module(args.task)
    if module:
        return module.against_accumulation(args) if hasattr(module, "against_accumulation") else ""
    return load_task(args.task).against_accumulation(args)


def defaults_of_size(task: str, images: int, given: Mapping[str, Any], processes: int) -> dict[str, Any]:
    """A task's defaults for a user's own set of so many training images; none for most tasks.

    Args:
        task: see `load_task`.
        images: at least 1.
        given: the options that the user gave.
        processes: of the run.
    """
    return _options_of(task).defaults_of_size(images, given, processes) if has_defaults_of_size(task) else {}


def has_defaults_of_size(task: str) -> bool:
    """Whether the number of a user's own images matters to a task's defaults; see `defaults_of_size`."""
    return hasattr(_options_of(task), "defaults_of_size")


def _options_of(task: str) -> Any:
    return _options_module(task) or load_task(task).options


def _options_module(name: str) -> ModuleType | None:
    """The module in ``options/`` of one of this program's tasks; None for other tasks."""
    if name in TASKS and find_spec(f"tasks.options.{name}"):
        return importlib.import_module(f"tasks.options.{name}")
    return None
