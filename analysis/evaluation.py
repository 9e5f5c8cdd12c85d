"""Files about the evaluation of a classifier: results, classes, confusions, calibration and the worst images.

`main.py --eval` writes them (docs/train.md). A page shows what the tables say: ``confusion.png``, ``worst.png``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import confusion_matrix

from analysis.panels import shorten
from analysis.pictures import draw_names, draw_sheet
from augmentation import as_pillow
from datasets import AugmentedDataset
from tasks.scores import Scores
from utils import prepare_output_dir, readable, write_atomically, write_csv, write_json

BINS = 15  # of the calibration error
WORST, SHOWN = 50, 16  # images with the largest loss, in the table and on the page
NAMED, NUMBERED = 50, 20  # classes up to which the picture of the confusions has names, and numbers of images
LETTERS = 24  # of a class's name beside that picture


def write_evaluation(folder: Path, summary: Mapping[str, Any], scores: Scores, dataset: AugmentedDataset) -> None:
    """Write all files about an evaluation; files of an earlier one are replaced.

    Args:
        folder: made if it is missing.
        summary: the content of ``eval.json``.
        scores: of at least one image.
        dataset: the evaluated images.

    Raises:
        UserError, RunError: the folder or a file cannot be written.
    """
    prepare_output_dir(folder)
    classes = dataset.classes
    confusion = confusion_matrix(scores.true, scores.predicted, labels=range(len(classes)))
    worst = worst_rows(scores, dataset)
    write_json(folder / "eval.json", summary)
    write_csv(folder / "classes.csv", class_rows(confusion, classes))
    write_csv(folder / "confusion.csv", confusion_rows(confusion, classes))
    write_csv(folder / "worst.csv", worst)
    figure, sheet = draw_confusion(confusion, classes), draw_worst(worst[:SHOWN], dataset)
    write_atomically(folder / "confusion.png", lambda file: figure.savefig(file, format="png", dpi=150))
    write_atomically(folder / "worst.png", lambda file: sheet.save(file, format="PNG"))


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """The expected calibration error in percent (Guo et al. 2017, Eq. 3), with bins ``(i/bins, (i+1)/bins]``.

    Args:
        confidence: ``(N,)``, probability of the predicted class.
        right: bool ``(N,)``, whether that is the true one.
    """
    place = np.digitize(confidence, np.linspace(0, 1, bins + 1), right=True)
    gaps = np.bincount(place, weights=right.astype(float) - confidence)  # in each bin, images x (accuracy - confidence)
    return float(100 * np.abs(gaps).sum() / len(confidence))


# ------------------------------------------------------------------------------------------------------ tables


def class_rows(confusion: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """For each class its images, its accuracy in percent, and the class that it is most often taken for.

    Args:
        confusion: numbers of images ``(K, K)``, rows are the true classes.
        classes: names.
    """
    rows = []
    for label, name in enumerate(classes):
        images, right = int(confusion[label].sum()), int(confusion[label, label])
        errors = confusion[label].copy()
        errors[label] = 0
        other, times = int(errors.argmax()), int(errors.max())
        rows.append(
            {
                "class": name,
                "images": images,
                "acc1": 100 * right / images if images else None,
                "taken_for": classes[other] if times else None,
                "times": times,
            }
        )
    return rows


def confusion_rows(confusion: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """The confusion matrix as a table: a row for each true class, a column for each predicted one."""
    return [
        {r"true \ predicted": name} | dict(zip(classes, row, strict=True))
        for name, row in zip(classes, confusion.tolist(), strict=True)
    ]


def worst_rows(scores: Scores, dataset: AugmentedDataset) -> list[dict[str, Any]]:
    """The images with the largest loss, the worst first; of equal ones that with the smaller index."""
    rows, classes = [], dataset.classes
    for place in np.argsort(-scores.loss, kind="stable")[:WORST].tolist():
        index, loss = int(scores.index[place]), float(scores.loss[place])
        rows.append(
            {
                "image": str(dataset.base.names[index]),
                "index": index,
                "true": classes[scores.true[place]],
                "predicted": classes[scores.predicted[place]],
                "probability_true": float(np.exp(-loss)),
                "probability_predicted": float(scores.confidence[place]),
                "loss": loss,
            }
        )
    return rows


# ---------------------------------------------------------------------------------------------------- pictures


def draw_confusion(confusion: np.ndarray, classes: Sequence[str]) -> Figure:
    """The share of each true class's images by predicted class; a class without images is a white row.

    Up to `NAMED` classes have their names, up to `NUMBERED` also the numbers of images.
    """
    # 1. the shares; small ones are drawn darker than in proportion
    count = len(classes)
    shares = 100 * confusion / confusion.sum(axis=1, keepdims=True).clip(min=1)
    side = min(max(4.0, 0.3 * count), 12.0) if count <= NAMED else 9.0
    figure = Figure(figsize=(side + 2.5, side + 1.5), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    # 2. names, or the numbers of the classes
    axes.set(xlabel="predicted class", ylabel="true class")
    if count <= NAMED:
        names = [shorten(name, LETTERS).replace("$", r"\$") for name in classes]
        axes.set_xticks(range(count), names, rotation=90 if max(map(len, names)) > 2 else 0)
        axes.set_yticks(range(count), names)
    else:
        axes.set(xlabel="predicted class, numbered from 0 as in classes.csv", ylabel="true class")
    # 3. numbers of images
    for true, predicted in np.argwhere(confusion) if count <= NUMBERED else ():
        ink = "white" if shares[true, predicted] > 40 else "black"
        axes.text(predicted, true, confusion[true, predicted], ha="center", va="center", color=ink, fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[0, 1, 5, 10, 25, 50, 75, 100])
    bar.set_label("% of the true class's images")
    return figure


def draw_worst(rows: Sequence[Mapping[str, Any]], dataset: AugmentedDataset) -> Image.Image:
    """A page of photographs with the largest loss, each with its predicted and its true class."""
    cells = []
    for row in rows:
        photograph = as_pillow(dataset.base[row["index"]][0])
        names = [f"predicted {row['predicted']}", f"true {row['true']}"]
        probabilities = [row["probability_predicted"], row["probability_true"]]
        cells.append(draw_names(photograph, readable(row["image"]), names, probabilities))
    return draw_sheet(cells)
