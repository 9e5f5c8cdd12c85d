"""Object detection: ViTDet's Faster R-CNN or Mask R-CNN (Table 5); average precision by PASCAL VOC's rules."""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image

from datasets import AugmentedDataset, collate, read_images
from models.rcnn import Detector
from models.vitdet import ViTDet
from randomness import isolated_rng
from readers.boxes import read_instances
from samplers import Draw
from tasks import Evaluator
from tasks.boxes import BoxEvalTransform, BoxTrainTransform
from tasks.dense import DenseTask, build_backbone, describe_rates
from tasks.options import detect as options
from tasks.settings import split_settings
from tasks.voc_ap import Matches, match, voc_results
from utils import Processes, write_atomically


class BoxedDataset(AugmentedDataset):
    """Images with objects, indexed by the draws of a sampler: ``images``, ``objects`` and ``replaced``.

    Random numbers and unreadable images are treated as in `AugmentedDataset`. A batch has ``images (B, 3, h, w)`` and a
    list of B ``objects``.

    Attributes:
        masks: whether objects have ``masks``, where the set has them.
    """

    transform: Callable[[Tensor, Mapping[str, Tensor]], Any]
    masks = False

    @staticmethod
    def collate(items: list[dict[str, Any]]) -> Any:
        objects = [item.pop("objects") for item in items]
        return collate(items) | {"objects": objects}

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        image, objects, replaced = self._read(draw.index)
        path = objects.pop("masks")
        if self.masks and path:
            objects["masks"] = read_instances(path, len(objects["boxes"]))
        with isolated_rng("augmentation", self.seed, draw.epoch, draw.position):
            image, objects = self.transform(image, objects)
        return {"images": image, "objects": objects, "replaced": replaced}


class BoxedEvaluationDataset(BoxedDataset):
    """Images for evaluation; a batch is a list of items, which also have their image's ``index`` and ``name``."""

    collate = staticmethod(list)  # type: ignore[assignment]

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        image, objects, replaced = self._read(draw.index)
        place = {"index": draw.index, "name": self.base.names[draw.index]}
        return self.transform(image, objects) | place | {"replaced": replaced}


