"""MoCo-v3: its numbers against the official program's, and whole runs of it."""

import dataclasses
import math
import re
import signal
from pathlib import Path

import pytest
import torch
from helpers import image_sets, runs, selfsup
from torch import nn

import build
import checkpoints
import engine
import main
import tasks.moco
import utils
from analysis.models import load_model
from arguments import accumulation, parse_arguments
from losses import spatial_entropy
from schedules import Position
from tasks.heads import MoCoHead
from tasks.moco import MoCo, contrast_logits, contrastive_loss, fixed_positions
from weights import read_checkpoint, select_weights

ROOT, GOLDEN = Path(__file__).parents[1], Path(__file__).parent / "golden"
EXACT = {"rtol": 0, "atol": 1e-10}
ALONE = utils.Processes(0, 1, torch.device("cpu"))
STEP = (
    "--task moco --model vit_tiny --input-size 16 --patch-size 4 --data-set digits --num-workers 0 "
    "--model-kwargs embed_dim=12 depth=2 num_heads=3 mlp_ratio=2 --moco-dim 8 --moco-mlp-dim 20 --moco-t 0.2 "
    "--epochs 3 --warmup-epochs 1 --lr 0.004 --unscale-lr --moco-m 0.9 --weight-decay 0.1 --print-every 1 --device cpu"
)


# -------------------------------------------------------------------------------------------- the mathematics


def test_the_loss_and_its_gradient_are_the_official_ones(golden):
    for case in golden("mocov3_losses.pt")["contrastive"]:
        queries, keys, temperature = case["q"].double().requires_grad_(), case["k"].double(), case["T"]
        loss = contrastive_loss(contrast_logits(queries, keys, temperature), temperature)
        loss.backward()
        torch.testing.assert_close(loss.detach(), case["loss"], **EXACT)
        torch.testing.assert_close(queries.grad, case["grad_q"], **EXACT)


