"""DINO: its numbers against the official program's, and whole runs of it."""

import argparse
import dataclasses
import math
import re
import signal
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from helpers import image_sets, runs, selfsup
from torch import nn

import build
import checkpoints
import engine
import main
import models_sar
import tasks.dino
import utils
from analysis.models import load_model
from arguments import accumulation, parse_arguments
from losses import spatial_entropy
from schedules import Position
from tasks.dino import DINO, Centre, CrossEntropyOfCrops
from tasks.heads import BatchNorm, DINOHead
from tasks.options.dino import local_size
from weights import read_checkpoint, select_weights

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden"
EXACT = {"rtol": 0, "atol": 1e-10}
ALONE = utils.Processes(0, 1, torch.device("cpu"))
GOLDEN_HEAD = {"hidden_dim": 20, "bottleneck_dim": 8}
STEP = (
    "--task dino --model vit_tiny --input-size 16 --patch-size 4 --local-crops-number 3 "
    "--model-kwargs embed_dim=12 depth=2 num_heads=2 mlp_ratio=2 --drop-path 0 --data-set digits --num-workers 0 "
    "--out-dim 24 --epochs 4 --warmup-epochs 0 --lr 0.005 --unscale-lr --min-lr 1e-6 --momentum-teacher 0.9 "
    "--weight-decay 0.04 --weight-decay-end 0.4 --teacher-temp 0.07 --warmup-teacher-temp-epochs 2 --clip-grad 0.7 "
    "--freeze-last-layer 1 --print-every 1 --device cpu"
)


# -------------------------------------------------------------------------------------------- the mathematics


def loss_of(student, teacher, centre, temperature):
    """The loss of crop-major logits, as the task computes it."""
    targets = ((teacher - centre) / temperature).softmax(dim=-1).unflatten(0, (2, -1))
    return CrossEntropyOfCrops.apply(student.unflatten(0, (-1, targets.shape[1])), targets)


def test_the_loss_its_gradient_and_the_centre_are_the_official_ones(golden):
    content = golden("dino_losses.pt")
    centre = Centre(content["meta"]["out_dim"]).double()
    for step in content["steps"]:
        torch.testing.assert_close(centre.center, step["center_before"], **EXACT)
        student, teacher = step["student"].double().requires_grad_(), step["teacher"].double()
        loss = loss_of(student, teacher, centre.center, step["teacher_temp"])
        loss.backward()
        torch.testing.assert_close(loss.detach(), step["loss"], **EXACT)
        torch.testing.assert_close(student.grad, step["grad_student"], **EXACT)
        centre.begin()
        for part in teacher.split(1):  # in micro-batches
            centre.add(part)
        centre.update()
        torch.testing.assert_close(centre.center, step["center_after"], **EXACT)


def test_the_loss_without_local_crops():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 3, 7).double().requires_grad_(), torch.randn(2, 3, 7).double().softmax(-1)
    logs = (logits / 0.1).log_softmax(-1)
    expected = -(targets[1] * logs[0] + targets[0] * logs[1]).sum(-1).mean() / 2
    torch.testing.assert_close(CrossEntropyOfCrops.apply(logits, targets), expected, **EXACT)
    assert torch.autograd.gradcheck(lambda z: CrossEntropyOfCrops.apply(z, targets), logits)


@pytest.mark.parametrize("number", range(4))
def test_the_head_is_the_official_one(golden, number):
    case = golden("dino_head.pt")["cases"][number]
    config = case["config"]
    head = DINOHead(
        config["in_dim"],
        config["out_dim"],
        batch_norm=config["use_bn"],
        norm_last_layer=config["norm_last_layer"],
        layers=config["nlayers"],
        hidden_dim=config["hidden_dim"],
        bottleneck_dim=config["bottleneck_dim"],
    )
    head.load_state_dict(case["state_dict"])
    head.double()
    x = case["input"].double().requires_grad_()
    output = head(x)
    (output * case["cotangent"]).sum().backward()
    torch.testing.assert_close(output, case["output_f64"], **EXACT)
    torch.testing.assert_close(x.grad, case["grad_input_f64"], **EXACT)
    assert {name: p.requires_grad for name, p in head.named_parameters()} == case["requires_grad"]
    gradients = {name: p.grad for name, p in head.named_parameters() if p.grad is not None}
    torch.testing.assert_close(gradients, case["grads_f64"], **EXACT)
    for name, value in case.get("buffers_after", {}).items():
        torch.testing.assert_close(head.state_dict()[name].to(value), value, **EXACT)


