"""The models: the paper's last block, the similarity map, and timm's whole interface."""

import copy
import pickle
import time

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models import create_feature_extractor, get_graph_node_names
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models_sar
from losses import SpatialEntropyLoss
from models_sar import LAST_BLOCKS, SIMILARITIES, LastBlock, similarity_map

NAMES = ["vit_base", "vit_base_sar", "vit_small", "vit_small_sar", "vit_tiny", "vit_tiny_sar"]
SMALL = {"embed_dim": 24, "depth": 3, "num_heads": 3, "img_size": 32, "patch_size": 8, "num_classes": 5}


def make(name="vit_tiny_sar", seed=0, **kwargs):
    """A small model far from its initialisation, where every layer and bias matters."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **{**SMALL, **kwargs})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def images(batch=2, size=(32, 32), seed=1, **kwargs):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed), **kwargs)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def full_logits(model, x):
    """Logits by way of all tokens, as timm computes them."""
    return model.forward_head(model.forward_features(x))


# ------------------------------------------------------------------------------------------------ the family


def test_six_models_are_in_timms_registry():
    assert timm.list_models(module="models_sar") == NAMES


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("vit_tiny", "deit_tiny/vit_tiny (1000 cls)"),
        ("vit_tiny_sar", "vit_tiny_nosn"),
        ("vit_small", "vit_small (1000 cls)"),
        ("vit_small_sar", "vit_small_nosn"),
    ],
)
def test_parameter_counts_are_the_released_codes(golden, name, key):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == golden("param_counts.pt")["counts"][key]


def test_sar_drops_one_layer_norm_of_the_base_model():
    plain, sar = (timm.create_model(name, device="meta") for name in ("vit_base", "vit_base_sar"))
    assert set(plain.state_dict()) - set(sar.state_dict()) == {
        "blocks.11.norm2.weight",
        "blocks.11.norm2.bias",
    }
    assert set(sar.state_dict()) < set(plain.state_dict())
    assert sum(p.numel() for p in plain.parameters()) == 86_567_656
    assert sum(p.numel() for p in sar.parameters()) == 86_567_656 - 2 * 768


def test_default_cfg_is_deits():
    cfg = timm.create_model("vit_small_sar", device="meta").default_cfg
    assert cfg["architecture"] == "vit_small_sar"
    assert cfg["input_size"] == (3, 224, 224)
    assert (cfg["mean"], cfg["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (cfg["crop_pct"], cfg["interpolation"]) == (0.875, "bicubic")
    assert (cfg["first_conv"], cfg["classifier"]) == ("patch_embed.proj", "head")


def test_there_are_no_pretrained_weights():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for vit_tiny_sar"):
        timm.create_model("vit_tiny_sar", pretrained=True, **SMALL)


def test_vit_small_is_timms_vit_small_from_the_same_seed():
    torch.manual_seed(0)
    theirs = timm.create_model("vit_small_patch16_224").eval()
    torch.manual_seed(0)
    ours = timm.create_model("vit_small").eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    x = images(1, (224, 224))
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(ours.forward_features(x), theirs.forward_features(x))


# ---------------------------------------------------------------------------------------- the golden numbers


@pytest.mark.parametrize(("kind", "last_block"), [("standard", "standard"), ("nosn", "sar")])
@pytest.mark.parametrize("file", ["sar_vit_p4_32.pt", "sar_vit_p4_56.pt"])
class TestReleasedCode:
    """Logits, similarity and gradients that the authors' code printed, from their weights by name."""

    def load(self, golden, file, kind, last_block, **kwargs):
        content = golden(file)
        model = timm.create_model("vit_small", last_block=last_block, **content["config"], **kwargs).double()
        model.load_state_dict(content[kind]["state_dict"], strict=True)
        return model, content["input"].double(), content["target"], content[kind]

    def test_logits_and_similarity(self, golden, file, kind, last_block):
        model, x, _, expected = self.load(golden, file, kind, last_block)
        logits, similarity = model.eval()(x, return_similarity=True)
        assert similarity.dtype == torch.float64
        torch.testing.assert_close(logits, expected["logits_f64"], rtol=0, atol=1e-10)
        torch.testing.assert_close(similarity.flatten(2), expected["dot_qk_cls"], rtol=0, atol=1e-10)
        torch.testing.assert_close(full_logits(model, x), expected["logits_f64"], rtol=0, atol=1e-10)

    def test_softmax_similarity_is_the_attention_row_of_cls(self, golden, file, kind, last_block):
        model, x, _, expected = self.load(golden, file, kind, last_block, similarity="softmax")
        _, similarity = model.eval()(x, return_similarity=True)
        patches = expected["attn_cls_softmax"][..., 1:]
        torch.testing.assert_close(similarity.flatten(2), patches, rtol=0, atol=1e-10)

    def test_gradients_of_cross_entropy_and_spatial_entropy(self, golden, file, kind, last_block):
        model, x, target, expected = self.load(golden, file, kind, last_block)
        logits, similarity = model.train()(x, return_similarity=True)
        loss = F.cross_entropy(logits, target)
        tolerance = 1e-10
        if "blob" in expected:  # their eps in the blob loss moves it by about 1e-7
            loss = loss + 0.01 * SpatialEntropyLoss()(similarity)
            tolerance = 1e-6
        torch.testing.assert_close(loss, expected["total"], rtol=tolerance, atol=0)
        loss.backward()
        ours = gradients(model)
        for name, gradient in expected["grads_total_f64"].items():
            torch.testing.assert_close(ours[name].float(), gradient, rtol=1e-5, atol=1e-7)
        for name, norm in expected["grad_norm_total_f64"].items():
            assert float(ours[name].norm()) == pytest.approx(float(norm), rel=tolerance, abs=1e-10)
        assert ours.keys() == expected["grad_norm_total_f64"].keys()


