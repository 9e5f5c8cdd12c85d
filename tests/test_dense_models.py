"""The models of detection and segmentation against numbers of detectron2, PVT and mmsegmentation."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer_sam import Block
from torch import nn

from models.fpn import SemanticFPN, enlarge, feature_pyramid
from models.pvt import DensePVT
from models.vitdet import SimpleFeaturePyramid, ViTDet, ViTDetBlock, relative_bias, relative_positions, resize_positions
from tasks.segment import pixel_loss

TIGHT = {"rtol": 0, "atol": 1e-10}
TINY = {"img_size": 48, "patch_size": 8, "pretrain_size": 32, "embed_dim": 24, "depth": 4, "num_heads": 2}


def doubles(state: dict) -> dict:
    return {name: value.double() if value.is_floating_point() else value for name, value in state.items()}


# ------------------------------------------------------------------------------------------------------ ViTDet


@pytest.fixture(scope="module")
def vitdet(golden):
    return golden("vitdet_backbone.pt")


def vitdet_of(vitdet: dict, variant: str, last_block: str = "standard") -> ViTDet:
    """The official network of a variant, in float64, with the last block of Eq. 1-2 or 10-11."""
    part, config = vitdet["variants"][variant], vitdet["config"]
    sizes = {name: config[name] for name in TINY.keys() - {"pretrain_size"}}
    model = ViTDet(
        **sizes,
        pretrain_size=config["pretrain_img_size"],
        window_size=config["window_size"],
        global_blocks=tuple(set(range(config["depth"])) - set(part["window_block_indexes"])),
        rel_pos=part["use_rel_pos"],
        last_block=last_block,
    )
    model = model.double().eval()
    state = doubles(vitdet["variants"]["last_global"]["state_dict"] | part.get("rel_pos", {}))
    last_norm = f"blocks.{config['depth'] - 1}.norm2"
    without = ["rel_pos"] * (not part["use_rel_pos"]) + [last_norm] * (last_block == "sar")
    model.load_state_dict({name: value for name, value in state.items() if not any(end in name for end in without)})
    return model


VARIANTS = ("last_global", "last_windowed", "last_global_no_rel_pos")


@pytest.mark.parametrize("variant", VARIANTS)
def test_vitdets_map_is_the_official_one(vitdet, variant):
    """Windows and images that need padding, positions that are resized, and sizes that fit as they are."""
    models = {kind: vitdet_of(vitdet, variant, kind) for kind in ("standard", "sar")}
    keys = {"standard": "out_f64", "sar": "nosn_out_f64"}
    for size, case in vitdet["variants"][variant]["cases"].items():
        for kind in models.keys() & {kind for kind, key in keys.items() if key in case}:
            torch.testing.assert_close(models[kind](vitdet["inputs"][size].double()), case[keys[kind]], **TIGHT)


@pytest.mark.parametrize("variant", VARIANTS[:2])
def test_vitdets_gradients_are_the_official_ones(vitdet, variant):
    cases = vitdet["variants"][variant]["cases"]
    ((size, case),) = [(size, case) for size, case in cases.items() if "grads_f64" in case]
    model, images = vitdet_of(vitdet, variant), vitdet["inputs"][size].double().requires_grad_()
    (model(images) * vitdet["cotangents"][size]).sum().backward()
    found = {name: model.get_parameter(name).grad for name in case["grads_f64"]}
    torch.testing.assert_close(found, case["grads_f64"], rtol=0, atol=1e-9)
    assert not model.pos_embed.grad[:, 0].any(), "the position of [CLS] is not used"
    mean = images.grad.mean(dim=1)
    torch.testing.assert_close(mean, case["grad_input_mean_over_channels_f64"], rtol=0, atol=1e-9)


def test_relative_positions_are_the_official_ones(golden):
    """Where queries and keys are as many; tables of other sizes are resized."""
    numbers = golden("vitdet_rel_pos.pt")
    equal = [case for case in numbers["get_rel_pos"] if case["q_size"] == case["k_size"]]
    assert {len(case["table"]) == len(case["out"]) * 2 - 1 for case in equal} == {True, False}
    for case in equal:
        found = relative_positions(case["table"], case["q_size"]).transpose(1, 2)
        torch.testing.assert_close(found, case["out"], **TIGHT)
    equal = [case for case in numbers["add_decomposed_rel_pos"] if case["q_size"] == case["k_size"]]
    assert equal
    for case in equal:
        bias = relative_bias(case["q_unscaled"][None], case["rel_pos_h"], case["rel_pos_w"], tuple(case["q_size"]))
        torch.testing.assert_close(case["scores"] + bias[0], case["out"], **TIGHT)
    for case in filter(lambda case: case["has_cls"], numbers["get_abs_pos"]):
        torch.testing.assert_close(resize_positions(case["pos_embed"], tuple(case["grid"])), case["out"], **TIGHT)


def test_a_block_is_timms_with_the_same_weights():
    torch.manual_seed(0)
    ours, theirs = (kind(24, 2, use_rel_pos=True, input_size=(6, 6), window_size=4) for kind in (ViTDetBlock, Block))
    for table in (ours.attn.rel_pos_h, ours.attn.rel_pos_w):
        nn.init.normal_(table)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 7, 24)
    torch.testing.assert_close(ours(x), theirs(x))


def test_drop_path_drops_images_and_not_windows():
    torch.manual_seed(0)
    block = ViTDetBlock(24, 2, window_size=2, drop_path=0.5).train()
    block.drop_path2 = nn.Identity()
    block.mlp = nn.Identity()
    x = torch.randn(64, 4, 4, 24)
    kept = ((block(x) - x - block.norm2(x)).abs() > 1e-4).any(dim=-1).flatten(1).float().mean(dim=1)
    assert set(kept.tolist()) == {0.0, 1.0}


def test_gradients_of_relative_positions_do_not_depend_on_threads():
    """At the size of a real network, where gradients of an index are summed in the order that threads finish."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.manual_seed(0)
        q, tables = torch.randn(1, 2, 1024, 64), [torch.randn(63, 64, requires_grad=True) for _ in range(2)]
        weight = torch.randn(1, 2, 1024, 1024)
        grads = [torch.autograd.grad((relative_bias(q, *tables, (32, 32)) * weight).sum(), tables) for _ in range(4)]
        assert all(torch.equal(one, other) for grad in grads[1:] for one, other in zip(grad, grads[0], strict=True))
    finally:
        torch.set_num_threads(before)