def test_a_fresh_head_has_the_official_initial_values(golden):
    fresh = golden("dino_head.pt")["fresh"]
    selfsup.compare_fresh(dict(DINOHead(**fresh["config"]).named_parameters()), fresh["parameters"])


def test_the_schedules_are_the_official_ones(golden):
    for case in golden("dino_schedules.pt")["cases"].values():
        config = case["config"]
        words = f"{STEP} --lr {config['lr']} --epochs {config['epochs']} --warmup-epochs {config['warmup_epochs']}"
        words += f" --warmup-teacher-temp {config['warmup_teacher_temp']} --teacher-temp {config['teacher_temp']}"
        words += f" --warmup-teacher-temp-epochs {config['warmup_teacher_temp_epochs']}"
        words += f" --momentum-teacher {config['momentum']}"
        task = new_task(words)
        for index, iteration in enumerate(case["iterations"].tolist()):
            epoch, step = divmod(iteration, config["iterations_per_epoch"])
            schedule = task.schedule(Position(epoch, step, config["iterations_per_epoch"], config["epochs"]))
            assert schedule["lr"] == pytest.approx(case["lr"][index].item(), rel=1e-12, abs=0)
            assert schedule["weight_decay"] == pytest.approx(case["weight_decay"][index].item(), rel=1e-12)
            assert schedule["teacher_momentum"] == pytest.approx(case["momentum"][index].item(), rel=1e-12)
            assert schedule["teacher_temp"] == pytest.approx(case["teacher_temp_of_epoch"][epoch].item(), rel=1e-12)
            assert schedule["last_layer_frozen"] == (epoch == 0)


def test_positions_of_other_sizes_are_the_official_ones(golden):
    content = golden("dino_losses.pt")["positions"]
    for case in content["cases"]:
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            found = models_sar.scaled_positions(content["pos_embed"].to(dtype), tuple(case["grid"]))
            torch.testing.assert_close(found, case["result_f64"].to(dtype), rtol=0, atol=tolerance)


def test_multi_crop_is_the_official_one(golden):
    content = golden("dino_losses.pt")["multicrop"]
    config = content["config"]
    words = (
        f"{STEP} --input-size 32 --local-crops-size 12 --local-crops-number 3 "
        "--model-kwargs embed_dim=24 depth=2 num_heads=3 mlp_ratio=2 --out-dim 18"
    )
    task = new_task(words)
    assert config["head"] == GOLDEN_HEAD | {"out_dim": 18}
    task.model.load_state_dict(content["backbone_state_dict"])
    task.student_head.load_state_dict(content["head_state_dict"])
    outputs = in_float64(task)(batch_of(content["crops"]))
    torch.testing.assert_close(outputs["student"], content["output_f64"], **EXACT)


def test_a_fresh_backbone_has_the_official_initial_values(golden):
    fresh = golden("dino_step.pt")["fresh_backbone"]
    words = f"{STEP} --input-size 224 --patch-size 16 --drop-path 0.1 --model vit_small --model-kwargs"
    task = new_task(f"{words} embed_dim=128 depth=2 num_heads=4")
    selfsup.compare_fresh(dict(task.model.named_parameters()), fresh["parameters"])
    assert task.model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    blocks = new_task(f"{words} embed_dim=12 depth=12 num_heads=2").model.blocks
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx(fresh["drop_path_of_12_blocks_at_0.1"], abs=1e-6)


# ------------------------------------------------------------------------------- whole updates, by the engine


def new_task(words: str, kind: type[DINO] = DINO) -> DINO:
    """A task of these options, with the golden files' small head."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks.dino, "DINOHead", partial(DINOHead, **GOLDEN_HEAD))
        return kind(parse_arguments(words.split()), range(1000), torch.device("cpu"))


def in_float64(task: DINO) -> DINO:
    for network in task.teacher:
        network.double()
    return task.double().train()


def batch_of(crops):
    """The task's batch of a list of crops, global ones first."""
    batch = {"global_views": torch.stack(crops[:2], dim=1).double()}
    return batch | {"local_views": torch.stack(crops[2:], dim=1).double()}