# -------------------------------------------------------------------------------------------- the last block

EQUATIONS = {  # Table 1(b), z the block's input
    "standard": lambda z, msa, ln2, mlp: (z + msa(z)) + mlp(ln2(z + msa(z))),
    "no_msa_skip": lambda z, msa, ln2, mlp: msa(z) + mlp(ln2(msa(z))),
    "sar": lambda z, msa, ln2, mlp: msa(z) + mlp(msa(z)),
    "no_skips": lambda z, msa, ln2, mlp: mlp(msa(z)),
}


@pytest.mark.parametrize("last_block", EQUATIONS)
def test_last_block_is_the_papers_equation(last_block):
    block = make(last_block=last_block).double().blocks[-1]
    z = torch.randn(2, 17, 24, dtype=torch.float64)
    msa = lambda z: block.attn(block.norm1(z))  # noqa: E731
    expected = EQUATIONS[last_block](z, msa, getattr(block, "norm2", None), block.mlp)
    torch.testing.assert_close(block(z), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("last_block", LAST_BLOCKS)
def test_second_norm_and_drop_path_exist_only_where_they_belong(last_block):
    model = make(last_block=last_block, drop_path_rate=0.1, init_values=1e-4)
    keys = {key.removeprefix("blocks.2.") for key in model.state_dict() if key.startswith("blocks.2.")}
    attn_skip, has_norm2, mlp_skip = LAST_BLOCKS[last_block]
    assert ("norm2.weight" in keys, "norm2.bias" in keys) == (has_norm2, has_norm2)
    assert ("ls1.gamma" in keys, "ls2.gamma" in keys) == (attn_skip, mlp_skip)
    last = model.blocks[-1]
    assert isinstance(last.drop_path1, nn.Identity) is not attn_skip
    assert isinstance(last.drop_path2, nn.Identity) is not mlp_skip
    assert all(hasattr(b, "norm2") and not isinstance(b, LastBlock) for b in model.blocks[:-1])


def test_without_skips_drop_path_never_drops_an_image():
    model = make(last_block="no_skips", depth=1, drop_path_rate=0.9).train()
    x = images(16)
    torch.testing.assert_close(model(x), model.eval()(x))


@pytest.mark.parametrize("last_block", LAST_BLOCKS)
def test_last_block_starts_as_timm_starts_it(last_block):
    """The same draws as the unchanged ViT's, hence the statistics of its neighbours."""
    torch.manual_seed(3)
    plain = timm.create_model("vit_tiny_patch16_224").state_dict()
    torch.manual_seed(3)
    state = timm.create_model("vit_tiny", last_block=last_block).state_dict()
    assert all(torch.equal(value, plain[key]) for key, value in state.items())
    for key in ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"):
        last, neighbour = state[f"blocks.11.{key}"], state[f"blocks.10.{key}"]
        assert float(last.std()) == pytest.approx(float(neighbour.std()), rel=0.02)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"last_block": "none"}, "last_block='none' .* standard, no_msa_skip, sar, no_skips"),
        ({"similarity": "l2"}, "similarity='l2' .* dot, cosine, softmax"),
        ({"attn_layer": "diff"}, "attn_layer='diff'"),
    ],
)
def test_unknown_choices_are_refused_with_the_known_ones(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


# ------------------------------------------------------------------------------------------------- one query


@pytest.mark.parametrize("last_block", LAST_BLOCKS)
@pytest.mark.parametrize("return_similarity", [False, True])
def test_one_query_gives_the_logits_and_gradients_of_all_queries(last_block, return_similarity):
    """In training, with drop-path: both ways draw the same random numbers."""
    model = make(last_block=last_block, drop_path_rate=0.5, depth=4).double().train()
    x, weight = images(8, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)
    results = []
    for forward in (lambda: model(x, return_similarity=return_similarity), lambda: full_logits(model, x)):
        model.zero_grad()
        torch.manual_seed(5)
        output = forward()
        logits = output[0] if isinstance(output, tuple) else output
        (logits * weight).sum().backward()
        results.append((logits, gradients(model)))
    (one, one_gradients), (full, all_gradients) = results
    torch.testing.assert_close(one, full, rtol=0, atol=1e-12)
    for name, gradient in all_gradients.items():
        torch.testing.assert_close(one_gradients[name], gradient, rtol=0, atol=1e-11, msg=name)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"qkv_bias": False},
        {"qk_norm": True},
        {"scale_attn_norm": True},
        {"init_values": 0.3},
        {"class_token": True, "reg_tokens": 4, "no_embed_class": True},
        {"pre_norm": True},
        {"fc_norm": True},
    ],
    ids=lambda kwargs: "-".join(kwargs),
)
def test_one_query_understands_timms_options(kwargs):
    model = make(**kwargs).double()
    x = images(dtype=torch.float64)
    torch.testing.assert_close(model(x), full_logits(model, x), rtol=0, atol=1e-12)


