"""The linear probe: both programs' numbers, many classifiers in one pass, official files, the frozen trunk."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from helpers import checkpoints as files
from helpers import runs

import main
import models
import utils
from arguments import default_arguments, parse_arguments
from build import build_optimizer, wrap
from engine import train_one_epoch
from samplers import Draw
from schedules import Position
from tasks.linear import LinearClassification, LinearProbe
from utils import RunError, UserError
from weights import read_checkpoint

CPU = torch.device("cpu")
ALONE = utils.Processes(0, 1, CPU)


@pytest.fixture(scope="module")
def numbers(golden):
    return golden("linear.pt")


# --------------------------------------------------------------------------------------- the references' numbers


def probe_of(config: dict, state: dict, words: str, num_classes: int = 7) -> tuple:
    """Arguments and task of a frozen float64 ViT with these weights."""
    sizes = " ".join(f"{name}={config[name]}" for name in ("embed_dim", "depth", "num_heads", "mlp_ratio"))
    size = f"--input-size {config['img_size']} --patch-size {config['patch_size']}"
    args = parse_arguments(
        f"--task linear --eval --model vit_tiny {size} --model-kwargs {sizes} --data-set folder {words}".split(),
        saved={},
    )
    task = LinearClassification(args, SimpleNamespace(classes=range(num_classes)), CPU)
    trunk = {name: value for name, value in state.items() if not name.startswith("head.")}
    task.model.trunk.load_state_dict(trunk)
    return args, task.double()


def train_a_pass(args, task, images, labels, position: Position) -> None:
    """The updates of the engine's loop, with the optimiser of the program."""
    optimizer = build_optimizer(args, task)
    lr = task.schedule(position)["lr"]
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    for batch in batches_of(images, labels):
        task.begin_update({})
        terms = task.losses(task(batch), batch)
        optimizer.zero_grad()
        terms["cross_entropy"].backward()
        optimizer.step()


def batches_of(images, labels) -> list[dict]:
    return [
        {"images": batch.double(), "targets": targets, "replaced": torch.zeros(len(targets), dtype=torch.int64)}
        for batch, targets in zip(images, labels, strict=True)
    ]