class Watched(DINO):
    """Notes of every update what a test compares."""

    def begin_update(self, schedule):
        super().begin_update(schedule)
        self.updates = [*getattr(self, "updates", []), {"schedule": schedule, "losses": []}]

    def losses(self, outputs, batch):
        terms = super().losses(outputs, batch)
        self.updates[-1]["losses"].append(terms["dino"].item())
        return terms

    def finish_gradients(self, schedule):
        before = {name: p.grad.clone() for name, p in official_names(self).items() if p.grad is not None}
        super().finish_gradients(schedule)
        after = {name: p.grad for name, p in official_names(self).items() if p.grad is not None}
        clipped = {name for name, gradient in after.items() if not gradient.equal(before[name])}
        self.updates[-1] |= {"gradients": before, "clipped": clipped, "dropped": before.keys() - after.keys()}

    def end_update(self, schedule):
        super().end_update(schedule)
        heads = self.student_head, self.teacher[1]
        after = [weights_of(*networks) for networks in zip((self.model, self.averaged), heads, strict=True)]
        self.updates[-1] |= {"student": after[0], "teacher": after[1], "centre": self.centre.center.clone()}
        state = self.optimizer.state
        steps = {name: int(state[p]["step"]) for name, p in official_names(self).items() if p in state}
        self.updates[-1] |= {"optimizer_steps": steps}


def official_names(task: DINO) -> dict:
    """The student's parameters by their names in the official program."""
    return {
        **{f"backbone.{name}": parameter for name, parameter in task.model.named_parameters()},
        **{f"head.{name}": parameter for name, parameter in task.student_head.named_parameters()},
    }


def weights_of(backbone, head) -> dict[str, torch.Tensor]:
    parts = {"backbone": backbone, "head": head}
    return {f"{part}.{name}": w.clone() for part, module in parts.items() for name, w in module.state_dict().items()}


def strip(state: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): weight for name, weight in state.items() if name.startswith(prefix)}


def golden_run(content, split, processes=ALONE):
    """A run of the golden steps' arguments from their weights, and the micro-batches that this process gets.

    Args:
        split: ``split(crops)`` returns this process's micro-batches of one update.
    """
    # 1. the task, which starts from the official student
    steps = [split(step["crops"]) for step in content["steps"]]
    micro, rows = len(steps[0]), len(steps[0][0]["global_views"])
    words = f"{STEP} --batch-size {rows} --total-batch {rows * micro * processes.world_size}"
    args = parse_arguments(words.split())
    task = new_task(words, Watched)
    for prefix, networks in {
        "backbone": (task.model, task.averaged),
        "head": (task.student_head, task.teacher[1]),
    }.items():
        state = content["student_before"]
        state = {name.removeprefix(f"{prefix}."): w for name, w in state.items() if name.startswith(prefix)}
        for network in networks:
            network.load_state_dict(state)
    in_float64(task)
    # 2. the rest, with batches in place of a loader
    plan = build.build_plan(args, processes, DINO.data(args, "train", ALONE))
    plan = dataclasses.replace(plan, updates_per_epoch=content["config"]["iterations_per_epoch"])
    network, optimizer = build.wrap(task, plan, processes, compiled=False), build.build_optimizer(args, task)
    task.optimizer = optimizer
    scaler, stop, loader = torch.amp.GradScaler("cpu", enabled=False), utils.StopSignal(processes), selfsup.Batches()
    return engine.Run(vars(args), plan, processes, task, network, optimizer, scaler, loader, loader, stop), steps


def train_and_compare(content, run, steps):
    """Two epochs of two updates, each update compared with the official program's."""
    for epoch in (0, 1):
        run.epoch, run.step = epoch, 0
        run.loader[:] = steps[2 * epoch] + steps[2 * epoch + 1]
        engine.train_one_epoch(run)
    for expected, found in zip(content["steps"], run.task.updates, strict=True):
        # 1. what the update saw
        losses = run.processes.gather(torch.tensor(found["losses"], dtype=torch.float64))
        assert losses.mean().item() == pytest.approx(expected["loss"].item(), abs=1e-10)
        schedule = found["schedule"] | {"momentum": found["schedule"]["teacher_momentum"]}
        for name in ("lr", "weight_decay", "teacher_temp", "momentum"):
            assert schedule[name] == pytest.approx(expected[name], rel=1e-12)
        norms = {name: gradient.norm().item() for name, gradient in found["gradients"].items()}
        assert norms == pytest.approx(expected["gradient_norms_before_clipping"], abs=1e-10)
        for name, gradient in expected.get("gradients_before_clipping", {}).items():
            torch.testing.assert_close(found["gradients"][name], gradient, **EXACT)
        assert found["dropped"] == ({"head.last_layer.weight_v"} if expected["epoch"] == 0 else set())
        assert found["clipped"] == set(expected["clipped"]) - found["dropped"]
        # 2. what it left
        torch.testing.assert_close(found["centre"], expected["center_after"], **EXACT)
        assert found["optimizer_steps"] == expected["optimizer_steps"]
        for network in ("student", "teacher"):
            if f"{network}_after" in expected:
                compare_weights(found[network], expected[f"{network}_after"])


