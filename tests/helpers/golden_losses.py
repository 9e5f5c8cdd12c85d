"""Golden losses: small runs whose loss terms and weights every change of the code must leave as they are.

    python tests/helpers/golden_losses.py check                  # the files in tests/golden/losses against this tree
    python tests/helpers/golden_losses.py record [NAME ...]      # write them anew, all or some
    python tests/helpers/golden_losses.py compare COMMIT COMMIT  # two commits against each other, without the files

A file holds a run's command line, the versions and the processor it ran with, every loss term and schedule of its 20
updates, the lines of log.txt, and a digest of the last weights. On the same versions and processor all is equal to
the bit; elsewhere the terms of the loss agree within `TOLERANCE`, and the digest says nothing.

Only main.py's command line and the files that it leaves are used, so any two commits can be compared.
"""

import argparse
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "golden" / "losses"

# Twenty updates of 48 digits with everything random on: augmentation, Mixup, CutMix, dropout, stochastic depth.
COMMON = (
    "--data-set digits --sampling-ratio 0.17 --epochs 4 --warmup-epochs 1 --total-batch 48 --batch-size 48 --lr 2e-3 "
    "--unscale-lr "
    "--aa rand-m9-mstd0.5-inc1 --hflip 0.5 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --drop 0.1 --drop-path 0.2 "
    "--model-ema --model-ema-decay 0.9 --sar-weight 0.1 --print-every 1 --num-workers 0 --device cpu --seed 3 "
)
VIT = "--model vit_tiny_sar --input-size 8 --patch-size 2 --model-kwargs embed_dim=24 depth=2 num_heads=3 "
CVT = "--model cvt_13_sar --input-size 64 --patch-size 2 --model-kwargs embed_dims=(8,16,24) depths=(1,1,1) "
CONFIGURATIONS = {
    "sar_vit": VIT,
    "drloc": VIT + "--drloc-weight 2.0",
    "accumulation": VIT + "--batch-size 12 --clip-grad 1.0",
    "two_processes": VIT + "--batch-size 24 --drloc-weight 2.0",
    "resumed": VIT + "--sched-on-updates --sar-schedule warmup-cosine",
    "batch_norm": CVT + "num_heads=(1,2,3) --sar-loss total-variation",
    "bf16": VIT + "--amp bf16",
}
PROCESSES = {"two_processes": 2}
STOPPED = {"resumed": "epoch 1 [2/5]"}  # SIGTERM as the log says so; the same command again
TIMES = {"images_per_second", "data_time", "data_share", "step_time"}

TOLERANCE = 2e-3
"""Largest relative difference of a loss term between other versions or processors.

On one processor torch 2.10, 2.13 and 2.14 agree to the bit (2.10 in bf16 to 6e-7). Two kinds of processor differ by
some 1e-4."""