class Detection(DenseTask):
    """``--task detect``: boxes and classes of objects; the model is a `models.rcnn.Detector`."""

    options = options
    metric = "ap50_11point"
    prediction = "boxes"
    main_loss = "losses of proposals (score, box) and regions (class, box)"

    def __init__(self, args: argparse.Namespace, dataset: BoxedDataset, device: torch.device):
        torch.manual_seed(args.seed)
        backbone = cast(ViTDet, build_backbone(args))
        model = Detector(backbone, len(dataset.classes), args.masks, **args.head_kwargs)
        super().__init__(args, model, device)
        self.classes, self.folder, self.masks = dataset.classes, args.output_dir, args.masks

    @property
    def compiled_part(self) -> nn.Module:
        """The backbone: the heads' numbers of regions change from step to step."""
        return cast(nn.Module, self.model.backbone)

    @classmethod
    def data(cls, args: argparse.Namespace, split: str, processes: Processes) -> BoxedDataset:
        images = read_images(split_settings(args), split, processes)
        if split == "val":
            transform = cls.evaluation_transform(args)
            return BoxedEvaluationDataset(images, transform, args.seed, args.skip_unreadable)
        augmentation = BoxTrainTransform(args.input_size, args.scale_range, args.hflip)
        dataset = BoxedDataset(images, augmentation, args.seed, args.skip_unreadable)
        dataset.masks = args.masks
        return dataset

    @classmethod
    def evaluation_transform(cls, args: argparse.Namespace) -> BoxEvalTransform:
        return BoxEvalTransform(args.input_size)

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        if not self.needs_similarity:
            return {"terms": self.model(batch["images"], batch["objects"])}
        terms, similarity = self.model(batch["images"], batch["objects"], return_similarity=True)
        return {"terms": terms, "similarity": similarity}

    def losses(self, outputs: dict[str, Any], batch: dict[str, Any]) -> dict[str, Tensor]:
        return outputs["terms"]

    def notes(self) -> dict[str, str]:
        heads = "boxes, and masks where they are known" if self.masks else "boxes; masks are not learned (--masks)"
        return super().notes() | {
            "heads": heads,
            "evaluation": "VOC AP by 11 points (picks best.pth) and by area; difficult objects do not count",
        }

    def evaluator(self) -> "VOCDetections":
        return VOCDetections(self.classes, self.folder)

    def predict(self, item: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return detect(self.model, item, with_masks=self.masks)

    def truth(self, item: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return objects_of(item)

    @classmethod
    def describe(cls, results: Mapping[str, float]) -> str:
        missing = results["classes_without_objects"]
        rates = {name.partition("/")[2]: rate for name, rate in results.items() if "/" in name}
        return (
            f"* AP50 {results['ap50_11point']:.2f} (11 points) {results['ap50_area']:.2f} (area), AP50:95 "
            f"{results['ap50_95_11point']:.2f} (11 points) {results['ap50_95_area']:.2f} (area) "
            f"({results['images']} images; AP50 by 11 points: {describe_rates(rates)}"
            + (f"; {missing} classes without objects)" if missing else ")")
        )


# ---------------------------------------------------------------------------------------------------- evaluation


class VOCDetections(Evaluator):
    """Average precision by `tasks.voc_ap`, exact for any number of processes; detections are kept as JSON.

    A batch is a list of items of `BoxedEvaluationDataset`, whose images pass the model one by one. So an image's
    detections do not depend on its batch. They are gathered once, on the host. Results: those of `voc_results`;
    ``images`` and ``unreadable``.

    Args:
        classes: names.
        folder: where `write_coco` writes.
    """

    def __init__(self, classes: Sequence[str], folder: str):
        self.classes, self.folder = classes, folder
        self.records: list[dict[str, Any]] = []
        self.unreadable = 0

    def update(self, model: nn.Module, batch: list[dict[str, Any]]) -> None:
        for item in batch:
            if item["replaced"]:
                self.unreadable += 1
            else:
                place = {name: item[name] for name in ("index", "name", "size")}
                self.records.append({**place, "detections": detect(model, item), "objects": objects_of(item)})

    def compute(self, processes: Processes) -> dict[str, Any]:
        # 1. all images, in the order of the set
        shares: list[Any] = [None] * processes.world_size
        if processes.world_size > 1:
            dist.all_gather_object(shares, (self.records, self.unreadable))
        else:
            shares = [(self.records, self.unreadable)]
        records = sorted((record for share, _ in shares for record in share), key=lambda record: record["index"])
        # 2. their files
        if processes.is_main:
            write_coco(Path(self.folder), records, self.classes)
        # 3. matches
        parts = [match(each["index"], inclusive(each["detections"]), inclusive(each["objects"])) for each in records]
        counts = np.zeros(len(self.classes), int)
        for each in records:
            counted = each["objects"]["labels"][~each["objects"]["difficult"]]
            counts += np.bincount(counted, minlength=len(self.classes))
        results = voc_results(Matches.join(parts), counts.tolist(), self.classes)
        return results | {"images": len(records), "unreadable": sum(number for _, number in shares)}


def detect(model: nn.Module, item: Mapping[str, Any], with_masks: bool = False) -> dict[str, np.ndarray]:
    """The detections in one image at its original size: ``boxes``, ``labels`` and ``scores``, on the host.

    Args:
        model: a `models.rcnn.Detector`.
        item: of `BoxedEvaluationDataset`.
        with_masks: add ``masks``, bool ``(N, height, width)``, of a detector with a mask head.
    """
    (found,) = model(item["images"], sizes=[item["inside"]], with_masks=with_masks)
    (height, width), (inside_height, inside_width) = item["size"], item["inside"]
    factor = found["boxes"].new_tensor([width / inside_width, height / inside_height] * 2)
    detections = found | {"boxes": found["boxes"] * factor}
    if with_masks:
        pasted = paste_masks_in_image(found["masks"][:, None], detections["boxes"], (height, width))
        detections["masks"] = pasted[:, 0] > 0.5
    return {name: part.cpu().numpy() for name, part in detections.items()}


def objects_of(item: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The true objects of one image at its original size, on the host."""
    return {name: item["objects"][name].cpu().numpy() for name in ("boxes", "labels", "difficult")}


def inclusive(objects: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Objects whose boxes count from 1 and include x2 and y2, as those in VOC's files."""
    return {**objects, "boxes": objects["boxes"].astype(float) + np.array([1, 1, 0, 0])}


def write_coco(folder: Path, records: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> None:
    """Write ``detections.json`` and ``objects.json`` in COCO's layout, which COCO's tools read.

    Boxes are x, y, width, height in px from 0. Numbers of images are indices of the set, those of classes begin at 1.
    COCO knows no ``difficult`` objects; they have this key.
    """
    objects = [
        entry
        | {"id": number, "area": entry["bbox"][2] * entry["bbox"][3], "iscrowd": 0}
        | {"difficult": int(record["objects"]["difficult"][place])}
        for number, (entry, record, place) in enumerate(coco_entries(records, "objects"), 1)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    truth = coco_images(records, classes) | {"annotations": objects}
    for name, content in {"detections": coco_detections(records, classes), "objects": truth}.items():
        text = json.dumps(content)
        write_atomically(folder / f"{name}.json", lambda file, text=text: file.write(text.encode()))


def coco_detections(records: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Detections in the layout of COCO's results, and the name of each one's ``category``; see `write_coco`.

    Args:
        records: of each image its ``index``, and its ``detections`` as `detect` returns them.
        classes: names.
    """
    return [
        entry
        | {"score": round(float(record["detections"]["scores"][place]), 8)}
        | {"category": classes[entry["category_id"] - 1]}
        for entry, record, place in coco_entries(records, "detections")
    ]


def coco_images(records: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> dict[str, Any]:
    """The ``images`` and ``categories`` of COCO's layout; ``index``, ``name`` and ``size`` of the records are read."""
    images = [
        {"id": record["index"], "file_name": record["name"], "height": record["size"][0], "width": record["size"][1]}
        for record in records
    ]
    return {"images": images, "categories": [{"id": number, "name": name} for number, name in enumerate(classes, 1)]}


def coco_entries(records: Sequence[Mapping[str, Any]], part: str) -> Iterator[tuple[dict[str, Any], Any, int]]:
    """What COCO's detections and objects share, for all boxes in a part of the records; the record, its box's place."""
    for record in records:
        values = record[part]
        for place, (box, label) in enumerate(zip(values["boxes"].tolist(), values["labels"].tolist(), strict=True)):
            x1, y1, x2, y2 = (round(side, 3) for side in box)
            size = {"bbox": [x1, y1, round(x2 - x1, 3), round(y2 - y1, 3)]}
            yield {"image_id": record["index"], "category_id": label + 1, **size}, record, place
