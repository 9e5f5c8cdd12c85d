"""Faster and Mask R-CNN on ViTDet's pyramid: torchvision's parts with detectron2's mathematics (commit 02b5c4e).

What differs from torchvision's own detectors: anchors are not rounded; regions are read at the strides of the maps, not
at strides guessed from the first images; the loss of boxes is L1; masks are cut as detectron2 does; boxes are float32
under autocast. Boxes are ``x1, y1, x2, y2`` in px of the padded image, from 0.

Letters of the axes: B images, N objects or regions of an image, R regions of all images, K classes.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import roi_align
from torchvision.ops.poolers import LevelMapper

from models.vitdet import SimpleFeaturePyramid, ViTDet
from utils import float64_device

RATIOS = (0.5, 1.0, 2.0)
"""Height / width of the anchors."""


def at_least_float32(x: Tensor) -> Tensor:
    """``x``, in float32 if it has a half-precision type: bfloat16 boxes above 256 px move in steps of 2 px."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# -------------------------------------------------------------------------------------------- region proposals


class ExactAnchors(AnchorGenerator):
    """Anchors of one size a level, centred at multiples of its stride, float32 and not rounded.

    Args:
        sizes: square root of the anchors' area on each level, px.
        strides: of the levels, px.
    """

    def __init__(self, sizes: Sequence[float], strides: Sequence[float]):
        super().__init__(tuple((size,) for size in sizes), (RATIOS,) * len(sizes))
        self.strides = strides

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device="cpu") -> Tensor:
        """``(anchors, 4)`` around 0."""
        roots = torch.tensor(aspect_ratios, dtype=torch.float64, device=float64_device(torch.device(device))).sqrt()
        sides = torch.stack([1 / roots, roots], dim=1) * scales[0] / 2
        return torch.cat([-sides, sides], dim=1).to(device, dtype)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """The anchors of all levels for each image, ``(A, 4)``."""
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        strides = [[torch.tensor(stride, device=device)] * 2 for stride in self.strides]
        anchors = torch.cat(self.grid_anchors([list(x.shape[-2:]) for x in feature_maps], strides))
        return [anchors] * len(image_list.image_sizes)


class ProposalHead(RPNHead):
    """torchvision's head with outputs in float32."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [at_least_float32(part) for part in logits], [at_least_float32(part) for part in deltas]


class Proposals(RegionProposalNetwork):
    """torchvision's network with detectron2's losses: L1, and sums divided by the number of anchors to be drawn."""

    def compute_loss(self, objectness, pred_bbox_deltas, labels, regression_targets) -> tuple[Tensor, Tensor]:
        number = self.fg_bg_sampler.batch_size_per_image * len(labels)
        positive, negative = (torch.cat(masks).bool() for masks in self.fg_bg_sampler(labels))
        drawn, labels, targets = positive | negative, torch.cat(labels), torch.cat(regression_targets)
        scores = F.binary_cross_entropy_with_logits(objectness.flatten()[drawn], labels[drawn], reduction="sum")
        boxes = F.l1_loss(pred_bbox_deltas[positive], targets[positive], reduction="sum")
        return scores / number, boxes / number


# --------------------------------------------------------------------------------------------------- regions


class RegionPooler(nn.Module):
    """Features of regions from the level that their size asks for, by aligned RoIAlign with adaptive sampling.

    Args:
        size: side of the result.
        strides: of the levels, px; the finest first.
        canonical_size: side in px of a region that is read from the third level.
    """

    def __init__(self, size: int, strides: Sequence[float], canonical_size: float = 224):
        super().__init__()
        self.size, self.strides = size, strides
        self.levels = LevelMapper(2, 1 + len(strides), canonical_scale=canonical_size, canonical_level=4)

    def forward(self, features: Mapping[str, Tensor], boxes: list[Tensor], image_shapes: Any = None) -> Tensor:
        """``(R, C, size, size)`` for boxes ``(N, 4)`` of each image; ``image_shapes`` is not used."""
        maps = list(features.values())[: len(self.strides)]
        images = torch.cat([torch.full((len(part), 1), number) for number, part in enumerate(boxes)]).to(maps[0].device)
        regions, levels = torch.cat([images, torch.cat(boxes)], dim=1), self.levels(boxes)
        places = [(levels == number).nonzero()[:, 0] for number in range(len(maps))]
        parts = [
            roi_align(x, regions[here].to(x.dtype), self.size, 1 / stride, sampling_ratio=0, aligned=True)
            for x, here, stride in zip(maps, places, self.strides, strict=True)
        ]
        return torch.cat(parts)[torch.cat(places).argsort()]


def box_losses(logits: Tensor, deltas: Tensor, labels: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Fast R-CNN's losses, as means over regions.

    Args:
        logits: ``(R, 1 + K)``, background first.
        deltas: ``(R, 4 (1 + K))``.
        labels: ``(R,)``; 0 is background.
        targets: ``(R, 4)``, the deltas of the regions that are not background.
    """
    found = (labels > 0).nonzero()[:, 0]
    own = deltas.unflatten(1, (-1, 4))[found, labels[found]]
    return {
        "region_class": F.cross_entropy(logits, labels),
        "region_box": F.l1_loss(own, targets[found], reduction="sum") / max(len(labels), 1),
    }