def environment() -> dict[str, str]:
    """What the last bit of a loss depends on."""
    import numpy
    import PIL
    import timm
    import torchvision

    modules = {"torch": torch, "torchvision": torchvision, "timm": timm, "numpy": numpy, "pillow": PIL}
    with open("/proc/cpuinfo") as lines:
        cpu = next((line.partition(": ")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return {name: module.__version__ for name, module in modules.items()} | {
        "cpu": f"{cpu} ({torch.backends.cpu.get_cpu_capability()})"
    }


def measure(name: str, start: Callable[[list[str], int, str | None], None]) -> dict:
    """Do the run ``name`` and read what it left.

    Args:
        start: ``start(words, processes, stop)`` runs main.py to its end; with ``stop``, until its log has a line that
            begins so.
    """
    words = (COMMON + CONFIGURATIONS[name]).split()
    with tempfile.TemporaryDirectory() as folder:
        lives = [STOPPED[name], None] if name in STOPPED else [None]
        for stop in lives:
            start([*words, "--output-dir", folder], PROCESSES.get(name, 1), stop)
        return {
            "command": " ".join(["main.py", *words]),
            "processes": PROCESSES.get(name, 1),
            "environment": environment(),
            "steps": read_steps(Path(folder)),
            "log": read_log(Path(folder)),
            "weights": digest(Path(folder)),
        }


def read_steps(folder: Path) -> list[dict[str, float]]:
    """The loss terms and schedules of each update, float32, from TensorBoard's files in the order they were written."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    steps: dict[int, dict[str, float]] = {}
    for path in sorted(folder.glob("events.*"), key=lambda path: path.stat().st_mtime_ns):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                part, _, term = value.tag.partition("/")
                if part == "train" and term not in TIMES:
                    steps.setdefault(event.step, {})[term] = value.tensor.float_val[0]
    return [steps[number] for number in sorted(steps)]


def read_log(folder: Path) -> list[dict]:
    """The epochs' lines, float64, without their times."""
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def digest(folder: Path) -> str:
    """Of the last epoch's weights and of their average."""
    checkpoint = torch.load(folder / "checkpoint.pth", weights_only=True)
    sha = hashlib.sha256()
    for part in ("model", "ema"):
        for name, weight in checkpoint[part].items():
            sha.update(name.encode() + weight.numpy().tobytes())
    return sha.hexdigest()


def differences(expected: dict, found: dict) -> list[str]:
    """Where two measurements disagree, a line each: to the bit on equal versions and processors, else `TOLERANCE`."""
    exact = expected["environment"] == found["environment"]
    lines = []
    if len(expected["steps"]) != len(found["steps"]):
        return [f"{len(found['steps'])} updates instead of {len(expected['steps'])}"]
    left_out = constants(expected["steps"]) - terms_of(found["steps"])  # as TensorBoard shows no constants
    for number, (one, other) in enumerate(zip(expected["steps"], found["steps"], strict=True)):
        for term in sorted((one.keys() | other.keys()) - left_out):
            a, b = one.get(term), other.get(term)
            if not agree(a, b, exact):
                lines.append(f"update {number}: {term} {b} instead of {a}")
    for one, other in zip(expected["log"], found["log"], strict=True):
        # on other processors an image or a component may be counted elsewhere
        names = one if exact else [name for name in one if not name.endswith(("acc1", "acc5", "components"))]
        lines += [
            f"epoch {one['epoch']}: {name} {other.get(name)} instead of {one[name]}"
            for name in names
            if not agree(one[name], other.get(name), exact)
        ]
    if exact and expected["weights"] != found["weights"]:
        lines.append("the last weights are others")
    return lines


def terms_of(steps: list[dict[str, float]]) -> set[str]:
    """The names of all terms of all updates."""
    return {term for step in steps for term in step}


def constants(steps: list[dict[str, float]]) -> set[str]:
    """The terms that have the same value in all updates."""
    return {term for term in terms_of(steps) if len({step.get(term) for step in steps}) == 1}


def agree(one, other, exact: bool) -> bool:
    """Whether two values are equal; numbers, if not ``exact``, within `TOLERANCE`."""
    if exact or not (isinstance(one, float) and isinstance(other, float)):
        return one == other
    return abs(one - other) <= TOLERANCE * max(abs(one), abs(other))


# ---------------------------------------------------------------------------------------------- starting main.py


def start_in(tree: Path) -> Callable[[list[str], int, str | None], None]:
    """A ``start`` for `measure` that runs the main.py of a checkout, in processes of its own."""

    def start(words: list[str], processes: int, stop: str | None) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(launcher if processes > 1 else []), "main.py", *words]
        with subprocess.Popen(command, cwd=tree, stdout=subprocess.PIPE, text=True, env=one_thread()) as process:
            for line in process.stdout:
                if stop is not None and line.startswith(stop):
                    process.send_signal(signal.SIGTERM)
        if process.returncode:
            raise SystemExit(f"{tree}: main.py {' '.join(words)} ended with {process.returncode}")

    return start


def one_thread() -> dict[str, str]:
    """The environment of a run: sums depend on the number of threads."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def start_here(words: list[str], processes: int, stop: str | None) -> None:
    """A ``start`` for `measure` without a new process: one process of this tree's main.py."""
    import main

    def look(record: logging.LogRecord) -> bool:
        if stop is not None and record.getMessage().startswith(stop):
            os.kill(os.getpid(), signal.SIGTERM)
        return True

    if processes > 1:
        raise ValueError("this process can be only one of several")
    log = logging.getLogger("sar")
    log.addFilter(look)
    try:
        code = main.main(words)
    finally:
        log.removeFilter(look)
    if code:
        raise RuntimeError(f"main.py {' '.join(words)} ended with {code}")


# ------------------------------------------------------------------------------------------------- command line


def measure_commit(commit: str, names: list[str]) -> dict[str, dict]:
    """The runs at another commit, in a checkout of its own that is removed again."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "worktree", "add", "-q", "--detach", folder, commit], cwd=ROOT, check=True)
        try:
            return {name: measure(name, start_in(Path(folder))) for name in names}
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=ROOT, check=True)


def tell(name: str, found: list[str]) -> bool:
    """Print what differs in a run; whether anything does."""
    print(f"{name:>14}  {'equal' if not found else f'{len(found)} differences, first: {found[0]}'}", flush=True)
    return bool(found)


def run_command_line(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["check", "record", "compare"])
    parser.add_argument("words", nargs="*", metavar="NAME|COMMIT")
    options = parser.parse_args(argv)
    names = list(CONFIGURATIONS)
    if options.action == "compare":
        one, other = (measure_commit(commit, names) for commit in options.words)
        return int(sum(tell(name, differences(one[name], other[name])) for name in names) > 0)
    different = False
    for name in options.words or names:
        found, path = measure(name, start_in(ROOT)), FOLDER / f"{name}.json"
        if options.action == "record":
            FOLDER.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=1) + "\n")
        else:
            different |= tell(name, differences(json.loads(path.read_text()), found))
    return int(different)


if __name__ == "__main__":
    sys.exit(run_command_line())
