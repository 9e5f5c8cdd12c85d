"""The detector's heads: detectron2's numbers, and what detectors are known to get wrong."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.detection.image_list import ImageList

from models.rcnn import Detector, at_least_float32, box_losses, crop_masks, mask_loss
from models.vitdet import ViTDet

EXACT, PIXELS = {"rtol": 0, "atol": 1e-10}, {"rtol": 0, "atol": 1e-4}
SMALL = {"channels": 8, "features": 16, "regions": 16}


def make_detector(masks=False, num_classes=3, **sizes):
    torch.manual_seed(0)
    backbone = ViTDet(img_size=64, embed_dim=16, depth=2, num_heads=2, pretrain_size=64, drop_path_rate=0.0)
    return Detector(backbone, num_classes, masks, **SMALL | sizes)


@pytest.fixture(scope="module")
def heads(golden):
    """The golden file, and a detector with its weights."""
    content = golden("vitdet_heads.pt")
    config, roi = content["config"], content["roi"]
    detector = make_detector(
        masks=True,
        num_classes=config["num_classes"],
        channels=config["channels"],
        features=len(roi["box_head_state_dict"]["fc1.weight"]),
        smallest_anchor=config["anchor_sizes"][0],
        canonical_size=roi["canonical_box_size"],
    )
    assert list(detector.rpn.anchor_generator.strides) == config["strides"]
    names = {"conv.conv0": "conv.0.0", "conv.conv1": "conv.1.0", "objectness_logits": "cls_logits"}
    load(detector.rpn.head, content["rpn"]["state_dict"], names | {"anchor_deltas": "bbox_pred"})
    convolutions = {f"conv{number}": f"{number - 1}.0" for number in range(1, 5)}
    norms = {f"{name}.norm": f"{number}.1" for number, name in enumerate(convolutions)}
    load(detector.roi_heads.box_head, roi["box_head_state_dict"], norms | convolutions | {"fc1": "5"})
    load(detector.roi_heads.box_predictor, background_first(roi["box_predictor_state_dict"]))
    masks = {name.replace("conv", "mask_fcn"): place for name, place in (norms | convolutions).items()}
    own = {name: value for name, value in roi["mask_head_state_dict"].items() if name.startswith("mask_fcn")}
    load(detector.roi_heads.mask_head, own, masks)
    last = {f"conv5_mask.{part}": roi["mask_head_state_dict"][f"deconv.{part}"] for part in ("weight", "bias")}
    for part in ("weight", "bias"):
        values = roi["mask_head_state_dict"][f"predictor.{part}"]
        last[f"mask_fcn_logits.{part}"] = torch.cat([torch.zeros_like(values[:1]), values])
    load(detector.roi_heads.mask_predictor, last)
    detector.rpn._pre_nms_top_n = dict(zip(("training", "testing"), config["pre_nms_topk"], strict=True))
    detector.rpn._post_nms_top_n = dict(zip(("training", "testing"), config["post_nms_topk"], strict=True))
    return content, detector


def load(module, state, names=None):
    for theirs, own in (names or {}).items():
        state = {name.replace(f"{theirs}.", f"{own}.", 1) if name.startswith(f"{theirs}.") else name: value
                 for name, value in state.items()}  # fmt: skip
    module.load_state_dict(state)


def background_first(state):
    """detectron2's last class is the background, which has no deltas; torchvision's is the first."""
    moved = {name: value.roll(1, dims=0) for name, value in state.items() if name.startswith("cls_score")}
    boxes = {name: value for name, value in state.items() if name.startswith("bbox_pred")}
    return moved | {name: torch.cat([torch.zeros_like(value[:4]), value]) for name, value in boxes.items()}


def image_list(content):
    height, width = content["config"]["canvas"]
    return ImageList(torch.zeros(2, 3, height, width), [tuple(size) for size in content["config"]["image_sizes"]])


def targets_of(content):
    return [{"boxes": each["boxes"], "labels": each["classes"] + 1} for each in content["gt"]]


def every_anchor(rpn, number=10**6):
    """Let the losses take all anchors instead of 256 drawn ones."""
    rpn.fg_bg_sampler.batch_size_per_image = number
    rpn.fg_bg_sampler.positive_fraction = 0.5


def test_anchors_and_their_labels_are_exact(heads):
    content, detector = heads
    features, rpn = list(content["features"].values()), content["rpn"]
    anchors = detector.rpn.anchor_generator(image_list(content), features)
    torch.testing.assert_close(anchors[1], torch.cat(rpn["anchors"]), rtol=0, atol=1e-5)
    labels, _ = detector.rpn.assign_targets_to_anchors(anchors, targets_of(content))
    assert torch.equal(torch.stack(labels).to(torch.int8), rpn["anchor_labels"])


def test_the_head_of_proposals(heads):
    content, detector = heads
    logits, deltas = detector.rpn.head.double()([x.double() for x in content["features"].values()])
    detector.rpn.head.float()
    for own, official in ((logits, "objectness_f64"), (deltas, "deltas_f64")):
        for level, expected in zip(own, content["rpn"][official], strict=True):
            torch.testing.assert_close(level, expected, **EXACT)


def given_outputs(content):
    """The golden outputs of the head, as the proposals and losses of the golden file read them."""
    scale = content["rpn"]["deltas_scale_used_below"]
    logits = [x.float() for x in content["rpn"]["objectness_f64"]]
    return logits, [(scale * x).float() for x in content["rpn"]["deltas_f64"]]


@pytest.mark.parametrize("mode", ["train", "test"])
def test_proposals_and_losses_are_those_of_detectron2(heads, mode, monkeypatch):
    content, detector = heads
    monkeypatch.setattr(detector.rpn.head, "forward", lambda features: given_outputs(content))
    detector.rpn.train(mode == "train")
    every_anchor(detector.rpn)
    proposals, losses = detector.rpn(image_list(content), content["features"], targets_of(content))
    for boxes, expected in zip(proposals, content["rpn"][f"proposals_{mode}"], strict=True):
        torch.testing.assert_close(boxes, expected["boxes"], **PIXELS)
    if mode == "train":
        score, box = (2 * 10**6 * loss for loss in losses.values())
        torch.testing.assert_close(score, content["rpn"]["loss_objectness_sum"], rtol=1e-4, atol=0)
        torch.testing.assert_close(box, content["rpn"]["loss_box_l1_sum"], rtol=1e-4, atol=0)


def test_regions_are_read_from_their_levels(heads):
    content, detector = heads
    roi, pool = content["roi"], detector.roi_heads.box_roi_pool
    assert torch.equal(pool.levels(roi["boxes"]), roi["levels"])
    torch.testing.assert_close(pool(content["features"], roi["boxes"]), roi["pooled_7"], rtol=0, atol=1e-5)
    pooled = detector.roi_heads.mask_roi_pool(content["features"], [roi["boxes"][0][:4], roi["boxes"][1][:0]])
    torch.testing.assert_close(pooled, roi["pooled_14_first_4_of_image_0"], rtol=0, atol=1e-5)


def test_the_heads_of_boxes_and_masks(heads):
    content, detector = heads
    roi, own = content["roi"], detector.roi_heads.double()
    features = own.box_head(roi["pooled_7"].double())
    torch.testing.assert_close(features, roi["box_features_f64"], **EXACT)
    scores, deltas = own.box_predictor(features)
    torch.testing.assert_close(scores.roll(-1, dims=1), roi["scores_f64"], **EXACT)
    torch.testing.assert_close(deltas[:, 4:], roi["deltas_f64"], **EXACT)
    masks = own.mask_predictor(own.mask_head(roi["pooled_14_first_4_of_image_0"].double()))
    torch.testing.assert_close(masks[:, 1:], roi["mask_logits_f64"], **EXACT)
    own.float()


def test_the_losses_of_boxes(heads):
    content, detector = heads
    roi = content["roi"]
    logits = roi["scores_f64"].float().roll(1, dims=1)
    deltas = F.pad(roi["deltas_f64"].float(), (4, 0))
    labels = torch.cat([(each["classes"] + 1) % (content["config"]["num_classes"] + 1) for each in roi["targets"]])
    goals = torch.cat(detector.roi_heads.box_coder.encode([each["boxes"] for each in roi["targets"]], roi["boxes"]))
    losses = box_losses(logits, deltas, labels, goals)
    torch.testing.assert_close(losses["region_class"], roi["loss_cls_mean"], rtol=1e-4, atol=0)
    total = losses["region_box"] * roi["num_regions"]
    torch.testing.assert_close(total, roi["loss_box_l1_sum"], rtol=1e-4, atol=0)


def test_detections(heads):
    content, detector = heads
    roi = content["roi"]
    logits = roi["scores_f64"].float().roll(1, dims=1)
    deltas = F.pad(roi["deltas_f64"].float(), (4, 0))
    sizes = image_list(content).image_sizes
    found = detector.roi_heads.postprocess_detections(logits, deltas, roi["boxes"], sizes)
    for boxes, scores, labels, expected in zip(*found, roi["detections"], strict=True):
        assert torch.equal(labels - 1, expected["classes"])
        torch.testing.assert_close(boxes, expected["boxes"], **PIXELS)
        torch.testing.assert_close(scores, expected["scores"], rtol=0, atol=1e-5)


def test_the_loss_of_masks(heads):
    content, _ = heads
    roi = content["roi"]
    targets = crop_masks(roi["masks_image_0"], roi["boxes"][0][:4], 28)
    assert torch.equal(targets, roi["mask_targets_28"])
    logits = F.pad(roi["mask_logits_f64"].float(), (0, 0, 0, 0, 1, 0))
    loss = mask_loss(logits, roi["mask_classes"] + 1, targets)
    torch.testing.assert_close(loss, roi["mask_loss_mean"], rtol=1e-4, atol=0)


# ---------------------------------------------------------------------------------------------- the whole model


@pytest.mark.parametrize("masks", [False, True])
def test_the_full_size_has_detectron2s_parameters(masks):
    with torch.device("meta"):
        detector = Detector(ViTDet(), num_classes=20, masks=masks)
    unused = 4 * 1025 + (257 if masks else 0)  # of the background: deltas and mask
    assert sum(each.numel() for each in detector.parameters()) == (44_146_408 if masks else 41_517_524) + unused


@pytest.mark.parametrize("masks", [False, True])
def test_every_parameter_has_a_gradient_without_objects(masks):
    """DistributedDataParallel relies on it."""
    detector = make_detector(masks)
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    losses = detector(torch.randn(2, 3, 64, 64), [nothing, nothing])
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert [name for name, each in detector.named_parameters() if each.grad is None] == []


def one_object(**more):
    return {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([2])} | more


def test_images_without_known_masks_add_nothing_to_the_loss_of_masks():
    detector, images = make_detector(masks=True), torch.randn(2, 3, 64, 64)
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[:, 8:40, 8:40] = True
    torch.manual_seed(1)
    both = detector(images, [one_object(masks=mask), one_object()])["region_mask"]
    assert both > 0
    assert detector(images, [one_object(), one_object()])["region_mask"] == 0


def test_boxes_stay_float32_under_autocast():
    detector = make_detector().eval()
    detector.roi_heads.score_thresh = 0.0
    images = torch.randn(1, 3, 512, 512)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        (found,) = detector(images)
    coordinates = found["boxes"][(found["boxes"] > 256) & (found["boxes"] < 511)]
    assert found["boxes"].dtype == torch.float32
    assert len(coordinates) > 10
    assert (coordinates % 2 != 0).float().mean() > 0.9
    assert at_least_float32(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


def test_a_small_first_image_does_not_change_where_regions_are_read():
    """torchvision's pooler infers the strides from the first sizes that it sees, and keeps them."""
    first, second = make_detector().eval(), make_detector().eval()
    for detector in (first, second):
        detector.roi_heads.score_thresh = 0.0
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        first(images, sizes=[(20, 20)])
        (one,), (other,) = first(images), second(images)
    assert torch.equal(one["boxes"], other["boxes"])


def test_detections_lie_within_the_image_not_in_its_padding():
    detector = make_detector().eval()
    detector.roi_heads.score_thresh = 0.0
    with torch.no_grad():
        (found,) = detector(torch.randn(1, 3, 64, 64), sizes=[(50, 30)])
    assert len(found["boxes"]) > 10
    assert (found["boxes"][:, 2:] <= torch.tensor([30, 50])).all()
