"""Checkpoints of every origin: read safely, picked by name, fitted to a model, refused with a clear line."""

import argparse
import math
import os
import pickle
import re
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from helpers.checkpoints import SMALL, dino_head, headless, make, moco_positions, with_prefix, write_dino, write_moco

import models_sar  # noqa: F401 - registers the models
from utils import UserError
from weights import (
    classifier_of,
    dino_head_of,
    last_block_of,
    load_weights,
    num_heads_of,
    read_checkpoint,
    select_weights,
)


def same_weights(model, state, but=()):
    own = model.state_dict()
    return all(torch.equal(own[k], v) for k, v in state.items() if not k.startswith(but))


@pytest.fixture
def state():
    torch.manual_seed(1)
    return make().state_dict()


# -------------------------------------------------------------------------------------------- reading a file


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_deit_era_file_with_a_namespace_and_numpy_numbers(tmp_path, state, zipped):
    content = {
        "model": state,
        "epoch": 299,
        "args": argparse.Namespace(lr=1e-3, opt_betas=None, data_path="imagenet"),
        "max_accuracy": np.float64(79.8),
        "n_parameters": np.int64(22_050_664),
    }
    torch.save(content, tmp_path / "deit.pth", _use_new_zipfile_serialization=zipped)
    checkpoint = read_checkpoint(tmp_path / "deit.pth")
    assert (checkpoint["args"].lr, checkpoint["max_accuracy"]) == (1e-3, 79.8)
    assert load_weights(make(), checkpoint) == []


