"""T2T-ViT, PVT, CvT, Swin, and ViT beside them: the official numbers, one interface, one way to attach SAR."""

import copy
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.layers import DropPath
from timm.models import create_feature_extractor, group_parameters

import main
import models_sar
from analysis import figures, jaccard
from losses import SpatialEntropyLoss
from models import (
    cvt,
    pvt,
    swin,  # noqa: F401 - registers the model
    t2t,
)
from models_sar import LAST_BLOCKS
from weights import BLOCK, last_block_of, load_weights

ROOT = Path(__file__).parents[1]
SMALL = {
    "vit_small": {"embed_dim": 48, "depth": 2, "num_heads": 3},
    "t2t_vit_14": {"embed_dim": 48, "depth": 2, "num_heads": 3, "token_dim": 16},
    "t2t_vit_t_14": {"embed_dim": 48, "depth": 2, "num_heads": 3, "token_dim": 16},
    "pvt_small": {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 2, 2), "num_heads": (1, 2, 3, 4)},
    "cvt_13": {"embed_dims": (16, 24, 48), "depths": (1, 2, 2), "num_heads": (1, 3, 6)},
    "swin_tiny": {"embed_dim": 16, "depths": (1, 2, 1, 2), "num_heads": (1, 2, 2, 4)},
}
HYBRIDS = [name for name in SMALL if name != "vit_small"]
PYRAMIDS = ["pvt_small", "cvt_13", "swin_tiny"]
NAMES = [name + suffix for name in SMALL for suffix in ("", "_sar")]


def make(name, img_size=64, **kwargs):
    torch.manual_seed(0)
    sizes = SMALL[name.removesuffix("_sar")]
    return timm.create_model(name, **{"img_size": img_size, "num_classes": 5, "drop_path_rate": 0.0, **sizes, **kwargs})


def images(batch=2, size=64, dtype=torch.float32):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def fill(model):
    """Give all weights and running statistics values far from their initial ones; returns the model."""
    generator = torch.Generator().manual_seed(2)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).abs())
    return model


# ------------------------------------------------------------------------------------------- official numbers


def golden_t2t(performer, c):
    sizes = {name: c[name] for name in ("embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "token_dim")}
    return lambda **kwargs: t2t.T2TViT(img_size=112, num_classes=10, performer=performer, **sizes, **kwargs)


def golden_pvt(c):
    sizes = {name: c[name] for name in ("embed_dims", "depths", "num_heads", "mlp_ratios", "sr_ratios", "img_size")}
    return lambda **kwargs: pvt.PVT(num_classes=10, **sizes, **kwargs)


def golden_cvt(c):
    sizes = {"embed_dims": c["spec"]["DIM_EMBED"], "depths": c["spec"]["DEPTH"], "num_heads": c["spec"]["NUM_HEADS"]}
    return lambda **kwargs: cvt.CvT(num_classes=10, **sizes, **kwargs)


GOLDEN = {
    "t2t_performer_tiny.pt": lambda c: golden_t2t(True, c),
    "t2t_transformer_tiny.pt": lambda c: golden_t2t(False, c),
    "pvt_v1_tiny.pt": golden_pvt,
    "cvt_tiny.pt": golden_cvt,
}


@pytest.mark.parametrize(("last_block", "prefix"), [("standard", ""), ("sar", "nosn_")])
@pytest.mark.parametrize("file", GOLDEN)
def test_official_weights_load_by_name_and_give_the_official_numbers(golden, file, last_block, prefix):
    content = golden(file)
    model = GOLDEN[file](content["config"])(last_block=last_block).eval()
    removed = {name for name in content["state_dict"] if name not in model.state_dict()}
    assert len(removed) == (0 if last_block == "standard" else 2)
    assert all(".norm2." in name for name in removed)
    model.load_state_dict({name: value for name, value in content["state_dict"].items() if name not in removed})
    if last_block == "standard":
        torch.testing.assert_close(model(content["input"]), content["logits"], rtol=0, atol=1e-5)
    model, expected = model.double(), content[f"{prefix}logits_f64"]
    logits, similarity = model(content["input"].double(), return_similarity=True)
    errors = {
        "logits": (logits - expected).abs().max(),
        "all tokens": (model.forward_head(model.forward_features(content["input"].double())) - expected).abs().max(),
        "similarity": (similarity.flatten(2) - content[f"{prefix}last_block_q_cls_dot_k"]).abs().max(),
    }
    print(file, last_block, {name: f"{error.item():.1e}" for name, error in errors.items()})
    assert max(errors.values()) < 1e-9


COUNTS = {
    "t2t_vit_14": 21_465_806,
    "t2t_vit_14_sar": 21_465_038,
    "t2t_vit_t_14": 21_465_422,
    "t2t_vit_t_14_sar": 21_464_654,
    "pvt_small": 24_485_864,
    "pvt_small_sar": 24_484_840,
    "cvt_13": 19_997_480,
    "cvt_13_sar": 19_996_712,
    "swin_tiny": 28_288_354,
    "swin_tiny_sar": 28_286_818,
}


@pytest.mark.parametrize("name", COUNTS)
def test_full_size_parameters_and_grid(name):
    model = timm.create_model(name).eval()
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]
    assert all(p.requires_grad for p in model.parameters())
    with torch.inference_mode():
        _, similarity = model(torch.randn(1, 3, 224, 224), return_similarity=True)
    side = 14 if name.startswith("t2t") else 7
    heads = {"t2t": 6, "pvt": 8, "cvt": 6, "swi": 24}[name[:3]]
    assert similarity.shape == (1, heads, side, side)


def test_swin_is_timms(monkeypatch):
    ours = fill(make("swin_tiny", img_size=224)).eval()
    theirs = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **SMALL["swin_tiny"]).eval()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(images(size=224)), theirs(images(size=224)))
    torch.testing.assert_close(ours(images(size=224), return_similarity=True)[0], theirs(images(size=224)))


