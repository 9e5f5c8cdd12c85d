"""Dense relative localisation: the released code's numbers, random pairs, and one module for all that trains."""

import pytest
import torch
from helpers import runs

import engine
import main
import models_sar  # noqa: F401 - registers the models
import tasks
from losses import PAIRS, Localiser, localisation_loss
from schedules import drloc_weight_schedule
from weights import load_weights

LOCALISED = ("--drloc-weight", "0.5", "--epochs", "2", "--total-batch", "120", "--batch-size", "24")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.write_digits(tmp_path_factory.mktemp("digits"))


# ------------------------------------------------------------------------------------------- the mathematics


def test_the_released_codes_predictions_loss_and_gradient(golden):
    file = golden("drloc_losses.pt")
    localiser = Localiser(8).double()
    localiser.load_state_dict({name: weight.double() for name, weight in file["state_dict"].items()})
    tokens = file["x"].double().requires_grad_()
    positions = torch.stack([file["pxs"], file["pys"]], dim=2)
    distances = localiser(tokens, positions)
    loss = localisation_loss(distances, positions)
    (0.1 * loss).backward()
    expected = file["module_l1"]["l1_absTrue_normFalse"]
    torch.testing.assert_close(distances.flatten(0, 1), expected["predxy"], atol=1e-12, rtol=0)
    torch.testing.assert_close(loss, expected["loss"], atol=1e-12, rtol=0)
    torch.testing.assert_close(tokens.grad, expected["grad_x"], atol=1e-12, rtol=0)


def test_its_schedule(golden):
    expected = golden("drloc_losses.pt")["lambda_schedule_0p5_warm20_total300"].tolist()
    assert [drloc_weight_schedule(0.5, epoch, 300) for epoch in range(300)] == pytest.approx(expected, abs=1e-12)
    assert drloc_weight_schedule(0.5, 300, 300) == 0
    assert drloc_weight_schedule(0.5, 5, 10) == 0.125, "a short run rises as the others do"


def test_size_of_the_mlp_at_vit_s():
    assert sum(p.numel() for p in Localiser(384).parameters()) == 657_410


def test_an_oblong_grid_has_rows_and_columns():
    """Tokens that hold their own position, and an MLP that reads off the first patch's."""
    tokens = torch.stack(torch.meshgrid(torch.arange(3.0), torch.arange(5.0), indexing="ij"))[None]
    positions = torch.tensor([[[[2, 4], [0, 1]], [[1, 0], [1, 3]]]])
    localiser = Localiser(2)
    localiser.layers = torch.nn.Identity()
    assert localiser(tokens, positions).tolist() == [[[2, 4, 0, 1], [1, 0, 1, 3]]]
    assert localisation_loss(torch.zeros(1, 2, 2), positions) == (2 + 3 + 0 + 3) / 4


def test_half_precision_predictions_give_a_float32_loss():
    positions = torch.randint(0, 14, (2, PAIRS, 2, 2))
    assert localisation_loss(torch.zeros(2, PAIRS, 2, dtype=torch.bfloat16), positions).dtype == torch.float32


# ------------------------------------------------------------------------------------------------- one module


SMALL = (
    "--data-set digits --model vit_tiny_sar --input-size 16 --patch-size 4 --drop-path 0 "
    "--model-kwargs embed_dim=24 depth=2 num_heads=3 "
)


def small_task(more: str = "--drloc-weight 0.5") -> tasks.Task:
    return runs.build(SMALL + more).task


def test_pairs_cover_the_grid_evenly():
    outputs = small_task().run_model(torch.zeros(50, 3, 16, 16), torch.rand(50, PAIRS, 2, 2))
    counts = outputs["positions"].flatten(0, 2).unique(dim=0, return_counts=True)[1]
    assert len(counts) == 16
    assert counts.min() > 0.8 * counts.float().mean()


