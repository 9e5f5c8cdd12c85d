"""Semantic segmentation: Semantic FPN on ViTDet's pyramid (Table 6) or on PVT (ADE20K); mean IoU."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from datasets import AugmentedDataset, read_images
from models.fpn import Segmenter
from randomness import isolated_rng
from readers.masks import VOID
from samplers import Draw
from tasks import Evaluator
from tasks.dense import DenseTask, build_backbone, describe_rates
from tasks.joint import JointEvalTransform, JointTrainTransform
from tasks.options import segment as options
from tasks.settings import split_settings
from utils import Processes, UserError, in_process_group

PIXELS = 2**26
"""The largest number of logits at the original size that are kept at once: 256 MiB."""


class MaskedDataset(AugmentedDataset):
    """Images with masks, indexed by the draws of a sampler: what a joint transform makes of them, and ``replaced``.

    Random numbers and unreadable images are treated as in `AugmentedDataset`.
    """

    transform: Callable[[Tensor, Tensor], dict[str, Any]]

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        image, mask, replaced = self._read(draw.index)
        with isolated_rng("augmentation", self.seed, draw.epoch, draw.position):
            return self.transform(image, mask) | {"replaced": replaced}


class MaskedEvaluationDataset(MaskedDataset):
    """Images of different sizes for evaluation; a batch is a list of items, which also have their image's ``name``."""

    collate = staticmethod(list)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        return super().__getitem__(draw) | {"name": self.base.names[draw.index]}