def test_numpy_1_spelling_of_a_number(tmp_path, state):
    torch.save({"model": state, "best": np.float32(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "old.pth").read_bytes()
    assert b"numpy._core.multiarray" in content
    (tmp_path / "old.pth").write_bytes(content.replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray"))
    assert read_checkpoint(tmp_path / "old.pth")["best"] == 3


def test_safetensors(tmp_path, state):
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    model = make()
    assert load_weights(model, tmp_path / "model.safetensors") == []
    assert same_weights(model, state)


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_is_refused_and_never_run(tmp_path, state, zipped):
    marker, path = tmp_path / "owned", tmp_path / "hostile.pth"
    torch.save({"model": state, "args": Hostile(marker)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"hostile.pth is refused: .* would call \w+.system, .* source you trust"):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps(Hostile(marker)))
    with pytest.raises(UserError, match=r"hostile.pth is"):
        read_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["checkpoint.pth", "model.safetensors"])
@pytest.mark.parametrize("kept", [0.01, 0.1, 0.5, 0.99])
def test_a_truncated_file(tmp_path, state, name, kept):
    path = tmp_path / name
    if path.suffix == ".pth":
        torch.save({"model": state}, path)
    else:
        safetensors.torch.save_file(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(UserError, match=rf"{name} is truncated or not a checkpoint; copy or download it again"):
        read_checkpoint(path)


def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / "notes.txt").write_text("hello, this is text")
    (tmp_path / "folder").mkdir()
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    for name, message in {
        "notes.txt": "notes.txt is truncated or not a checkpoint",
        "folder": "folder is a folder; name the checkpoint in it",
        "missing.pth": "missing.pth cannot be read .No such file or directory.; check the path",
        "missing.safetensors": "missing.safetensors cannot be read .*; check the path",
        "tensor.pth": "tensor.pth holds a Tensor, not a dictionary",
    }.items():
        with pytest.raises(UserError, match=message) as raised:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(raised.value)


# ------------------------------------------------------------------------------------------ which state dict


@pytest.mark.parametrize("key", ["model", "state_dict", "ema", "model_ema", "state_dict_ema"])
def test_each_known_key_is_found(state, key):
    found, used = select_weights({"epoch": 3, "optimizer": {"state": {}}, key: state, "args": {"lr": 1e-3}})
    assert used == key
    assert found.keys() == state.keys()


def test_the_key_is_chosen_by_name(state):
    averaged = {k: v + 1 for k, v in state.items()}
    checkpoint = {"model": state, "ema": averaged, "teacher": averaged, "epoch": 1}
    assert select_weights(checkpoint)[1] == "model"
    for key in ("ema", "teacher"):
        model = make()
        load_weights(model, checkpoint, key=key)
        assert same_weights(model, averaged)


def test_a_bare_state_dict(state):
    found, used = select_weights(state)
    assert used is None
    assert found.keys() == state.keys()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_prefixes_are_stripped(state, prefix):
    model = make()
    load_weights(model, {"model": {prefix + k: v for k, v in state.items()}})
    assert same_weights(model, state)


@pytest.mark.parametrize("key", ["ema", "epoch", "absent"])
def test_a_key_without_weights_lists_those_that_have(state, key):
    with pytest.raises(UserError, match=rf"no weights under '{key}'; keys with weights: model, model_ema$"):
        select_weights({"model": state, "model_ema": state, "ema": None, "epoch": 3}, key=key)


def test_a_checkpoint_without_weights_lists_its_keys(state):
    with pytest.raises(UserError, match=r"Keys with weights: net; all keys: net, epoch$"):
        select_weights({"net": state, "epoch": 3})
    with pytest.raises(UserError, match=r"Keys with weights: none"):
        select_weights({})


# ------------------------------------------------------------------------------- self-supervised programs' files


@pytest.mark.parametrize(("heads", "backbone"), [(True, "backbone."), (False, "backbone."), (False, "")])
def test_dinos_teacher_and_student(tmp_path, heads, backbone):
    student, teacher = headless(1), headless(2)
    write_dino(tmp_path / "dino.pth", student, teacher, heads, backbone)
    for key, expected in ((None, teacher), ("teacher", teacher), ("student", student)):
        model = make(num_classes=0)
        assert load_weights(model, tmp_path / "dino.pth", key, strict_head=True) == []
        assert same_weights(model, expected)


def test_moco_v3s_base_and_momentum_encoder(tmp_path):
    base, momentum = headless(1), headless(2)
    write_moco(tmp_path / "moco.pth.tar", base, momentum)
    for key, expected in ((None, base), ("base", base), ("momentum", momentum)):
        model = make(num_classes=0)
        (note,) = load_weights(model, tmp_path / "moco.pth.tar", key, strict_head=True)
        assert note.startswith("apparently trained with 12 heads, but the model has 3: use --model-kwargs num_heads=12")
        assert same_weights(model, expected)


def test_a_key_that_a_self_supervised_program_does_not_have(tmp_path):
    write_dino(tmp_path / "dino.pth", headless(), headless())
    write_moco(tmp_path / "moco.pth", headless(), headless())
    with pytest.raises(
        UserError, match=r"DINO checkpoint has no weights under 'ema'; keys with weights: teacher, student$"
    ):
        load_weights(make(), tmp_path / "dino.pth", "ema")
    with pytest.raises(UserError, match=r"MoCo-v3 checkpoint has no weights under 'state_dict'; .*: base, momentum$"):
        load_weights(make(), tmp_path / "moco.pth", "state_dict")


@pytest.mark.parametrize(
    "odd", ["backbone.fc.weight", "queue", "backbone.blocks.0.head.mlp.0.weight", "backbone.head.weight"]
)
def test_weights_beside_the_known_networks_are_an_error(odd):
    state = with_prefix("backbone.", headless()) | dino_head() | {odd: torch.zeros(1)}
    with pytest.raises(UserError, match=rf"(unexpected|weights of other networks): {odd.removeprefix('backbone.')}"):
        load_weights(make(num_classes=0), {"teacher": state}, strict_head=True)


def test_a_missing_weight_of_an_encoder_is_an_error(tmp_path):
    base = headless()
    del base["blocks.1.attn.proj.bias"]
    write_moco(tmp_path / "moco.pth", base, headless())
    with pytest.raises(UserError, match=r"missing: blocks.1.attn.proj.bias$"):
        load_weights(make(num_classes=0), tmp_path / "moco.pth", strict_head=True)


def renamed(head: dict, old: bool, new_norm: bool) -> dict:
    """Today's names of a DINO head as in early files, or with torch's newer weight normalisation."""
    words = {"mlp": "projection_head", "last_layer": "prototypes"} if old else {}
    if new_norm:
        words |= {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    for word, other in words.items():
        head = {name.replace(word, other): value for name, value in head.items()}
    return head


@pytest.mark.parametrize("backbone", ["backbone.", ""])
@pytest.mark.parametrize("old", [True, False], ids=["early names", "today's"])
@pytest.mark.parametrize("new_norm", [True, False], ids=["parametrized", "weight_norm"])
def test_dinos_head_of_any_age_is_found_and_is_no_part_of_the_model(old, new_norm, backbone):
    teacher, head = headless(), dino_head()
    state = with_prefix(backbone, teacher) | renamed(head, old, new_norm)
    for prefix in ("", "module."):
        checkpoint = {"teacher": with_prefix(prefix, state), "student": {}}
        model = make(num_classes=0)
        assert load_weights(model, checkpoint, strict_head=True) == []
        assert same_weights(model, teacher)
        found = dino_head_of(checkpoint, "teacher")
        assert found.keys() == {name.removeprefix("head.") for name in head}
        assert all(torch.equal(found[name.removeprefix("head.")], value) for name, value in head.items())


def test_a_file_without_dinos_head_has_none(state):
    for checkpoint in ({"teacher": headless()}, {"model": state}, {"student": dino_head()}):
        assert dino_head_of(checkpoint, "teacher") == {}


def test_the_layouts_of_the_official_training_files_are_read(golden):
    """Names and shapes as the programs write them."""
    layout = golden("selfsup_layouts.pt")
    dino = {name: torch.empty(shape, device="meta") for name, shape in layout["dino"]["teacher"].items()}
    teacher, _ = select_weights({"teacher": dino, "student": with_prefix("module.", dino), "epoch": 1})
    moco = {name: torch.empty(shape, device="meta") for name, shape in layout["moco"]["state_dict"].items()}
    base, _ = select_weights({"state_dict": with_prefix("module.", moco), "arch": "vit_small", "epoch": 1})
    with torch.device("meta"):
        expected = timm.create_model("vit_small", num_classes=0).state_dict()
    for state in (teacher, base):
        assert {name: value.shape for name, value in state.items()} == {k: v.shape for k, v in expected.items()}
    head = dino_head_of({"teacher": dino}, "teacher")
    assert (len(head), head["last_layer.weight_v"].shape) == (8, (65536, 256))


def test_the_classifiers_of_linear_probes(state):
    weight, bias = classifier_of(state)
    assert weight is state["head.weight"]
    assert bias is state["head.bias"]
    linear = {"module.linear.weight": weight, "module.linear.bias": bias}
    found, _ = select_weights({"epoch": 100, "state_dict": linear, "optimizer": {}, "scheduler": {}, "best_acc": 77.0})
    assert classifier_of(found) == (weight, bias)
    assert classifier_of(headless()) is None
    with pytest.raises(UserError, match=r"of DINO's linear probe, a classifier without its model; .* --classifier"):
        load_weights(make(), {"state_dict": linear})


def test_an_error_names_the_program_that_wrote_the_file(tmp_path):
    write_dino(tmp_path / "dino.pth", headless(), headless())
    write_moco(tmp_path / "moco.pth", headless(), headless())
    for name, program in (("dino", "DINO"), ("moco", "MoCo-v3")):
        with pytest.raises(UserError, match=rf"^the {program} checkpoint's weights do not fit the model. of another"):
            load_weights(make(num_classes=0, embed_dim=48), tmp_path / f"{name}.pth")


def test_a_run_that_was_never_evaluated_gives_the_weights_that_it_reports(state):
    averaged = {name: value + 1 for name, value in state.items()}
    checkpoint = {"args": {"last_block": "standard"}, "data": {}, "best": {}, "reported": "teacher"}
    checkpoint |= {"student": state, "teacher": averaged}
    assert select_weights(checkpoint)[1] == "teacher"
    assert select_weights(checkpoint, "student")[1] == "student"
    for key in ("base", "momentum"):
        assert select_weights(checkpoint | {key: state}, key)[0].keys() == state.keys()


def wide(width=384, positions=None, **kwargs):
    state = make(embed_dim=width, num_heads=6, **kwargs).state_dict()
    return state if positions is None else state | {"pos_embed": positions}


def test_six_and_twelve_heads_of_a_vit_s_are_told_apart_as_far_as_the_file_allows():
    plain, fixed = wide(), wide(positions=moco_positions(384, 4))
    bare = {k: v for k, v in plain.items() if not k.startswith("head.")}
    moco = {"state_dict": with_prefix("module.base_encoder.", bare), "arch": "vit_small"}
    assert num_heads_of({"model": plain}) == 6, "DeiT's own layout"
    assert num_heads_of({"model": plain, "args": {"model_kwargs": {"num_heads": 4}}}) == 4
    assert num_heads_of({"model": plain, "args": {"model_kwargs": {}}}) == 6
    assert num_heads_of({"teacher": with_prefix("backbone.", bare)}) == 6
    assert num_heads_of(moco) == 12
    assert num_heads_of({"model": fixed}) == num_heads_of(fixed) == 12, "MoCo-v3's positions"
    own = {"model": fixed, "data": {}, "args": {"model": "vit_small_sar", "model_kwargs": {}, "last_block": "sar"}}
    assert num_heads_of(own) == 6, "this program's ViT-S, with MoCo-v3's positions"
    drifted = moco_positions(384, 4)
    drifted[0, 1:] += 1e-4 * torch.rand(16, 384)
    assert num_heads_of({"model": wide(positions=drifted)}) == 12, "a momentum encoder's, after 300 epochs"
    learned_cls = moco_positions(384, 4)
    learned_cls[0, 0] = 0.1
    assert num_heads_of({"model": wide(positions=learned_cls)}) == 6, "MoCo-v3's have zeros for [CLS]"
    assert num_heads_of({"model_ema": plain}) == 6
    assert num_heads_of(plain) is num_heads_of(bare) is num_heads_of({"model": bare}) is None
    assert (num_heads_of(wide(192)), num_heads_of(wide(768)), num_heads_of(wide(48))) == (3, 12, None)
    assert num_heads_of(timm.create_model("resnet18").state_dict()) is None


# ---------------------------------------------------------------------------------------------- fitting them


def test_a_timm_checkpoint_gives_timms_logits():
    theirs = timm.create_model("vit_tiny_patch16_224", **SMALL).eval()
    ours = make().eval()
    assert load_weights(ours, theirs.state_dict()) == []
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x))


def test_any_timm_vit_can_be_the_model(state):
    theirs = timm.create_model("vit_tiny_patch16_224", **{**SMALL, "num_classes": 7})
    assert load_weights(theirs, {"model": state}) == ["head: 5 -> 7 classes, dropped and re-initialised"]
    assert same_weights(theirs, state, but="head.")


@pytest.mark.parametrize(("kind", "last_block"), [("standard", "standard"), ("nosn", "sar")])
def test_a_checkpoint_of_the_released_sar_code(golden, tmp_path, kind, last_block):
    content = golden("sar_vit_p4_32.pt")
    released = {"model": content[kind]["state_dict"], "args": argparse.Namespace(use_nosn=kind == "nosn")}
    torch.save(released, tmp_path / "released.pth")
    model = timm.create_model("vit_small", last_block=last_block, **content["config"]).eval()
    assert load_weights(model, tmp_path / "released.pth") == []
    torch.testing.assert_close(model(content["input"]), content[kind]["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: writing it was interrupted"),
        (b"PK\x03\x04", "is truncated or not a checkpoint"),
    ],
)
def test_files_that_hold_nothing(tmp_path, content, message):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_checkpoint(tmp_path / "weights.pth")