class Body(nn.Module):
    """The golden file's encoder before its head; see `test_a_models_step_is_the_official_one`."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.body, self.num_features = nn.Linear(inputs, width), width

    def forward(self, x):
        return nn.functional.gelu(self.body(x.flatten(1)))


def test_a_models_step_is_the_official_one(golden, monkeypatch):
    """A forward and backward pass of the task around another encoder: what it computes, moves and leaves alone."""
    content = golden("mocov3_losses.pt")["model_step"]
    config, before = content["config"], content["state_dict_before"]
    monkeypatch.setattr(tasks.moco, "build_backbone", lambda args, device: Body(config["inp"], config["width"]))
    words = f"{STEP} --moco-dim {config['dim']} --moco-mlp-dim {config['mlp_dim']} --moco-m {config['m']}"
    task = in_float64(load(new_task(f"{words} --moco-t {config['T']} --no-moco-m-cos"), before))
    batch = {"views": torch.stack([content["x1"], content["x2"]], dim=1)[..., None, None].double()}
    noted = note_outputs(task)
    task.begin_update(task.schedule(Position(0, 0, 1, 1)))
    terms = task.losses(task(batch), batch)
    terms["moco"].backward()
    torch.testing.assert_close(terms["moco"].detach(), content["loss"], **EXACT)
    for name, found in zip(("q1", "q2", "k1", "k2"), noted, strict=True):
        torch.testing.assert_close(found.detach(), content[name], **EXACT)
    torch.testing.assert_close(state_of(task), without_counts(content["state_dict_after"]), **EXACT)
    gradients = {name: weight.grad for name, weight in official_names(task).items()}
    torch.testing.assert_close({k: v for k, v in gradients.items() if v is not None}, content["grads"], **EXACT)
    assert all(weight.grad is None for network in task.momentum_encoder for weight in network.parameters())


def note_outputs(task: MoCo) -> list[torch.Tensor]:
    """What predictor and momentum projector return from now on, in order."""
    noted: list[torch.Tensor] = []
    for head in (task.predictor, task.momentum_encoder[1]):
        head.register_forward_hook(lambda module, inputs, output: noted.append(output))
    return noted


def test_the_schedules_are_the_official_ones(golden):
    for case in golden("mocov3_losses.pt")["schedules"].values():
        config = case["config"]
        words = f"{STEP} --lr {config['lr']} --epochs {config['epochs']} --warmup-epochs {config['warmup_epochs']}"
        task, constant = (new_task(f"{words} --moco-m {config['moco_m']} {more}") for more in ("", "--no-moco-m-cos"))
        for index, (epoch, step) in enumerate(case["epoch_and_step"].tolist()):
            position = Position(epoch, step, config["iterations_per_epoch"], config["epochs"])
            schedule = task.schedule(position)
            assert schedule["lr"] == pytest.approx(case["lr"][index].item(), rel=1e-12, abs=0)
            assert schedule["momentum"] == pytest.approx(case["momentum"][index].item(), rel=1e-12)
            assert constant.schedule(position)["momentum"] == config["moco_m"]


def test_positions_are_the_official_ones_and_follow_the_rows_of_any_grid(golden):
    for case in golden("mocov3_step.pt")["sincos"]:
        expected = case["pos_embed"]
        found = fixed_positions(tuple(case["grid"]), case["dim"])
        torch.testing.assert_close(found, expected[0, 1:], rtol=0, atol=1e-6)
        assert not expected[0, 0].any()
    square, oblong = (fixed_positions(grid, 8).unflatten(0, grid) for grid in ((5, 5), (3, 5)))
    assert torch.equal(oblong, square[:3])


@pytest.mark.parametrize("option", ["--stop-grad-conv1", "--no-stop-grad-conv1"])
def test_fresh_networks_have_the_official_initial_values(golden, option):
    fresh = golden("mocov3_step.pt")["fresh"]
    config = fresh["config"]
    words = (
        f"{STEP} --input-size {config['img_size']} --patch-size {config['patch_size']} {option} "
        f"--moco-dim {config['dim']} --moco-mlp-dim {config['mlp_dim']} --model-kwargs embed_dim={config['embed_dim']} "
        f"depth={config['depth']} num_heads={config['num_heads']} mlp_ratio={config['mlp_ratio']}"
    )
    task = new_task(words)
    found, expected = official_names(task), fresh["parameters"]
    selfsup.compare_fresh(found, expected)
    frozen = {name for name, values in expected.items() if not values["requires_grad"]}
    frozen = (frozen if option == "--stop-grad-conv1" else set()) | {"base_encoder.pos_embed"}
    assert {name for name, weight in found.items() if not weight.requires_grad} == frozen
    for momentum, base in zip(task.momentum_encoder, (task.model, task.base_projector), strict=True):
        runs.assert_identical(dict(momentum.state_dict()), dict(base.state_dict()))
        assert not any(weight.requires_grad for weight in momentum.parameters())


def test_the_networks_of_vit_small_are_the_official_ones(golden):
    layout = golden("mocov3_step.pt")["checkpoint_layout_vit_small"]
    with torch.device("meta"):
        heads = MoCoHead(384, 4096, 256, layers=3), MoCoHead(256, 4096, 256, layers=2)
    for head, prefix in zip(heads, ("base_encoder.head.", "predictor."), strict=True):
        shapes = {f"{prefix}{name}": list(weight.shape) for name, weight in head.state_dict().items()}
        assert shapes == {name: list(shape) for name, shape in layout["state_dict"].items() if name.startswith(prefix)}
    assert [sum(map(torch.numel, head.parameters())) for head in heads] == [
        layout["counts"]["projector"],
        layout["counts"]["predictor"],
    ]


# ------------------------------------------------------------------------------- whole updates, by the engine


def new_task(words: str, kind: type[MoCo] = MoCo) -> MoCo:
    return kind(parse_arguments(words.split()), range(1000), torch.device("cpu"))


def in_float64(task: MoCo) -> MoCo:
    for network in task.momentum_encoder:
        network.double()
    return task.double().train()


def networks(task: MoCo) -> dict[str, nn.Module]:
    """All networks, by the prefixes of their weights in the official program."""
    momentum, momentum_projector = task.momentum_encoder
    return {
        "base_encoder.": task.model,
        "base_encoder.head.": task.base_projector,
        "momentum_encoder.": momentum,
        "momentum_encoder.head.": momentum_projector,
        "predictor.": task.predictor,
    }


def official_names(task: MoCo) -> dict[str, torch.Tensor]:
    """The parameters of base encoder and predictor by their names in the official program."""
    parts = networks(task).items()
    return {
        prefix + name: weight
        for prefix, network in parts
        if not prefix.startswith("momentum")
        for name, weight in network.named_parameters()
    }


def state_of(task: MoCo) -> dict[str, torch.Tensor]:
    """All weights and statistics by their names in the official program, copied."""
    states = {prefix + k: v.clone() for prefix, net in networks(task).items() for k, v in net.state_dict().items()}
    return without_counts(states)


def without_counts(state: dict) -> dict:
    """Without BatchNorm's counters, which have no effect."""
    return {name: weight for name, weight in state.items() if not name.endswith("num_batches_tracked")}


