"""The k-NN evaluation: DINO's numbers, another library's votes, any number of processes, its data."""

import os
import socket
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from helpers import checkpoints as files
from helpers import runs
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

import main
import utils
from analysis.models import load_model
from arguments import parse_arguments
from augmentation import normalise
from datasets import cache_splits
from samplers import Draw, EvalSampler
from tasks import knn
from tasks.knn import KNearestNeighbours, knn_split
from training import draw_attention
from weights import read_checkpoint

ALONE = utils.Processes(0, 1, torch.device("cpu"))


class Features(nn.Module):
    """A model whose images are their own features ``(B, D)``."""

    def forward_features(self, images):
        return images

    def forward_head(self, features, pre_logits):
        assert pre_logits
        return features


def batch(features, targets, bank, replaced=None) -> dict[str, torch.Tensor]:
    """Bank or validation images; ``bank`` is 1 or 0."""
    ones = torch.ones(len(features), dtype=torch.int64)
    return {
        "images": features,
        "targets": targets,
        "bank": bank * ones,
        "replaced": 0 * ones if replaced is None else replaced,
    }


def evaluate(*batches, neighbours=knn.NEIGHBOURS, device="cpu") -> dict[str, float]:
    evaluator = KNearestNeighbours(neighbours)
    for each in batches:
        evaluator.update(Features(), {name: rows.to(device) for name, rows in each.items()})
    return evaluator.compute(utils.Processes(0, 1, torch.device(device)))


@pytest.fixture(scope="module")
def numbers(golden):
    """400 features of the bank, 200 to classify; seven classes."""
    return golden("knn.pt")


# ------------------------------------------------------------------------------------------- the reference's numbers


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_accuracies_are_those_of_dinos_own_program(device, numbers):
    bank = batch(numbers["train_features"], numbers["train_labels"], 1)
    test = batch(numbers["test_features"], numbers["test_labels"], 0)
    results = evaluate(bank, test, neighbours=numbers["config"]["k"], device=device)
    for case in numbers["results"]:
        assert results[f"knn{case['k']}"] == case["top1"]
        if case["k"] in (1, 100, 200):  # in the others DINO's program counts classes without a vote
            assert results[f"knn{case['k']}_top5"] == case["top5"]
    assert (results["images"], results["unreadable"]) == (200, 0)


def test_votes_and_predictions_are_those_of_dinos_own_program(numbers):
    nearest = knn.NearestNeighbours(numbers["test_features"], 200)
    places = torch.stack([torch.arange(400), numbers["train_labels"]], dim=1)
    nearest.add(nn.functional.normalize(numbers["train_features"].double(), dim=1), places)
    errors = []
    for case in numbers["results"]:
        votes = nearest.votes(case["k"])
        largest = case["votes_f64"].amax(dim=1, keepdim=True)
        errors.append(((votes - case["votes_f64"][:, : votes.shape[1]]) / largest).abs().max().item())
        assert torch.equal(votes.argmax(dim=1), case["prediction"])
    print(f"largest relative error of a vote: {max(errors):.1e}")  # shown by pytest -s
    assert max(errors) < 1e-10


def votes(distances: np.ndarray) -> np.ndarray:
    """scikit-learn's weights: of the distance of two vectors of length 1, which gives their cosine."""
    return np.exp((1 - distances**2 / 2) / knn.TEMPERATURE)


def test_scikit_learn_predicts_the_same_classes(numbers):
    train, test = (
        nn.functional.normalize(numbers[f"{split}_features"].double(), dim=1).numpy() for split in ("train", "test")
    )
    for k in (10, 20, 100, 200):
        judge = KNeighborsClassifier(k, weights=votes, algorithm="brute").fit(train, numbers["train_labels"].numpy())
        accuracy = 100 * judge.score(test, numbers["test_labels"].numpy())
        bank = batch(numbers["train_features"], numbers["train_labels"], 1)
        queries = batch(numbers["test_features"], numbers["test_labels"], 0)
        assert evaluate(bank, queries)[f"knn{k}"] == pytest.approx(accuracy)


# -------------------------------------------------------------------------------------------------- ties and limits