def test_a_torchscript_archive_is_called_what_it_is(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"model/{name}", b"")
    with pytest.raises(UserError, match=r"is a TorchScript archive.*torch\.jit\.load"):
        read_checkpoint(tmp_path / "model.pt")


def test_the_content_decides_the_format(tmp_path, state):
    safetensors.torch.save_file({"head.bias": torch.ones(3)}, tmp_path / "weights.pth")
    torch.save(state, tmp_path / "weights.safetensors")
    assert list(read_checkpoint(tmp_path / "weights.pth")) == ["head.bias"]
    assert list(read_checkpoint(tmp_path / "weights.safetensors")) == list(state)


def test_paths_in_arguments_are_read(tmp_path, state):
    torch.save({"model": state, "args": {"data_path": Path("/data"), "other": PurePosixPath("x")}}, tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth")["args"]["data_path"] == Path("/data")


@pytest.mark.parametrize("prefix", ["model.", "backbone.", "vit."])
def test_a_beginning_that_all_names_share_is_removed(state, prefix):
    assert list(select_weights({"state_dict": with_prefix(prefix, state)})[0]) == list(state)
    assert select_weights({"state_dict": {"linear.weight": torch.ones(2, 2)}})[0].keys() == {"linear.weight"}


def test_maes_pre_training_gives_its_encoder(state):
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 192)}
    encoder = {name: value for name, value in state.items() if not name.startswith("head.")}
    model = make()
    notes = load_weights(model, {"model": encoder | decoder})
    assert notes[0] == "of MAE's pre-training: the encoder, without decoder and mask token"
    assert torch.equal(model.state_dict()["blocks.1.attn.qkv.weight"], state["blocks.1.attn.qkv.weight"])


