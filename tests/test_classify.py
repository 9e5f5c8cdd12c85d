"""The classification's own parts: weights of the classes, the warm-up of the averaged weights."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import runs
from sklearn.utils.class_weight import compute_class_weight
from timm.data import Mixup
from timm.utils import ModelEmaV3

import main
from schedules import Position
from tasks.classify import Classification, WeightedCrossEntropy, balanced_weights

CLASSES = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture
def batch():
    """Logits, class numbers and weights."""
    generator = torch.Generator().manual_seed(4)
    logits = 3 * torch.randn(12, CLASSES, generator=generator)
    return logits, torch.randint(CLASSES, (12,), generator=generator), torch.rand(CLASSES, generator=generator) + 0.1


def last(folder) -> dict:
    return json.loads((folder / "log.txt").read_text().splitlines()[-1])


# --------------------------------------------------------------------------------------------- class weights


def test_balanced_weights_are_scikit_learns():
    targets = np.random.default_rng(0).choice(CLASSES, size=200, p=[0.5, 0.3, 0.1, 0.06, 0.04])
    ours = balanced_weights(targets, CLASSES)
    expected = compute_class_weight("balanced", classes=np.arange(CLASSES), y=targets)
    torch.testing.assert_close(ours.double().numpy(), expected, rtol=1e-6, atol=0)
    assert float(ours[torch.from_numpy(targets)].mean()) == pytest.approx(1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_targets_are_torchs_own_weighted_cross_entropy(batch, smoothing):
    logits, numbers, weights = batch
    soft = Mixup(mixup_alpha=0.8, num_classes=CLASSES, label_smoothing=0.1)(torch.zeros(12, 3, 4, 4), numbers)[1]
    expected = F.cross_entropy(logits, soft, weights, label_smoothing=smoothing)
    assert torch.equal(WeightedCrossEntropy(weights, smoothing)(logits, soft), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_numbers_are_torchs_sum_over_the_number_of_images(batch, smoothing):
    """torch divides by the sum of the targets' weights instead, which another batch would not have."""
    logits, numbers, weights = batch
    ours = WeightedCrossEntropy(weights, smoothing)(logits, numbers)
    total = F.cross_entropy(logits, numbers, weights, label_smoothing=smoothing, reduction="sum")
    torch.testing.assert_close(ours, total / len(numbers))
    by_hand = -((1 - smoothing) * F.one_hot(numbers, CLASSES) + smoothing / CLASSES) * weights * logits.log_softmax(1)
    torch.testing.assert_close(ours, by_hand.sum(dim=1).mean())


def test_micro_batches_have_the_mean_of_the_whole(batch):
    logits, numbers, weights = batch
    loss = WeightedCrossEntropy(weights, 0.1)
    parts = [loss(logits[part], numbers[part]) for part in (slice(0, 6), slice(6, 12))]
    torch.testing.assert_close(sum(parts) / 2, loss(logits, numbers))


def test_equal_classes_change_nothing(batch):
    logits, numbers, _ = batch
    plain = F.cross_entropy(logits, numbers, label_smoothing=0.1)
    torch.testing.assert_close(WeightedCrossEntropy(torch.ones(CLASSES), 0.1)(logits, numbers), plain)


def test_the_weights_of_a_run_are_those_of_its_training_images(data, tmp_path, capsys):
    for path in sorted((data / "train/3").iterdir())[6:]:
        (tmp_path / "removed").mkdir(exist_ok=True)
        path.rename(tmp_path / "removed" / path.name)
    try:
        words = f"{' '.join(runs.SMALL)} --data-path {data} --class-weights balanced"
        run = runs.build(words)
        expected = torch.full((10,), 222 / (10 * 24)).index_fill(0, torch.tensor([3]), 222 / (10 * 6))
        torch.testing.assert_close(run.task.criterion.weights, expected)
        assert run.task.notes() == {"class weights": "balanced, 0.925 (0) to 3.7 (3)"}
        command = runs.command(data, tmp_path / "run", "--epochs", "1", "--warmup-epochs", "0")
        assert main.main([*command, "--class-weights", "balanced"]) == 0
        assert "class weights  balanced, 0.925 (0) to 3.7 (3)" in capsys.readouterr().out
        # the loss of an evaluation is unweighted, as it is compared between runs
        assert main.main(["--eval", "--resume", str(tmp_path / "run/best.pth")]) == 0
        assert f"loss {last(tmp_path / 'run')['test_loss']:.4f}" in capsys.readouterr().out
    finally:
        for path in (tmp_path / "removed").iterdir():
            path.rename(data / "train/3" / path.name)


@pytest.mark.parametrize("task", ["dino", "moco", "segment", "detect"])
def test_tasks_without_a_classifier_have_no_class_weights(task, capsys):
    assert main.main(["--task", task, "--class-weights", "balanced"]) == 2
    assert "no option --class-weights" in capsys.readouterr().err


# ------------------------------------------------------------------------------- warm-up of averaged weights


def build(data, *words) -> Classification:
    return runs.build(" ".join([*runs.SMALL, "--data-path", str(data), *words])).task


def test_the_decay_is_timms_and_a_function_of_the_position(data):
    task = build(data, "--model-ema-warmup", "--model-ema-decay", "0.9")
    timm = ModelEmaV3(torch.nn.Linear(1, 1), decay=0.9, use_warmup=True)
    for epoch, step in ((0, 0), (0, 1), (0, 4), (2, 3), (40, 0)):
        update = 5 * epoch + step
        decay = task.schedule(Position(epoch, step, 5, 50))["model_ema_decay"]
        assert decay == timm.get_decay(update + 1), "timm counts the update that has just been made"
        assert decay == pytest.approx(min(0.9, 1 - (1 + update) ** (-2 / 3)))
    assert "model_ema_decay" not in build(data).schedule(Position(0, 0, 5, 50))


def test_the_average_of_a_short_run_forgets_the_initial_weights(data, tmp_path, capsys):
    words = ("--model-ema-decay", "0.99996", "--epochs", "2")
    task = build(data, *words, "--model-ema-warmup")
    weights, initial = task.model.head.weight, task.averaged.head.weight.clone()
    average = initial
    for update in range(6):
        with torch.no_grad():
            weights.add_(1)
        schedule = task.schedule(Position(update // 5, update % 5, 5, 2))
        task.end_update(schedule)
        average = torch.lerp(average, weights.detach(), 1 - schedule["model_ema_decay"])
    torch.testing.assert_close(task.averaged.head.weight, average)
    assert (task.averaged.head.weight - initial).min() > 3
    assert main.main(runs.command(data, tmp_path, *words, "--model-ema-warmup")) == 0
    assert "of the initial weights" not in capsys.readouterr().out
    assert math.isclose(last(tmp_path)["train_model_ema_decay"], np.mean([1 - (6 + t) ** (-2 / 3) for t in range(5)]))


def test_a_run_with_a_warm_up_is_resumed_bit_for_bit(data, tmp_path):
    words = ("--model-ema-warmup", "--model-ema-decay", "0.99996", "--epochs", "2", "--print-every", "1")
    assert main.main(runs.command(data, tmp_path / "whole", *words)) == 0
    child = runs.Child(data, tmp_path / "log")
    assert child(tmp_path / "parts", *words, before=runs.killed_at_update(8)) == -9
    assert child(tmp_path / "parts", *words) == 0
    runs.assert_identical(runs.content(tmp_path / "parts"), runs.content(tmp_path / "whole"))