def load(task: MoCo, state: dict) -> MoCo:
    """Load official weights, strictly."""
    parts = networks(task)
    for prefix, network in parts.items():
        longer = [other for other in parts if other != prefix and other.startswith(prefix)]
        names = [name for name in state if name.startswith(prefix) and not name.startswith(tuple(longer))]
        network.load_state_dict({name.removeprefix(prefix): state[name] for name in names})
    return task


class Watched(MoCo):
    """Notes of every update what a test compares."""

    def begin_update(self, schedule):
        self.updates = [*getattr(self, "updates", []), {"schedule": schedule, "before": state_of(self)}]
        super().begin_update(schedule)
        self.updates[-1]["momentum"] = state_of(self)

    def losses(self, outputs, batch):
        terms = super().losses(outputs, batch)
        self.updates[-1]["loss"] = terms["moco"].detach()
        return terms

    def finish_gradients(self, schedule):
        super().finish_gradients(schedule)
        gradients = {name: p.grad.clone() for name, p in official_names(self).items() if p.grad is not None}
        self.updates[-1]["gradients"] = gradients

    def end_update(self, schedule):
        super().end_update(schedule)
        self.updates[-1]["after"] = state_of(self)


def golden_run(content, processes=ALONE):
    """A run of the golden steps' arguments from their weights, and its batches."""
    # 1. the task, which starts from the official networks
    batches = [{"views": torch.stack(step["views"], dim=1).double()} for step in content["steps"]]
    rows = len(batches[0]["views"])
    args = parse_arguments([*STEP.split(), f"--batch-size={rows}", f"--total-batch={rows * processes.world_size}"])
    task = in_float64(load(new_task(STEP, Watched), content["state_dict_before"]))
    # 2. the rest, with batches in place of a loader
    plan = build.build_plan(args, processes, MoCo.data(args, "train", ALONE))
    plan = dataclasses.replace(plan, updates_per_epoch=content["config"]["iterations_per_epoch"])
    network, optimizer = build.wrap(task, plan, processes, compiled=False), build.build_optimizer(args, task)
    scaler, stop, loader = torch.amp.GradScaler("cpu", enabled=False), utils.StopSignal(processes), selfsup.Batches()
    return engine.Run(vars(args), plan, processes, task, network, optimizer, scaler, loader, loader, stop), batches


def train(run, batches):
    """Two epochs of two updates."""
    for epoch in (0, 1):
        run.epoch, run.step = epoch, 0
        run.loader[:] = batches[2 * epoch : 2 * epoch + 2]
        engine.train_one_epoch(run)
    return run.task.updates


def test_updates_are_the_official_ones(golden):
    content = golden("mocov3_step.pt")
    for expected, found in zip(content["steps"], train(*golden_run(content)), strict=True):
        assert found["loss"].item() == pytest.approx(expected["loss"].item(), abs=1e-10)
        assert found["schedule"]["lr"] == pytest.approx(expected["lr"], rel=1e-12)
        assert found["schedule"]["momentum"] == pytest.approx(expected["momentum"], rel=1e-12)
        norms = {name: gradient.norm().item() for name, gradient in found["gradients"].items()}
        assert norms == pytest.approx(expected["gradient_norms"], abs=1e-10)
        for name, gradient in expected.get("gradients", {}).items():
            torch.testing.assert_close(found["gradients"][name], gradient, **EXACT)
        for name, value in without_counts(expected["some_after"] | expected.get("state_dict_after", {})).items():
            torch.testing.assert_close(found["after"][name], value, rtol=0, atol=tolerance(name))