# --------------------------------------------------------------------- what no released weights can tell: training


@pytest.mark.parametrize("name", ["t2t_vit_14_sar", "pvt_small_sar", "cvt_13_sar"])
def test_initial_weights_are_the_official_ones(name):
    model = make(name)
    deviations = {n: p.std().item() for n, p in model.named_parameters()}
    names = [n for n in deviations if n.endswith((".qkv.weight", ".q.weight", ".proj_q.weight", ".fc1.weight"))]
    names += [n for n in deviations if "cls_token" in n or re.fullmatch(r"pos_embed[1-4]", n)]
    assert len(names) >= 5
    for n in names:
        assert deviations[n] == pytest.approx(0.02, rel=0.35), n


def test_the_performers_features_are_orthogonal_and_fixed():
    for model in (make("t2t_vit_14"), timm.create_model("t2t_vit_14")):
        layer = model.tokens_to_token.attention2
        torch.testing.assert_close(layer.w @ layer.w.T, len(layer.w) * torch.eye(len(layer.w)), atol=1e-4, rtol=0)
        assert not layer.w.requires_grad
        assert "w" in layer.state_dict()


def test_positions_of_t2t_are_the_official_sinusoids(golden):
    content = golden("t2t_performer_tiny.pt")
    torch.testing.assert_close(t2t.sinusoids(50, 48), content["state_dict"]["pos_embed"], rtol=0, atol=1e-6)


def test_positions_of_t2t_are_saved_and_never_trained():
    model = make("t2t_vit_14").train()
    fixed = {"pos_embed", "tokens_to_token.attention1.w", "tokens_to_token.attention2.w"}
    assert dict(model.named_buffers()).keys() == fixed <= model.state_dict().keys()
    before = model.pos_embed.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(images()).square().mean().backward()
    optimizer.step()
    assert torch.equal(model.pos_embed, before)
    assert model.double().pos_embed.dtype == torch.float64


def test_t2t_takes_images_of_another_size():
    model, larger = fill(make("t2t_vit_14_sar")).eval(), make("t2t_vit_14_sar", img_size=(96, 64)).eval()
    load_weights(larger, {"model": model.state_dict()})
    model.set_input_size(img_size=(96, 64))
    x = images(size=96)[..., :64]
    for one, other in zip(model(x, return_similarity=True), larger(x, return_similarity=True), strict=True):
        assert torch.equal(one, other)
    assert model.tokens_to_token.grid_size == model(x, return_similarity=True)[1].shape[-2:] == (6, 4)
    assert "pos_embed" not in dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"patches of 16 px"):
        model.set_input_size(patch_size=(8, 8))


