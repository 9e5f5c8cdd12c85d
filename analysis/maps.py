"""Draw what the spatial entropy sees: each head's similarity map, its threshold and its components (Fig. 2).

python -m analysis.maps --checkpoint output/quickstart/best.pth --out maps.png
"""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, no window

import matplotlib.pyplot as plt
import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from arguments import parse_arguments
from build import build_model
from checkpoints import load_weights, read_checkpoint
from datasets import build_split
from losses import label_components, spatial_entropy
from samplers import Draw
from utils import Processes, UserError

# Okabe and Ito's colours, told apart by colour-blind readers too; the heaviest component gets the first.
COLOURS = np.array(
    [
        [230, 159, 0],
        [86, 180, 233],
        [0, 158, 115],
        [240, 228, 66],
        [0, 114, 178],
        [213, 94, 0],
        [204, 121, 167],
    ]
)


def main(argv: list[str] | None = None) -> int:
    """Draw the validation images of a checkpoint's own data set; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="one that main.py wrote")
    parser.add_argument("--out", default="maps.png", metavar="FILE", help="the picture (default: %(default)s)")
    parser.add_argument("--data-path", default=None, metavar="DIR", help="if the data set has moved")
    parser.add_argument("--images", type=int, default=6, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    try:
        checkpoint = read_checkpoint(arguments.checkpoint)
        if "args" not in checkpoint or "data_set" not in checkpoint["args"]:
            raise UserError(f"{arguments.checkpoint}: not written by main.py, so its data set is unknown")
        given = ["--data-path", arguments.data_path] if arguments.data_path else []
        args, cpu = parse_arguments(["--eval", *given], saved=checkpoint["args"]), torch.device("cpu")
        dataset, num_classes = build_split(args, "val", Processes(0, 1, cpu))
        model = build_model(args, num_classes, cpu)
        load_weights(model, checkpoint)
        draw(model, dataset, arguments.images, Path(arguments.out))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"similarity maps drawn: {arguments.out}")
    return 0


def draw(model: torch.nn.Module, dataset, count: int, path: Path) -> None:
    """One row an image: the image, then for each head its map (threshold as a line) and its components."""
    samples = choose(dataset, count)
    images = torch.stack([image for image, _, _ in samples])
    with torch.inference_mode():
        logits, similarity = model.eval()(images, return_similarity=True)
    entropy, components = spatial_entropy(similarity)
    heads = similarity.shape[1]
    figure, axes = plt.subplots(
        len(samples),
        1 + 2 * heads,
        figsize=(1.5 * (1 + 2 * heads), 1.75 * len(samples) + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for row, (_, target, _) in enumerate(samples):
        picture = _as_picture(images[row])
        guess = int(logits[row].argmax())
        axes[row, 0].imshow(picture)
        axes[row, 0].set_title(f"{dataset.classes[target]}, predicted {dataset.classes[guess]}", fontsize=8)
        for head in range(heads):
            values = similarity[row, head]
            _draw_map(axes[row, 1 + 2 * head], values)
            _draw_components(axes[row, 2 + 2 * head], values, picture)
            number = int(components[row, head])
            noun = "component" if number == 1 else "components"
            axes[row, 1 + 2 * head].set_title(f"head {head + 1}", fontsize=8)
            axes[row, 2 + 2 * head].set_title(f"{number} {noun}, H = {entropy[row, head].abs():.2f}", fontsize=8)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.suptitle(
        "Similarity of the [CLS] query with the patch keys, its mean (line), and the parts above it",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def choose(dataset, count: int) -> list:
    """Up to ``count`` samples of different classes, spread evenly over the set."""
    chosen = {}
    for index in np.linspace(0, len(dataset) - 1, num=min(10 * count, len(dataset)), dtype=int).tolist():
        sample = dataset[Draw(index, 0, index)]
        chosen.setdefault(sample[1], sample)
        if len(chosen) == count:
            break
    return list(chosen.values())


def _as_picture(image: torch.Tensor) -> np.ndarray:
    """Undo the normalisation: ``(3, h, w)`` -> ``(h, w, 3)`` in 0..1."""
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    return (image.permute(1, 2, 0) * std + mean).clamp(0, 1).numpy()


def _draw_map(axis, values: torch.Tensor) -> None:
    axis.imshow(values.numpy(), cmap="viridis")
    mask = np.kron((values > values.mean()).numpy(), np.ones((16, 16)))  # the line follows the patches
    h, w = values.shape
    axis.contour(
        np.linspace(-0.5, w - 0.5, mask.shape[1]),
        np.linspace(-0.5, h - 0.5, mask.shape[0]),
        mask,
        levels=[0.5],
        colors="white",
        linewidths=0.8,
    )


def _draw_components(axis, values: torch.Tensor, picture: np.ndarray) -> None:
    labels = label_components(values > values.mean())
    excess = (values - values.mean()).clamp(min=0)
    mass = {int(label): float(excess[labels == label].sum()) for label in labels.unique() if label > 0}
    painted = np.repeat(picture.mean(axis=2, keepdims=True), 3, axis=2) * 0.6
    side = (picture.shape[0] // values.shape[0], picture.shape[1] // values.shape[1])
    for rank, label in enumerate(sorted(mass, key=mass.get, reverse=True)):
        where = np.kron((labels == label).numpy(), np.ones(side, dtype=bool))
        colour = COLOURS[rank % len(COLOURS)] / 255
        painted[where] = 0.35 * painted[where] + 0.65 * colour
    axis.imshow(painted)


if __name__ == "__main__":
    sys.exit(main())