def tolerance(name: str) -> float:
    """Adam enlarges the rounding of gradients that are 0: a BatchNorm takes these weights' effect away."""
    constants = ("attn.qkv.bias", "encoder.norm.bias", "head.1.running_mean")
    return 1e-7 if name.endswith(constants) else 1e-9


def test_momentum_follows_the_base_of_before_the_step_and_only_what_is_trained(golden):
    content = golden("mocov3_step.pt")
    run, batches = golden_run(content)
    run.task.averaged.patch_embed.proj.bias.data += 1  # a difference that no average may touch
    for update in train(run, batches):
        m, before, after = update["schedule"]["momentum"], update["before"], update["after"]
        for name in content["trainable"]:
            if name.startswith("base_encoder."):
                of_momentum = name.replace("base_encoder", "momentum_encoder")
                expected = m * before[of_momentum] + (1 - m) * before[name]
                torch.testing.assert_close(update["momentum"][of_momentum], expected, **EXACT)
                assert torch.equal(after[of_momentum], update["momentum"][of_momentum])
        for name in ("patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed"):
            for encoder in ("base_encoder", "momentum_encoder"):
                assert torch.equal(after[f"{encoder}.{name}"], before[f"{encoder}.{name}"])
    assert set(update["gradients"]) == set(content["trainable"])


def test_all_that_is_trained_decays(golden):
    content = golden("mocov3_step.pt")
    run, _ = golden_run(content)
    (group,) = run.optimizer.param_groups
    names = {parameter: name for name, parameter in official_names(run.task).items()}
    assert {names[parameter] for parameter in group["params"]} == set(content["trainable"])
    assert group["weight_decay"] == content["weight_decay_of_all"]


def compare_on_two_processes(rank: int) -> None:
    """On one of two processes: the official losses of two, and whole updates against those of one process."""
    losses, step = (torch.load(GOLDEN / f"mocov3_{name}.pt", weights_only=True) for name in ("losses", "step"))
    # 1. one process on all ten images of an update, before this process has met the other
    for one in step["steps"]:
        one["views"] = [torch.cat([view, view.flip(0, 3) + 0.1]) for view in one["views"]]
    alone = train(*golden_run(step))
    processes = utils.start_processes("cpu")
    # 2. each rank's loss and gradient
    world = losses["world"]
    own = world["ranks"][rank]
    queries = own["q"].double().requires_grad_()
    loss = contrastive_loss(contrast_logits(queries, own["k"].double(), world["T"]), world["T"])
    loss.backward()
    torch.testing.assert_close(loss.detach(), own["loss"], **EXACT)
    torch.testing.assert_close(queries.grad, own["grad_q"], **EXACT)
    # 3. whole updates of five images each: losses, gradients, statistics and weights of both encoders
    for one in step["steps"]:
        one["views"] = [view[5 * rank : 5 * rank + 5] for view in one["views"]]
    run, batches = golden_run(step, processes)
    assert run.network.static_graph
    for expected, found in zip(alone, train(run, batches), strict=True):
        assert processes.gather(found["loss"]).mean().item() == pytest.approx(expected["loss"].item(), abs=1e-10)
        torch.testing.assert_close(found["gradients"], expected["gradients"], **EXACT)
        for name, value in expected["after"].items():
            torch.testing.assert_close(found["after"][name], value, rtol=0, atol=tolerance(name))
    utils.end_processes()


def test_two_processes_are_one():
    assert runs.on_two_processes(compare_on_two_processes) == [0, 0]


# ------------------------------------------------------------------------------------------------- whole runs