def test_the_map_covers_images_of_any_size():
    model = ViTDet(**TINY, window_size=4).eval()
    for height, width in ((48, 48), (41, 9), (8, 100)):
        images = torch.randn(1, 3, height, width)
        rows, columns = -(-height // 8), -(-width // 8)
        padded = F.pad(images, (0, 8 * columns - width, 0, 8 * rows - height))
        assert model(images).shape == (1, 24, rows, columns)
        assert torch.equal(model(images), model(padded))


def test_whole_image_blocks_are_the_last_of_each_quarter():
    for depth, expected in ((12, {2, 5, 8, 11}), (24, {5, 11, 17, 23}), (32, {7, 15, 23, 31}), (2, {0, 1})):
        blocks = ViTDet(**TINY | {"depth": depth}).blocks
        assert {number for number, block in enumerate(blocks) if block.window_size == 0} == expected
        assert blocks[0].window_size in (0, 14)


def test_drop_rates_rise_linearly_and_a_branch_without_skip_has_none():
    model = ViTDet(**TINY, drop_path_rate=0.3, last_block="sar")
    rates = [getattr(block.drop_path1, "drop_prob", 0) for block in model.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0])
    assert model.blocks[3].drop_path2.drop_prob == pytest.approx(0.3)


@pytest.mark.parametrize("global_blocks", [(3,), ()])
def test_similarity_is_that_of_the_mean_with_every_patch(global_blocks):
    torch.manual_seed(0)
    model = ViTDet(**TINY, window_size=4, global_blocks=global_blocks).double()
    seen, block = {}, model.blocks[3]
    block.register_forward_pre_hook(lambda block, inputs: seen.update(x=inputs[0]))
    images = torch.randn(2, 3, 40, 56, dtype=torch.float64)
    maps, similarity = model.eval()(images, return_similarity=True)
    assert similarity.shape == (2, 2, 5, 7)
    y = block.norm1(seen["x"]).flatten(1, 2)
    to_q, to_k, _ = block.attn.qkv.weight.chunk(3)
    in_q, in_k, _ = block.attn.qkv.bias.chunk(3)
    for head in range(2):
        rows = slice(12 * head, 12 * head + 12)
        q, k = y.mean(dim=1) @ to_q[rows].T + in_q[rows], y @ to_k[rows].T + in_k[rows]
        expected = torch.einsum("bd,bnd->bn", q, k) * 12**-0.5
        torch.testing.assert_close(similarity[:, head].flatten(1), expected, **TIGHT)
    assert torch.equal(model(images), maps), "S changes nothing of the map"