DEIT3 = ("deit3_small_patch16_224", {"init_values": 0.5})
DINOV2 = ("vit_small_patch14_dinov2", {"init_values": 0.5})
REGISTERS = ("vit_small_patch14_reg4_dinov2", {"init_values": 0.5, "reg_tokens": 2, "no_embed_class": True})


def official(name: str, kwargs: dict):
    """timm's model, and its weights with the names of the program that trained it."""
    theirs = timm.create_model(name, **{**SMALL, **kwargs}).eval()
    state = {key: torch.randn_like(value) / 8 for key, value in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    if name.startswith("deit3"):
        return theirs, {"model": {re.sub(r"ls(\d)\.gamma", r"gamma_\1", key): value for key, value in state.items()}}
    state["mask_token"] = torch.zeros(1, 24)
    if "reg_token" in state:
        state["register_tokens"], own = state.pop("reg_token"), torch.randn(1, 1, 24)
        state |= {"cls_token": state["cls_token"] - own, "pos_embed": torch.cat([own, state["pos_embed"]], dim=1)}
    return theirs, state


@pytest.mark.parametrize("which", [DEIT3, DINOV2, REGISTERS], ids=["DeiT III", "DINOv2", "DINOv2 with registers"])
def test_layer_scale_and_registers_of_official_files_are_read(which, tmp_path):
    theirs, content = official(*which)
    torch.save(content, tmp_path / "official.pth")
    ours = make(**which[1]).eval()
    load_weights(ours, tmp_path / "official.pth")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images))
    assert ours(images, return_similarity=True)[1].shape == (2, 3, 4, 4)
    timms = make(**which[1]).eval()
    load_weights(timms, theirs.state_dict())
    torch.testing.assert_close(timms(images), theirs(images))