SMALL = (
    "--task moco --data-set folder --model vit_tiny_sar --input-size 16 --patch-size 4 --num-workers 0 "
    "--model-kwargs embed_dim=24 depth=2 num_heads=3 --moco-dim 8 --moco-mlp-dim 20 --batch-size 24 --total-batch 24 "
    "--sampling-ratio 0.5 --epochs 3 --warmup-epochs 1 --lr 4e-3 --drop 0.1 --drop-path 0.2 --sar-weight 0.1 "
    "--print-every 3 --crop-min 0.5"
)
IN_PROCESS = SMALL.replace("--data-set folder", "--data-set digits --sampling-ratio 0.1 --device cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train the small run in processes of its own; see ``runs.Child``."""
    folder = tmp_path_factory.mktemp("moco")
    child = runs.Child(runs.write_digits(folder / "digits"), folder / "text")
    child.words = SMALL.split()
    return child


@pytest.fixture(scope="module")
def whole_run(run, tmp_path_factory):
    """What the small run leaves, trained in this process."""
    output = tmp_path_factory.mktemp("whole")
    assert main.main(runs.folders(SMALL.split(), run.data, output)) == 0
    return runs.content(output)


def test_a_run_logs_what_shows_its_progress_and_picks_the_base_encoder_by_k_nn(whole_run):
    *_, last = whole_run["log.txt"]
    assert last["train_loss"] == pytest.approx(last["train_moco"] + 0.1 * last["train_spatial_entropy"])
    assert 0 < last["train_contrast_accuracy"] < 100
    assert 0 < last["train_feature_deviation"] < 1.1
    assert last["train_momentum"] > 0.99
    best = whole_run["best.pth"]["best"]
    assert best["weights"] == "base"
    assert best["knn20"] == max(line["test_knn20"] for line in whole_run["log.txt"])
    assert not any(name.startswith("test_momentum") for line in whole_run["log.txt"] for name in line)


def test_equal_features_are_called_a_collapse():
    assert "nothing is learned" in MoCo.warning(None, {"feature_deviation": 0.004})
    assert not MoCo.warning(None, {"feature_deviation": 0.3})


def test_statistics_of_both_encoders_move_and_are_in_the_checkpoint(whole_run):
    statistics = [whole_run["checkpoint.pth"][f"{name}_projector"]["7.running_var"] for name in ("base", "momentum")]
    assert not torch.equal(*statistics)
    assert all((part != 1).all() for part in statistics)
    assert whole_run["checkpoint.pth"]["predictor"]["4.num_batches_tracked"] == 2 * 15


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


def test_a_flat_folder_without_classes_trains_and_says_what_it_cannot_do(tmp_path, capsys):
    for number in range(6):
        image_sets.picture(number).save(tmp_path / f"{number}.png")
    words = f"{IN_PROCESS} --data-set images --data-path {tmp_path} --sampling-ratio 1 --epochs 1 --warmup-epochs 0"
    output = tmp_path / "output"
    assert main.main([*words.split(), "--batch-size", "6", "--total-batch", "6", "--output-dir", str(output)]) == 0
    assert "evaluation  none: the images have no classes" in capsys.readouterr().out
    assert sorted(path.name for path in output.glob("*.pth")) == ["checkpoint.pth"]
    assert select_weights(read_checkpoint(output / "checkpoint.pth"))[1] == "base"


def test_checkpoints_are_read_by_key(tmp_path):
    run = runs.build(f"{IN_PROCESS} --output-dir {tmp_path}")
    engine.train_one_epoch(run)
    checkpoints.save(run, "checkpoint.pth")
    for key, network in {None: run.task.model, "base": run.task.model, "momentum": run.task.averaged}.items():
        loaded = load_model(tmp_path / "checkpoint.pth", key=key).model
        runs.assert_identical(dict(loaded.state_dict()), dict(network.state_dict()))


def test_a_new_run_goes_on_with_the_networks_of_a_run_of_this_program(tmp_path):
    run = runs.build(f"{IN_PROCESS} --output-dir {tmp_path}")
    engine.train_one_epoch(run)
    checkpoints.save(run, "checkpoint.pth")
    other = runs.build(f"{IN_PROCESS} --seed 1 --output-dir {tmp_path / 'other'}")
    checkpoints.start_or_resume(other, finetune=str(tmp_path / "checkpoint.pth"))
    for name, module in checkpoints.saved_modules(run.task).items():
        runs.assert_identical(checkpoints.saved_modules(other.task)[name].state_dict(), module.state_dict(), name)
    assert (other.epoch, other.step) == (0, 0)


@pytest.mark.parametrize("width", [8, 9])
def test_a_new_run_goes_on_with_the_networks_of_an_official_run(golden, tmp_path, width):
    content = golden("mocov3_step.pt")
    state = content["state_dict_before"] | content["steps"][-1]["state_dict_after"]
    drifted = state | {"momentum_encoder.pos_embed": state["momentum_encoder.pos_embed"] + 1e-5}
    official = {"epoch": 2, "arch": "vit_small", "state_dict": {f"module.{k}": v for k, v in drifted.items()}}
    torch.save(official, tmp_path / "moco.pth.tar")
    task = in_float64(new_task(f"{STEP} --moco-dim {width}"))
    fresh = state_of(task)
    *_, note = task.start_from(str(tmp_path / "moco.pth.tar"), None)
    found, expected = state_of(task), without_counts(state)
    heads = {name for name in found if ".head." in name or name.startswith("predictor.")}
    for name in found.keys() - heads:
        torch.testing.assert_close(found[name], expected[name].double(), **EXACT)
    for name in heads:
        torch.testing.assert_close(found[name], expected[name].double() if width == 8 else fresh[name], **EXACT)
    assert note.startswith("base and momentum" if width == 8 else "projectors and predictor start anew")


def test_a_new_run_starts_both_encoders_from_given_weights(tmp_path):
    state = new_task(IN_PROCESS).model.state_dict()
    torch.save({"model": state | {"cls_token": torch.ones_like(state["cls_token"])}}, tmp_path / "vit.pth")
    task = new_task(IN_PROCESS)
    task.start_from(str(tmp_path / "vit.pth"), None)
    for backbone in (task.model, task.averaged):
        assert (backbone.cls_token == 1).all()


def test_the_maps_of_both_views_of_the_base_encoder_enter_the_loss():
    torch.manual_seed(0)
    task = new_task(f"{IN_PROCESS} --drop 0 --drop-path 0").train()
    batch = {"views": torch.randn(4, 2, 3, 16, 16)}
    outputs = task(batch)
    term = engine.regularisers(outputs, "spatial-entropy")["spatial_entropy"]
    assert outputs["similarity"].shape == (8, 3, 4, 4)
    views = [task.model(batch["views"][:, view], return_similarity=True)[1] for view in (0, 1)]
    torch.testing.assert_close(term, torch.cat([spatial_entropy(maps)[0] for maps in views]).mean())
    term.backward()
    assert task.model.blocks[-1].attn.qkv.weight.grad.any()
    assert task.model.last_block == task.averaged.last_block == "sar"


def test_heads_and_loss_are_float32_inside_autocast():
    task = new_task(IN_PROCESS)
    batch = {"views": torch.randn(4, 2, 3, 16, 16)}
    noted = note_outputs(task)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = task(batch)
        loss = task.losses(outputs, batch)["moco"]
    assert {part.dtype for part in [*noted, outputs["contrast"], loss]} == {torch.float32}
    assert outputs["features"].dtype == torch.bfloat16, "the backbone is not"


def test_accumulation_is_refused_with_the_sizes_that_work(tmp_path, capsys):
    args = parse_arguments("--task moco --data-path x".split())
    assert accumulation(args, 8) == 1
    message = (
        "--batch-size 128 x 1 processes is not --total-batch 1024: MoCo-v3 contrasts the images of one forward pass "
        "and normalises over them, which accumulation would change; give --batch-size 1024, or --total-batch 128"
    )
    with pytest.raises(utils.UserError, match=message):
        accumulation(args, 1)
    assert main.main([*IN_PROCESS.split(), "--batch-size", "12", "--output-dir", str(tmp_path / "run")]) == 2
    assert "--batch-size 12 x 1 processes is not --total-batch 24" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_defaults_are_the_recipe_of_vit_small():
    args = parse_arguments("--task moco --data-path x".split())
    assert MoCo.peak_learning_rate(args) == pytest.approx(6e-4)
    assert (args.model, args.total_batch, args.clip_grad, args.sar_weight) == ("vit_small", 1024, None, 0)


def test_the_banner_says_what_to_expect():
    notes = new_task(f"{IN_PROCESS} --total-batch 1024").notes()
    assert notes == {
        "views": "2 x 16 px (area 0.5 to 1)",
        "expected": f"the loss of a guess is 4 T ln 1024 = {0.8 * math.log(1024):.2f}; it does not measure quality, "
        "knn20 does",
    }
    small = "--model vit_small --model-kwargs embed_dim=24 depth=2"
    assert new_task(f"{IN_PROCESS} {small} num_heads=6").notes()["heads"].startswith("6; MoCo-v3's own ViT-S has 12: ")
    assert "heads" not in new_task(f"{IN_PROCESS} {small} num_heads=12").notes()


def test_the_loss_of_a_guess():
    logits = torch.zeros(8, 8)
    assert 2 * contrastive_loss(logits, 0.2).item() == pytest.approx(4 * 0.2 * math.log(8))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--mixup 0.8", "no option --mixup"),
        ("--model swin_tiny", "--model swin_tiny: --task moco trains ViTs"),
        ("--drloc-weight 1", "--drloc-weight: --task moco has no DRLoc loss"),
        ("--sched constant", "--sched, --no-sched-on-updates and --cooldown-epochs: leave them out"),
        ("--model-kwargs embed_dim=18", "--model-kwargs embed_dim=18: MoCo-v3's positions need a multiple of 4"),
        ("--moco-t 0", "--moco-t"),
    ],
)
def test_arguments_that_cannot_work_are_one_line(words, message):
    with pytest.raises(utils.UserError, match=re.escape(message)):
        parse_arguments(f"--task moco --data-path x {words}".split())


