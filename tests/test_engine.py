"""Step and evaluation on a device: nothing waits for it, and nothing needs float64, which Apple's GPUs lack."""

import pytest
import torch
from helpers import runs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import engine
import losses
import utils
from build import choose_amp
from tasks import classify, knn, linear, scores

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


class Doubles(TorchDispatchMode):
    """Counts the operations that make float64 of something else, but for `utils.float64`, which goes to the host."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.found, self.on_host = [], False
        for module in (classify, knn, linear, scores):
            monkeypatch.setattr(module, "float64", self._float64)

    def _float64(self, tensor):
        self.on_host = True
        made = utils.float64(tensor)
        self.on_host = False
        return made

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        into = any(part.dtype == torch.float64 for part in tensors_in(made))
        if into and not self.on_host and all(part.dtype != torch.float64 for part in tensors_in((args, kwargs))):
            self.found.append(str(function))
        return made


def tensors_in(values) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("words", [STEP, DINO], ids=["classify", "dino"])
def test_a_step_needs_no_float64(words, monkeypatch):
    run = runs.build(words.replace("--num-workers 0", "--num-workers 1"))
    doubles, found = Doubles(monkeypatch), []
    monkeypatch.setattr(engine.Window, "close", lambda window: found.extend(doubles.found) or {})
    with doubles:
        engine.train_one_epoch(run)
    assert found == []


@pytest.mark.parametrize(
    ("evaluator", "logits"),
    [
        (classify.Accuracy(scores.ImageScores()), (12, 3)),
        (linear.LinearAccuracy(["a", "b"], scores.ImageScores(2)), (2, 12, 3)),
        (knn.KNearestNeighbours((1, 2)), (12, 3)),
    ],
    ids=["classify", "linear", "knn"],
)
def test_an_evaluation_counts_in_float64_on_the_host(evaluator, logits, monkeypatch):
    monkeypatch.setattr(knn, "pooled_features", lambda model, images: images)
    batch = {"images": torch.randn(logits), "targets": torch.arange(12) % 3, "replaced": torch.arange(12) // 11}
    batch |= {"bank": torch.arange(12) % 2}
    maps = torch.randn(12, 2, 3, 3)
    with Doubles(monkeypatch) as doubles:
        evaluator.update(lambda images, return_similarity=False: (images, maps) if return_similarity else images, batch)
        assert evaluator.compute(utils.Processes(0, 1, torch.device("cpu")))["unreadable"] == 1
    assert doubles.found == []


def test_an_apple_gpu_is_for_one_process_in_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    device = utils.pick_device("mps")
    assert device == torch.device("mps")
    assert utils.float64_device(device) == torch.device("cpu")
    assert choose_amp("auto", device)[0] is None
    with pytest.raises(utils.UserError, match="float32; leave --amp out"):
        choose_amp("bf16", device)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(utils.UserError, match="cannot share an Apple GPU; start one alone"):
        utils.pick_device("mps")


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