def test_t2ts_tokens_belong_to_the_stem():
    model = make("t2t_vit_14")
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups["tokens_to_token.attention1.kqv.weight"] == groups["cls_token"] == 0
    assert groups["blocks.0.attn.qkv.weight"] == 1


@pytest.mark.parametrize("name", SMALL)
def test_layers_are_the_stem_each_block_and_the_head(name):
    """What enters a stage before its first block is in that block's group, as in timm's Swin."""
    model = make(name)
    blocks = {match[0] for key in model.state_dict() if (match := BLOCK.match(key))}
    groups = group_parameters(model, model.group_matcher())
    assert len(groups) == 1 + len(blocks) + 1
    for layer, members in groups.items():
        inside = {match[0] for key in members if (match := BLOCK.match(key))}
        assert len(inside) == (0 < layer <= len(blocks))
    classifiers = model.pretrained_cfg["classifier"]
    assert set(groups[len(blocks) + 1]) == {f"{classifiers}.weight", f"{classifiers}.bias"}
    assert {"norm.weight", "norm.bias"} < set(groups[len(blocks)])
    coarse = group_parameters(model, model.group_matcher(coarse=True))
    stages = 4 if name in ("pvt_small", "swin_tiny") else 3 if name == "cvt_13" else len(blocks)
    assert len(coarse) == 1 + stages + 1


def rates(model, kind):
    return [round(m.drop_prob if kind is DropPath else m.p, 4) for m in model.modules() if isinstance(m, kind)]


def test_stochastic_depth_grows_block_by_block():
    linear = lambda blocks: [round(0.1 * i / (blocks - 1), 4) for i in range(1, blocks) for _ in (0, 1)]  # noqa: E731
    for name, expected in {"t2t_vit_14": linear(14), "pvt_small": linear(16), "cvt_13": linear(10)}.items():
        assert rates(timm.create_model(name, drop_path_rate=0.1), DropPath) == expected
        sar = timm.create_model(f"{name}_sar", drop_path_rate=0.1)
        assert rates(sar, DropPath) == expected[:-1], "none on the attention of the last block"


def test_dropout_is_where_it_is_asked_for():
    plain = {rate for rate in rates(make("t2t_vit_14"), torch.nn.Dropout) if rate}
    assert plain == {0.1}, "the Performers' own"
    for name in ("pvt_small", "cvt_13"):
        assert not any(rates(make(name), torch.nn.Dropout))
        more = {"drop_rate": 0.11, "proj_drop_rate": 0.12, "attn_drop_rate": 0.13}
        more |= {"pos_drop_rate": 0.14} if name == "pvt_small" else {}
        model = make(name, **more)
        assert set(rates(model, torch.nn.Dropout)) == set(more.values())
        assert model.last().mlp.drop2.p == model.last().attn.proj_drop.p == 0.12
        assert (model.head_drop.p, model.last().attn.attn_drop.p) == (0.11, 0.13)
        torch.testing.assert_close(model.eval()(images()), model(images()))


