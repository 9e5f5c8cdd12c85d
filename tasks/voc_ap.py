"""Average precision of detections by PASCAL VOC's rules, on the host, exact for any number of processes.

The rules are those of VOC's development kit as detectron2 applies them (commit 02b5c4e, ``pascal_voc_evaluation.py``),
without its rounding of scores and coordinates. Boxes are ``x1, y1, x2, y2`` in px, 1-based and inclusive: a box has the
width x2 - x1 + 1. An object that is ``difficult`` is neither to be found nor an error if it is found.

Letters of the axes: D detections, G objects, T thresholds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

THRESHOLDS = tuple(percent / 100 for percent in range(50, 100, 5))
"""Of the IoU, which must be larger."""
RECALLS = np.arange(0, 1.1, 0.1)


@dataclass(frozen=True)
class Matches:
    """Detections of some images, each with the object of its class and image that it overlaps most.

    Attributes:
        image, label: ``(D,)``, int64.
        score: ``(D,)``.
        iou: ``(D,)``; -1 where the image has no object of the class.
        object: ``(D,)``, index of the object in its image; -1 without one.
        difficult: ``(D,)``, whether that object is.
    """

    image: np.ndarray
    label: np.ndarray
    score: np.ndarray
    iou: np.ndarray
    object: np.ndarray
    difficult: np.ndarray

    @classmethod
    def join(cls, parts: Sequence["Matches"]) -> "Matches":
        """The detections of several parts, one after the other."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    def take(self, which: np.ndarray) -> "Matches":
        """Some detections, by mask or indices."""
        return Matches(**{field.name: getattr(self, field.name)[which] for field in fields(self)})


def match(image: int, detections: Mapping[str, np.ndarray], objects: Mapping[str, np.ndarray]) -> Matches:
    """Find the object of each detection in one image.

    Args:
        image: its number.
        detections: ``boxes (D, 4)``, ``labels (D,)``, ``scores (D,)``.
        objects: ``boxes (G, 4)``, ``labels (G,)``, ``difficult (G,)``.
    """
    number, labels = len(detections["labels"]), detections["labels"]
    iou, found, difficult = np.full(number, -1.0), np.full(number, -1), np.zeros(number, bool)
    if number and len(objects["labels"]):
        overlap = box_iou(detections["boxes"], objects["boxes"])
        overlap[labels[:, None] != objects["labels"][None]] = -1
        found = overlap.argmax(axis=1)
        iou = overlap.max(axis=1)
        found[iou < 0] = -1
        difficult = np.asarray(objects["difficult"], bool)[found] & (found >= 0)
    return Matches(np.full(number, image), labels, np.asarray(detections["scores"], float), iou, found, difficult)


def box_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes ``(D, 4)`` and ``(G, 4)``: ``(D, G)``."""
    boxes, others = np.asarray(boxes, float)[:, None], np.asarray(others, float)[None]
    low, high = np.maximum(boxes[..., :2], others[..., :2]), np.minimum(boxes[..., 2:], others[..., 2:])
    inside = np.maximum(high - low + 1, 0).prod(axis=-1)
    first, second = ((box[..., 2:] - box[..., :2] + 1).prod(axis=-1) for box in (boxes, others))
    return inside / (first + second - inside)


def average_precisions(matches: Matches, positives: int) -> dict[str, np.ndarray]:
    """Average precision of one class at each of `THRESHOLDS`, as fractions of 1.

    Detections are ranked by score; of equal scores the first is ranked first. The first detection of an object is
    right, later ones are wrong.

    Args:
        matches: all detections of the class.
        positives: number of its objects that are not difficult, at least 1.

    Returns:
        ``11point (T,)``: mean over the recalls 0, .1, ..., 1 of the best precision at this recall or a larger one (VOC
        2007). ``area (T,)``: the area below that precision (VOC 2010 and later).
    """
    ranked = matches.take(np.argsort(-matches.score, kind="stable"))
    results: dict[str, list[float]] = {"11point": [], "area": []}
    for threshold in THRESHOLDS:
        # 1. which detections are right, which are wrong; those of difficult objects are neither
        hit = ranked.iou > threshold
        places = np.flatnonzero(hit & ~ranked.difficult)
        objects = np.stack([ranked.image[places], ranked.object[places]])
        right = np.zeros(len(hit), bool)
        right[places[np.unique(objects, axis=1, return_index=True)[1]]] = True
        wrong = ~right & ~(hit & ranked.difficult)
        # 2. precision and recall down to each detection; the best precision from there on
        found, errors = right.cumsum(), wrong.cumsum()
        recall, precision = found / positives, found / np.maximum(found + errors, 1)
        best = np.maximum.accumulate(precision[::-1])[::-1]
        # 3. their two summaries
        first = np.searchsorted(recall, RECALLS)
        results["11point"].append(np.append(best, 0.0)[first].sum() / len(RECALLS))
        results["area"].append((np.diff(recall, prepend=0.0) * best).sum())
    return {name: np.array(values) for name, values in results.items()}


def voc_results(matches: Matches, positives: Sequence[int], classes: Sequence[str]) -> dict[str, float]:
    """All results in percent, each with the name of its kind of average precision.

    A class without objects, or with difficult ones alone, has no average precision and is left out of the means.

    Args:
        matches: the detections of all images.
        positives: number of objects of each class that are not difficult.
        classes: their names.

    Returns:
        Means over classes: ``ap50_11point`` and ``ap50_area`` at an IoU of .5, ``ap50_95_11point`` and
        ``ap50_95_area`` over all `THRESHOLDS`. ``ap50_11point/<class>`` of each class, and ``classes_without_objects``.
    """
    values = {
        name: average_precisions(matches.take(matches.label == label), positives[label])
        for label, name in enumerate(classes)
        if positives[label] > 0
    }
    results = {}
    for kind in ("11point", "area"):
        table = 100 * np.array([value[kind] for value in values.values()]).reshape(-1, len(THRESHOLDS))
        means = table.mean(axis=0) if len(table) else np.zeros(len(THRESHOLDS))
        results |= {f"ap50_{kind}": float(means[0]), f"ap50_95_{kind}": float(means.mean())}
    results |= {f"ap50_11point/{name}": 100 * float(value["11point"][0]) for name, value in values.items()}
    return results | {"classes_without_objects": len(classes) - len(values)}
