"""What dense tasks share: weights of a classifier in a backbone, layer decay, schedules."""

import pytest
import timm
import torch
from helpers.checkpoints import SMALL, make, with_prefix, write_checkpoint, write_dino

import models_sar  # noqa: F401 - registers the models
from arguments import parse_arguments
from models.pvt import DensePVT
from models.vitdet import ViTDet
from schedules import Position, poly_factor, steps_factor
from tasks.segment import Segmentation
from utils import UserError
from weights import load_trunk, read_checkpoint

BACKBONE = {name: SMALL[name] for name in ("embed_dim", "depth", "num_heads", "patch_size")} | {
    "img_size": 48,
    "pretrain_size": 32,
    "window_size": 4,
    "global_blocks": (1,),
}


class Classes:
    """The training set as far as a task looks at it when it is built."""

    def __init__(self, number: int):
        self.classes = [str(label) for label in range(number)]


def task_of(*words: str, classes: int = 21, device: str = "cpu") -> Segmentation:
    args = parse_arguments(["--task", "segment", "--data-path", "x", *words])
    return Segmentation(args, Classes(classes), torch.device(device))


# ----------------------------------------------------------------------------------------------------- weights


def classifier(name: str = "vit_tiny", seed: int = 0):
    torch.manual_seed(seed)
    return make(name)


def test_a_classifiers_weights_enter_by_name_and_the_rest_is_said(tmp_path):
    model = classifier("vit_tiny_sar")
    torch.save({"model": model.state_dict()}, tmp_path / "sar.pth")
    backbone = ViTDet(**BACKBONE, last_block="sar")
    before = backbone.blocks[0].attn.rel_pos_h.clone()
    notes = load_trunk(backbone, tmp_path / "sar.pth")
    assert notes == [
        "left out: cls_token, norm.weight, norm.bias, head.weight, head.bias",
        "relative positions start at 0 (4 tables)",
    ]
    for name, value in backbone.state_dict().items():
        if "rel_pos" not in name:
            assert torch.equal(value, model.state_dict()[name])
    assert torch.equal(backbone.blocks[0].attn.rel_pos_h, before)


def test_without_windows_and_relative_positions_the_backbone_is_the_classifier_without_cls():
    model = classifier().eval()
    backbone = ViTDet(**BACKBONE | {"window_size": 0, "rel_pos": False}).eval()
    load_trunk(backbone, {"model": model.state_dict()})
    images = torch.randn(2, 3, 32, 32)
    tokens = model.patch_embed(images) + model.pos_embed[:, 1:]
    for block in model.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(backbone(images), tokens.transpose(1, 2).unflatten(2, (4, 4)))