def test_of_equally_near_images_the_first_of_the_bank_votes():
    features = torch.tensor([[2.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
    results = evaluate(batch(features, torch.tensor([1, 0, 2]), 1), batch(features[:1], torch.tensor([1]), 0),
                       neighbours=(1, 2))  # fmt: skip
    assert results["knn1"] == 100
    assert results["knn2"] == 0, "one vote each: the first class"
    assert results["knn2_top5"] == 100


def test_a_bank_smaller_than_k_votes_as_a_whole_and_few_images_are_enough():
    features = torch.eye(3)
    results = evaluate(batch(features, torch.arange(3), 1), batch(features, torch.arange(3), 0))
    assert results["knn10"] == results["knn200"] == results["knn10_top5"] == 100


def test_a_class_that_the_bank_lacks_is_never_right():
    results = evaluate(batch(torch.eye(2), torch.tensor([0, 1]), 1), batch(torch.eye(2), torch.tensor([5, 1]), 0))
    assert results["knn10"] == results["knn10_top5"] == 50


def test_unreadable_images_neither_vote_nor_count():
    replaced = torch.tensor([0, 1, 0])
    bank = batch(torch.eye(3), torch.tensor([0, 1, 2]), 1, replaced)
    results = evaluate(bank, batch(torch.eye(3), torch.arange(3), 0, replaced))
    assert results["knn10"] == 100
    assert (results["images"], results["unreadable"]) == (2, 2)
    assert evaluate(bank, batch(torch.eye(3), torch.arange(3), 0))["knn10_top5"] == pytest.approx(200 / 3)


def test_features_in_half_precision_are_compared_in_float64():
    features = torch.tensor([[1.0, 0.0], [1.0, 1e-3]])
    bank = batch(features.bfloat16(), torch.tensor([0, 1]), 1)
    assert evaluate(bank, batch(features.bfloat16(), torch.tensor([0, 1]), 0), neighbours=(1,))["knn1"] == 100


# ---------------------------------------------------------------------------------- any number of processes


def evaluate_shares(processes: utils.Processes) -> list[dict]:
    """Evaluate this process's share of 20 training and 9 validation images, with equal and unreadable ones."""
    results = []
    for bank, test in ((20, 9), (1, 1)):  # also fewer images than processes
        features = torch.randn(bank + test, 4, generator=torch.Generator().manual_seed(0)).round()
        whole = batch(features, torch.arange(bank + test) % 5, (torch.arange(bank + test) < bank).long())
        whole["replaced"][3:4] = 1
        evaluator = KNearestNeighbours((1, 2, 3, 30))
        for draw in EvalSampler(bank + test, processes.rank, processes.world_size):
            evaluator.update(Features(), {name: rows[draw.index, None] for name, rows in whole.items()})
        results.append(evaluator.compute(processes))
    return results


def one_of_three(rank: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    knn.BANK_ROWS, knn.TEST_ROWS = 4, 3
    torch.save(evaluate_shares(utils.start_processes("cpu")), f"{folder}/{rank}.pt")
    utils.end_processes()


def test_three_processes_find_what_one_finds(tmp_path):
    """Bit for bit, with many equally near images, and in smaller pieces."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    runs.Child.context.set_forkserver_preload(["helpers.runs"])
    children = [runs.Child.context.Process(target=one_of_three, args=(r, port, str(tmp_path))) for r in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    alone = evaluate_shares(ALONE)
    assert all(torch.load(tmp_path / f"{rank}.pt") == alone for rank in range(3))
    assert (alone[0]["images"], alone[0]["unreadable"]) == (9, 1)
    assert 0 < alone[0]["knn3"] < 100


# --------------------------------------------------------------------------------------------------- the data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.write_digits(tmp_path_factory.mktemp("knn") / "digits", train=4, val=2)


def test_the_bank_is_the_training_set_under_the_transform_of_evaluation(folder):
    words = f"--data-set folder --data-path {folder} --input-size 8 --sampling-ratio 0.5 --drloc-weight 0.1"
    images = knn_split(parse_arguments(words.split()), ALONE)
    assert len(images) == 20 + 20
    first = [images[Draw(index, 0, index)] for index in range(40)]
    assert [item["bank"] for item in first] == [1] * 20 + [0] * 20
    assert [item["targets"] for item in first] == sorted(list(range(10)) * 2) * 2
    again = images[Draw(3, 5, 7)]["images"]
    assert torch.equal(again, first[3]["images"]), "nothing is random"
    assert "pairs" not in first[0]
    cache_splits([images], ALONE)
    assert all(part.base.in_memory for part in images.parts)
    assert torch.equal(images[Draw(25, 0, 25)]["images"], first[25]["images"])


def test_attention_of_the_validation_images_can_be_drawn(folder, tmp_path):
    path = files.write_checkpoint(tmp_path / "vit.pth", ["one", "two"])
    images = knn_split(parse_arguments([*files.OWN, "--data-path", str(folder)]), ALONE)
    run = SimpleNamespace(task=SimpleNamespace(model=load_model(path).model), processes=ALONE)
    assert draw_attention(run, images)[0].axes


# -------------------------------------------------------------------------------------------------- the task


def printed(words: list[str], capsys) -> str:
    """The last line of ``main.py --task knn``."""
    assert main.main(["--task", "knn", "--num-workers", "0", *words]) == 0
    return capsys.readouterr().out.splitlines()[-1]


def test_it_evaluates_a_checkpoint_with_the_settings_of_its_run(folder, tmp_path, capsys):
    """Here with other classes than the checkpoint's; scikit-learn says the same of the same features."""
    path = files.write_checkpoint(tmp_path / "vit.pth", ["one", "two", "three"])
    line = printed(["--finetune", str(path), "--data-path", str(folder)], capsys)
    model = load_model(path).model
    features, labels = [], []
    images = knn_split(parse_arguments([*files.OWN, "--data-path", str(folder)]), ALONE)
    for item in (images[Draw(index, 0, index)] for index in range(len(images))):
        features.append(model.forward_features(normalise(item["images"][None]))[0, 0].detach().double().numpy())
        labels.append(item["targets"])
    features = np.stack(features) / np.linalg.norm(features, axis=1, keepdims=True)
    judge = KNeighborsClassifier(10, weights=votes, algorithm="brute").fit(features[:40], labels[:40])
    accuracy = 100 * judge.score(features[40:], labels[40:])
    assert line.startswith(f"* k-NN Acc@1 (Acc@5) of k = 10 {accuracy:.3f} (")
    assert line.endswith("(20 images)")


def test_it_evaluates_the_encoders_of_self_supervised_programs(folder, tmp_path, capsys):
    """Each in the model that the command line describes; the teacher and the base encoder by default."""
    small = "--model vit_tiny --input-size 32 --patch-size 8 --model-kwargs embed_dim=24 depth=2 num_heads=3".split()
    data = ["--data-set", "folder", "--data-path", str(folder)]
    files.write_dino(tmp_path / "dino.pth", files.headless(1), files.headless(2))
    files.write_moco(tmp_path / "moco.pth", files.headless(2), files.headless(1))
    lines = {
        (name, key): printed(["--finetune", str(tmp_path / name), *key, *small, *data], capsys)
        for name in ("dino.pth", "moco.pth")
        for key in ((), ("--checkpoint-key", "student" if name == "dino.pth" else "momentum"))
    }
    (teacher, student), (base, momentum) = list(lines.values())[:2], list(lines.values())[2:]
    assert teacher == base != student == momentum


def test_without_a_checkpoint_it_says_what_is_missing(tmp_path, capsys):
    assert main.main(["--task", "knn", "--output-dir", str(tmp_path / "none")]) == 2
    error = f"error: nothing to evaluate at {tmp_path / 'none/best.pth'}; name a checkpoint with --resume FILE or "
    assert capsys.readouterr().err == error + "--finetune FILE\n"


def test_the_evaluated_weights_are_exported(folder, tmp_path, capsys):
    path = files.write_checkpoint(tmp_path / "vit.pth", ["one", "two"], more="--last-block standard")
    printed(["--finetune", str(path), "--data-path", str(folder), "--export", str(tmp_path / "x.safetensors")], capsys)
    sizes = {"img_size": 8, "patch_size": 2, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    theirs = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    theirs.load_state_dict(read_checkpoint(tmp_path / "x.safetensors"))
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(theirs(images), knn.pooled_features(load_model(path).model, images))


def test_an_export_that_is_of_little_use_is_told(folder, tmp_path, capsys):
    words = ["--data-path", str(folder), "--num-workers", "0", "--export", str(tmp_path / "x.pth")]
    path = files.write_checkpoint(tmp_path / "vit.pth", [str(number) for number in range(10)])
    assert main.main(["--eval", "--finetune", str(path), *words]) == 0
    assert "x.pth: its last block is 'sar', which other programs' ViTs lack" in capsys.readouterr().out
    assert read_checkpoint(tmp_path / "x.pth").keys() == read_checkpoint(path)["model"].keys()