@pytest.mark.parametrize(
    ("which", "kwargs", "mend"),
    [
        (DEIT3, {}, "They have LayerScale: give --model-kwargs init_values=1e-5"),
        (
            REGISTERS,
            {},
            "They have LayerScale and register tokens: give --model-kwargs init_values=1e-5 reg_tokens=2 "
            "no_embed_class=True",
        ),
        (REGISTERS, {"init_values": 1, "reg_tokens": 2}, "Register tokens have no positions: give .* no_embed_class"),
        (DEIT3, {"init_values": 1, "img_size": 48}, r"with a position of \[CLS\] .* no_embed_class=True if"),
        (DINOV2, {"init_values": 1, "qk_norm": True}, "no norms of queries and keys: leave qk_norm out"),
    ],
)
def test_parts_that_only_the_file_or_the_model_has_are_named_with_the_mend(which, kwargs, mend):
    with pytest.raises(UserError, match=mend) as error:
        load_weights(make(**kwargs), official(*which)[1])
    assert len(str(error.value)) < 400


def test_layer_scale_is_no_part_of_a_pyramid():
    with pytest.raises(UserError, match=r"They have LayerScale, which this model cannot have$"):
        load_weights(timm.create_model("resnet18"), official(*DEIT3)[1])


def test_positions_without_one_for_cls_are_the_same_model():
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 3}
    theirs = timm.create_model("vit_tiny_patch16_224", no_embed_class=True, **sizes).eval()
    ours = timm.create_model("vit_tiny", **sizes).eval()
    assert load_weights(ours, {"model": theirs.state_dict()}) == ["pos_embed: without one for [CLS], which gets zeros"]
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours(images), theirs(images))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["vit.embeddings.cls_token", "vit.encoder.layer.0.output.dense.bias"], "those of Hugging Face's transformers"),
        (["layers.0.ln1.weight", "cls_token"], "those of mmpretrain"),
        (["conv_proj.weight", "encoder.layers.encoder_layer_0.ln_1.weight"], "those of torchvision's ViT"),
    ],
)
def test_other_layouts_are_called_by_their_programs(names, message):
    with pytest.raises(UserError, match=message):
        load_weights(make(), {"model": {name: torch.zeros(1) for name in names}})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(state, value):
    state = state | {"blocks.0.norm1.bias": torch.full_like(state["blocks.0.norm1.bias"], value)}
    model = make()
    before = model.state_dict()["blocks.0.norm1.bias"].clone()
    with pytest.raises(UserError, match=r"blocks\.0\.norm1\.bias is not finite"):
        load_weights(model, {"model": state})
    assert torch.equal(model.state_dict()["blocks.0.norm1.bias"], before)


