"""The training step itself: nothing waits for the device, and many processes do the mathematics of one."""

import subprocess
import sys

import pytest
import runs
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import build
import datasets
import engine
import losses
import utils
from arguments import parse_arguments

STEP = (
    "--data-set digits --model vit_tiny_sar --input-size 8 --patch-size 2 --num-workers 0 --print-every 1000 "
    "--model-kwargs embed_dim=24 depth=2 num_heads=3 --batch-size 32 --total-batch 64 --clip-grad 1.0 "
    "--mixup 0.8 --cutmix 1.0 --model-ema --aa none --drloc-weight 0.1"
)


def run_on(device: str, words: str = STEP) -> engine.Run:
    """A run that is about to begin, on ``device``."""
    args = parse_arguments([*words.split(), "--device", device])
    processes = utils.start_processes(device)
    train_set, _ = datasets.build_split(args, "train", processes)
    plan = build.build_plan(args, processes, train_set)
    return build.build_run(args, plan, processes, utils.StopSignal(processes), train_set)


class Waits(TorchDispatchMode):
    """Counts the operations that would make the host wait for a GPU."""

    NAMES = ("_local_scalar_dense", "nonzero", "equal.default", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in self.NAMES):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def test_no_operation_of_a_step_would_wait_for_a_gpu(monkeypatch):
    """On a CPU. What waits is on the host anyway: the count of unreadable images, and once the loader's own seed."""
    run = run_on("cpu", STEP.replace("--num-workers 0", "--num-workers 1"))  # loading may call .item() as it likes
    monkeypatch.setattr(losses, "label_components", lambda mask: losses._label(mask, early_exit=False))
    waits, found = Waits(), []
    monkeypatch.setattr(engine.Window, "close", lambda window: found.extend(waits.found) or {})
    with waits:
        engine.train_one_epoch(run)
    micro_steps = run.plan.updates_per_epoch * run.plan.accumulation
    assert found == ["aten._local_scalar_dense.default"] * (micro_steps + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
def test_no_synchronisation_between_logging_steps(amp, monkeypatch):
    run = run_on("cuda", f"{STEP} --amp {amp}")
    engine.train_one_epoch(run)  # first use of kernels and of the optimiser's state may wait
    run.epoch, run.step = 1, 0
    original = engine.Window.close

    def close(window):
        torch.cuda.set_sync_debug_mode("default")
        return original(window)

    monkeypatch.setattr(engine.Window, "close", close)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert engine.train_one_epoch(run)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("options", ["--amp bf16", "--amp fp16", "--amp off", "--amp bf16 --compile"])
def test_a_gpu_learns_the_digits(options, tmp_path):
    import main

    words = "--model vit_tiny_sar --model-kwargs embed_dim=64 depth=2 num_heads=4 --input-size 16 --patch-size 2"
    assert main.main([*words.split(), "--epochs", "10", *options.split(), "--output-dir", str(tmp_path)]) == 0
    best = torch.load(tmp_path / "best.pth", weights_only=True)["best"]
    assert best["acc1"] > 50


def test_two_processes_do_the_mathematics_of_one(tmp_path):
    """Same total batch, same images at the same positions: the same weights to rounding; each image evaluated once."""
    data = runs.write_digits(tmp_path / "digits", val=7)  # 70 images: an odd number for two processes of 2 x 12
    alike = "--drop 0 --drop-path 0 --mixup 0 --cutmix 0 --opt sgd --lr 1 --epochs 2 --drloc-weight 1 --batch-size"
    contents = []
    for processes, batch_size in ((1, "48"), (2, "12")):
        output = tmp_path / str(processes)
        command = runs.command(data, output, *alike.split(), batch_size)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run(
            [sys.executable, *(launcher if processes > 1 else []), "main.py", *command],
            cwd=runs.ROOT,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("batch  ") == 1, "only rank 0 speaks"
        contents.append(runs.content(output))
    one, two = contents
    for line_one, line_two in zip(one["log.txt"], two["log.txt"], strict=True):
        assert line_two["test_images"] == 70
        assert line_two["train_loss"] == pytest.approx(line_one["train_loss"], abs=1e-5)
        assert line_two["test_loss"] == pytest.approx(line_one["test_loss"], abs=1e-5)
        assert line_two["test_spatial_entropy"] == pytest.approx(line_one["test_spatial_entropy"], abs=1e-3)
    for part in ("model", "localiser"):
        weights, others = (content["checkpoint.pth"][part] for content in (one, two))
        weights, others = (values["model"] if part == "localiser" else values for values in (weights, others))
        for name, weight in weights.items():
            assert torch.allclose(others[name], weight, atol=1e-5), name