class Segmentation(DenseTask):
    """``--task segment``: a class for each pixel; the model is a `models.fpn.Segmenter`.

    Training batches hold ``images (B, 3, h, w)`` and ``masks (B, h, w)``, uint8 classes and 255 for void.
    """

    options = options
    metric = "miou"
    main_loss = "cross-entropy of the pixels"
    prediction = "pixels"

    def __init__(self, args: argparse.Namespace, dataset: MaskedDataset, device: torch.device):
        torch.manual_seed(args.seed)
        model: nn.Module = Segmenter(build_backbone(args), len(dataset.classes), args.head_norm)
        gpus = dist.get_world_size() if in_process_group() and device.type == "cuda" else 1
        if gpus > 1:  # it changes no other norm
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        super().__init__(args, model, device)
        self.batch_norm = args.batch_size * gpus if args.head_norm == "batch" else 0
        self.loss_pixels, self.classes = args.loss_pixels, dataset.classes
        self.write_predictions = args.write_predictions

    @classmethod
    def data(cls, args: argparse.Namespace, split: str, processes: Processes) -> MaskedDataset:
        images = read_images(split_settings(args), split, processes)
        if split == "val":
            transform = cls.evaluation_transform(args)
            return MaskedEvaluationDataset(images, transform, args.seed, args.skip_unreadable)
        longer = args.longer_side or args.input_size
        joint = JointTrainTransform(
            args.input_size, longer, args.scale_range, args.most_of_one_class, args.hflip, args.photometric
        )
        return MaskedDataset(images, joint, args.seed, args.skip_unreadable)

    @classmethod
    def evaluation_transform(cls, args: argparse.Namespace) -> JointEvalTransform:
        return JointEvalTransform(args.input_size, args.longer_side or args.input_size)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.needs_similarity:
            return {"logits": self.model(batch["images"])}
        logits, similarity = self.model(batch["images"], return_similarity=True)
        return {"logits": logits, "similarity": similarity}

    def losses(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"cross_entropy": pixel_loss(outputs["logits"], batch["masks"], self.loss_pixels)}

    def notes(self) -> dict[str, str]:
        divisor = {"valid": "the pixels that are not void", "all": "all pixels, void included"}[self.loss_pixels]
        notes = super().notes() | {"void": f"255 is not learned; a micro-batch's loss is a mean over {divisor}"}
        if self.batch_norm:
            notes["norm"] = f"BatchNorm over {self.batch_norm} images, whatever is accumulated to a total batch"
        return notes

    def evaluator(self) -> "MeanIoU":
        return MeanIoU(self.classes, self.write_predictions)

    def predict(self, item: Mapping[str, Any]) -> dict[str, np.ndarray]:
        predicted = predict(self.model, item["images"], item["inside"], item["size"])
        return {"classes": predicted.cpu().numpy()}

    def truth(self, item: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {"classes": item["masks"].cpu().numpy()}

    @classmethod
    def describe(cls, results: Mapping[str, float]) -> str:
        if not results["labelled_pixels"]:
            return f"* no labels to compare with ({results['images']} images)"
        rates = {name.removeprefix("iou_"): rate for name, rate in results.items() if name.startswith("iou_")}
        return (
            f"* mIoU {results['miou']:.2f} pixel accuracy {results['pixel_accuracy']:.2f} class accuracy "
            f"{results['class_accuracy']:.2f} ({results['images']} images; IoU: {describe_rates(rates)})"
        )


def pixel_loss(logits: Tensor, masks: Tensor, pixels: str) -> Tensor:
    """The cross-entropy of all pixels that are not void: their sum, divided by a number of pixels.

    Args:
        logits: ``(B, K, h, w)``.
        masks: uint8 ``(B, h, w)``, classes and `VOID`.
        pixels: ``"valid"`` divides by the pixels that are not void, as torch and detectron2 do, and gives 0 if there
            are none. ``"all"`` divides by B h w, as mmsegmentation 0.13 does.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, masks.long(), ignore_index=VOID, reduction="sum")
    return total / (masks.numel() if pixels == "all" else (masks != VOID).sum().clamp(min=1))


# ---------------------------------------------------------------------------------------------------- evaluation


class MeanIoU(Evaluator):
    """Mean IoU from one confusion matrix over the whole set, which is exact for any number of processes.

    A batch is a list of items of `MaskedEvaluationDataset`, whose images pass the model one by one, as they differ in
    size. So an image's result does not depend on its batch. Results: see `rates_of`; ``images`` and ``unreadable``.

    Args:
        classes: names.
        folder: where predictions are written, see `write_prediction`; empty for none.
    """

    def __init__(self, classes: Sequence[str], folder: str = ""):
        self.classes, self.folder = classes, folder
        self.confusion: Tensor | int = 0
        self.images = self.unreadable = 0

    def update(self, model: nn.Module, batch: list[dict[str, Any]]) -> None:
        for item in batch:
            if item["replaced"]:
                self.unreadable += 1
                continue
            predicted = predict(model, item["images"], item["inside"], item["masks"].shape)
            self.confusion = self.confusion + confusion_of(predicted, item["masks"], len(self.classes))
            self.images += 1
            if self.folder:
                write_prediction(predicted.cpu().numpy(), Path(self.folder) / item["name"])

    def compute(self, processes: Processes) -> dict[str, Any]:
        own = torch.zeros(len(self.classes), len(self.classes), dtype=torch.int64, device=processes.device)
        confusion = processes.gather(own + self.confusion).sum(dim=0)
        counts = torch.tensor([self.images, self.unreadable], device=processes.device)
        images, unreadable = processes.gather(counts).sum(dim=0).tolist()
        return rates_of(confusion, self.classes) | {"images": images, "unreadable": unreadable}


def predict(model: nn.Module, image: Tensor, inside: tuple[int, int], size: Sequence[int]) -> Tensor:
    """The class of each pixel of one image at its original size, int64 ``(height, width)``.

    Args:
        image: ``(1, 3, h, w)``, resized and padded.
        inside: height and width of the image without padding.
        size: original height and width.
    """
    height, width = inside
    logits = model(image)[..., :height, :width].float()
    step = max(1, PIXELS // math.prod(size))
    parts = [logits[:, first : first + step] for first in range(0, logits.shape[1], step)]
    best, classes = F.interpolate(parts[0], size=list(size), mode="bilinear")[0].max(dim=0)
    for number, part in enumerate(parts[1:], 1):  # of a large photograph, all classes at once are gigabytes
        values, labels = F.interpolate(part, size=list(size), mode="bilinear")[0].max(dim=0)
        classes = torch.where(values > best, number * step + labels, classes)
        best = torch.maximum(best, values)
    return classes


def confusion_of(predicted: Tensor, mask: Tensor, num_classes: int) -> Tensor:
    """Numbers of pixels by class (rows) and predicted class (columns), int64 ``(K, K)``; void is left out."""
    valid = mask != VOID
    pairs = mask[valid].long() * num_classes + predicted[valid].long()
    return pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def rates_of(confusion: Tensor, classes: Sequence[str]) -> dict[str, float]:
    """Rates in percent from a confusion matrix ``(K, K)``, whose rows are the true classes.

    Returns:
        ``miou``, the mean IoU of the classes in labels or predictions, and ``iou_<class>`` of each; the IoU is the
        diagonal / (row + column - diagonal). ``class_accuracy``, the mean of diagonal / row over the labelled classes.
        ``pixel_accuracy``. ``labelled_pixels``, a number. Without labels, all means are 0.
    """
    counts = confusion.double()
    right, rows, columns = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
    iou, accuracy = 100 * right / (rows + columns - right), 100 * right / rows
    means = {
        "miou": iou.nanmean().nan_to_num().item(),
        "pixel_accuracy": (100 * right.sum() / rows.sum()).nan_to_num().item(),
        "class_accuracy": accuracy.nanmean().nan_to_num().item(),
        "labelled_pixels": int(rows.sum()),
    }
    return means | {f"iou_{name}": rate for name, rate in zip(classes, iou.tolist(), strict=True) if rate == rate}


def write_prediction(classes: np.ndarray, name: Path) -> None:
    """Write predicted classes ``(h, w)`` as a PNG of indices with PASCAL VOC's palette, in place of the suffix.

    Raises:
        UserError: the file cannot be written.
    """
    image = Image.fromarray(classes.astype(np.uint8))
    image.putpalette(voc_palette().tobytes())
    path = name.with_suffix(".png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); name another folder") from error


def voc_palette() -> np.ndarray:
    """PASCAL VOC's colours of the numbers 0 to 255, uint8 ``(256, 3)``: bits 0, 3, 6 of a number are red's highest."""
    numbers = np.arange(256)
    colours = [sum((numbers >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)]
    return np.stack(colours, axis=1).astype(np.uint8)