def test_last_block_computes_one_query_and_one_mlp_token():
    """About 7 % less work than the plain ViT, with the similarity included."""
    x = torch.empty(1, 3, 224, 224, device="meta")
    flops = {}
    for name in ("vit_small_patch16_224", "vit_small_sar"):
        model = timm.create_model(name, device="meta")
        with FlopCounterMode(display=False) as counter:
            model(x, return_similarity=True) if name.endswith("sar") else model(x)
        flops[name] = counter.get_total_flops()
    assert 0.92 < flops["vit_small_sar"] / flops["vit_small_patch16_224"] < 0.94


def test_no_attention_matrix_is_kept_for_the_similarity():
    model = make().train()
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        model(images(), return_similarity=True, return_tokens=True)
    assert any(shape[-2:] == (17, 8) for shape in shapes)  # keys are seen
    assert not any(shape[-2:] == (17, 17) for shape in shapes)


# ------------------------------------------------------------------------------------------------ similarity


def scores_of_cls(model, x, prefix=1):
    """Eq. 4 read literally: q and k of the last block, all pairs, then the row of [CLS]."""
    last = model.blocks[-1]
    seen = []
    handle = last.norm1.register_forward_hook(lambda module, args, output: seen.append(output))
    model.forward_features(x)
    handle.remove()
    B, N, C = seen[0].shape
    q, k, _ = last.attn.qkv(seen[0]).view(B, N, 3, 3, C // 3).permute(2, 0, 3, 1, 4)
    return (q @ k.transpose(-2, -1))[:, :, 0] / (C // 3) ** 0.5, q[:, :, 0], k


@pytest.mark.parametrize("kwargs", [{}, {"reg_tokens": 4}, {"img_size": (32, 48)}], ids=str)
def test_similarity_is_the_row_of_cls_over_the_patch_keys(kwargs):
    model = make(**kwargs).double()
    h, w = model.patch_embed.grid_size
    x = images(size=(8 * h, 8 * w), dtype=torch.float64)
    scores, _, _ = scores_of_cls(model, x)
    _, similarity = model(x, return_similarity=True)
    assert similarity.shape == (2, 3, h, w)
    expected = scores[..., model.num_prefix_tokens :].unflatten(-1, (h, w))
    torch.testing.assert_close(similarity, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", SIMILARITIES)
def test_kinds_of_similarity(kind):
    model = make(similarity=kind).double()
    x = images(dtype=torch.float64)
    scores, q, k = scores_of_cls(model, x)
    expected = {
        "dot": scores,
        "cosine": F.cosine_similarity(q.unsqueeze(2), k, dim=-1),
        "softmax": scores.softmax(-1),
    }[kind]
    logits, similarity = model(x, return_similarity=True)
    torch.testing.assert_close(similarity.flatten(2), expected[..., 1:], rtol=0, atol=1e-12)
    torch.testing.assert_close(logits, make(similarity="dot").double()(x))  # the logits never depend on it


def test_similarity_map_stands_alone():
    q, k = torch.randn(2, 3, 8), torch.randn(2, 3, 1 + 12, 8)
    similarity = similarity_map(q.half(), k.half(), scale=0.5, grid=(3, 4))
    assert similarity.dtype == torch.float32
    expected = 0.5 * (q.half().float().unsqueeze(2) * k.half().float()).sum(-1)[..., 1:].view(2, 3, 3, 4)
    torch.testing.assert_close(similarity, expected)
    with pytest.raises(ValueError, match="dot, cosine, softmax"):
        similarity_map(q, k, 1.0, (3, 4), kind="l1")
    assert similarity_map(torch.zeros_like(q), k, 1.0, (3, 4), kind="cosine").abs().max() == 0


@pytest.mark.parametrize("kind", SIMILARITIES)
def test_autocast_does_not_touch_the_similarity_map(kind):
    q, k = torch.randn(2, 3, 8).bfloat16(), torch.randn(2, 3, 17, 8).bfloat16()
    exact = similarity_map(q, k, 0.5, (4, 4), kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(similarity_map(q, k, 0.5, (4, 4), kind), exact, rtol=0, atol=0)


@pytest.mark.parametrize("return_tokens", [False, True])
def test_similarity_is_float32_under_autocast(return_tokens):
    model = make()
    exact = model(images(), return_similarity=True)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, similarity, *_ = model(images(), return_similarity=True, return_tokens=return_tokens)
    assert logits.dtype == torch.bfloat16
    assert similarity.dtype == torch.float32
    assert not torch.equal(similarity, similarity.bfloat16().float())  # a bfloat16 product would be
    torch.testing.assert_close(similarity, exact, rtol=0.05, atol=0.1)


def test_autocast_training_reaches_every_parameter():
    model = make().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, similarity = model(images(), return_similarity=True)
        loss = logits.float().square().mean() + similarity.square().mean()
    loss.backward()
    exact = copy.deepcopy(model)
    exact.zero_grad()
    logits, similarity = exact(images(), return_similarity=True)
    (logits.square().mean() + similarity.square().mean()).backward()
    for (name, p), e in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert (p.grad - e.grad).norm() < 0.1 * e.grad.norm() + 1e-3, name


def test_tokens_are_the_last_blocks_before_the_final_norm():
    model = make(img_size=(32, 48), reg_tokens=2)
    x = images(size=(32, 48))
    logits, similarity, tokens = model(x, return_similarity=True, return_tokens=True)
    assert (similarity.shape, tokens.shape) == ((2, 3, 4, 6), (2, 24, 4, 6))
    torch.testing.assert_close(tokens, model.forward_intermediates(x, 1, intermediates_only=True)[0])
    torch.testing.assert_close(similarity, model(x, return_similarity=True)[1])
    only_logits, only_tokens = model(x, return_tokens=True)
    torch.testing.assert_close((only_logits, only_tokens), (logits, tokens))
    torch.testing.assert_close(logits, model(x))


class TestNoMap:
    """Asking for a map that does not exist is an error that says why."""

    def test_no_class_token(self):
        model = make(class_token=False, global_pool="avg")
        assert model(images()).shape == (2, 5)
        assert model(images(), return_tokens=True)[1].shape == (2, 24, 4, 4)
        with pytest.raises(ValueError, match="class_token=True"):
            model(images(), return_similarity=True)

    def test_patch_dropout(self):
        model = make(patch_drop_rate=0.5)
        assert model(images(), return_similarity=True)[1].shape == (2, 3, 4, 4)  # inactive in eval mode
        assert model.train()(images()).shape == (2, 5)
        for flag in ("return_similarity", "return_tokens"):
            with pytest.raises(ValueError, match="patch_drop_rate=0"):
                model(images(), **{flag: True})

    def test_pruned_last_block(self):
        model = make()
        model.prune_intermediate_layers(1, prune_head=False)
        assert model(images(), return_similarity=True)[0].shape == (2, 5)  # the last block is the one kept
        model.prune_intermediate_layers([0, 1], prune_head=False)
        torch.testing.assert_close(model(images()), full_logits(model, images()))
        with pytest.raises(ValueError, match="pruned"):
            model(images(), return_similarity=True)


# ------------------------------------------------------------------------------------------ timm's interface


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_of_every_model(name):
    model = make(name).train()
    logits, similarity = model(images(), return_similarity=True)
    assert (logits.shape, similarity.shape) == ((2, 5), (2, 3, 4, 4))
    logits.mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert model.last_block == ("sar" if name.endswith("_sar") else "standard")


@pytest.mark.parametrize("patch_size", [4, 8, 16])
def test_patch_sizes(patch_size):
    model = make(patch_size=patch_size)
    grid = 32 // patch_size
    assert model(images(), return_similarity=True)[1].shape == (2, 3, grid, grid)
    with pytest.raises(AssertionError, match="doesn't match model"):
        model(images(size=(48, 48)))


def test_set_input_size():
    model = make()
    model.set_input_size((48, 32))
    logits, similarity = model(images(size=(48, 32)), return_similarity=True)
    assert (logits.shape, similarity.shape) == ((2, 5), (2, 3, 6, 4))
    model.set_input_size(patch_size=(16, 16))
    assert model(images(size=(48, 32)), return_similarity=True)[1].shape == (2, 3, 3, 2)


def test_dynamic_image_size():
    model, fixed = make(dynamic_img_size=True), make()
    torch.testing.assert_close(model(images(), return_similarity=True), fixed(images(), return_similarity=True))
    assert model(images(size=(40, 64)), return_similarity=True)[1].shape == (2, 3, 5, 8)
    padded = make(dynamic_img_size=True, dynamic_img_pad=True)
    assert padded(images(size=(41, 62)), return_similarity=True)[1].shape == (2, 3, 6, 8)


@pytest.mark.parametrize("pool", ["token", "avg", "max", "avgmax", "map", ""])
def test_pooling(pool):
    model = make(global_pool=pool)
    logits, similarity = model(images(), return_similarity=True)
    torch.testing.assert_close(logits, full_logits(model, images()))
    torch.testing.assert_close(model(images()), logits)
    assert logits.shape == ((2, 17, 5) if pool == "" else (2, 5))
    assert similarity.shape == (2, 3, 4, 4)


def test_features_without_a_classifier():
    model = make()
    pooled = model.forward_head(model.forward_features(images()), pre_logits=True)
    assert (model.forward_features(images()).shape, pooled.shape) == ((2, 17, 24), (2, 24))
    bare = make(num_classes=0)
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("head.")})
    torch.testing.assert_close(bare(images()), pooled)
    model.reset_classifier(0)
    torch.testing.assert_close(model(images()), pooled)
    model.reset_classifier(0, "")
    assert model(images()).shape == (2, 17, 24)
    model.reset_classifier(7, "token")
    assert model(images()).shape == (2, 7)
    assert (model.num_classes, model.get_classifier().out_features) == (7, 7)


def test_forward_intermediates():
    model = make()
    final, maps = model.forward_intermediates(images(), norm=True)
    torch.testing.assert_close(final, model.forward_features(images()))
    assert [m.shape for m in maps] == [(2, 24, 4, 4)] * 3
    torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), final[:, 1:])
    tokens = model.get_intermediate_layers(images(), n=[2], norm=True, return_prefix_tokens=True)[0]
    torch.testing.assert_close(torch.cat(tokens[::-1], dim=1), final)
    causal = model.forward_features(images(), is_causal=True)
    assert not torch.allclose(causal, final)