def error(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


@pytest.mark.parametrize("number", [0, 1, 2])
def test_dinos_features_logits_and_updates(number, numbers):
    dino, case = numbers["dino"], numbers["dino"]["cases"][number]
    blocks = case["n_last_blocks"]
    words = f"--probe-blocks {blocks} --lr {dino['lr_argument']} --batch-size 6 --total-batch 6"
    words += " --avgpool-patchtokens" * case["avgpool_patchtokens"]
    args, task = probe_of(dino["backbone_config"], dino["backbone_state_dict"], words)
    (head,) = task.model.heads
    head.load_state_dict({"weight": case["weight"], "bias": case["bias"]})
    batch = dino["images"][0].double()
    errors = [
        error(task.model.features(batch)[blocks], case["features_f64"]),
        error(task.model(batch)[0], case["logits_f64"]),
    ]
    assert task.learning_rate.peak == case["lr_of_the_optimizer"]
    train_a_pass(args, task, dino["images"], dino["labels"], Position(0, 0, 2, 100))
    errors += [error(head.weight, case["weight_after_f64"]), error(head.bias, case["bias_after_f64"])]
    evaluator = task.evaluator()
    for each in batches_of(dino["images"], dino["labels"]):
        evaluator.update(task.model, each)
    results = evaluator.compute(ALONE)
    assert {name: results[name] for name in case["validation_after"]} == pytest.approx(case["validation_after"])
    print(f"largest error: {max(errors):.1e}")  # shown by pytest -s
    assert max(errors) < 1e-10


def test_mocos_features_logits_and_updates(numbers):
    moco = numbers["moco"]
    config = moco["config"]
    words = f"--probe-blocks 1 --lr {config['lr']} --batch-size 6 --total-batch {config['total_batch'] // 6 * 6}"
    words += f" --unscale-lr --epochs {config['epochs']}"  # 256 images are no multiple of 6
    args, task = probe_of(config, moco["state_dict"], words)
    (head,) = task.model.heads
    head.load_state_dict({name: moco["state_dict"][f"head.{name}"] for name in ("weight", "bias")})
    batch = moco["images"][0].double()
    position = Position(config["epoch"], 0, 2, config["epochs"])
    errors = [
        error(task.model.features(batch)[1], moco["features_f64"]),
        error(task.model(batch)[0], moco["logits_f64"]),
        abs(task.schedule(position)["lr"] - moco["lr_of_this_epoch"]),
    ]
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    train_a_pass(args, task, moco["images"], moco["labels"], position)
    errors += [error(head.weight, moco["weight_after_f64"]), error(head.bias, moco["bias_after_f64"])]
    changed = [name for name, value in task.model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["heads.0.weight", "heads.0.bias"]
    print(f"largest error: {max(errors):.1e}")
    assert max(errors) < 1e-10


def test_learning_rates_of_both_programs_by_epoch(numbers):
    cases = [*numbers["dino"]["cosine_annealing"].items(), *numbers["moco"]["cosine_of_epoch"].items()]
    for name, case in cases:
        epochs = int(name.removesuffix("_epochs"))
        config = numbers["moco"]["config"]
        words = f"--probe-blocks 1 --lr {case['lr']} --unscale-lr --epochs {epochs}"
        _, task = probe_of(config, numbers["moco"]["state_dict"], words)
        rates = [task.schedule(Position(epoch, 1, 3, epochs))["lr"] for epoch in range(epochs)]
        assert np.abs(np.array(rates) - case["lr_of_epoch"].numpy()).max() < 1e-12


def test_many_classifiers_in_one_pass_are_each_what_it_is_alone(numbers):
    dino = numbers["dino"]
    words = f"--probe-blocks 4 1 --lr-factors 0.5 1 --lr {dino['lr_argument']} --batch-size 6 --total-batch 6"
    args, task = probe_of(dino["backbone_config"], dino["backbone_state_dict"], words)
    assert task.names == ["lr4_blocks4", "lr8_blocks4", "lr4_blocks1", "lr8_blocks1"]
    cases = [dino["cases"][number] for number in (0, 0, 1, 1)]
    for head, case in zip(task.model.heads, cases, strict=True):
        head.load_state_dict({"weight": case["weight"], "bias": case["bias"]})
    train_a_pass(args, task, dino["images"], dino["labels"], Position(0, 0, 2, 100))
    for number in (1, 3):
        assert error(task.model.heads[number].weight, cases[number]["weight_after_f64"]) < 1e-10
    assert error(task.model.heads[0].weight, cases[0]["weight_after_f64"]) > 1e-3
    evaluator = task.evaluator()
    for batch in batches_of(dino["images"], dino["labels"]):
        evaluator.update(task.model, batch)
    results = evaluator.compute(ALONE)
    expected = {name: results[f"acc1_{name}"] for name in task.names}
    assert results["acc1"] == max(expected.values())
    assert results["loss_lr8_blocks4"] == pytest.approx(cases[1]["validation_after"]["loss"])
    assert results["acc5_lr8_blocks1"] == pytest.approx(cases[3]["validation_after"]["acc5"])
    line = task.describe(results)
    assert all(f"{name} {rate:.3f}" in line for name, rate in expected.items())


def test_fresh_classifiers_are_those_of_the_programs():
    torch.manual_seed(0)
    probe = LinearProbe(files.make(num_classes=0, embed_dim=192), [2, 1], 1000)
    for head in probe.heads.requires_grad_(False):
        assert head.weight.std() == pytest.approx(0.01, rel=0.02)
        assert abs(head.weight.mean()) < 1e-4
        assert not head.bias.any()
    assert not torch.equal(probe.heads[0].weight[:, :192], probe.heads[1].weight)


# ------------------------------------------------------------------------------------------------ a run

SHORT = "--num-workers 0 --batch-size 24 --total-batch 48 --epochs 2 --probe-blocks 2 1 --lr-factors 1 100".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.write_digits(tmp_path_factory.mktemp("linear") / "digits", train=12, val=3)


@pytest.fixture(scope="module")
def pretrained(folder):
    return files.write_checkpoint(folder.parent / "vit.pth", ["one", "two", "three"])


@pytest.fixture(scope="module")
def trained(folder, pretrained):
    words = ["--task", "linear", "--finetune", str(pretrained), "--data-set", "folder", "--data-path", str(folder)]
    assert main.main([*words, "--output-dir", str(folder.parent / "out"), *SHORT]) == 0
    return folder.parent / "out"


def test_a_probe_takes_the_model_of_its_checkpoint_and_trains_the_classifiers_alone(trained, pretrained):
    lines = [json.loads(line) for line in (trained / "log.txt").read_text().splitlines()]
    before, after = read_checkpoint(pretrained)["model"], read_checkpoint(trained / "checkpoint.pth")["model"]
    for name, value in before.items():
        if not name.startswith("head."):
            assert torch.equal(after[f"trunk.{name}"], value)
    names = ["lr0.001_blocks2", "lr0.1_blocks2", "lr0.001_blocks1", "lr0.1_blocks1"]
    for line in lines:
        assert line["test_acc1"] == max(line[f"test_acc1_{name}"] for name in names)
    assert all(after[f"heads.{number}.bias"].any() for number in range(4))
    assert lines[0]["n_parameters"] == 2 * (24 + 1) * 10 + 2 * (48 + 1) * 10
    assert lines[0]["metric"] == "acc1"
    assert read_checkpoint(trained / "best.pth")["best"]["acc1"] == max(line["test_acc1"] for line in lines)


def test_a_probe_is_evaluated_from_its_own_checkpoint(trained, capsys):
    assert main.main(["--eval", "--resume", str(trained / "checkpoint.pth"), "--num-workers", "0"]) == 0
    last = json.loads((trained / "log.txt").read_text().splitlines()[-1])
    expected = LinearClassification.describe({name.removeprefix("test_"): value for name, value in last.items()})
    assert capsys.readouterr().out.splitlines()[-1] == expected


def small_run(pretrained, folder, *more: str):
    words = f"--task linear --finetune {pretrained} --data-set folder --data-path {folder}"
    run = runs.build(" ".join([words, *SHORT, *more]))
    run.task.start_from(pretrained, None)
    return run


def test_a_trunk_that_changes_ends_the_run(pretrained, folder):
    run = small_run(pretrained, folder)
    assert all(not module.training for module in run.task.train().model.trunk.modules())
    train_one_epoch(run)
    assert all(parameter.grad is None for parameter in run.task.model.trunk.parameters())
    run.task.evaluator()
    run.task.model.trunk.norm.bias.data[3] += 1e-6
    with pytest.raises(RunError, match=r"must not change, but these weights did: norm\.bias$"):
        run.task.evaluator()


def test_the_gradients_of_the_classifiers_alone_are_exchanged(pretrained, folder):
    """A group of this process alone stands for many."""
    run = small_run(pretrained, folder, "--total-batch", "24")
    two = utils.Processes(0, 2, CPU)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        run.network = wrap(run.task, run.plan, two, compiled=False)
        assert {name for name, p in run.network.named_parameters() if p.requires_grad} == {
            f"module.model.heads.{number}.{kind}" for number in range(4) for kind in ("weight", "bias")
        }
        train_one_epoch(run)
    finally:
        del run.network
        utils.end_processes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "--task linear needs a trained model; name its checkpoint with --finetune FILE"),
        ("--resume x.pth --avgpool-patchtokens", "--avgpool-patchtokens needs --probe-blocks 1, as in DINO's program"),
        ("--resume x.pth --sar-weight 0.1", "--sar-weight has no effect on the training of a linear probe; remove it"),
        ("--resume x.pth --classifier y", "--classifier has no effect on the training of a linear probe; remove it"),
    ],
)
def test_what_a_probe_cannot_do_is_one_line(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pth").touch()
    with pytest.raises(UserError) as raised:
        parse_arguments(["--task", "linear", *words.split()])
    assert str(raised.value) == message


def test_images_of_both_programs(folder):
    """Random crops and flips to train on; a resize of either kind, here from 8 to 32 px, to evaluate."""
    words = f"--task linear --eval --data-set folder --data-path {folder} --input-size 32 --crop-pct 1".split()
    found = {}
    for interpolation in ("bicubic", "bilinear"):
        args = parse_arguments([*words, "--eval-interpolation", interpolation], saved={})
        train, val = (LinearClassification.data(args, split, ALONE) for split in ("train", "val"))
        found[interpolation] = [val[Draw(3, epoch, 3)]["images"] for epoch in (0, 1)]
        assert torch.equal(*found[interpolation])
        assert not torch.equal(*(train[Draw(3, epoch, 3)]["images"] for epoch in (0, 1)))
    assert not torch.equal(found["bicubic"][0], found["bilinear"][0])


def test_features_of_models_other_than_vits():
    models.register("pvt_small_sar")
    sizes = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 2, 2), "num_heads": (1, 2, 3, 4)}
    trunk = timm.create_model("pvt_small_sar", img_size=32, num_classes=0, **sizes).eval()
    images = torch.randn(2, 3, 32, 32)
    probe = LinearProbe(trunk, [1, 1], 5).eval()
    assert probe(images).shape == (2, 2, 5)
    torch.testing.assert_close(probe.features(images)[1], trunk(images))
    with pytest.raises(UserError, match=r"PVT has no \[CLS\] tokens of its blocks; give --probe-blocks 1"):
        LinearProbe(trunk, [4], 5)
    with pytest.raises(UserError, match=r"--probe-blocks 3: the model has 2 blocks; give fewer$"):
        LinearProbe(files.make(num_classes=0), [1, 3], 5)