@pytest.mark.parametrize("kind", ["standard", "no_msa_skip", "sar", "no_skips"])
def test_every_parameter_of_the_backbones_has_a_gradient(kind):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    vit = ViTDet(**TINY, window_size=4, last_block=kind)
    pvt = DensePVT(last_block=kind, **TINY_PVT)
    for model in (vit, pvt):
        for with_maps in (False, True):
            model.zero_grad()
            maps = model(images, return_similarity=with_maps)
            maps = maps[0] if with_maps else maps
            sum(x.square().mean() for x in (maps if isinstance(maps, list) else [maps])).backward()
            assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_gradient_checkpointing_changes_nothing():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    for model in (ViTDet(**TINY, window_size=4, drop_path_rate=0), DensePVT(**TINY_PVT)):
        grads = []
        for enable in (False, True):
            model.set_grad_checkpointing(enable)
            model.zero_grad()
            maps = model(images)
            (maps[-1] if isinstance(maps, list) else maps).square().mean().backward()
            grads.append([parameter.grad for parameter in model.parameters()][5])
        assert torch.equal(*grads)


# ---------------------------------------------------------------------------------------------------- pyramids


def test_the_simple_feature_pyramid_is_the_official_one(golden):
    numbers = golden("simple_feature_pyramid.pt")
    pyramid = SimpleFeaturePyramid(numbers["config"]["dim"], numbers["config"]["out_channels"]).double()
    # the two orders are the same, but that official 1 x 1 and 3 x 3 convolutions hold their norm
    own = dict(zip(pyramid.state_dict(), numbers["state_dict_LN"], strict=True))
    pyramid.load_state_dict({name: numbers["state_dict_LN"][theirs].double() for name, theirs in own.items()})
    theirs_to_own = {theirs: name for name, theirs in own.items()}
    for case, x in ((numbers["cases"][f"LN_{size}"], x) for size, x in numbers["inputs"].items()):
        x = x.double().requires_grad_()
        maps = dict(zip(case["out_f64"], pyramid(x), strict=True))
        torch.testing.assert_close(maps, case["out_f64"], **TIGHT)
        pyramid.zero_grad()
        loss = sum((p * torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view_as(p)).sum() for p in maps.values())
        loss.backward()
        grads = {name: pyramid.get_parameter(theirs_to_own[name]).grad for name in case["grads_f64"]}
        torch.testing.assert_close(grads, case["grads_f64"], rtol=0, atol=1e-9)
        torch.testing.assert_close(x.grad, case["grad_input_f64"], rtol=0, atol=1e-9)


@pytest.fixture(scope="module")
def semantic(golden):
    return golden("semantic_fpn.pt")


def load_in_order(module: nn.Module, state: dict) -> None:
    """Give a module another program's weights, whose names differ and whose order is the same."""
    module.load_state_dict(dict(zip(module.state_dict(), doubles(state).values(), strict=True)))


def pvts_head(semantic: dict) -> tuple[nn.Module, SemanticFPN]:
    config = semantic["config"]
    neck = feature_pyramid(config["in_channels"], config["out_channels"]).double()
    head = SemanticFPN(config["out_channels"], config["num_classes"], config["channels"], norm="batch").double()
    load_in_order(neck, semantic["neck_state_dict"])
    state = semantic["head_state_dict"]  # there the classifier comes first
    load_in_order(head, dict(sorted(state.items(), key=lambda item: item[0].startswith("conv_seg"))))
    return neck, head


def named(maps: list) -> dict:
    return {str(number): x.double() for number, x in enumerate(maps)}


def test_pvts_semantic_fpn_is_the_official_one(semantic):
    for case in semantic["cases"].values():
        neck, head = pvts_head(semantic)
        maps = list(neck(named(case["features"])).values())
        torch.testing.assert_close(maps, case["fpn_out_f64"], **TIGHT)
        torch.testing.assert_close(head.eval()(maps), case["eval_logits_f64"], **TIGHT)
        assert not torch.allclose(head(maps), case["eval_logits_align_corners_true_f64"], atol=1e-3)
        head.train().dropout.p = 0.0
        torch.testing.assert_close(head(maps), case["train_logits_f64"], **TIGHT)
        (mean,) = case["running_mean_after_f64"].values()
        torch.testing.assert_close(head.levels[0][0][1].running_mean, mean, **TIGHT)


