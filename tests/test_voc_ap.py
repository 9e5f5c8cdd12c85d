"""VOC's average precision against detectron2's numbers."""

import numpy as np
import pytest

from tasks.voc_ap import THRESHOLDS, Matches, average_precisions, box_iou, match, voc_results


@pytest.fixture(scope="module")
def sets(golden):
    """The golden sets: one of all kinds of detections, and five special ones."""
    content = golden("voc_ap.pt")
    return {"plain": content} | {part["name"]: part for part in content["more"]}


def matches_of(content):
    """The matches of a golden set, and its number of objects of each class that are not difficult."""
    images = [
        [{name: value.numpy() for name, value in part.items()} for part in pair]
        for pair in zip(content["det"], content["gt"], strict=True)
    ]
    labels = np.concatenate([objects["labels"][~objects["difficult"]] for _, objects in images])
    parts = [match(number, *pair) for number, pair in enumerate(images)]
    return parts, np.bincount(labels, minlength=len(content["classes"]))


@pytest.mark.parametrize(
    "name",
    ["plain", "exact_half", "class_without_gt", "class_without_detections", "class_only_difficult", "many_duplicates"],
)
def test_it_is_that_of_detectron2(sets, name):
    content = sets[name]
    parts, positives = matches_of(content)
    matches = Matches.join(parts)
    for label, count in enumerate(positives):
        if not count:
            continue
        values = average_precisions(matches.take(matches.label == label), count)
        for kind in ("11point", "area"):
            official = {key: content["result"][f"{key}_{kind}"]["ap"][label] for key in ("iou0.5", "iou0.75")}
            official["iou0.50:0.95"] = content["result"][f"iou0.50:0.95_{kind}"]["ap"][label]
            own = values[kind][0], values[kind][THRESHOLDS.index(0.75)], values[kind].mean()
            assert own == pytest.approx(tuple(official.values()), rel=0, abs=1e-9)


def test_the_means_are_named_by_their_kind(sets):
    content = sets["plain"]
    parts, positives = matches_of(content)
    results = voc_results(Matches.join(parts), positives, content["classes"])
    for kind in ("11point", "area"):
        official = content["result"]
        assert results[f"ap50_{kind}"] == pytest.approx(100 * official[f"iou0.5_{kind}"]["map"], abs=1e-9)
        assert results[f"ap50_95_{kind}"] == pytest.approx(100 * official[f"iou0.50:0.95_{kind}"]["map"], abs=1e-9)
    assert results[f"ap50_11point/{content['classes'][1]}"] == pytest.approx(
        100 * official["iou0.5_11point"]["ap"][1], abs=1e-9
    )
    assert results["classes_without_objects"] == 0


@pytest.mark.parametrize("name", ["class_without_gt", "class_only_difficult"])
def test_a_class_without_objects_is_left_out_of_the_means(sets, name):
    content = sets[name]
    parts, positives = matches_of(content)
    results = voc_results(Matches.join(parts), positives, content["classes"])
    (missing,) = np.flatnonzero(positives == 0)
    official = np.delete(content["result"]["iou0.5_11point"]["ap"], missing)
    assert results["ap50_11point"] == pytest.approx(100 * official.mean(), abs=1e-9)
    assert results["classes_without_objects"] == 1
    assert f"ap50_11point/{content['classes'][missing]}" not in results


def test_without_any_detection_it_is_zero():
    nothing = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, int), "scores": np.zeros(0)}
    objects = {"boxes": np.ones((1, 4)), "labels": np.zeros(1, int), "difficult": np.zeros(1, bool)}
    results = voc_results(match(0, nothing, objects), [1], ["cat"])
    assert results["ap50_11point"] == results["ap50_area"] == results["ap50_95_area"] == 0


def test_boxes_are_inclusive():
    assert box_iou(np.array([[1, 1, 10, 10]]), np.array([[1, 1, 10, 5], [11, 1, 20, 10]])).tolist() == [[0.5, 0]]