def compare_weights(found, expected):
    """The key part of a bias of queries, keys and values has gradient 0 but for rounding, which Adam enlarges."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = 1e-7 if name.endswith("attn.qkv.bias") else 1e-9
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance)


def whole(crops):
    return [batch_of(crops)]


def one_by_one(crops):
    return [batch_of([crop[row : row + 1] for crop in crops]) for row in range(3)]


@pytest.mark.parametrize("split", [whole, one_by_one], ids=["one micro-batch", "three"])
def test_updates_are_the_official_ones(golden, split):
    content = golden("dino_step.pt")
    train_and_compare(content, *golden_run(content, split))


def test_the_parameter_groups_are_the_official_ones(golden):
    content = golden("dino_step.pt")
    run, _ = golden_run(content, whole)
    names = {parameter: name for name, parameter in official_names(run.task).items()}
    decayed, others = ({names[p] for p in group["params"]} for group in run.optimizer.param_groups)
    assert decayed == set(content["parameter_groups"]["decayed"])
    assert others == set(content["parameter_groups"]["not_decayed"])
    schedule = engine.set_schedule(run)
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [schedule["weight_decay"], 0]


def rolled(crops, rank):
    """As `one_by_one`, in another order on every rank."""
    batches = one_by_one(crops)
    return batches[rank:] + batches[:rank]


def compare_on_two_processes(rank: int) -> None:
    """On one of two processes: the official loss of two, updates with and without accumulation, a BatchNorm."""
    losses, step = (torch.load(GOLDEN / f"dino_{name}.pt", weights_only=True) for name in ("losses", "step"))
    processes = utils.start_processes("cpu")
    # 1. each rank's loss and gradient, and one centre
    world = losses["world"]
    own, centre = world["ranks"][rank], Centre(losses["meta"]["out_dim"]).double()
    centre.center.copy_(world["center_before"])
    student, teacher = own["student"].double().requires_grad_(), own["teacher"].double()
    loss = loss_of(student, teacher, centre.center, world["teacher_temp"])
    loss.backward()
    torch.testing.assert_close(loss.detach(), own["loss"], **EXACT)
    torch.testing.assert_close(student.grad, own["grad_student"], **EXACT)
    centre.begin()
    centre.add(teacher)
    centre.update()
    torch.testing.assert_close(centre.center, world["center_after"], **EXACT)
    # 2. whole updates: both see all three images, in another order
    accumulated = golden_run(step, partial(rolled, rank=rank), processes)
    assert accumulated[0].plan.accumulation == 3
    train_and_compare(step, *accumulated)
    at_once = golden_run(step, lambda crops: whole([crop.roll(rank, 0) for crop in crops]), processes)
    assert at_once[0].network.static_graph
    train_and_compare(step, *at_once)
    # 3. batch normalisation of both processes' rows
    compare_batch_norm(rank)
    utils.end_processes()


def compare_batch_norm(rank: int) -> None:
    """Half of the rows here are as all of them in torch's."""
    torch.manual_seed(0)
    x, cotangent = torch.randn(8, 5).double() + 3, torch.randn(8, 5).double()
    ours, theirs = BatchNorm(5).double(), nn.BatchNorm1d(5).double()
    rows = slice(4 * rank, 4 * rank + 4)
    own, every = x[rows].requires_grad_(), x.clone().requires_grad_()
    output, expected = ours(own), theirs(every)
    (output * cotangent[rows]).sum().backward()
    (expected * cotangent).sum().backward()
    torch.testing.assert_close(output, expected[rows], **EXACT)
    torch.testing.assert_close(own.grad, every.grad[rows], **EXACT)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **EXACT)