def test_batch_statistics_count_a_recomputed_pass_once():
    plain = make("cvt_13_sar").train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    for model in (plain, saving):
        model(images(), return_similarity=True)[0].square().sum().backward()
    for (name, one), other in zip(plain.named_buffers(), saving.buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_mixed_precision_leaves_exponentials_and_norms_in_float32():
    performer = make("t2t_vit_14").tokens_to_token.attention1
    k, q, v = torch.randn(3, 2, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert performer.attend(k, q, v).dtype == torch.float32
        torch.testing.assert_close(performer.attend(k, q, v), performer.attend(k.float(), q.float(), v.float()))
    norm, x = cvt.LayerNorm(64), 1000 + torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    exact = norm.double()(x.bfloat16().double())
    torch.testing.assert_close(norm.float()(x.bfloat16()).double(), exact, rtol=0.01, atol=0.01)
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm.float()(x), torch.nn.functional.layer_norm(x, (64,), norm.weight, norm.bias, norm.eps))
        assert norm(x).dtype == torch.float32


def test_pvts_positions_at_another_size_are_interpolated_as_officially():
    model = make("pvt_small").eval()
    tokens, grid = model.embed(0, images(size=96))
    known = model.pos_embed1.transpose(1, 2).unflatten(2, (16, 16))
    resized = torch.nn.functional.interpolate(known, size=(24, 24), mode="bilinear").flatten(2).transpose(1, 2)
    assert grid == (24, 24)
    torch.testing.assert_close(tokens, model.patch_embed1(images(size=96)) + resized)


@pytest.mark.parametrize("name", ["t2t_vit_14_sar", "pvt_small_sar", "cvt_13_sar"])
def test_the_mean_query_is_that_of_the_patches_alone(name):
    model = fill(make(name, similarity_query="mean").double()).eval()
    similarity = model(images(dtype=torch.float64), return_similarity=True)[1]
    torch.testing.assert_close(similarity, explicit(model, images(dtype=torch.float64))[1])
    model.last().similarity_query = "cls"
    assert not torch.allclose(similarity, model(images(dtype=torch.float64), return_similarity=True)[1])


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("pvt_small", {"img_size": 72}, r"img_size=72: 4 stages need a multiple of 32 px"),
        ("pvt_small", {"depths": (1, 1)}, r"different numbers of stages \(embed_dims 4, depths 2"),
        ("cvt_13", {"num_heads": (1, 3, 5)}, r"num_heads 5 does not divide the 48 channels"),
        ("cvt_13", {"depths": (1, 1, 0)}, r"every stage needs a block"),
        (
            "pvt_small",
            dict.fromkeys(("embed_dims", "depths", "num_heads", "mlp_ratios", "sr_ratios"), (4,) * 5),
            r"depths=\(4, 4, 4, 4, 4\): a pyramid has at most 4 stages",
        ),
        ("t2t_vit_14", {"patch_size": 8}, r"windows make patches of 16 px; leave it out"),
    ],
)
def test_sizes_that_make_no_model(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(name, **kwargs)


# ---------------------------------------------------------------------- against a slow and explicit last block


def explicit(model, x):
    """Logits and S with the last block written out, all tokens computed, no fused attention."""
    tokens, (h, w) = model.forward_trunk(x)
    block, attn = model.last(), model.last().attn
    y = block.norm1(tokens)
    q, k, v = block.project(y, False, (h, w))
    scores = q @ k.mT * attn.scale
    if block.similarity_query == "cls":
        row = scores[:, :, 0]
    else:
        mean = y[:, -h * w :].mean(dim=1, keepdim=True)
        row = torch.einsum("bhd,bhnd->bhn", block.query(mean)[:, :, 0], k) * attn.scale
    rows, columns = block.key_grid(h, w)
    similarity = row[:, :, -rows * columns :].unflatten(2, (rows, columns))
    if hasattr(attn, "relative_position_bias_table"):
        scores = scores + attn._get_rel_pos_bias()
    z = attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    if model.last_block in ("standard",):
        z = tokens + z
        z = z + block.mlp(block.norm2(z))
    elif model.last_block == "no_msa_skip":
        z = z + block.mlp(block.norm2(z))
    elif model.last_block == "sar":
        z = z + block.mlp(z)
    else:
        z = block.mlp(z)
    return model.classify(z, (h, w)), similarity


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("last_block", LAST_BLOCKS)
@pytest.mark.parametrize("name", SMALL)
def test_value_and_every_gradient_equal_an_explicit_last_block(name, last_block, training):
    fast = fill(make(name, last_block=last_block).double()).train(training)
    slow = copy.deepcopy(fast)
    for module in (*fast.modules(), *slow.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    outputs = []
    for model, forward in ((fast, lambda m, x: m(x, return_similarity=True)), (slow, explicit)):
        logits, similarity = forward(model, images(dtype=torch.float64))
        (logits.square().mean() + SpatialEntropyLoss()(similarity)).backward()
        outputs.append((logits, similarity))
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    for (parameter, ours), theirs in zip(fast.named_parameters(), slow.parameters(), strict=True):
        if ours.requires_grad:
            assert ours.grad is not None, parameter
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-10, msg=parameter)
    for buffer, other in zip(fast.buffers(), slow.buffers(), strict=True):
        torch.testing.assert_close(buffer, other)


@pytest.mark.parametrize("name", SMALL)
def test_one_function_makes_all_similarity_maps(name, monkeypatch):
    calls = []
    whole = models_sar.similarity_map
    monkeypatch.setattr(models_sar, "similarity_map", lambda *args: calls.append(args) or whole(*args))
    make(f"{name}_sar").eval()(images(), return_similarity=True)
    assert len(calls) == 1
    assert isinstance(make(f"{name}_sar").last(), models_sar.LastBlock)


def test_the_query_of_the_mean_on_a_vit_without_class_token():
    kwargs = {"class_token": False, "global_pool": "avg", "similarity_query": "mean", "qk_norm": True}
    model = fill(make("vit_small_sar", **kwargs)).eval()
    x, (h, w) = model.forward_trunk(images())
    attn, y = model.last().attn, model.last().norm1(x)
    q, k, _ = attn.qkv(torch.cat([y.mean(dim=1, keepdim=True), y], dim=1)).chunk(3, dim=-1)
    heads = (3, -1)
    q, k = attn.q_norm(q[:, :1].unflatten(2, heads)), attn.k_norm(k[:, 1:].unflatten(2, heads))
    expected = (q * k).sum(-1).transpose(1, 2).unflatten(2, (h, w)) * attn.scale
    torch.testing.assert_close(model(images(), return_similarity=True)[1], expected)
    with pytest.raises(ValueError, match=r"class_token=True, or with similarity_query='mean'"):
        make("vit_small", class_token=False, global_pool="avg")(images(), return_similarity=True)
    with pytest.raises(ValueError, match=r"similarity_query='max' is unknown; choose one of cls, mean"):
        make("vit_small", similarity_query="max")


def test_swin_refuses_a_map_of_several_windows_and_the_class_query():
    model = make("swin_tiny_sar", img_size=256).eval()
    assert model(images(size=256)).shape == (2, 5), "without S it is timm's Swin at any size"
    with pytest.raises(ValueError, match=r"8 x 8 tokens in windows of 7 x 7, shifted: S needs one window .* 224 px"):
        model(images(size=256), return_similarity=True)
    shifted = make("swin_tiny_sar", window_size=2, always_partition=True).eval()
    with pytest.raises(ValueError, match=r"windows of 2 x 2, shifted: S needs one window"):
        shifted(images(), return_similarity=True)
    with pytest.raises(ValueError, match=r"similarity_query='cls': Swin has no \[CLS\]"):
        make("swin_tiny", similarity_query="cls")


# -------------------------------------------------------------------------------------- timm's kind of tests


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_reach_every_parameter(name):
    model = make(name, drop_path_rate=0.1).train()
    logits = model(images())
    assert logits.shape == (2, 5)
    logits.mean().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert model.eval()(images(batch=1)).shape == (1, 5)


@pytest.mark.parametrize("name", NAMES)
def test_features_head_and_classifier(name):
    model = make(name).eval()
    features = model.forward_features(images())
    torch.testing.assert_close(model.forward_head(features), model(images()))
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.num_features) == (2, model.head_hidden_size)
    logits, similarity, tokens = model(images(), return_similarity=True, return_tokens=True)
    torch.testing.assert_close(logits, model(images()))
    assert tokens.shape[:2] == (2, model.num_features)
    assert similarity.dtype == torch.float32
    model.reset_classifier(0)
    torch.testing.assert_close(model(images()), pooled)
    model.reset_classifier(9)
    assert model(images()).shape == (2, 9)
    assert model.get_classifier().out_features == 9
    model.double().reset_classifier(3)
    assert model(images(dtype=torch.float64)).shape == (2, 3), "of the model's type"