def test_features_only():
    model = timm.create_model("vit_tiny_sar", features_only=True, out_indices=(1, 2), **SMALL)
    assert [f.shape for f in model(images())] == [(2, 24, 4, 4)] * 2
    assert model.feature_info.channels() == [24, 24]


def test_weight_decay_and_layer_groups_are_timms():
    ours, theirs = make(), timm.create_model("vit_tiny_patch16_224", device="meta")
    assert ours.no_weight_decay() == theirs.no_weight_decay()
    assert ours.group_matcher() == theirs.group_matcher()
    groups = param_groups_layer_decay(ours, weight_decay=0.05, layer_decay=0.7)
    assert len({round(group["lr_scale"], 6) for group in groups}) == 3 + 2  # stem, blocks, head


@pytest.mark.parametrize("kwargs", [{}, {"global_pool": "avg"}, {"return_tokens": True}], ids=str)
def test_gradient_checkpointing(kwargs):
    flags = {"return_similarity": True, **{k: v for k, v in kwargs.items() if k == "return_tokens"}}
    options = {k: v for k, v in kwargs.items() if k != "return_tokens"}
    results = []
    for enable in (False, True):
        model = make(drop_path_rate=0.5, **options).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(5)
        outputs = model(images(8), **flags)
        sum(output.square().mean() for output in outputs).backward()
        results.append((outputs, gradients(model)))
    torch.testing.assert_close(results[0], results[1])