# ------------------------------------------------------------------------------------------------ official files


@pytest.fixture
def official(tmp_path):
    """Files of DINO's and MoCo-v3's linear probes of the same backbone, five classes."""
    backbone, classifiers = files.headless(), {blocks: torch.nn.Linear(blocks * 24, 5) for blocks in (1, 2)}
    torch.save(backbone, tmp_path / "dino_backbone.pth")
    linear = files.with_prefix("module.linear.", classifiers[2].state_dict())
    torch.save({"epoch": 100, "state_dict": linear, "best_acc": 77.0}, tmp_path / "dino_linear.pth")
    whole = files.with_prefix("module.", backbone | files.with_prefix("head.", classifiers[1].state_dict()))
    torch.save({"epoch": 90, "arch": "vit_small", "state_dict": whole, "best_acc1": torch.tensor(73.2)},
               tmp_path / "moco_linear.pth.tar")  # fmt: skip
    return tmp_path, classifiers


OFFICIAL = "--task linear --eval --model vit_tiny --input-size 32 --patch-size 8 --data-set folder".split()
OFFICIAL += "--model-kwargs embed_dim=24 depth=2 num_heads=3 --lr-factors 1 10 --probe-blocks 1".split()


def official_task(*words: str, classes: int = 5) -> LinearClassification:
    args = parse_arguments([*OFFICIAL, *words], saved={})
    return LinearClassification(args, SimpleNamespace(classes=range(classes)), CPU).eval()


