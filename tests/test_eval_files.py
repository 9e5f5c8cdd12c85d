"""The files that ``main.py --eval`` of a classifier leaves: tables, pictures, calibration."""

import argparse
import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import runs
from PIL import Image

import main
import training
import utils
from analysis import evaluation
from tasks.classify import Accuracy
from tasks.linear import LinearAccuracy
from tasks.scores import ImageScores, Scores

CPU = torch.device("cpu")
FILES = ["classes.csv", "confusion.csv", "confusion.png", "eval.json", "worst.csv", "worst.png"]


def rows_of(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def collect(logits, targets, replaced, rank=0, world_size=1, batch=3) -> ImageScores:
    """The recorder of one rank, which sees its share of the images in batches."""
    recorder, own = ImageScores(), range(rank, len(targets), world_size)
    for first in range(0, len(own), batch):
        chosen = list(own[first : first + batch])
        recorder.add(logits[chosen], targets[chosen], replaced[chosen])
    return recorder


@pytest.fixture
def images():
    """Logits of 11 images of 4 classes, of which image 5 is unreadable."""
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(11, 4, generator=generator), torch.randint(4, (11,), generator=generator)
    return logits, targets, (torch.arange(11) == 5).long()


class Gathering(utils.Processes):
    """A rank whose gather also gets what the other ranks would send, in the order of the calls."""

    def gather(self, rows):
        return torch.stack([rows, *self.store.pop(0)])  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------------------- scores


def test_scores_are_those_of_each_readable_image(images):
    logits, targets, replaced = images
    scores = collect(*images).gather(utils.Processes(0, 1, CPU))
    readable = (replaced == 0).numpy()
    assert scores.index.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert scores.true.tolist() == targets.numpy()[readable].tolist()
    assert scores.predicted.tolist() == logits.argmax(dim=1).numpy()[readable].tolist()
    losses = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none").numpy()
    np.testing.assert_allclose(scores.loss, losses[readable], rtol=1e-12)
    probabilities = logits.double().softmax(dim=1).amax(dim=1).numpy()
    np.testing.assert_allclose(scores.confidence, probabilities[readable], rtol=1e-12)


@pytest.mark.parametrize("world_size", [2, 3, 12])
def test_scores_do_not_depend_on_the_number_of_processes(images, world_size):
    """With 11 images on 12 processes, the last one has none."""
    alone = collect(*images).gather(utils.Processes(0, 1, CPU))
    own, others = collect(*images, 0, world_size), []
    for rank in range(1, world_size):
        rows = [part[0] for part in collect(*images, rank, world_size).rows]
        others.append(torch.cat([torch.zeros(0, 5, dtype=torch.float64), *rows]))
    longest = sum(part.shape[1] for part in own.rows)
    padded = [torch.nn.functional.pad(rows, (0, 0, 0, longest - len(rows))) for rows in others]
    sent = [[torch.tensor(len(rows)) for rows in others], padded]
    together = own.gather(Gathering(0, world_size, CPU, store=sent))  # type: ignore[arg-type]
    for name in ("index", "true", "predicted", "loss", "confidence"):
        assert getattr(together, name).tolist() == getattr(alone, name).tolist()


def test_the_scores_of_one_of_several_classifiers(images):
    logits, targets, replaced = images
    recorder = ImageScores(2)
    recorder.add(torch.stack([-logits, logits]), targets, replaced)
    process = utils.Processes(0, 1, CPU)
    chosen, alone = recorder.gather(process, 1), collect(*images).gather(process)
    assert chosen.loss.tolist() == alone.loss.tolist()
    assert chosen.predicted.tolist() == alone.predicted.tolist()


def test_of_several_linear_classifiers_the_scores_are_those_of_the_best(images):
    logits, targets, replaced = images
    right = torch.nn.functional.one_hot(targets, 4).float()
    evaluator = LinearAccuracy(["bad", "good", "none"], ImageScores(3))
    batch = {"images": torch.stack([logits, right, -right]), "targets": targets, "replaced": replaced}
    evaluator.update(lambda images: images, batch)
    assert evaluator.compute(utils.Processes(0, 1, CPU))["acc1"] == 100
    assert evaluator.scores.predicted.tolist() == evaluator.scores.true.tolist()


def test_training_records_nothing_and_eval_changes_no_result(images):
    """Per-epoch evaluation must cost what it did."""
    run = runs.build(" ".join(runs.SMALL).replace("folder", "digits"))
    assert run.task.evaluator().recorder is None
    logits, targets, replaced = images
    batch = {"images": logits, "targets": targets, "replaced": replaced}

    def model(values, return_similarity):
        return values, torch.ones(len(values), 2, 3, 3)

    alone = utils.Processes(0, 1, CPU)
    plain, recording = Accuracy(), Accuracy(ImageScores())
    for evaluator in (plain, recording):
        evaluator.update(model, batch)
    results = plain.compute(alone)
    assert results == recording.compute(alone)
    assert plain.scores is None
    right = recording.scores.predicted == recording.scores.true
    assert 100 * right.mean() == pytest.approx(results["acc1"])


# ----------------------------------------------------------------------------------------------- calibration


def test_calibration_error_by_hand():
    """Two images in the bin (0.8, 0.867] with accuracy 0.5, one right image in (0.933, 1]."""
    error = evaluation.calibration_error(np.array([0.82, 0.86, 1.0]), np.array([True, False, True]))
    assert error == pytest.approx(100 * 2 / 3 * abs(0.5 - 0.84))


def test_a_confidence_at_the_edge_of_two_bins_is_in_the_lower_one():
    """In separate bins the gaps +0.5 and -0.4 would not cancel."""
    confidence, right = np.array([0.5, 0.4]), np.array([True, False])
    assert evaluation.calibration_error(confidence, right, bins=2) == pytest.approx(100 * abs(0.5 - 0.45))


# --------------------------------------------------------------------------------------------------- the files


class Pictures(list):
    """Pairs of image and label, with names."""

    def __init__(self, count: int):
        super().__init__((torch.full((3, 8, 8), number, dtype=torch.uint8), 0) for number in range(count))
        self.names = [f"folder/{number}.png" for number in range(count)]


def dataset_of(classes: list[str], count: int):
    return SimpleNamespace(classes=classes, base=Pictures(count))


def scores_of(true, predicted, loss) -> Scores:
    arrays = [np.array(values) for values in (range(len(true)), true, predicted, loss)]
    return Scores(*arrays, confidence=np.full(len(true), 0.5))


def test_the_tables(tmp_path):
    scores = scores_of([0, 0, 0, 0, 1, 1], [0, 1, 2, 2, 1, 1], [0.1, 3.0, 1.0, 2.0, 3.0, 0.2])
    evaluation.write_evaluation(tmp_path / "eval", {"results": {}}, scores, dataset_of(["a", "b", "c"], 6))
    assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == FILES
    classes = rows_of(tmp_path / "eval/classes.csv")
    assert [tuple(row.values()) for row in classes] == [
        ("a", "4", "25.0", "c", "2"),
        ("b", "2", "100.0", "", "0"),
        ("c", "0", "", "", "0"),
    ]
    confusion = rows_of(tmp_path / "eval/confusion.csv")
    assert [list(row.values()) for row in confusion] == [
        ["a", "1", "1", "2"],
        ["b", "0", "2", "0"],
        ["c", "0", "0", "0"],
    ]
    worst = rows_of(tmp_path / "eval/worst.csv")
    assert [row["index"] for row in worst] == ["1", "4", "3", "2", "5", "0"]
    assert (worst[0]["image"], worst[0]["true"], worst[0]["predicted"]) == ("folder/1.png", "a", "b")
    assert float(worst[0]["probability_true"]) == pytest.approx(np.exp(-3.0))
    assert float(worst[0]["probability_predicted"]) == 0.5


def test_fifty_images_are_listed_and_sixteen_drawn():
    count = 70
    scores = scores_of([0] * count, [1] * count, np.arange(count, dtype=float))
    dataset = dataset_of(["a", "b"], count)
    rows = evaluation.worst_rows(scores, dataset)
    assert [row["index"] for row in rows] == list(range(69, 19, -1))
    sixteen, twelve = (evaluation.draw_worst(rows[:number], dataset) for number in (evaluation.SHOWN, 12))
    assert (evaluation.SHOWN, sixteen.width) == (16, twelve.width)
    assert sixteen.height > twelve.height


@pytest.mark.parametrize(("count", "names", "numbers"), [(10, 10, 10), (30, 30, 0), (100, 0, 0)])
def test_the_picture_of_the_confusions_has_names_as_far_as_they_can_be_read(count, names, numbers):
    figure = evaluation.draw_confusion(np.eye(count, dtype=int), [f"class {n}" for n in range(count)])
    axes = figure.axes[0]
    assert sum(label.get_text().startswith("class ") for label in axes.get_yticklabels()) == names
    assert len(axes.texts) == numbers


# ------------------------------------------------------------------------------------------------- main.py --eval


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    data = runs.write_digits(tmp_path_factory.mktemp("digits"))
    output = tmp_path_factory.mktemp("trained")
    assert main.main(runs.command(data, output, "--epochs", "1", "--warmup-epochs", "0")) == 0
    assert not (output / "eval").exists()
    return output


def evaluate(trained, *more) -> int:
    return main.main(["--eval", "--resume", str(trained / "best.pth"), "--num-workers", "0", *more])


def test_eval_writes_files_beside_the_checkpoint(trained, capsys):
    assert evaluate(trained) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(path.name for path in (trained / "eval").iterdir()) == FILES
    summary = json.loads((trained / "eval/eval.json").read_text())
    best = torch.load(trained / "best.pth", weights_only=True)["best"]["results"]
    # float32 sums of batches of another size
    assert {name: summary["results"][name] for name in best} == pytest.approx(best, rel=1e-5)
    assert (summary["checkpoint"], summary["weights"]) == (str(trained / "best.pth"), "model")
    assert summary["arguments"]["data_set"] == "folder"
    confusion = np.array([[int(n) for n in list(row.values())[1:]] for row in rows_of(trained / "eval/confusion.csv")])
    assert confusion.sum() == summary["results"]["images"] == 60
    assert 100 * confusion.trace() / 60 == pytest.approx(summary["results"]["acc1"])
    assert f"expected calibration error {summary['results']['calibration_error']:.2f} %" in lines
    worst = rows_of(trained / "eval/worst.csv")
    assert all(Path(row["image"]).parts[-2] == row["true"] for row in worst)
    mean = sum(float(row["loss"]) for row in worst) / len(worst)
    assert len(worst) == 50
    assert mean > summary["results"]["loss"]
    assert Image.open(trained / "eval/worst.png").width > 1000


def test_output_dir_names_another_folder(trained, tmp_path):
    assert evaluate(trained, f"--output_dir={tmp_path / 'other'}", "--checkpoint-key", "ema") == 0
    assert json.loads((tmp_path / "other/eval/eval.json").read_text())["weights"] == "ema"


def test_a_folder_that_cannot_be_written_is_a_warning(trained, tmp_path, capsys):
    (tmp_path / "eval").write_text("a file")
    assert evaluate(trained, "--output-dir", str(tmp_path)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if f"{tmp_path / 'eval'} lacks files of this evaluation" in line]) == 1
    assert any(line.startswith("expected calibration error ") for line in lines)
    assert lines[-1].startswith("* Acc@1 ")


def test_a_full_disk_is_a_warning(tmp_path, caplog, monkeypatch):
    def full(path, rows):
        raise utils.RunError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(evaluation, "write_csv", full)
    monkeypatch.setattr(utils.logger, "handlers", [caplog.handler])
    scores, dataset = scores_of([0], [0], [1.0]), dataset_of(["a", "b"], 1)
    training.write_files(tmp_path, argparse.Namespace(), {"results": {}}, scores, dataset)
    assert "No space left on device" in caplog.records[-1].getMessage()
    assert caplog.records[-1].levelname == "WARNING"