def test_gradient_checkpointing_keeps_less():
    kept = []
    for enable in (False, True):
        model = make().train()
        model.set_grad_checkpointing(enable)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            model(images(), return_similarity=True)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


def test_copy_and_pickle():
    model = make()
    expected = model(images(), return_similarity=True)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(clone(images(), return_similarity=True), expected, rtol=0, atol=0)


def test_checkpoint_path_of_create_model(tmp_path):
    model = make(seed=7)
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "checkpoint.pth")
    loaded = timm.create_model("vit_tiny_sar", checkpoint_path=tmp_path / "checkpoint.pth", **SMALL).eval()
    assert torch.equal(loaded(images()), model(images()))


def test_input_channels_and_own_layers():
    class Patches(PatchEmbed):
        pass

    model = make(in_chans=1, embed_layer=Patches)
    assert isinstance(model.patch_embed, Patches)
    assert model(images()[:, :1]).shape == (2, 5)


# ----------------------------------------------------------------------------------- compilers and processes


@pytest.mark.parametrize("last_block", LAST_BLOCKS)
def test_torchscript(last_block):
    model = make(last_block=last_block, drop_path_rate=0.1)
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(images()), full_logits(model, images()))
    torch.testing.assert_close(scripted(images()), model(images()))
    torch.testing.assert_close(torch.jit.trace(model, images())(images()), model(images()))
    assert scripted.train()(images()).requires_grad