# --------------------------------------------------------------------------------------------------- the recipes

OFFICIAL = {  # facebookresearch/moco-v3, README.md: ViT-S on one node of 8 GPUs
    "task": "moco",
    "data_set": "imagenet100",
    "input_size": 224,
    "patch_size": 16,
    "total_batch": 1024,
    "peak_lr": 6e-4,
    "min_lr": 0.0,
    "warmup_epochs": 40,
    "warmup_lr": 0.0,
    "epochs": 300,
    "opt": "adamw",
    "opt_eps": 1e-8,
    "opt_betas": None,
    "weight_decay": 0.1,
    "clip_grad": None,
    "drop": 0.0,
    "drop_path": 0.0,
    "crop_min": 0.08,
    "moco_dim": 256,
    "moco_mlp_dim": 4096,
    "moco_m": 0.99,
    "moco_m_cos": True,
    "moco_t": 0.2,
    "stop_grad_conv1": True,
    "model_kwargs": {},
    "sar_weight": 0.01,
    "sar_schedule": "constant",
    "sar_loss": "spatial-entropy",
    "last_block": "sar",
}
RECIPES = {
    "moco_in100": OFFICIAL,
    "moco_in100_12heads": OFFICIAL | {"model_kwargs": {"num_heads": 12}},
    "moco_small": OFFICIAL | {"total_batch": 256, "peak_lr": 1.5e-4, "epochs": 100, "warmup_epochs": 10},
}