def test_a_head_whose_classes_have_other_names_is_dropped(state):
    classes = [f"class {number}" for number in range(len(state["head.bias"]))]
    own = {"model": state, "args": {"last_block": "standard", "model": "x"}, "data": {"classes": classes}}
    model = make()
    assert load_weights(model, own, classes=classes) == []
    assert load_weights(model, own) == [], "nothing is known of the model's classes"
    (note,) = load_weights(model, own, classes=[*classes[:-1], "zebra"])
    assert "with other names, dropped and re-initialised; --keep-head keeps it" in note


def test_another_number_of_classes_drops_the_head(state):
    torch.manual_seed(2)
    model = make(num_classes=3)
    fresh = {k: v.clone() for k, v in model.state_dict().items() if k.startswith("head.")}
    assert load_weights(model, state) == ["head: 5 -> 3 classes, dropped and re-initialised"]
    assert same_weights(model, state, but="head.")
    assert same_weights(model, fresh)


def test_evaluation_never_drops_the_head(state):
    assert load_weights(make(), state, strict_head=True) == []
    with pytest.raises(
        UserError, match=r"shape: head.weight 5x24 for 3x24, head.bias 5 for 3\. Its classes are others"
    ):
        load_weights(make(num_classes=3), state, strict_head=True)
    headless = {k: v for k, v in state.items() if not k.startswith("head.")}
    with pytest.raises(UserError, match=r"missing: head.weight, head.bias$"):
        load_weights(make(), headless, strict_head=True)


def test_a_head_on_one_side_only(state):
    headless = {k: v for k, v in state.items() if not k.startswith("head.")}
    assert load_weights(make(num_classes=0), state) == ["head: dropped (5 classes), as the model has none"]
    assert load_weights(make(), headless) == ["head: not in the checkpoint, initialised for 5 classes"]
    assert load_weights(make(num_classes=0), headless) == []


def test_position_embedding_of_another_image_size_is_resampled_as_timm_does(state):
    model, expected = make(img_size=(48, 32)), make()
    expected.load_state_dict(state)
    expected.set_input_size((48, 32))
    assert load_weights(model, state) == ["pos_embed: 1x17x24 -> 1x25x24, resampled"]
    assert same_weights(model, expected.state_dict())


def test_another_patch_size_is_resampled(state):
    model, expected = make(patch_size=4), make()
    expected.load_state_dict(state)
    expected.set_input_size(patch_size=(4, 4))
    assert load_weights(model, state) == [
        "patch_embed.proj.weight: 24x3x8x8 -> 24x3x4x4, resampled",
        "pos_embed: 1x17x24 -> 1x65x24, resampled",
    ]
    torch.testing.assert_close(model.state_dict(), expected.state_dict())