@torch.no_grad()
def test_official_linear_classifiers_are_evaluated(official):
    path, classifiers = official
    vit = files.make(num_classes=0).eval()
    vit.load_state_dict(torch.load(path / "dino_backbone.pth"))
    images = torch.randn(3, 3, 32, 32)
    tokens = [prefix[:, 0] for _, prefix in vit.get_intermediate_layers(images, 2, False, True, True)]
    dino = official_task("--classifier", str(path / "dino_linear.pth"))
    assert dino.load(read_checkpoint(path / "dino_backbone.pth"), None) == []
    torch.testing.assert_close(dino.model(images), classifiers[2](torch.cat(tokens, dim=1))[None])
    moco = official_task()
    assert moco.load(read_checkpoint(path / "moco_linear.pth.tar"), None) == []
    torch.testing.assert_close(moco.model(images), classifiers[1](tokens[-1])[None])
    assert (dino.evaluator().names, moco.evaluator().names) == (("blocks2",), ("blocks1",))


def test_a_classifier_that_is_missing_or_does_not_fit_is_one_line(official, folder, capsys):
    path, _ = official
    backbone = ["--finetune", str(path / "dino_backbone.pth"), "--data-path", str(folder), "--num-workers", "0"]
    assert main.main([*OFFICIAL, *backbone]) == 2
    assert (
        "dino_backbone.pth: the checkpoint has no linear classifier; train one without --eval, or"
        in capsys.readouterr().err
    )
    assert main.main([*OFFICIAL, *backbone, "--classifier", str(path / "dino_linear.pth")]) == 2
    error = "the linear classifier is 5x48, but the data have 10 classes and the trunk's tokens 24 channels"
    assert error in capsys.readouterr().err
    assert main.main([*OFFICIAL, "--finetune", str(path / "dino_linear.pth"), "--data-path", str(folder)]) == 2
    assert "of DINO's linear probe, a classifier without its model; evaluate both by" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ recipes