def resolved(*words: str):
    return parse_arguments([*words, "--model", "vit_small_sar", "--data-path", "x"])


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_its_protocol(name):
    args = resolved(f"@{ROOT}/recipes/{name}.args")
    found = vars(args) | {"peak_lr": round(MoCo.peak_learning_rate(args), 12)}
    assert {key: found[key] for key in RECIPES[name]} == RECIPES[name]
    text = (ROOT / f"recipes/{name}.args").read_text()
    assert "# Source: " in text
    assert name == "moco_in100" or text.startswith("@moco_in100.args")


def test_the_official_recipe_is_the_default():
    defaults = vars(resolved("--task", "moco", "--data-set", "imagenet100"))
    named = vars(resolved(f"@{ROOT}/recipes/moco_in100.args"))
    assert {key for key in named if named[key] != defaults[key]} == {"eval_every"}


@pytest.mark.gpu
def test_on_a_gpu_the_heads_have_torchs_synchronised_batch_normalisation():
    task = MoCo(parse_arguments(IN_PROCESS.split()), range(10), torch.device("cuda"))
    kinds = {type(part) for part in task.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)}
    assert kinds == {nn.SyncBatchNorm}
    on_cpu = new_task(IN_PROCESS)
    assert task.predictor.state_dict().keys() == on_cpu.predictor.state_dict().keys()
    batch = {"views": torch.randn(4, 2, 3, 16, 16, device="cuda")}
    terms = task.train().losses(task(batch), batch)
    terms["moco"].backward()
    assert terms["moco"].isfinite()
