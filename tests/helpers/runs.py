"""Small training runs for the tests: their command line, a child process to kill, and how to compare two."""

import functools
import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

import engine
import main
import utils
from arguments import parse_arguments
from build import build_plan, build_run
from tasks import load_task

ROOT = Path(__file__).parents[2]

# A three-head, two-block ViT on scanned digits, every regulariser on: a second for three epochs.
SMALL = (
    "--data-set folder --model vit_tiny_sar --input-size 8 --patch-size 2 --num-workers 0 "
    "--model-kwargs embed_dim=24 depth=2 num_heads=3 "
    "--batch-size 24 --total-batch 48 --epochs 3 --warmup-epochs 1 --lr 4e-3 --no-sched-on-updates "
    "--mixup 0.8 --cutmix 1.0 --model-ema --model-ema-decay 0.9 --drop 0.1 --drop-path 0.2 --sar-weight 0.1 "
    "--print-every 3"
).split()
UPDATES = 5  # an epoch: 240 images in total batches of 48
TIMES = {"images_per_second", "data_time", "step_time"}  # all of log.txt that differs between equal runs


def write_digits(root: Path, train: int = 24, val: int = 6) -> Path:
    """scikit-learn's scanned digits as an image folder of so many images a class; returns ``root``."""
    digits = load_digits()
    for label in range(10):
        images = digits.images[digits.target == label][: train + val]
        for index, image in enumerate(images):
            folder = root / ("train" if index < train else "val") / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 255 / 16).astype(np.uint8)).save(folder / f"{index}.png")
    return root


def build(words: str, device: str = "cpu") -> engine.Run:
    """A run put together but not begun."""
    args = parse_arguments([*words.split(), "--device", device])
    processes = utils.start_processes(device)
    train_set = load_task(args.task).data(args, "train", processes)
    plan = build_plan(args, processes, train_set)
    return build_run(args, plan, processes, utils.StopSignal(processes), train_set)


def command(data: Path, output: Path, *more: str) -> list[str]:
    """``main.py``'s arguments for the small run."""
    return folders(SMALL, data, output, *more)


def folders(words: Sequence[str], data: Path, output: Path, *more: str) -> list[str]:
    """These arguments with their folders."""
    return [*words, "--data-path", str(data), "--output-dir", str(output), *more]


class Child:
    """A small run in a process of its own, to be killed; forked from a clean server that has all imports done."""

    context = multiprocessing.get_context("forkserver")

    def __init__(self, data: Path, log: Path):
        self.data, self.log, self.words = data, log, SMALL
        os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
        self.context.set_forkserver_preload(["helpers.runs"])

    def __call__(self, output: Path, *more: str, before=None, everywhere=None, ranks: int = 1) -> int:
        """Run ``main.py`` after ``before()`` (on the last of ``ranks`` processes); its text is in ``text()``.

        ``everywhere(rank)`` is called on all of them.

        Returns:
            Rank 0's exit code; -9 if it was killed.
        """
        children = self.start(output, *more, before=before, everywhere=everywhere, ranks=ranks)
        for child in children:
            child.join()
        return children[0].exitcode

    def start(self, output: Path, *more: str, before=None, everywhere=None, ranks: int = 1) -> list:
        """The processes of such a run, which has begun."""
        argv, environment = folders(self.words, self.data, output, *more), {}
        if ranks > 1:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        children = [
            self.context.Process(
                target=_main,
                args=(
                    argv,
                    self.log if rank == 0 else Path(f"{self.log}{rank}"),
                    [before if rank == ranks - 1 else None, everywhere and functools.partial(everywhere, rank)],
                    environment | {"RANK": str(rank)},
                ),
            )
            for rank in range(ranks)
        ]
        for child in children:
            child.start()
        return children

    def text(self, rank: int = 0) -> str:
        """What this process of the last run printed, errors included."""
        return Path(f"{self.log}{rank or ''}").read_text()


def on_two_processes(function) -> list[int | None]:
    """``function(rank)`` on two processes that have met by `utils.start_processes`; returns their exit codes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    children = [Child.context.Process(target=_on_process, args=(function, rank, port)) for rank in (0, 1)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    return [child.exitcode for child in children]


def _on_process(function, rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    function(rank)


def _main(argv: list[str], log: Path, hooks: list, environment: dict) -> None:
    os.environ.update(environment)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as in a program that nothing has forked
    for hook in filter(None, hooks):
        hook()
    sys.exit(main.main(argv))


def at_call(module: str, name: str, number: int, action, after: bool = False):
    """For ``before``: make the ``number``-th call of ``module.name`` do ``action()`` first, or after it."""
    return functools.partial(_install, module, name, number, action, after)


def _install(module: str, name: str, number: int, action, after: bool) -> None:
    owner = importlib.import_module(module)
    original, calls = getattr(owner, name), [0]

    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == number and not after:
            action()
        result = original(*args, **kwargs)
        if calls[0] == number and after:
            action()
        return result

    setattr(owner, name, counted)


def _send(number: int) -> None:
    os.kill(os.getpid(), number)


def send(number: int):
    """An action that sends this process a signal."""
    return functools.partial(_send, number)


def killed_at_update(number: int, by=signal.SIGKILL):
    return at_call("engine", "update_weights", number, send(by))


def killed_at_evaluation_batch(number: int, by=signal.SIGKILL):
    return at_call("tasks.classify", "batch_sums", number, send(by))


def killed_at_replace(number: int, after: bool):
    return at_call("os", "replace", number, send(signal.SIGKILL), after)


def content(output: Path) -> dict:
    """What a finished run leaves, without what may differ: times, where it was written, who loaded."""
    files = {}
    for name in ("best.pth", "checkpoint.pth"):
        checkpoint = torch.load(output / name, weights_only=True)
        for name_of in ("output_dir", "num_workers"):
            del checkpoint["args"][name_of]
        files[name] = checkpoint
    lines = [json.loads(line) for line in (output / "log.txt").read_text().splitlines()]
    files["log.txt"] = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    return files


def assert_identical(one, other, where: str = "") -> None:
    """Bit for bit, through dicts and lists; names the place of the first difference."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_identical(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_identical(a, b, f"{where}/{index}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, f"{where}: {one} != {other}"
