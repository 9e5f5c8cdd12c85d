"""Weights for other programs: files by their suffix, and folders that timm loads."""

import json

import pytest
import timm
import torch
from helpers import checkpoints as files
from helpers import runs
from helpers.checkpoints import SMALL, make
from timm.data import resolve_data_config
from timm.models import save_for_hf

import checkpoints
import export
import main
from arguments import parse_arguments
from export import write_weights
from tasks.settings import build_task_model
from utils import UserError
from weights import load_weights, read_checkpoint

# ------------------------------------------------------------------------------------------------------------- files


def same_weights(model, state):
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], value) for name, value in state.items())


def test_written_weights_are_loaded_by_timm_and_by_this_program(tmp_path):
    model, images = make(num_classes=0).eval(), torch.randn(2, 3, 32, 32)
    for name in ("vit.safetensors", "vit.pth", "vit.pth.tar"):
        write_weights(model, tmp_path / name, None, ())
        again = make(num_classes=0).eval()
        load_weights(again, tmp_path / name, strict_head=True)
        assert torch.equal(again(images), model(images))
    theirs = timm.create_model("vit_tiny_patch16_224", **{**SMALL, "num_classes": 0}).eval()
    for name in ("vit.safetensors", "vit.pth"):
        theirs.load_state_dict(read_checkpoint(tmp_path / name), strict=True)
        torch.testing.assert_close(theirs(images), model(images))
    by_path = timm.create_model(
        "vit_tiny_patch16_224", checkpoint_path=tmp_path / "vit.safetensors", **{**SMALL, "num_classes": 0}
    )
    assert torch.equal(by_path.eval()(images), theirs(images))


def test_written_weights_have_the_names_that_dinos_and_mocos_scripts_read(tmp_path):
    model = make(num_classes=0)
    write_weights(model, tmp_path / "dino.pth", None, ())
    content = torch.load(tmp_path / "dino.pth", weights_only=True)
    stripped = {name.replace("module.", "").replace("backbone.", ""): value for name, value in content.items()}
    assert same_weights(model, stripped)
    assert stripped.keys() == model.state_dict().keys()
    write_weights(make(), tmp_path / "moco.pth.tar", None, ())
    names = torch.load(tmp_path / "moco.pth.tar", weights_only=True)["state_dict"]
    prefix = "module.base_encoder"
    kept = [name.removeprefix(f"{prefix}.") for name in names if not name.startswith(f"{prefix}.head")]
    assert kept == list(model.state_dict())


@pytest.mark.parametrize("name", ["vit.onnx", "vit.pt", "none/vit.pth"])
def test_weights_that_cannot_be_written_are_one_line(tmp_path, name):
    with pytest.raises(UserError, match=r"--export .*(name a file \*\.safetensors|make it first)"):
        write_weights(make(), tmp_path / name, None, ())


# ----------------------------------------------------------------------------------------------------------- folders


def exported(path, folder, *more) -> dict:
    """The configuration in the folder that main.py writes of this checkpoint."""
    assert main.main(["--resume", str(path), "--export", str(folder), *more]) == 0
    assert {file.name for file in folder.iterdir()} == {"model.safetensors", "config.json"}
    return json.loads((folder / "config.json").read_text())


def own(path, more: str):
    """The model of a checkpoint of this program, which is written, with weights far from zero."""
    files.write_checkpoint(path, ["ant", "bee", "cat"], more=more)
    content = torch.load(path, weights_only=True)
    for key in ("ema", "model"):
        content[key] = {name: value + torch.rand(value.shape) / 4 for name, value in content["model"].items()}
    torch.save(content, path)
    model = build_task_model(parse_arguments([*files.OWN, *more.split()]), 3, torch.device("cpu")).eval()
    return model, content


@pytest.mark.parametrize(("key", "more"), [("model", ()), ("ema", ("--checkpoint-key", "ema"))])
def test_a_stock_vit_is_timms_own_in_a_folder(tmp_path, key, more, capsys):
    """Without this program: the architecture is timm's, and so are all arguments of it."""
    model, content = own(tmp_path / "best.pth", "--model vit_tiny --crop-pct 0.9")
    config = exported(tmp_path / "best.pth", tmp_path / "out/hub", *more)
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert (config["num_classes"], config["label_names"]) == (3, ["ant", "bee", "cat"])
    assert not {"last_block", "similarity", "similarity_query"} & config["model_args"].keys()
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out/hub'}", pretrained=True).eval()
    model.load_state_dict(content[key])
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(theirs(images), model.forward_head(model.forward_features(images))), (
        "of all tokens, as timm does"
    )
    data = resolve_data_config(model=theirs)
    assert (data["input_size"], data["crop_pct"], data["interpolation"]) == ((3, 8, 8), 0.9, "bicubic")
    assert (*data["mean"], *data["std"]) == (0.485, 0.456, 0.406, 0.229, 0.224, 0.225)
    assert f'timm.create_model("local-dir:{tmp_path / "out/hub"}", pretrained=True) loads it' in capsys.readouterr().out