def test_self_supervised_and_own_checkpoints_are_read_too(tmp_path):
    student, teacher = (make(num_classes=0).state_dict() for _ in range(2))
    write_dino(tmp_path / "dino.pth", student, teacher)
    backbone = ViTDet(**BACKBONE)
    assert load_trunk(backbone, tmp_path / "dino.pth")[0] == "left out: cls_token, norm.weight, norm.bias"
    assert torch.equal(backbone.pos_embed, teacher["pos_embed"])
    load_trunk(backbone, tmp_path / "dino.pth", "student")
    assert torch.equal(backbone.pos_embed, student["pos_embed"])
    own = write_checkpoint(tmp_path / "own.pth", ["a", "b"])
    sizes = {"patch_size": 2, "pretrain_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    backbone = ViTDet(**sizes, last_block="sar")
    load_trunk(backbone, own)
    assert torch.equal(backbone.pos_embed, read_checkpoint(own)["model"]["pos_embed"])


def test_all_else_that_is_missing_or_left_over_is_refused_and_nothing_is_changed():
    state, backbone = classifier().state_dict(), ViTDet(**BACKBONE)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    del state["blocks.1.mlp.fc2.bias"]
    with pytest.raises(UserError, match=r"missing: blocks\.1\.mlp\.fc2\.bias"):
        load_trunk(backbone, {"model": state})
    state = classifier().state_dict() | {"dist_token": torch.zeros(1, 1, 24)}
    with pytest.raises(UserError, match="unexpected: dist_token"):
        load_trunk(backbone, {"model": state})
    with pytest.raises(UserError, match="unexpected: encoder"):
        load_trunk(backbone, {"model": classifier().state_dict() | with_prefix("encoder.", {"x": torch.zeros(1)})})
    with pytest.raises(UserError, match=r"17 positions, the backbone 37: .*--model-kwargs pretrain_size=N"):
        load_trunk(ViTDet(**BACKBONE | {"pretrain_size": 48}), {"model": classifier().state_dict()})
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_the_last_blocks_kind_is_kept_unless_the_caller_says_otherwise():
    sar, standard, no_msa_skip = (
        {
            "model": classifier(name).state_dict(),
            "args": {"last_block": kind, "model": name, "model_kwargs": {"num_heads": 3}},
            "data": {},
        }
        for name, kind in (("vit_tiny_sar", "sar"), ("vit_tiny", "standard"), ("vit_tiny", "no_msa_skip"))
    )
    for backbone, checkpoint, kind in ((ViTDet(**BACKBONE), sar, "sar"), (ViTDet(**BACKBONE), sar["model"], "sar")):
        with pytest.raises(UserError, match=f"has the last block '{kind}'.*: use --last-block {kind}"):
            load_trunk(backbone, checkpoint)
    with pytest.raises(UserError, match="'no_msa_skip'"):  # of the same names
        load_trunk(ViTDet(**BACKBONE), no_msa_skip)
    back = ViTDet(**BACKBONE)
    notes = load_trunk(back, sar, other_last_block=True)
    assert notes[:2] == [
        "last block: sar in the file, standard here, as --last-block says",
        "blocks.1.norm2: not in the file, starts at 1 and 0",
    ]
    assert (back.blocks[1].norm2.weight == 1).all()
    without = ViTDet(**BACKBONE, last_block="sar")
    assert load_trunk(without, standard, other_last_block=True)[0].startswith("last block: standard in the file")
    assert torch.equal(without.blocks[1].mlp.fc1.weight, standard["model"]["blocks.1.mlp.fc1.weight"])


def test_the_command_line_follows_the_files_last_block(tmp_path):
    for kind in ("vit_tiny", "vit_tiny_sar"):
        torch.save({"model": classifier(kind).state_dict()}, tmp_path / f"{kind}.pth")
    words = ["--task", "segment", "--data-path", "x", "--model", "vit_tiny", "--finetune"]
    assert parse_arguments([*words, str(tmp_path / "vit_tiny.pth")]).last_block == "standard"
    assert parse_arguments([*words, str(tmp_path / "vit_tiny_sar.pth")]).last_block == "sar"
    other = parse_arguments([*words, str(tmp_path / "vit_tiny_sar.pth"), "--last-block", "standard"])
    assert other.last_block == "standard"


SMALL_PVT = {"embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4), "mlp_ratios": (2,) * 4, "depths": (1, 1, 1, 2)}


@pytest.mark.parametrize("kind", ["pvt_small", "pvt_small_sar"])
def test_pvts_weights_enter_without_resampling(kind):
    model = timm.create_model(kind, num_classes=5, img_size=64, **SMALL_PVT)
    backbone = DensePVT(img_size=64, last_block=model.last_block, **SMALL_PVT)
    assert load_trunk(backbone, {"model": model.state_dict()}) == [
        "left out: cls_token, norm.weight, norm.bias, head.weight, head.bias"
    ]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in backbone.state_dict().items())
    with pytest.raises(UserError, match="pretrain_size"):
        load_trunk(DensePVT(img_size=96, last_block=model.last_block, **SMALL_PVT), {"model": model.state_dict()})


# ----------------------------------------------------------------------------------- learning rates and weight decay


def groups_by_name(task: Segmentation, *words: str) -> dict:
    args = parse_arguments(["--task", "segment", "--data-path", "x", *words])
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    return {names[id(p)]: group for group in task.parameter_groups(args) for p in group["params"]}


def test_layer_decay_is_vitdets(golden):
    """By the names of the official backbone and pyramid; all that is not in the backbone has the full rate."""
    official = golden("layer_decay.pt")["models"][0]
    groups = groups_by_name(task_of("--model", "vit_small", device="meta"))
    scales = {name.removeprefix("model.backbone."): group["lr_scale"] for name, group in groups.items()}
    prefix = "backbone.net."
    for name, scale in official["lr_scale"].items():
        if name.startswith(prefix):
            assert scales.pop(name.removeprefix(prefix)) == pytest.approx(scale, rel=1e-12)
    assert len(scales) == 32 + 23, "of the pyramid and the head"
    assert set(scales.values()) == {1.0}


def test_one_dimensional_parameters_and_positions_do_not_decay_unless_all_do():
    task = task_of("--model", "vit_tiny", device="meta")
    groups, parameters = groups_by_name(task), dict(task.named_parameters())
    decayed = {name for name, group in groups.items() if group["weight_decay"]}
    one_dimensional = {name for name, parameter in parameters.items() if parameter.ndim <= 1}
    assert decayed == parameters.keys() - one_dimensional - {"model.backbone.pos_embed"}
    everything = groups_by_name(task, "--decay-all", "--weight-decay", "1e-4")
    assert {group["weight_decay"] for group in everything.values()} == {1e-4}
    assert everything.keys() == parameters.keys()


def test_pvt_has_one_rate():
    words = ("--model", "pvt_small", "--layer-decay", "1")
    assert {group["lr_scale"] for group in groups_by_name(task_of(*words, device="meta"), *words).values()} == {1.0}


def test_the_schedules_are_the_official_ones(golden):
    numbers = golden("layer_decay.pt")
    steps, poly = numbers["vitdet_lr_multiplier"], numbers["poly_lr_multiplier"]
    for name, official, warmup in ((steps_factor, steps, 250), (poly_factor, poly, 0)):
        for update, value in zip(official["iterations"], official["values"], strict=True):
            position = Position(update // 100, update % 100, 100, official["max_iter"] // 100)
            assert name(position, warmup) == pytest.approx(value, rel=1e-12)


def test_the_tasks_schedule_does_not_scale_the_rate_with_the_batch():
    task = task_of("--model", "vit_tiny", "--lr", "1e-3", "--total-batch", "64", device="meta")
    assert task.schedule(Position(0, 0, 1000, 25))["lr"] == pytest.approx(1e-6)
    assert task.schedule(Position(1, 0, 1000, 25))["lr"] == 1e-3
    assert task.schedule(Position(24, 999, 1000, 25))["lr"] == pytest.approx(1e-5)
    poly = task_of("--model", "vit_tiny", "--lr-schedule", "poly", "--warmup-updates", "0", device="meta")
    assert poly.schedule(Position(10, 0, 10, 20))["lr"] == pytest.approx(1e-4 * 0.5**0.9)