LINEAR_DINO = {
    "task": "linear",
    "epochs": 100,
    "cooldown_epochs": 0,
    "total_batch": 1024,
    "batch_size": 128,
    "lr": 1e-3,
    "unscale_lr": False,
    "sched": "cosine",
    "sched_on_updates": False,
    "warmup_epochs": 0,
    "min_lr": 0.0,
    "opt": "momentum",
    "weight_decay": 0.0,
    "clip_grad": None,
    "hflip": 0.5,
    "eval_interpolation": "bicubic",
    "crop_pct": None,  # 256 -> 224
    "amp": "off",
    "sar_weight": 0.0,
    "drloc_weight": 0.0,
    "sampling_ratio": 1.0,
    "avgpool_patchtokens": False,
}
LINEAR_MOCO = LINEAR_DINO | {"epochs": 90, "lr": 3.0, "eval_interpolation": "bilinear"}
PROBES = {
    "linear_dino": (LINEAR_DINO, 4, 0.004),
    "linear_moco": (LINEAR_MOCO, 1, 12.0),
}
"""Protocols of linear probes, with the official number of blocks and learning rate, which come first."""


@pytest.mark.parametrize("name", PROBES)
def test_a_linear_probe_is_its_program_s(name):
    expected, blocks, peak = PROBES[name]
    words = [f"@{runs.ROOT}/recipes/{name}.args", "--resume", __file__]
    for data_set in ("digits", "cifar10"):  # their own defaults change nothing
        args = parse_arguments([*words, "--data-set", data_set, "--crop-pct", "0.5"])
        assert {key: vars(args)[key] for key in expected} == expected | {"crop_pct": 0.5}
    assert (args.probe_blocks[0], args.lr_factors[0]) == (blocks, 1)
    assert LinearClassification.peak_learning_rate(args) == pytest.approx(peak)
    text = (runs.ROOT / f"recipes/{name}.args").read_text()
    assert "Source: facebookresearch/" in text
    assert "Expected there: " in text


def test_the_defaults_of_the_linear_probe_are_dinos():
    defaults = default_arguments("linear")
    assert {key: defaults[key] for key in LINEAR_DINO} == LINEAR_DINO
    assert (defaults["probe_blocks"], defaults["lr_factors"]) == ([4], [1.0])