def test_fx_feature_extraction():
    model = make()
    _, nodes = get_graph_node_names(model)
    assert nodes[-1] == "head"
    extractor = create_feature_extractor(model, {"blocks.1": "middle", "blocks.2": "last", "head": "logits"})
    outputs = extractor(images())
    assert torch.equal(outputs["logits"], full_logits(model, images()))
    torch.testing.assert_close(outputs["logits"], model(images()))
    assert outputs["last"].shape == (2, 17, 24)  # a feature extractor gets all tokens
    assert torch.equal(model.norm(outputs["last"]), model.forward_features(images()))
    extractor.train()(images())["logits"].mean().backward()


FLAGS = [{}, {"return_similarity": True}, {"return_similarity": True, "return_tokens": True}]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("last_block", LAST_BLOCKS)
def test_there_is_no_graph_break(last_block, flags):
    model = make(last_block=last_block, depth=2, drop_path_rate=0.1)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images(), **flags), model(images(), **flags))
    model.train()
    compiled(images(), **flags)


def test_compiled_training_step():
    check_compiled("vit_tiny_sar", {"return_similarity": True})


@pytest.mark.slow
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("name", ["vit_tiny", "vit_tiny_sar"])
def test_compiled_training_step_of_all(name, flags):
    check_compiled(name, flags)


