"""A trained model from a file of any origin: the same logits or features as the model it came from, or a clear line."""

import argparse
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from helpers import checkpoints as files
from helpers import runs
from torch.nn import functional as F

import main
from analysis.attention import attention_of, similarity_maps
from analysis.commands import add_checkpoint_options, add_model_options, load_models
from analysis.models import CPU, load_model, short_names
from arguments import parse_arguments
from cli import Parser
from models import build_model
from tasks.settings import model_settings
from utils import UserError

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def another_programs(num_classes=5, **kwargs):
    """timm's own ViT, whose weights stand for another program's."""
    torch.manual_seed(3)
    return timm.create_model("vit_small_patch16_224", **{**files.SMALL, "num_classes": num_classes, **kwargs}).eval()


def save(path, content):
    (safetensors.torch.save_file if path.suffix == ".safetensors" else torch.save)(content, path)
    return path


SUPERVISED = {
    "DeiT": ("deit.pth", lambda state: {"model": state}),
    "DeiT, with its arguments": ("deit.pth", lambda state: {"model": state, "args": argparse.Namespace(lr=1e-3)}),
    "timm, bare": ("timm.pth", lambda state: state),
    "timm, safetensors": ("timm.safetensors", lambda state: state),
    "timm, training": (
        "timm.pth.tar",
        lambda state: {"state_dict": state, "arch": "vit_small_patch16_224", "epoch": 1},
    ),
    "wrapped": ("module.pth", lambda state: {"model": files.with_prefix("module.", state)}),
}


@pytest.mark.parametrize(("name", "pack"), SUPERVISED.values(), ids=SUPERVISED.keys())
def test_a_supervised_vit_gives_its_own_logits(tmp_path, name, pack):
    source = another_programs()
    trained = load_model(save(tmp_path / name, pack(source.state_dict())), num_heads=3)
    assert (trained.input_size, trained.patch_size, trained.classes) == (32, 8, None)
    assert not trained.model.training
    torch.testing.assert_close(trained.model(IMAGES), source(IMAGES))