@pytest.mark.parametrize("name", NAMES)
def test_another_image_size(name):
    larger = make(name, img_size=96).eval()
    logits, similarity = larger(images(size=96), return_similarity=True)
    assert logits.shape == (2, 5)
    assert similarity.shape[-1] == {"vit": 6, "t2t": 6, "pvt": 3, "cvt": 3, "swi": 3}[name[:3]]


@pytest.mark.parametrize("name", PYRAMIDS)
def test_a_pyramids_maps(name):
    model = make(name).eval()
    tokens, maps = model.forward_intermediates(images())
    assert tokens.shape == model.forward_features(images()).shape
    normed = model.forward_intermediates(images(), norm=True)[1]
    changed = [not torch.equal(one, other) for one, other in zip(maps, normed, strict=True)]
    assert changed[-1] or name == "swin_tiny"
    assert not any(changed[:-1])
    reductions = [4, 8, 16, 32][: len(maps)]
    assert [tuple(one.shape[-2:]) for one in maps] == [(64 // r, 64 // r) for r in reductions]
    getter = make(name, features_only=True).eval()
    getter.load_state_dict({f"model.{n}": v for n, v in model.state_dict().items()}, strict=False)
    features = getter(images())
    assert getter.feature_info.reduction() == reductions
    assert getter.feature_info.channels() == [one.shape[1] for one in features]
    for one, other in zip(features, maps, strict=True):
        torch.testing.assert_close(one, other)
    first = make(name, features_only=True, out_indices=(0, 1)).eval()
    assert [one.shape[-1] for one in first(images())] == [16, 8]
    assert sum(p.numel() for p in first.parameters()) < sum(p.numel() for p in model.parameters()) / 2


@pytest.mark.parametrize("name", ["pvt_small", "cvt_13"])
def test_a_pyramid_whose_stages_were_dropped_has_no_map(name):
    model = make(name)
    model.prune_intermediate_layers([0, 1])
    with pytest.raises(ValueError, match="the last block was pruned away"):
        model(images(), return_similarity=True)


@pytest.mark.parametrize("name", ["pvt_small", "cvt_13"])
def test_a_pyramid_can_pool_its_patches(name):
    model = make(name, global_pool="avg").eval()
    expected = model.head(model.forward_features(images())[:, 1:].mean(dim=1))
    torch.testing.assert_close(model(images()), expected)
    by_cls = model.head(model.forward_features(images())[:, 0])
    model.reset_classifier(5, global_pool="token")
    model.head.load_state_dict(make(name, global_pool="avg").head.state_dict())
    torch.testing.assert_close(model(images()), by_cls)
    for make_it in (lambda: make(name, global_pool="max"), lambda: model.reset_classifier(5, "max")):
        with pytest.raises(ValueError, match=r"global_pool='max' is unknown; choose one of"):
            make_it()


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_and_copies_change_nothing(name):
    model = make(name).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    saving = copy.deepcopy(model)
    saving.set_grad_checkpointing()
    for one in (model, saving):
        logits, similarity = one(images(), return_similarity=True)
        (logits.square().sum() + similarity.square().sum()).backward()
    for (parameter, one), other in zip(model.named_parameters(), saving.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad, msg=parameter)


@pytest.mark.parametrize("name", HYBRIDS)
def test_what_is_not_decayed_is_there(name):
    model = make(name)
    names = model.no_weight_decay()
    assert names <= {n for n, _ in model.named_parameters()}
    expected = {"t2t": {"cls_token"}, "pvt": {"cls_token"}, "cvt": {"stage2.cls_token"}}
    assert name.startswith("swin") or names == expected[name[:3]]


@pytest.mark.parametrize("name", NAMES)
def test_torchscript_computes_what_the_model_computes_of_all_tokens(name):
    model = fill(make(name, drop_path_rate=0.1)).eval()
    expected = model.forward_head(model.forward_features(images()))
    scripted = torch.jit.script(model)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    for one in (scripted, torch.jit.load(file)):
        assert torch.equal(one(images()), expected)
    torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-4)
    assert scripted.state_dict().keys() >= model.state_dict().keys()
    assert scripted.train()(images()).requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_fx_computes_what_the_model_computes_of_all_tokens(name):
    """As it hands out features; the model itself computes one query of the last block where [CLS] alone is read."""
    model = fill(make(name)).eval()
    expected = model.forward_head(model.forward_features(images()))
    head = "head.fc" if name.startswith("swin") else "head"
    for graph in (torch.fx.symbolic_trace(model), torch.jit.script(torch.fx.symbolic_trace(model))):
        assert torch.equal(graph(images()), expected)
    extractor = create_feature_extractor(model, {"norm": "tokens", head: "logits"})
    outputs = extractor(images())
    assert torch.equal(outputs["logits"], expected)
    assert torch.equal(outputs["tokens"], model.forward_features(images()))
    model.train()
    extractor.train()(images())["logits"].mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_one_graph_is_for_images_of_every_size():
    model = fill(make("pvt_small")).eval()
    for graph in (torch.fx.symbolic_trace(model), torch.jit.script(model)):
        for size in (64, 96):
            expected = model.forward_head(model.forward_features(images(size=size)))
            assert torch.equal(graph(images(size=size)), expected)


@pytest.mark.parametrize("name", ["pvt_small", "cvt_13"])
def test_a_pyramid_whose_stages_were_dropped_can_be_compiled(name):
    model = make(name).eval()
    model.prune_intermediate_layers([0, 1])
    expected = model(images())
    assert torch.equal(torch.jit.script(model)(images()), expected)
    assert torch.equal(torch.fx.symbolic_trace(model)(images()), expected)


@pytest.mark.parametrize("name", HYBRIDS)
def test_timms_description_is_of_the_model(name):
    model = timm.create_model(f"{name}_sar", device="meta", dtype=torch.float64)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    cfg, names = model.default_cfg, model.state_dict().keys()
    assert model.in_chans == cfg["input_size"][0]
    convolutions = [cfg["first_conv"]] if isinstance(cfg["first_conv"], str) else list(cfg["first_conv"])
    assert {f"{one}.weight" for one in (cfg["classifier"], *convolutions)} <= names
    x = torch.empty(1, *cfg["input_size"], device="meta", dtype=torch.float64)
    last = model.forward_intermediates(x, intermediates_only=True)[-1]
    assert cfg["pool_size"] == (tuple(last.shape[-2:]) if name in PYRAMIDS else None)
    model.eval().reset_classifier(3)
    assert not model.head.training
    with pytest.raises(TypeError):
        timm.create_model(name, device="meta", no_such_size=1)


@pytest.mark.parametrize("name", HYBRIDS)
def test_autocast_leaves_the_map_in_float32(name):
    model = make(f"{name}_sar").train()
    with torch.autocast("cpu", torch.bfloat16):
        logits, similarity = model(images(), return_similarity=True)
    assert (similarity.dtype, similarity.isfinite().all()) == (torch.float32, True)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", HYBRIDS)
def test_the_graph_is_one_for_a_compiler(name):
    torch._dynamo.reset()
    model = make(f"{name}_sar").eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for one, other in zip(
        compiled(images(), return_similarity=True), model(images(), return_similarity=True), strict=True
    ):
        torch.testing.assert_close(one, other)


SHALLOW = {
    "t2t": {"depth": 1},
    "pvt": {"embed_dims": (8, 16), "depths": (1, 1), "num_heads": (1, 2), "sr_ratios": (2, 1), "mlp_ratios": (2, 2)},
    "cvt": {"embed_dims": (8, 16), "depths": (1, 1), "num_heads": (1, 2), "mlp_ratios": (2, 2)}
    | {"patch_sizes": (7, 3), "patch_paddings": (2, 1)},
    "swi": {"depths": (1, 1), "num_heads": (1, 2), "img_size": 32},
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("t2t_vit_14_sar", marks=pytest.mark.slow),  # a minute each where nothing is compiled yet
        pytest.param("t2t_vit_t_14_sar", marks=pytest.mark.slow),
        pytest.param("pvt_small_sar", marks=pytest.mark.slow),
        pytest.param("cvt_13_sar", marks=pytest.mark.slow),
        "swin_tiny_sar",
    ],
)
def test_a_compiled_training_step(name):
    torch._dynamo.reset()
    model = make(name, **SHALLOW[name[:3]]).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    results = []
    for one in (copy.deepcopy(model), torch.compile(copy.deepcopy(model), fullgraph=True)):
        size = SHALLOW[name[:3]].get("img_size", 64)
        logits, similarity = one(images(size=size), return_similarity=True)
        (logits.square().mean() + similarity.square().mean()).backward()
        gradients = {n.removeprefix("_orig_mod."): p.grad for n, p in one.named_parameters() if p.requires_grad}
        results.append((logits, similarity, gradients))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