def test_outputs_are_what_the_regularisers_read():
    images, pairs = torch.rand(2, 3, 16, 16), torch.rand(2, PAIRS, 2, 2)
    everything = small_task().eval().run_model(images, pairs)
    assert everything.keys() == {"logits", "similarity", "positions", "distances"}
    others = {
        "--sar-weight 0": {"logits"},
        "": {"logits", "similarity"},
        "--sar-weight 0 --drloc-weight 0.5": {"logits", "positions", "distances"},
    }
    for words, names in others.items():
        outputs = small_task(words).eval().run_model(images, pairs)
        assert outputs.keys() == names
        for name, value in outputs.items():
            torch.testing.assert_close(value, everything[name])


def test_gradients_reach_model_and_localiser():
    task = small_task("--drloc-weight 0.5 --no-model-ema")
    outputs = task.run_model(torch.rand(2, 3, 16, 16), torch.rand(2, PAIRS, 2, 2))
    localisation_loss(outputs["distances"], outputs["positions"]).backward()
    without = {name for name, weight in task.named_parameters() if weight.grad is None}
    # the loss reads the tokens before the final norm
    assert without == {"model.norm.weight", "model.norm.bias", "model.head.weight", "model.head.bias"}


def test_positions_tokens_norms_and_biases_have_no_weight_decay():
    run = runs.build(SMALL + "--drloc-weight 0.5")
    named = {id(weight): name for name, weight in run.task.named_parameters()}
    without, decayed = run.optimizer.param_groups
    assert (without["weight_decay"], decayed["weight_decay"]) == (0, 0.05)
    names = {named[id(weight)] for weight in without["params"]}
    assert {"model.pos_embed", "model.cls_token", "model.norm.weight", "localiser.layers.0.bias"} <= names
    assert {named[id(weight)] for weight in decayed["params"]} >= {"localiser.layers.0.weight", "model.head.weight"}
    assert not any("averaged" in name or "ema" in name for name in names)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    assert main.main(runs.command(data, output, *LOCALISED)) == 0
    return output


def test_it_is_saved_apart_from_the_exported_weights(data, trained):
    checkpoint = torch.load(trained / "checkpoint.pth", weights_only=True)
    assert not any("localiser" in name for name in (*checkpoint["model"], *checkpoint["ema"]))
    assert checkpoint["localiser"].keys() == Localiser(24).state_dict().keys()
    plain = runs.build(" ".join(runs.SMALL).replace("folder", "digits") + " --drloc-weight 0").task.model
    load_weights(plain, checkpoint, strict_head=True)  # strictly: not a name too many
    assert torch.equal(plain.blocks[1].mlp.fc1.weight, checkpoint["model"]["blocks.1.mlp.fc1.weight"])


def test_a_stopped_run_with_it_goes_on_bit_for_bit(data, trained, tmp_path, monkeypatch, capsys):
    original, updates = engine.update_weights, []

    def stopping(run, schedule):
        original(run, schedule)
        updates.append(1)
        run.stop.received = 15 if len(updates) == 3 else None

    with monkeypatch.context() as patch:
        patch.setattr(engine, "update_weights", stopping)
        assert main.main(runs.command(data, tmp_path, *LOCALISED)) == 0
    assert "--drloc-weight 0.5 is reached at epoch 20 only; this run has 2 epochs" in capsys.readouterr().out
    saved = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert (saved["epoch"], saved["step"]) == (1, 1)
    assert main.main(runs.command(data, tmp_path, *LOCALISED)) == 0
    runs.assert_identical(runs.content(tmp_path), runs.content(trained))


def test_log_and_checkpoint_tell_of_it(data, trained):
    line = runs.content(trained)["log.txt"][-1]
    assert line["train_drloc"] > 0
    assert line["train_spatial_entropy"] >= 0, "together with SAR"
    assert line["train_drloc_weight"] == pytest.approx((0.5 * 1.0 / 20 + 0.5 * 1.5 / 20) / 2)
    assert line["train_loss"] == pytest.approx(
        line["train_cross_entropy"] + 0.1 * line["train_spatial_entropy"] + 0.031 * line["train_drloc"], rel=0.01
    )