@pytest.mark.parametrize("kind", ["standard", "nosn"])
def test_the_released_code_gives_its_golden_logits_and_similarity(golden, tmp_path, kind):
    content = golden("sar_vit_p4_32.pt")
    trained = load_model(save(tmp_path / "sar.pth", {"model": content[kind]["state_dict"]}), num_heads=3)
    torch.testing.assert_close(trained.model(content["input"]), content[kind]["logits"], rtol=0, atol=1e-5)
    similarity = similarity_maps(trained.model.double(), content["input"].double())
    torch.testing.assert_close(similarity.flatten(2), content[kind]["dot_qk_cls"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["standard", "nosn"])
def test_positions_are_resampled_as_the_released_code_does(golden, tmp_path, kind):
    content = golden("sar_vit_p4_32.pt")
    path = save(tmp_path / "sar.pth", {"model": content[kind]["state_dict"]})
    images = F.interpolate(content["input"].double(), scale_factor=2)
    expected = content[kind]["last_selfattention_at_double_res"][:, :, 1:]
    expected = expected / expected.sum(dim=-1, keepdim=True)
    errors = {}
    for positions in ("released", "timm"):
        model = load_model(path, num_heads=3, input_size=64, positions=positions).model.double()
        errors[positions] = (attention_of(similarity_maps(model, images)).flatten(2) - expected).abs().max()
    assert errors["released"] < 2e-8, "the file's positions are float32"
    assert errors["timm"] > 1e-4, "a check that would see the difference"
    same_size = load_model(path, num_heads=3, positions="released").model
    torch.testing.assert_close(same_size(content["input"]), content[kind]["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("key", "seed"), [(None, 2), ("teacher", 2), ("student", 1)])
def test_dinos_networks_give_their_own_features(tmp_path, key, seed):
    sources = {number: another_programs(num_classes=0) for number in (1, 2)}
    torch.nn.init.normal_(sources[1].pos_embed)
    files.write_dino(tmp_path / "dino.pth", sources[1].state_dict(), sources[2].state_dict())
    trained = load_model(tmp_path / "dino.pth", key=key, num_heads=3)
    torch.testing.assert_close(trained.model.forward_features(IMAGES), sources[seed].forward_features(IMAGES))
    assert trained.model.num_classes == 0
    assert similarity_maps(trained.model, IMAGES).shape == (2, 3, 4, 4)


@pytest.mark.parametrize(("key", "seed"), [(None, 1), ("base", 1), ("momentum", 2)])
def test_moco_v3s_encoders_give_their_own_features(tmp_path, key, seed):
    sources = {number: another_programs(num_classes=0, num_heads=12) for number in (1, 2)}
    torch.nn.init.normal_(sources[1].pos_embed)
    files.write_moco(tmp_path / "moco.pth.tar", sources[1].state_dict(), sources[2].state_dict())
    trained = load_model(tmp_path / "moco.pth.tar", key=key)
    torch.testing.assert_close(trained.model.forward_features(IMAGES), sources[seed].forward_features(IMAGES))
    assert similarity_maps(trained.model, IMAGES).shape == (2, 12, 4, 4), "MoCo-v3's number, without asking"


@pytest.mark.parametrize("model", ["vit_tiny", "vit_tiny_sar"])
def test_a_checkpoint_of_this_program_needs_no_word(tmp_path, model):
    data = runs.write_digits(tmp_path / "digits")
    command = runs.command(data, tmp_path / "out", "--model", model, "--epochs", "1", "--sar-similarity", "cosine")
    assert main.main(command) == 0
    trained = load_model(tmp_path / "out/best.pth")
    assert trained.name == "out"
    assert trained.classes == sorted(path.name for path in (data / "train").iterdir())
    saved = torch.load(tmp_path / "out/best.pth", weights_only=True)
    images = torch.randn(2, 3, trained.input_size, trained.input_size)
    settings = model_settings(argparse.Namespace(**saved["args"]), len(trained.classes))
    source, _ = build_model(settings, torch.device("cpu"))
    source.load_state_dict(saved["model"])
    torch.testing.assert_close(trained.model(images), source(images))
    source.blocks[-1].similarity = "dot"
    assert torch.equal(similarity_maps(trained.model, images), similarity_maps(source, images)), "Eq. 4, not Eq. 15"
    larger = load_model(tmp_path / "out/best.pth", input_size=2 * trained.input_size)
    assert (
        similarity_maps(larger.model, torch.zeros(1, 3, *[larger.input_size] * 2)).shape[-1]
        == 2 * trained.model(images, return_similarity=True)[1].shape[-1]
    )


@pytest.mark.parametrize("name", ["deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_layer_scale_registers_and_positions_without_cls_are_found_in_the_file(tmp_path, name):
    theirs = timm.create_model(name, embed_dim=192, depth=1, num_heads=3, img_size=28, patch_size=7).eval()
    theirs.load_state_dict({key: torch.randn_like(value) / 8 for key, value in theirs.state_dict().items()})
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    trained = load_model(tmp_path / "vit.pth")
    assert (trained.input_size, trained.patch_size) == (28, 7)
    images = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(trained.model(images), theirs(images))


def test_a_head_of_1000_classes_is_imagenets(tmp_path):
    path = save(tmp_path / "deit.pth", {"model": another_programs(num_classes=1000).state_dict()})
    classes = load_model(path, num_heads=3).classes
    assert (classes[6], len(classes), classes == sorted(classes)) == ("n01498041", 1000, True)


def test_what_cannot_be_used_is_said(tmp_path):
    state = another_programs().state_dict()
    path = save(tmp_path / "timm.pth", state)
    with pytest.raises(UserError, match=r"timm.pth: the file does not give .* of width 24; give --num-heads$"):
        load_model(path)
    with pytest.raises(UserError, match=r"--num-heads 7 does not divide the width 24$"):
        load_model(path, num_heads=7)
    with pytest.raises(UserError, match=r"size of 50 is not divisible by the patch size 8; use 48$"):
        load_model(path, num_heads=3, input_size=50)
    with pytest.raises(UserError, match=r"resnet.pth: not the weights of a ViT: no cls_token, .* must hold a ViT$"):
        load_model(save(tmp_path / "resnet.pth", timm.create_model("resnet18").state_dict()))
    with pytest.raises(UserError, match=r"odd.pth: .*unexpected: blocks.0.extra.gamma$"):
        load_model(save(tmp_path / "odd.pth", state | {"blocks.0.extra.gamma": torch.ones(24)}), num_heads=3)


def test_a_vit_of_other_proportions_needs_no_word_but_its_heads(tmp_path):
    source = another_programs(qkv_bias=False, mlp_ratio=2)
    trained = load_model(save(tmp_path / "odd.pth", source.state_dict()), num_heads=3)
    torch.testing.assert_close(trained.model(IMAGES), source(IMAGES))


def test_heads_that_are_said_are_compared_with_what_is_known(tmp_path, caplog):
    own = own_checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"best.pth: trained with 3 heads, not 6; leave --num-heads out$"):
        load_model(own, num_heads=6)
    assert load_model(own, num_heads=3).model.blocks[-1].attn.num_heads == 3
    files.write_moco(tmp_path / "moco.pth", *(another_programs(num_classes=0).state_dict() for _ in range(2)))
    with caplog.at_level("WARNING", "sar"):
        assert load_model(tmp_path / "moco.pth", num_heads=6).model.blocks[0].attn.num_heads == 6
    assert "using 6 heads as given, although its layout implies 12" in caplog.text
    plain = save(tmp_path / "plain.pth", another_programs().state_dict())
    with pytest.raises(UserError, match=r"moco.pth has 12 heads by its layout"):
        load_models(options(plain, tmp_path / "moco.pth", "--num-heads", "6"), CPU)
    with pytest.raises(UserError, match=r"'0' is not a whole number of at least 1"):
        options(plain, "--num-heads", "0")


def options(*words):
    parser = Parser(prog="test")
    add_checkpoint_options(parser, required=True)
    add_model_options(parser)
    files = [word for path in words if isinstance(path, Path) for word in ("--checkpoint", str(path))]
    args = parser.parse_args([*files, *(word for word in words if isinstance(word, str))])
    args.input_size = None
    return args


def own_checkpoint(folder):
    sizes = {"embed_dim": 24, "depth": 1, "num_heads": 3}
    words = "--model vit_tiny --input-size 32 --patch-size 8 --crop-pct 0.9".split()
    args = vars(parse_arguments(words)) | {"model_kwargs": sizes}
    model = files.make("vit_tiny", img_size=32, num_classes=2, depth=1)
    torch.save({"args": args, "data": {"classes": ["a", "b"]}, "model": model.state_dict()}, folder / "best.pth")
    return folder / "best.pth"


def test_an_own_checkpoint_keeps_its_crop_and_its_patches(tmp_path):
    assert load_model(own_checkpoint(tmp_path)).crop_pct == 0.9
    with pytest.raises(UserError, match=r"size of 50 is not divisible by the patch size 8; use 48$"):
        load_model(tmp_path / "best.pth", input_size=50)


def test_short_names_tell_checkpoints_apart():
    assert short_names(["out/runs/vit_small/seed0/best.pth", "out/runs/vit_small_sar/seed0/best.pth"]) == [
        "vit_small",
        "vit_small_sar",
    ]
    assert short_names(["a/seed0/best.pth", "b/seed1/best.pth"]) == ["a/seed0", "b/seed1"]
    assert short_names(["x/deit.pth", "y/z/dino.pth"]) == ["x/deit", "y/z/dino"]
    assert short_names(["output/quickstart/best.pth"]) == ["quickstart"]
    assert short_names(["a/best.pth", "a/best.pt"]) == ["best.pth", "best.pt"]
    assert short_names(["weights/deit_small.pth"]) == ["deit_small"]
    timms, url = "timm:deit_small_patch16_224.fb_in1k", "https://host/moco/vit-s.pth?download=true"
    assert short_names([timms]) == ["deit_small_patch16_224.fb_in1k"]
    assert short_names(["a/seed0/best.pth", "hf-hub:me/vit@v1", "b/seed0/best.pth", url]) == [
        "a",
        "vit@v1",
        "b",
        "vit-s",
    ]
    assert short_names(["hf-hub:me/vit", "hf-hub:you/vit", "a/vit.pth"]) == ["hf-hub:me/vit", "hf-hub:you/vit", "vit"]
    assert short_names(["hf-hub:vit", "http://[host"]) == ["vit", "[host"], "an error when they are fetched"
    with pytest.raises(UserError, match=r"a checkpoint is given twice: a.pth, ./a.pth, b.pth; give each once$"):
        short_names(["a.pth", "./a.pth", "b.pth"])