FAMILIES = {
    "vit_tiny_sar": "--patch-size 4 --input-size 16 --sar-query mean --sar-similarity cosine",
    "t2t_vit_14_sar": "--patch-size 16 --input-size 48 --model-kwargs embed_dim=24 depth=2 num_heads=3 token_dim=8",
    "pvt_small": "--patch-size 4 --input-size 64 --model-kwargs embed_dims=8,8,8,8 depths=1,1,1,1 num_heads=1,1,1,1",
    "cvt_13_sar": "--patch-size 4 --input-size 128 --model-kwargs embed_dims=8,8,12 depths=1,1,1 num_heads=1,1,2",
    "swin_tiny": "--patch-size 4 --input-size 64 --model-kwargs embed_dim=8 depths=1,1,1,1 num_heads=1,1,1,1 "
    "window_size=2",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_comes_back_from_a_folder(tmp_path, name):
    more = f"--model {name} --sar-query {'mean' if name.startswith('swin') else 'cls'} {FAMILIES[name]}"
    model, content = own(tmp_path / "best.pth", more)
    config = exported(tmp_path / "best.pth", tmp_path / "hub")
    assert config["architecture"] == {"swin_tiny": "swin_tiny_patch4_window7_224"}.get(name, name)
    again = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    model.load_state_dict(content["model"])
    side = config["pretrained_cfg"]["input_size"][1]
    images = torch.randn(2, 3, side, side)
    torch.testing.assert_close(again(images), model(images))
    if name.endswith("_sar"):
        torch.testing.assert_close(*(each(images, return_similarity=True)[1] for each in (again, model)))


def test_a_killed_export_leaves_nothing_to_upload_and_a_folder_may_have_a_dot(tmp_path, monkeypatch):
    own(tmp_path / "best.pth", "")
    there = []

    def written(*args, **options):
        save_for_hf(*args, **options)
        there.extend((tmp_path / "hub-v1.0").rglob("*"))

    monkeypatch.setattr(export, "save_for_hf", written)
    exported(tmp_path / "best.pth", tmp_path / "hub-v1.0")
    assert there == []


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(UserError, match="a folder with other files; name a new one"):
        write_weights(make(), tmp_path, None, ())
    assert [file.name for file in tmp_path.iterdir()] == ["a.jpg"]


def test_a_folder_is_read_again_and_replaced(tmp_path):
    model, content = own(tmp_path / "best.pth", "")
    exported(tmp_path / "best.pth", tmp_path / "hub")
    exported(tmp_path / "best.pth", tmp_path / "hub", "--checkpoint-key", "ema")
    assert same_weights(model, read_checkpoint(tmp_path / "hub/model.safetensors")) is False
    with pytest.raises(UserError, match=r"hub is a folder; name the checkpoint in it, .*hub/model\.safetensors$"):
        read_checkpoint(tmp_path / "hub")
    load_weights(model, tmp_path / "hub/model.safetensors", strict_head=True)
    assert same_weights(model, content["ema"])


ENCODERS = {
    "dino": "--out-dim 16 --local-crops-number 0",
    "moco": "--moco-dim 8 --moco-mlp-dim 16 --batch-size 128 --total-batch 128",
}


@pytest.mark.parametrize("task", ENCODERS)
def test_an_encoder_goes_into_a_folder_without_heads_and_without_images(tmp_path, task):
    words = f"--task {task} {' '.join(files.OWN[4:])} --data-set digits --output-dir {tmp_path}"
    run = runs.build(f"{words} --num-workers 0 {ENCODERS[task]}")
    checkpoints.save(run, "checkpoint.pth")
    config = exported(tmp_path / "checkpoint.pth", tmp_path / "hub")
    assert config["num_classes"] == 0
    again = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    images = torch.randn(2, 3, 8, 8)
    encoder = run.task.evaluated()["test" if run.task.reported == run.task.weight_names[0] else "test_teacher"]
    torch.testing.assert_close(again(images), encoder.eval()(images))