def test_gradients_of_pvts_semantic_fpn_are_the_official_ones(semantic):
    """Of mmsegmentation's loss, through both networks; the two programs have their weights in one order."""
    in_order = sorted(semantic["head_state_dict"], key=lambda name: name.startswith("conv_seg"))
    for case in semantic["cases"].values():
        neck, head = pvts_head(semantic)
        head.train().dropout.p = 0.0
        logits = head(list(neck(named(case["features"])).values()))
        pixel_loss(enlarge(logits, case["label"].shape[1:]), case["label"], "all").backward()
        own = {}
        for part, theirs, module in (("neck", semantic["neck_state_dict"], neck), ("head", in_order, head)):
            parameters = dict(module.named_parameters())
            pairs = zip(theirs, module.state_dict(), strict=True)
            own |= {f"{part}.{name}": parameters.get(ours) for name, ours in pairs}
        found = {name: own[name].grad for name in case["grads_of_loss_all_pixels_f64"]}
        torch.testing.assert_close(found, case["grads_of_loss_all_pixels_f64"], rtol=0, atol=1e-9)


def test_detectron2s_head_is_the_official_one(semantic):
    (case,) = [case for case in semantic["cases"].values() if "d2_logits_f64" in case]
    config, (neck, _) = semantic["config"], pvts_head(semantic)
    head = SemanticFPN(config["out_channels"], config["num_classes"], config["gn_channels"]).double()
    load_in_order(head, semantic["d2_head_state_dict"])
    maps = list(neck(named(case["features"])).values())
    torch.testing.assert_close(head(maps), case["d2_logits_f64"], **TIGHT)


def test_initial_values_of_the_heads():
    torch.manual_seed(0)
    head = SemanticFPN(64, 150, 64, norm="batch")
    assert head.classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert head.levels[3][1][0].weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)
    assert head.dropout.p == 0.1
    assert SemanticFPN(64, 21, 64).dropout.p == 0
    neck = feature_pyramid([64, 128, 320, 512])
    bound = (6 / (512 + 256)) ** 0.5
    assert neck.inner_blocks[3][0].weight.abs().max().item() == pytest.approx(bound, rel=1e-3)


def test_sizes_of_the_real_network():
    """Of FACTS: detectron2's ViT with relative positions for 512 px, and its pyramid."""
    count = lambda model: sum(parameter.numel() for parameter in model.parameters())  # noqa: E731
    assert count(ViTDet()) == 21_724_416
    assert count(SimpleFeaturePyramid(384)) == 3_298_144


# --------------------------------------------------------------------------------------------------------- PVT


TINY_PVT = {
    "img_size": 64,
    "embed_dims": (8, 16, 24, 32),
    "num_heads": (1, 2, 3, 4),
    "mlp_ratios": (4, 4, 2, 2),
    "depths": (1, 1, 1, 2),
}


@pytest.mark.parametrize("kind", ["standard", "sar"])
def test_pvts_maps_are_the_official_ones(golden, kind):
    numbers = golden("pvt_dense.pt")
    sizes = {name: value for name, value in numbers["config"].items() if "eps" not in name}
    model = DensePVT(last_block=kind, **sizes).double().eval()
    own, last_norm = model.state_dict(), f"block4.{sizes['depths'][3] - 1}.norm2"
    left = numbers["state_dict"].keys() - own.keys()
    assert left == (set() if kind == "standard" else {f"{last_norm}.weight", f"{last_norm}.bias"})
    model.load_state_dict({name: numbers["state_dict"][name].double() for name in own})
    for case in numbers["cases"].values():
        maps, similarity = model(case["input"].double(), return_similarity=True)
        if kind == "standard":
            torch.testing.assert_close(maps, case["maps_f64"], **TIGHT)
        else:
            torch.testing.assert_close(maps[3], case["nosn_last_map_f64"], **TIGHT)
        assert similarity.shape == (len(maps[3]), sizes["num_heads"][3], *maps[3].shape[2:])


def test_pvt_takes_images_where_a_later_stage_has_as_many_tokens_as_the_first_was_made_for():
    """The official code compares with the first stage's number of tokens, and fails."""
    maps = DensePVT(**TINY_PVT).eval()(torch.randn(1, 3, 128, 120))
    assert [tuple(x.shape[2:]) for x in maps] == [(32, 32), (16, 16), (8, 8), (4, 4)]