def test_two_processes_are_the_official_program():
    assert runs.on_two_processes(compare_on_two_processes) == [0, 0]


# ------------------------------------------------------------------------------------------------- whole runs

SMALL = (
    "--task dino --data-set folder --model vit_tiny_sar --input-size 16 --patch-size 4 --local-crops-number 2 "
    "--model-kwargs embed_dim=24 depth=2 num_heads=3 --num-workers 0 --batch-size 24 --total-batch 24 --epochs 3 "
    "--sampling-ratio 0.5 "
    "--warmup-epochs 1 --lr 4e-3 --out-dim 64 --use-bn-in-head --drop 0.1 --drop-path 0.2 --sar-weight 0.1 "
    "--sar-views all --print-every 3 --global-crops-scale 0.5 1 --local-crops-scale 0.2 0.5 --no-norm-last-layer"
)
WITHOUT_NOISE = "--drop 0 --drop-path 0"


def small_heads(rank: int = 0) -> None:
    tasks.dino.DINOHead = partial(DINOHead, **GOLDEN_HEAD)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train the small run in processes of its own; see ``runs.Child``."""
    folder = tmp_path_factory.mktemp("dino")
    child = runs.Child(runs.write_digits(folder / "digits"), folder / "text")
    child.words = SMALL.split()
    return partial(child, everywhere=small_heads)


@pytest.fixture(scope="module")
def here(run):
    """Train it into a folder in this process; returns what it leaves."""

    def train(output, *more):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tasks.dino, "DINOHead", partial(DINOHead, **GOLDEN_HEAD))
            assert main.main(runs.folders(SMALL.split(), run.func.data, output, *more)) == 0
        return runs.content(output)

    return train


@pytest.fixture(scope="module")
def whole_run(here, tmp_path_factory):
    return here(tmp_path_factory.mktemp("whole"))


def test_a_run_logs_what_shows_a_collapse_and_picks_the_teacher_by_k_nn(whole_run):
    first, *_, last = whole_run["log.txt"]
    assert last["train_loss"] == pytest.approx(last["train_dino"] + 0.1 * last["train_spatial_entropy"])
    assert last["train_dino"] == pytest.approx(last["train_teacher_entropy"] + last["train_kl"])
    assert 0 < last["train_teacher_entropy"] < math.log(64)
    assert 0 < last["train_feature_deviation"] < 1.1
    assert last["train_centre_norm"] > first["train_centre_norm"] > 0
    assert (first["train_last_layer_frozen"], last["train_last_layer_frozen"]) == (1, 0)
    best = whole_run["best.pth"]["best"]
    assert best["weights"] == "teacher"
    assert best["knn20"] == max(line["test_teacher_knn20"] for line in whole_run["log.txt"])
    assert not any(name.startswith("test_knn") for line in whole_run["log.txt"] for name in line)


def test_killed_it_goes_on_bit_for_bit(run, whole_run, tmp_path):
    assert run(tmp_path, before=runs.killed_at_update(runs.UPDATES + 2)) == -signal.SIGKILL
    assert run(tmp_path, before=runs.killed_at_update(2, by=signal.SIGTERM)) == 0
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["step"] == 2
    assert run(tmp_path) == 0
    runs.assert_identical(runs.content(tmp_path), whole_run)


def test_killed_in_k_nn_and_between_two_files_it_goes_on_bit_for_bit(run, whole_run, tmp_path):
    in_knn = runs.at_call("tasks.knn", "pooled_features", 3, runs.send(signal.SIGKILL))
    for kill in (in_knn, runs.killed_at_replace(5, after=True)):
        assert run(tmp_path, before=kill) == -signal.SIGKILL
    assert run(tmp_path) == 0
    runs.assert_identical(runs.content(tmp_path), whole_run)


def test_two_processes_train_as_one_does(run, here, tmp_path):
    alone = here(tmp_path / "one", *WITHOUT_NOISE.split())
    assert run(tmp_path / "two", *WITHOUT_NOISE.split(), "--batch-size", "12", ranks=2) == 0
    for one, two in zip(alone["log.txt"], runs.content(tmp_path / "two")["log.txt"], strict=True):
        for name in ("dino", "spatial_entropy", "centre_norm", "teacher_entropy"):
            assert two[f"train_{name}"] == pytest.approx(one[f"train_{name}"], rel=2e-3), name


IN_PROCESS = SMALL.replace("--data-set folder", "--data-set digits --sampling-ratio 0.1 --device cpu")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(tasks.dino, "DINOHead", partial(DINOHead, **GOLDEN_HEAD))


def test_a_flat_folder_without_classes_trains_and_says_what_it_cannot_do(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(DINO, "warning", lambda task, means: f"{means['dino']:.3f} is ln K")
    for number in range(6):
        image_sets.picture(number).save(tmp_path / f"{number}.png")
    words = f"{IN_PROCESS} --data-set images --data-path {tmp_path} --sampling-ratio 1 --epochs 1 --warmup-epochs 0"
    output = tmp_path / "output"
    assert main.main([*words.split(), "--batch-size", "6", "--total-batch", "6", "--output-dir", str(output)]) == 0
    text = capsys.readouterr().out
    assert "evaluation  none: the images have no classes, so there is no k-NN accuracy" in text
    assert re.search(r"^\d\.\d+ is ln K$", text, re.MULTILINE)
    assert sorted(path.name for path in output.glob("*.pth")) == ["checkpoint.pth"]
    _, key = select_weights(read_checkpoint(output / "checkpoint.pth"))
    assert key == "teacher", "also where nothing was evaluated"
    assert main.main(["--eval", "--resume", str(output / "checkpoint.pth")]) == 2
    assert "--data-set images has no classes to evaluate with" in capsys.readouterr().err


def test_a_new_run_starts_both_networks_from_given_weights(small, tmp_path):
    torch.manual_seed(1)
    state = new_task(IN_PROCESS).model.state_dict()
    state["cls_token"] = torch.ones_like(state["cls_token"])
    torch.save({"model": state}, tmp_path / "vit.pth")
    run = runs.build(IN_PROCESS)
    checkpoints.start_or_resume(run, finetune=str(tmp_path / "vit.pth"))
    for backbone in (run.task.model, run.task.averaged):
        assert (backbone.cls_token == 1).all()


@pytest.mark.parametrize("out_dim", [24, 25])
def test_a_new_run_goes_on_with_both_networks_of_an_official_run(golden, tmp_path, out_dim):
    content = golden("dino_step.pt")["steps"][3]
    student = {f"module.{name}": weight for name, weight in content["student_after"].items()}
    official = {"student": student, "teacher": content["teacher_after"], "epoch": 2}
    official |= {"dino_loss": {"center": content["center_after"]}, "args": argparse.Namespace(arch="vit_tiny")}
    torch.save(official, tmp_path / "dino.pth")
    task = new_task(f"{STEP} --out-dim {out_dim}")
    in_float64(task)
    fresh = task.student_head.last_layer.weight_v.clone()
    *_, note = task.start_from(str(tmp_path / "dino.pth"), None)
    torch.testing.assert_close(task.averaged.state_dict(), strip(content["teacher_after"], "backbone."), **EXACT)
    torch.testing.assert_close(task.model.state_dict(), strip(content["student_after"], "backbone."), **EXACT)
    if out_dim == 24:
        assert note == "student and teacher with projection heads and centre"
        torch.testing.assert_close(task.student_head.state_dict(), strip(content["student_after"], "head."), **EXACT)
        torch.testing.assert_close(task.teacher[1].state_dict(), strip(content["teacher_after"], "head."), **EXACT)
        torch.testing.assert_close(task.centre.center, content["center_after"], **EXACT)
    else:
        assert note.startswith("projection heads and centre start anew")
        assert torch.equal(task.student_head.last_layer.weight_v, fresh)


def test_a_new_run_goes_on_with_the_networks_of_a_run_of_this_program(small, tmp_path):
    run = runs.build(f"{IN_PROCESS} --output-dir {tmp_path}")
    engine.train_one_epoch(run)
    checkpoints.save(run, "checkpoint.pth")
    analysed = load_model(tmp_path / "checkpoint.pth").model
    runs.assert_identical(dict(analysed.state_dict()), dict(run.task.averaged.state_dict()), "the analysis")
    other = runs.build(f"{IN_PROCESS} --seed 1 --output-dir {tmp_path / 'other'}")
    checkpoints.start_or_resume(other, finetune=str(tmp_path / "checkpoint.pth"))
    for name, module in checkpoints.saved_modules(run.task).items():
        runs.assert_identical(checkpoints.saved_modules(other.task)[name].state_dict(), module.state_dict(), name)
    assert (other.epoch, other.step) == (0, 0)


def test_which_maps_enter_the_loss(small):
    """All: a mean over the maps of all crops. The teacher has none, and no gradients."""
    torch.manual_seed(0)
    batch = {"global_views": torch.randn(4, 2, 3, 16, 16), "local_views": torch.randn(4, 2, 3, 8, 8)}
    maps = {}
    for views in ("global", "all"):
        task = new_task(f"{IN_PROCESS} {WITHOUT_NOISE} --sar-views {views}").train()
        outputs = task(batch)
        maps[views] = outputs["similarity"]
        term = engine.regularisers(outputs, "spatial-entropy")["spatial_entropy"]
        assert term.requires_grad
        assert not outputs["teacher"].requires_grad
    assert maps["global"].shape == (8, 3, 4, 4)
    assert [part.shape for part in maps["all"]] == [(8, 3, 4, 4), (8, 3, 2, 2)]
    torch.testing.assert_close(maps["all"][0], maps["global"])
    each = torch.cat([spatial_entropy(part)[0] for part in maps["all"]])
    torch.testing.assert_close(term, each.mean())


def test_heads_and_loss_are_float32_inside_autocast(small):
    task = new_task(f"{IN_PROCESS} {WITHOUT_NOISE}")
    batch = {"global_views": torch.randn(2, 2, 3, 16, 16)}
    schedule = task.schedule(Position(0, 0, 1, 3))
    task.begin_update(schedule)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = task(batch)
        loss = task.losses(outputs, batch)["dino"]
    assert outputs["student"].dtype == outputs["teacher"].dtype == loss.dtype == torch.float32
    assert outputs["features"].dtype == torch.bfloat16, "the backbone is not"


def test_a_collapse_is_said_in_words(small):
    task = new_task(IN_PROCESS)
    uniform = math.log(64)
    assert "the loss is ln K = 4.1589" in task.warning({"dino": uniform, "teacher_entropy": uniform - 1e-4})
    assert not task.warning({"dino": uniform, "teacher_entropy": uniform - 0.1}), "as in the first updates"
    assert not task.warning({"dino": uniform + 0.1, "teacher_entropy": uniform})


def test_the_banner_says_what_to_expect(small):
    task = new_task(f"{IN_PROCESS} --local-crops-number 0")
    assert task.notes() == {
        "views": "2 x 16 px (area 0.5 to 1)",
        "prototypes": "64; a loss that stays at ln K = 4.16 is a collapse",
        "expected": "the loss rises when the last layer is free (epoch 1), then falls; it does not measure quality, "
        "knn20 does",
    }
    notes = new_task(f"{IN_PROCESS} --out-dim 4097 --freeze-last-layer 0").notes()
    assert notes["views"].endswith(" + 2 x 8 px (area 0.2 to 0.5)")
    assert notes["prototypes"].endswith("which is likely with 1,000 images: see recipes/dino_small.args")
    assert notes["expected"].startswith("the loss falls; ")


def test_attention_is_drawn_of_validation_images(small, tmp_path):
    words = f"{IN_PROCESS} --epochs 1 --warmup-epochs 0 --log-attention 1 --output-dir {tmp_path}"
    assert main.main(words.split()) == 0


def test_the_learning_rate_refers_to_256_images():
    args = parse_arguments("--task dino --data-path x".split())
    assert DINO.peak_learning_rate(args) == 1e-3
    assert (args.model, args.total_batch, args.clip_grad, args.out_dim) == ("vit_small", 512, 3.0, 65536)
    assert (args.sar_weight, args.last_block) == (0, "standard")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--mixup 0.8", "no option --mixup"),
        ("--model swin_tiny", "--model swin_tiny: --task dino trains ViTs"),
        ("--drloc-weight 1", "--drloc-weight: --task dino has no DRLoc loss"),
        ("--sched constant", "--sched, --no-sched-on-updates and --cooldown-epochs: leave them out"),
        ("--local-crops-size 90", "--local-crops-size 90 is not divisible by --patch-size 16"),
        ("--local-crops-size 240", "--local-crops-size 240 is larger than the global crops, --input-size 224"),
        ("--local-crops-scale 0.4 0.05", "--local-crops-scale 0.4 0.05: the smaller area comes first"),
        ("--model vit_small_sar --sar-views all --local-crops-size 16", "--sar-views all: a local crop of 16 px"),
    ],
)
def test_arguments_that_cannot_work_are_one_line(words, message):
    with pytest.raises(utils.UserError, match=re.escape(message)):
        parse_arguments(f"--task dino --data-path x --patch-size 16 {words}".split())


def test_batch_normalisation_forbids_accumulation():
    args = parse_arguments("--task dino --data-path x --use-bn-in-head".split())
    message = "--batch-size 64 x 4 processes is not --total-batch 512: --use-bn-in-head normalises over the images"
    with pytest.raises(utils.UserError, match=f"{message}.* give --batch-size 128, or --total-batch 256"):
        accumulation(args, 4)
    assert accumulation(args, 8) == 1


def test_without_clipping_gradients_stay_as_they_are(small):
    task = new_task(f"{IN_PROCESS} --clip-grad 0")
    for parameter in task.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    task.finish_gradients({"last_layer_frozen": 0})
    assert all((parameter.grad == 7).all() for parameter in task.parameters())


def test_dinos_positions_are_an_option_of_every_vit():
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    model = timm.create_model("vit_tiny_sar", positions="dino", **sizes)
    features, similarity = model(torch.randn(2, 3, 48, 16), return_similarity=True)
    assert (features.shape, similarity.shape) == ((2, 24), (2, 3, 6, 2))
    with pytest.raises(ValueError, match="positions='dinner' is unknown; choose one of timm, dino"):
        timm.create_model("vit_tiny_sar", positions="dinner", **sizes)


# --------------------------------------------------------------------------------------------------- the recipes

OFFICIAL = {  # facebookresearch/dino, main_dino.py
    "task": "dino",
    "data_set": "imagenet",
    "input_size": 224,
    "patch_size": 16,
    "total_batch": 512,
    "peak_lr": 1e-3,
    "min_lr": 1e-6,
    "warmup_epochs": 10,
    "warmup_lr": 0.0,
    "epochs": 100,
    "opt": "adamw",
    "opt_eps": 1e-8,
    "opt_betas": None,
    "weight_decay": 0.04,
    "weight_decay_end": 0.4,
    "clip_grad": 3.0,
    "drop": 0.0,
    "drop_path": 0.1,
    "global_crops_scale": [0.4, 1.0],
    "local_crops_number": 8,
    "local_crops_scale": [0.05, 0.4],
    "local_side": 96,
    "out_dim": 65536,
    "norm_last_layer": True,
    "use_bn_in_head": False,
    "momentum_teacher": 0.996,
    "warmup_teacher_temp": 0.04,
    "teacher_temp": 0.04,
    "warmup_teacher_temp_epochs": 0,
    "freeze_last_layer": 1,
    "sar_weight": 0.01,
    "sar_schedule": "constant",
    "sar_loss": "spatial-entropy",
    "sar_views": "global",
    "last_block": "sar",
}
TABLE12 = OFFICIAL | {"data_set": "imagenet100", "epochs": 300, "local_crops_number": 10}
BOOSTED = {"teacher_temp": 0.07, "warmup_teacher_temp_epochs": 30, "norm_last_layer": False}
SMALL_SET = {"out_dim": 1024, "momentum_teacher": 0.99, "warmup_teacher_temp": 0.02, "teacher_temp": 0.02}
RECIPES = {
    "dino": OFFICIAL,
    "dino_in100": TABLE12,
    "dino_in100_boosted": TABLE12 | BOOSTED,
    "dino_small": OFFICIAL | SMALL_SET | {"total_batch": 256, "peak_lr": 5e-4, "epochs": 300},
}


def resolved(*words: str) -> argparse.Namespace:
    return parse_arguments([*words, "--model", "vit_small_sar", "--data-path", "x"])


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_its_protocol(name):
    args = resolved(f"@{ROOT}/recipes/{name}.args")
    found = vars(args) | {"peak_lr": DINO.peak_learning_rate(args), "local_side": local_size(args)}
    assert {key: found[key] for key in RECIPES[name]} == RECIPES[name]
    text = (ROOT / f"recipes/{name}.args").read_text()
    assert "# Source: " in text
    assert name == "dino" or text.startswith(("@dino.args", "@dino_in100.args"))


def test_the_official_recipe_is_the_default():
    defaults, named = vars(resolved("--task", "dino")), vars(resolved(f"@{ROOT}/recipes/dino.args"))
    assert {key for key in named if named[key] != defaults[key]} == {"eval_every"}
