"""The training step itself: nothing waits for the device."""

import pytest
import torch
from helpers import runs
from torch.utils._python_dispatch import TorchDispatchMode

import engine
import losses

STEP = (
    "--data-set digits --model vit_tiny_sar --input-size 8 --patch-size 2 --num-workers 0 --print-every 1000 "
    "--model-kwargs embed_dim=24 depth=2 num_heads=3 --batch-size 32 --total-batch 64 --clip-grad 1.0 "
    "--mixup 0.8 --cutmix 1.0 --model-ema --aa none --drloc-weight 0.1"
)


DINO = (
    "--task dino --data-set digits --model vit_tiny_sar --input-size 16 --patch-size 4 --num-workers 0 "
    "--print-every 1000 --model-kwargs embed_dim=24 depth=2 num_heads=3 --batch-size 32 --total-batch 64 "
    "--local-crops-number 2 --sar-views all --out-dim 16 --sampling-ratio 0.2"
)


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


@pytest.mark.parametrize("words", [STEP, DINO], ids=["classify", "dino"])
def test_no_operation_of_a_step_would_wait_for_a_gpu(words, monkeypatch):
    """On a CPU. What waits is on the host anyway: once the loader's own seed."""
    run = runs.build(words.replace("--num-workers 0", "--num-workers 1"))  # loading may call .item() as it likes
    monkeypatch.setattr(losses, "label_components", lambda mask: losses._label(mask, early_exit=False))
    waits, found = Waits(), []
    monkeypatch.setattr(engine.Window, "close", lambda window: found.extend(waits.found) or {})
    with waits:
        engine.train_one_epoch(run)
    assert found == ["aten._local_scalar_dense.default"]


@pytest.mark.gpu
@pytest.mark.parametrize("words", [STEP, DINO], ids=["classify", "dino"])
@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
def test_no_synchronisation_between_logging_steps(words, amp, monkeypatch):
    run = runs.build(f"{words} --amp {amp}", "cuda")
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
    assert best["acc1"] > 20, "chance is 10; after 10 epochs a CPU has about 40"