def test_same_shapes_are_never_resampled():
    """7 x 28 patches are as many as 14 x 14: our own checkpoint must come back as it was."""
    sizes = {"img_size": (112, 448), "patch_size": 16}
    model, again = make(**sizes), make(**sizes)
    assert load_weights(again, model.state_dict()) == []
    assert same_weights(again, model.state_dict())


@pytest.mark.parametrize("image", [(32, 48), (32, 56)])
@pytest.mark.parametrize("target", [32, 64])
def test_an_oblong_grid_cannot_be_resampled(image, target):
    oblong = make(img_size=image).state_dict()
    with pytest.raises(UserError, match=r"another shape: pos_embed .*\. Only square grids with a position of"):
        load_weights(make(img_size=target), oblong)


def test_a_standard_checkpoint_in_a_sar_model_and_the_reverse(state):
    sar = make("vit_tiny_sar").state_dict()
    with pytest.raises(UserError, match=r"unexpected: blocks.1.norm2.weight, .* --last-block standard$"):
        load_weights(make("vit_tiny_sar"), state)
    with pytest.raises(UserError, match=r"missing: blocks.1.norm2.weight, .* --last-block sar$"):
        load_weights(make(), sar)
    assert load_weights(make(last_block="sar"), sar) == []


def test_a_distilled_deit_is_told_by_name(state):
    distilled = state | {"dist_token": torch.zeros(1, 1, 24), "pos_embed": torch.zeros(1, 18, 24)}
    with pytest.raises(UserError, match=r"use the model without distillation$"):
        load_weights(make(), distilled)


def test_another_width_is_no_matter_of_the_grid(state):
    with pytest.raises(UserError, match="of another shape") as error:
        load_weights(make(embed_dim=48), state)
    assert "square grid" not in str(error.value)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize(("name", "kind"), [("vit_tiny", "standard"), ("vit_tiny_sar", "sar")])
def test_the_last_block_is_told_by_the_arguments_or_the_second_norm(name, kind, zipped, tmp_path):
    path, state = tmp_path / "weights.pth", make(name).state_dict()

    def kind_of(content, key=None):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        return last_block_of(path, key)

    assert kind_of({"model": state}) == kind
    assert kind_of({"model": state, "args": {"last_block": "no_skips"}}) == "no_skips"
    assert kind_of({"teacher": {f"module.{name}": value for name, value in state.items()}}, "teacher") == kind
    assert kind_of({"model": {"weight": torch.zeros(1)}}) is None


def test_anything_else_is_listed_and_changes_nothing(state):
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wrong = {k: v for k, v in state.items() if k != "norm.weight"} | {"dist_token": torch.zeros(1, 1, 24)}
    wrong["blocks.0.mlp.fc1.bias"] = torch.zeros(7)
    message = "missing: norm.weight; unexpected: dist_token; of another shape: blocks.0.mlp.fc1.bias 7 for 96"
    with pytest.raises(UserError, match=message):
        load_weights(model, wrong)
    assert same_weights(model, before)


def test_a_wholly_different_model_gives_a_short_line(state):
    with pytest.raises(UserError, match=r"unexpected: .* and \d+ more") as raised:
        load_weights(timm.create_model("resnet18", num_classes=5), state)
    assert len(str(raised.value)) < 400
    with pytest.raises(UserError, match="do not fit"):
        load_weights(make(depth=1), state)


def test_a_vit_of_another_width_is_called_by_its_models_name():
    base, small = (timm.create_model("vit_small", depth=1, embed_dim=width, num_heads=6) for width in (768, 384))
    with pytest.raises(UserError, match=r"of width 768, and the model is of width 384: use --model vit_base$") as error:
        load_weights(small, base.state_dict())
    assert len(str(error.value)) < 400


def test_half_precision_weights_are_cast(state):
    model = make(img_size=64)
    load_weights(model, {k: v.half() for k, v in state.items()})
    assert all(p.dtype == torch.float32 for p in model.parameters())