def check_compiled(name, flags):
    model = make(name, depth=2).train()
    torch._dynamo.reset()
    results = []
    for forward in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        outputs = forward(images(), **flags)
        sum(o.square().mean() for o in (outputs if flags else [outputs])).backward()
        results.append((outputs, gradients(model)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def ddp_worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = make().train()
    wrapped = nn.parallel.DistributedDataParallel(model)
    logits, similarity = wrapped(images(4)[rank::2], return_similarity=True)
    (logits.square().mean() + similarity.square().mean()).backward()
    if rank == 0:
        torch.save(gradients(model), f"{folder}/gradients.pt")
    del wrapped  # a wrapper that outlives its process group can spin for ever at exit
    dist.barrier()
    dist.destroy_process_group()


def test_ddp_on_two_processes(tmp_path):
    context = torch.multiprocessing.spawn(ddp_worker, args=(tmp_path,), nprocs=2, join=False)
    deadline = time.monotonic() + 120
    try:
        while not context.join(timeout=1):  # True once both have ended
            assert time.monotonic() < deadline, "a process hangs"
    finally:
        for process in context.processes:
            process.kill()
    model = make().train()
    logits, similarity = model(images(4), return_similarity=True)
    (logits.square().mean() + similarity.square().mean()).backward()
    torch.testing.assert_close(torch.load(tmp_path / "gradients.pt"), gradients(model))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_as_on_the_cpu_and_without_synchronisation(dtype):
    model = make()
    expected = model(images(), return_similarity=True)
    model, x = model.cuda(), images().cuda()
    model(x)  # warm up
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            logits, similarity = model(x, return_similarity=True)
            (logits.float().square().mean() + similarity.square().mean()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    assert similarity.dtype == torch.float32
    torch.testing.assert_close(logits.float().cpu(), expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(similarity.cpu(), expected[1], rtol=tolerance, atol=tolerance)


def test_module_lists_its_public_names():
    assert set(models_sar.__all__) >= set(NAMES) | {
        "LAST_BLOCKS",
        "SIMILARITIES",
        "LastBlock",
        "similarity_map",
    }
