"""Semantic FPN (Kirillov et al., 2019): a pyramid's maps to the classes of pixels; PVT's feature pyramid.

Both forms of the head are here: detectron2's (commit 02b5c4e, ``SemSegFPNHead``) has GroupNorm, mmsegmentation's
(0.13.0, ``FPNHead``) BatchNorm and dropout. The convolutions are torchvision's.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork

from models.pvt import DensePVT
from models.vitdet import SimpleFeaturePyramid, ViTDet

NORMS = {"group": partial(nn.GroupNorm, 32), "batch": nn.BatchNorm2d}


class SemanticFPN(nn.Module):
    """Logits of every fourth pixel from maps of strides 4, 8, 16 and 32.

    Level l of 0, 1, 2, 3 passes max(1, l) times a 3 x 3 convolution, norm and ReLU, each but level 0's followed by a
    bilinear enlargement by 2. The sum of all levels is classified by a 1 x 1 convolution.

    Args:
        in_channels: of each map.
        num_classes: of the logits.
        channels: of the head; a multiple of 32 with ``norm="group"``.
        norm: a key of `NORMS`. ``"batch"`` is mmsegmentation's head, with dropout of whole channels at a rate of .1 and
            a classifier of deviation .01.
    """

    def __init__(self, in_channels: int, num_classes: int, channels: int = 128, norm: str = "group"):
        super().__init__()
        self.levels = nn.ModuleList(
            nn.ModuleList(
                Conv2dNormActivation(in_channels if step == 0 else channels, channels, norm_layer=NORMS[norm])
                for step in range(max(1, level))
            )
            for level in range(4)
        )
        self.dropout = nn.Dropout2d(0.1 if norm == "batch" else 0.0)
        self.classifier = nn.Conv2d(channels, num_classes, kernel_size=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if norm == "batch":
            nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps ``(B, C, h_l, w_l)``, the finest first -> logits ``(B, classes, h_0, w_0)``."""
        size = maps[0].shape[2:]
        levels = []
        for number, (x, steps) in enumerate(zip(maps, self.levels, strict=True)):
            for step in steps:
                x = step(x)
                if number:
                    x = enlarge(x, (2 * x.shape[2], 2 * x.shape[3]))
            levels.append(enlarge(x, size))  # odd sizes
        return self.classifier(self.dropout(torch.stack(levels).sum(dim=0)))


def enlarge(x: Tensor, size: Sequence[int]) -> Tensor:
    """``(B, C, h, w)`` resized bilinearly to ``size``; corners are not aligned."""
    return x if x.shape[2:] == tuple(size) else F.interpolate(x, size=list(size), mode="bilinear")


def feature_pyramid(in_channels: Sequence[int], out_channels: int = 256) -> FeaturePyramidNetwork:
    """mmsegmentation's neck for PVT: an FPN without norms, Xavier-uniform at first; it takes and returns a dict."""
    neck = FeaturePyramidNetwork(list(in_channels), out_channels)
    for module in neck.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
    return neck


class Segmenter(nn.Module):
    """A backbone, its pyramid of 256 channels, and `SemanticFPN`.

    Args:
        backbone: `ViTDet`, which gets a `SimpleFeaturePyramid`, or `DensePVT`, which gets a `feature_pyramid`.
        num_classes: of the logits.
        norm: of the head, a key of `NORMS`.
    """

    def __init__(self, backbone: ViTDet | DensePVT, num_classes: int, norm: str = "group"):
        super().__init__()
        self.num_features = backbone.num_features
        self.backbone = backbone
        if isinstance(backbone, ViTDet):
            self.pyramid: nn.Module = SimpleFeaturePyramid(backbone.num_features)
        else:
            self.pyramid = feature_pyramid([stage["num_chs"] for stage in backbone.feature_info])
        self.head = SemanticFPN(256, num_classes, norm=norm)

    def forward(self, images: Tensor, return_similarity: bool = False):
        """Logits of each pixel, ``(B, classes, h, w)``, and on request S of the last block.

        Args:
            images: ``(B, 3, h, w)`` of any size, normalised.
            return_similarity: return ``(logits, S)``, S of ``(B, H, rows, columns)``.
        """
        found = self.backbone(images, return_similarity)
        maps, similarity = found if return_similarity else (found, None)
        if isinstance(maps, Tensor):
            pyramid = self.pyramid(maps)[:4]
        else:
            pyramid = list(self.pyramid({str(number): x for number, x in enumerate(maps)}).values())
        logits = self.head(pyramid)
        # the backbone pads images to whole patches, so 4 times the logits can be larger than the image
        logits = enlarge(logits, self._padded_size(images))[..., : images.shape[2], : images.shape[3]]
        return (logits, similarity) if return_similarity else logits

    def _padded_size(self, images: Tensor) -> list[int]:
        patch = self.backbone.reduction
        return [-(-side // patch) * patch for side in images.shape[2:]]