# -------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("suffix", ["", "_sar"])
@pytest.mark.parametrize("name", HYBRIDS)
def test_weights_for_another_image_size_and_head(name, suffix):
    small, large = make(name + suffix), make(name + suffix, img_size=96, num_classes=3)
    notes = load_weights(large, {"model": fill(small).state_dict()})
    assert notes[-1].endswith("5 -> 3 classes, dropped and re-initialised")
    resampled = {"t2t": 1, "pvt": 4, "cvt": 0, "swi": 3}[name[:3]]
    assert len([note for note in notes if note.endswith("resampled")]) == resampled
    again = make(name + suffix)
    assert load_weights(again, {"model": small.state_dict()}) == []
    assert torch.equal(again.eval()(images()), small.eval()(images()))
    assert last_block_of({"model": small.state_dict()}) == ("sar" if suffix else "standard")


def test_the_last_of_more_than_ten_blocks_is_found():
    for name in ("cvt_13_sar", "t2t_vit_14_sar"):
        assert last_block_of({"model": timm.create_model(name).state_dict()}) == "sar"


def test_a_map_of_one_patch_is_refused_where_it_should_be_regularised(tmp_path, capsys):
    command = ["--model", "swin_tiny_sar", "--output-dir", str(tmp_path / "out")]
    assert main.main(command) == 2
    assert "S has 1 x 1 patches, which are always one component" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- the program around them