def crop_masks(masks: Tensor, boxes: Tensor, size: int) -> Tensor:
    """The part of each mask ``(R, h, w)`` in its box ``(R, 4)``: bool ``(R, size, size)``."""
    numbers = torch.arange(len(boxes), device=boxes.device)[:, None]
    regions = torch.cat([numbers, boxes], dim=1)
    parts = roi_align(masks[:, None].to(boxes.dtype), regions, size, 1.0, sampling_ratio=0, aligned=True)
    return parts[:, 0] >= 0.5


def mask_loss(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropy of the pixels of regions; 0 without regions.

    Args:
        logits: ``(R, 1 + K, h, w)``.
        labels: ``(R,)``, above 0.
        targets: bool ``(R, h, w)``, see `crop_masks`.
    """
    if not len(labels):
        return logits.sum() * 0
    own = logits[torch.arange(len(labels), device=labels.device), labels]
    return F.binary_cross_entropy_with_logits(own, targets.to(own.dtype))


class Regions(RoIHeads):
    """torchvision's heads with detectron2's losses; in evaluation, masks are predicted on request alone."""

    def forward(
        self, features, proposals, image_shapes, targets=None, with_masks=False
    ) -> tuple[list[dict[str, Tensor]], dict]:
        """Detections of each image in evaluation, loss terms in training.

        Args:
            features: the maps by name, the finest first.
            proposals: ``(N, 4)`` of each image.
            image_shapes: height and width of each image without padding.
            targets: in training ``boxes (N, 4)``, ``labels (N,)`` from 1, and with a mask head ``masks``, bool
                ``(N, h, w)`` or None, of each image.
            with_masks: in evaluation, with a mask head: add each detection's ``masks (N, 28, 28)``, probabilities.
        """
        # 1. regions: in training, some of the proposals and of the objects' own boxes
        if self.training:
            proposals, matched, labels, goals = self.select_training_samples(proposals, targets)
        # 2. their classes and boxes
        x = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        logits, deltas = (at_least_float32(part) for part in self.box_predictor(x))
        if not self.training:
            parts = zip(*self.postprocess_detections(logits, deltas, proposals, image_shapes), strict=True)
            found = [{"boxes": boxes, "scores": scores, "labels": labels} for boxes, scores, labels in parts]
            if with_masks:
                boxes, labels = ([each[name] for each in found] for name in ("boxes", "labels"))
                pixels = at_least_float32(self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes))))
                found = [
                    each | {"masks": masks[:, 0]}
                    for each, masks in zip(found, maskrcnn_inference(pixels, labels), strict=True)
                ]
            return found, {}
        losses = box_losses(logits, deltas, torch.cat(labels), torch.cat(goals))
        # 3. the masks of regions with an object whose mask is known
        if self.has_mask():
            known = [(part > 0) & (target["masks"] is not None) for part, target in zip(labels, targets, strict=True)]
            boxes = [part[which] for part, which in zip(proposals, known, strict=True)]
            pixels = at_least_float32(self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes))))
            size = pixels.shape[-1]
            parts = [
                crop_masks(target["masks"][objects[which]], part, size)
                for target, objects, which, part in zip(targets, matched, known, boxes, strict=True)
                if target["masks"] is not None
            ]
            wanted = torch.cat(parts) if parts else pixels.new_zeros(0, size, size)
            classes = torch.cat([part[which] for part, which in zip(labels, known, strict=True)])
            losses["region_mask"] = mask_loss(pixels, classes, wanted)
        return [], losses


# ------------------------------------------------------------------------------------------------- the detector


class Detector(nn.Module):
    """ViTDet's detector: backbone, simple feature pyramid, Faster R-CNN or Mask R-CNN.

    Args:
        backbone: with patches whose side is a multiple of 4 px.
        num_classes: K, without background.
        masks: add the mask head, which trains the features.
        channels: of the pyramid and of the heads.
        features: width of the box head's hidden layer.
        regions: number of regions of an image in training.
        smallest_anchor: px; each of the further four levels has twice the size of the one before.
        canonical_size: see `RegionPooler`.
    """

    def __init__(
        self,
        backbone: ViTDet,
        num_classes: int,
        masks: bool = False,
        channels: int = 256,
        features: int = 1024,
        regions: int = 512,
        smallest_anchor: float = 32,
        canonical_size: float = 224,
    ):
        super().__init__()
        # 1. the maps
        self.num_features = backbone.num_features
        self.backbone, self.pyramid = backbone, SimpleFeaturePyramid(backbone.num_features, channels)
        strides = [backbone.reduction * factor for factor in (0.25, 0.5, 1, 2, 4)]
        # 2. proposals
        self.rpn = Proposals(
            ExactAnchors([smallest_anchor * 2**level for level in range(5)], strides),
            ProposalHead(channels, len(RATIOS), conv_depth=2),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2000, "testing": 1000},
            post_nms_top_n={"training": 1000, "testing": 1000},
            nms_thresh=0.7,
        )
        # 3. regions
        mask_parts: dict[str, nn.Module] = {}
        if masks:
            mask_parts = {
                "mask_roi_pool": RegionPooler(14, strides[:4], canonical_size),
                "mask_head": MaskRCNNHeads(channels, [channels] * 4, dilation=1, norm_layer=LayerNorm2d),
                "mask_predictor": MaskRCNNPredictor(channels, channels, 1 + num_classes),
            }
        self.roi_heads = Regions(
            RegionPooler(7, strides[:4], canonical_size),
            FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [features], norm_layer=LayerNorm2d),
            FastRCNNPredictor(features, 1 + num_classes),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=regions,
            positive_fraction=0.25,
            bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
            **mask_parts,
        )
        self._init_heads()

    def _init_heads(self) -> None:
        """detectron2's initial values where torchvision's differ."""
        heads = self.roi_heads
        for module in heads.box_head.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)
        last = [(heads.box_predictor.cls_score, 0.01), (heads.box_predictor.bbox_pred, 0.001)]
        if heads.has_mask():
            nn.init.zeros_(heads.mask_predictor.conv5_mask.bias)
            last.append((heads.mask_predictor.mask_fcn_logits, 0.001))
        for layer, deviation in last:
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        images: Tensor,
        targets: Sequence[Mapping[str, Tensor]] | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
        return_similarity: bool = False,
        with_masks: bool = False,
    ) -> Any:
        """Loss terms by name in training, else the detections of each image; on request also S of the last block.

        Args:
            images: ``(B, 3, height, width)``, normalised.
            targets: in training ``boxes (N, 4)``, ``labels (N,)`` from 0, and ``masks``, bool ``(N, height, width)``,
                of each image; images without objects have N = 0, images without known masks no ``masks``.
            sizes: height and width of the images without padding (default: there is none).
            return_similarity: return ``(result, S)``, S of ``(B, H, h, w)``.
            with_masks: add ``masks (N, 28, 28)`` to the detections, the object's probability in each part of its box.

        Returns:
            Terms ``proposal_score``, ``proposal_box``, ``region_class``, ``region_box`` and with masks ``region_mask``.
            Detections have ``boxes (N, 4)``, ``scores (N,)`` and ``labels (N,)`` from 0, the best first.
        """
        # 1. features
        found = self.backbone(images, return_similarity)
        x, similarity = found if return_similarity else (found, None)
        features = OrderedDict((str(level), part) for level, part in enumerate(self.pyramid(x)))
        # 2. heads, whose class 0 is background
        batch = ImageList(images, list(sizes) if sizes else [cast(tuple[int, int], images.shape[2:])] * len(images))
        if targets is not None:
            targets = [
                {"boxes": each["boxes"], "labels": each["labels"] + 1, "masks": each.get("masks")} for each in targets
            ]
        proposals, first = self.rpn(batch, features, targets)
        detections, second = self.roi_heads(features, proposals, batch.image_sizes, targets, with_masks)
        # 3. results
        result: Any = [each | {"labels": each["labels"] - 1} for each in detections]
        if self.training:
            scores, boxes = first.values()
            result = {"proposal_score": scores, "proposal_box": boxes, **second}
        return (result, similarity) if return_similarity else result