SMOKE = {
    "t2t_vit_14_sar": ["@recipes/smoke_t2t.args"],
    "t2t_vit_t_14_sar": ["@recipes/smoke_t2t.args"],
    "pvt_small_sar": ["@recipes/smoke_pvt.args", "--drloc-weight", "0.1"],
    "cvt_13_sar": ["@recipes/smoke_cvt.args"],
    "swin_tiny_sar": [
        "--input-size",
        "128",
        "--model-kwargs",
        "embed_dim=8",
        "depths=(1,1,1,2)",
        "num_heads=(1,1,2,2)",
    ],
}


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """Three digits and their ink as masks."""
    root = tmp_path_factory.mktemp("masked")
    for number, digit in enumerate(load_digits().images[:3]):
        for folder, pixels in (("images", digit * 15), ("masks", (digit > 8) * 255)):
            (root / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).resize((64, 64), 0).save(root / folder / f"{number}.png")
    return root


@pytest.mark.parametrize("name", SMOKE)
def test_training_evaluation_and_analysis_work_on_all(name, masked, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    short = "--epochs 1 --warmup-epochs 0 --sampling-ratio 0.1 --num-workers 0 --batch-size 8 --total-batch 64".split()
    first, *more = SMOKE[name]
    files, options = ([first], more) if first.startswith("@") else ([], SMOKE[name])
    out = ["--output-dir", str(tmp_path / "out")]
    assert main.main([*files, "--model", name, *options, *short, *out]) == 0
    record = json.loads((tmp_path / "out/log.txt").read_text())
    assert record["test_components"] >= 1
    best = str(tmp_path / "out/best.pth")
    assert main.main(["--eval", "--resume", best, "--num-workers", "0"]) == 0
    assert f"Acc@1 {record['test_acc1']:.3f}" in capsys.readouterr().out
    where = ["--data-path", str(masked), "--input-size", "128", "--num-workers", "0"]
    assert jaccard.main(["--checkpoint", best, *where]) == 0
    grid = {"t2t": "8 x 8", "pvt": "8 x 8", "cvt": "8 x 8", "swi": "4 x 4"}[name[:3]]
    assert f"of {grid}" in capsys.readouterr().out
    assert figures.main(["--checkpoint", best, "--count", "2", "--out", str(tmp_path / "figures")]) == 0


def test_released_positions_are_for_vits_alone(tmp_path, capsys, masked, monkeypatch):
    monkeypatch.chdir(ROOT)
    torch.save({"model": make("pvt_small").state_dict()}, tmp_path / "pvt.pth")
    assert jaccard.main(["--checkpoint", str(tmp_path / "pvt.pth"), "--data-path", str(masked)]) == 2
    assert "not the weights of a ViT" in capsys.readouterr().err
