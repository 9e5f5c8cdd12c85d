"""Pages of attention maps: one row per image, with the image and every head of every model (Fig. 1, 2, 4, 8).

Three kinds of page, drawn from plain tensors without pyplot's global state:

- `attention_page`: each head's attention, and the outline of the patches that hold 60 % of its mass (Fig. 4, 8);
- `mask_page`: the image inside that outline, dimmed outside (Fig. 1);
- `component_page`: the similarity map, its mean as a line, and the components above it in colour (Fig. 2).

Colours are scaled from each map's minimum (dark) to its maximum (bright). Lengths are in inches.
"""

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from analysis.attention import MASS, attention_of, keep_mass, measure_maps
from analysis.images import as_picture
from losses import label_components, max_components, thresholded

# The palette of Okabe and Ito, distinguishable for colour-blind readers; white for all further components.
COLOURS = np.array(
    [
        [230, 159, 0],
        [86, 180, 233],
        [0, 158, 115],
        [240, 228, 66],
        [0, 114, 178],
        [213, 94, 0],
        [204, 121, 167],
        [255, 255, 255],
    ]
)
COLOUR_MAP = "viridis"  # perceptually uniform

CELL, GAP, MODEL_GAP, LINE, MARGIN = 1.4, 0.08, 0.25, 0.15, 0.12
CHARACTERS = 24  # number of caption characters that fit into a cell's width
PANEL_LINE, PANEL_SIZE, PANEL_CHARACTERS = 0.3, 15, 11  # the same for `attention_panel`: large letters, in points


@dataclass(frozen=True)
class ModelMaps:
    """One model's outputs for the images.

    Attributes:
        name: of the model.
        similarity: Eq. 4, float32 ``(images, heads, h, w)`` on the CPU.
        predictions: what it predicts for each image, in words; None without a classifier whose classes have names.
    """

    name: str
    similarity: Tensor
    predictions: list[str] | None = None

    def select(self, rows: slice) -> "ModelMaps":
        """The maps of some of the images."""
        return ModelMaps(self.name, self.similarity[rows], self.predictions and self.predictions[rows])


@dataclass(frozen=True)
class Box:
    """A rectangle on a page, the origin at its top left corner."""

    left: float
    top: float
    width: float
    height: float

    def right_of(self) -> "Box":
        """The box of the next cell in this row."""
        return Box(self.left + CELL + GAP, self.top, self.width, self.height)


# Draws one head's cells of a row: (axes, box of its first cell, picture (height, width, 3), S (h, w)).
DrawHead = Callable[[Axes, Box, np.ndarray, Tensor], None]


# ------------------------------------------------------------------------------------------------- the pages


def attention_panel(image: Tensor, similarity: Tensor, title: str = "") -> Figure:
    """One image and each head's attention with its spatial entropy, for TensorBoard, whose thumbnails have 300 px.

    Args:
        image: normalised, ``(3, height, width)``, on any device.
        similarity: S of Eq. 4, ``(H, h, w)``, on any device.
        title: below the image; a long one is shortened.
    """
    # 1. a grid, about as wide as high
    similarity = similarity.detach().float().cpu()
    count = 1 + len(similarity)
    columns = math.ceil(math.sqrt(count))
    step = CELL + GAP, CELL + GAP + PANEL_LINE
    figure, axes = _blank(columns * step[0] + GAP, math.ceil(count / columns) * step[1] + GAP)
    boxes = [Box(GAP + at % columns * step[0], GAP + at // columns * step[1], CELL, CELL) for at in range(count)]
    # 2. the image, and the heads after it
    entropy = measure_maps(similarity[None])["entropy"][0].abs().tolist()
    pictures = [as_picture(image), *attention_of(similarity[None])[0].numpy()]
    captions = [shorten(title, PANEL_CHARACTERS), *(f"H {value:.2f}" for value in entropy)]
    for box, picture, caption in zip(boxes, pictures, captions, strict=True):
        _paint(axes, box, picture)
        _write(axes, box.left + CELL / 2, box.top + CELL + PANEL_LINE / 2, caption, size=PANEL_SIZE)
    return figure


def attention_page(
    pictures: Sequence[np.ndarray], titles: Sequence[str], models: Sequence[ModelMaps], mass: float = MASS
) -> Figure:
    """Each head's attention of [CLS] to the patches, its top ``mass`` outlined; below it entropy and components.

    Args:
        pictures: RGB, ``(height, width, 3)`` in 0..1, of any sizes; the maps are drawn in their aspect ratio.
        titles: one or two lines per picture.
        models: drawn side by side; their grids and numbers of heads may differ.
    """

    def draw(axes: Axes, box: Box, picture: np.ndarray, similarity: Tensor) -> None:
        attention = attention_of(similarity[None, None])[0, 0]
        _paint(axes, box, attention.numpy())
        _outline(axes, box, keep_mass(attention, mass).numpy())
        _caption(axes, box, describe(similarity))

    heading = (
        f"Attention of [CLS] to the patches. Line: {mass:.0%} of its mass. H, spatial entropy in nats, and components: "
        "of the similarity map above its mean, not of the line."
    )
    return _page(pictures, titles, models, heading, draw)


def mask_page(
    pictures: Sequence[np.ndarray], titles: Sequence[str], models: Sequence[ModelMaps], mass: float = MASS
) -> Figure:
    """The image inside each head's top ``mass`` (Fig. 1), dimmed outside; arguments as for `attention_page`."""

    def draw(axes: Axes, box: Box, picture: np.ndarray, similarity: Tensor) -> None:
        mask = keep_mass(attention_of(similarity[None, None])[0, 0], mass).numpy()
        _paint(axes, box, np.where(enlarge(mask, picture)[..., None], picture, 0.35 * _grey(picture)))
        _outline(axes, box, mask)
        _caption(axes, box, f"{mask.sum()} of {mask.size} patches")

    heading = f"The patches that hold {mass:.0%} of the attention of [CLS]."
    return _page(pictures, titles, models, heading, draw)


def component_page(
    pictures: Sequence[np.ndarray], titles: Sequence[str], models: Sequence[ModelMaps], mass: float = MASS
) -> Figure:
    """The similarity map, its mean as a line, and the components above it (Fig. 2); arguments as for `attention_page`.

    ``mass`` has no effect. `COLOURS` are assigned by the components' mass, largest first.
    """

    def draw(axes: Axes, box: Box, picture: np.ndarray, similarity: Tensor) -> None:
        ranks = rank_components(similarity).numpy()
        _paint(axes, box, similarity.numpy())
        _outline(axes, box, ranks > 0)
        _paint(axes, box.right_of(), paint_components(ranks, picture))
        _caption(axes, box.right_of(), describe(similarity))

    heading = "Similarity of the [CLS] query with the patch keys, its mean (line), and the components above it."
    return _page(pictures, titles, models, heading, draw, cells=2)


# --------------------------------------------------------------------------------------- their contents


def describe(similarity: Tensor) -> str:
    """A caption with spatial entropy (nats) and number of components of one map ``(h, w)``."""
    measured = measure_maps(similarity[None, None])
    entropy, components = float(measured["entropy"]), int(measured["components"])
    return f"H {abs(entropy):.2f} · {components} component{'' if components == 1 else 's'}"


def rank_components(similarity: Tensor) -> Tensor:
    """Rank the components above each map's mean (Eq. 5-6) by mass: int64 ``(..., h, w)`` for S ``(..., h, w)``.

    1 marks the component with the largest mass above the mean (Eq. 8), 2 the next; 0 marks patches below the mean. A
    map that is constant up to rounding has no component, as in `losses.spatial_entropy`.
    """
    excess = thresholded(similarity)
    labels = label_components(excess > 0).flatten(-2)
    mass = excess.new_zeros(*labels.shape[:-1], 1 + max_components(*similarity.shape[-2:]))
    mass = mass.scatter_add(-1, labels, excess.flatten(-2))
    mass[..., 0] = float("inf")  # the background stays 0
    rank_of_label = mass.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return rank_of_label.gather(-1, labels).view_as(similarity)


def paint_components(ranks: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """A grey picture ``(height, width, 3)`` with the components ``(h, w)`` of `rank_components` in `COLOURS`."""
    ranks = enlarge(ranks, picture)[..., None]
    colours = COLOURS[np.minimum(ranks[..., 0], len(COLOURS)) - 1] / 255
    grey = 0.6 * _grey(picture)
    return np.where(ranks > 0, 0.35 * grey + 0.65 * colours, grey)


def enlarge(values: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """Upsample a map ``(h, w)`` to a picture's ``(height, width)``: each pixel gets its patch's value."""
    (h, w), (height, width) = values.shape, picture.shape[:2]
    return values[np.ix_(np.arange(height) * h // height, np.arange(width) * w // width)]


def shorten(text: str, length: int) -> str:
    """``text`` shortened to at most ``length`` characters by cutting out its middle."""
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[: length - 1 - half]}…{text[-half:]}"


def _grey(picture: np.ndarray) -> np.ndarray:
    return picture.mean(axis=2, keepdims=True).repeat(3, axis=2)


# ------------------------------------------------------------------------------------------------ the layout


def _page(
    pictures: Sequence[np.ndarray],
    titles: Sequence[str],
    models: Sequence[ModelMaps],
    heading: str,
    draw: DrawHead,
    cells: int = 1,
) -> Figure:
    """Lay out images, titles and headings, and call ``draw`` for each head, which takes ``cells`` cells of a row."""
    # 1. page size and heading
    lefts, width = _columns(models, cells)
    lines = textwrap.wrap(heading, int(CHARACTERS / CELL * (width - 2 * MARGIN) * 0.95))
    heights = [CELL * min(1, picture.shape[0] / picture.shape[1]) for picture in pictures]
    top = MARGIN + 1.3 * LINE * len(lines) + 3 * LINE
    figure, axes = _blank(width, top + sum(heights) + (2 * LINE + GAP) * len(pictures) + MARGIN)
    for number, line in enumerate(lines):
        _write(axes, MARGIN, MARGIN + 1.3 * LINE * (number + 0.5), line, size=8.5, align="left")
    _name_columns(axes, models, lefts, cells, top)
    # 2. one row per image
    for index, (picture, title, height) in enumerate(zip(pictures, titles, heights, strict=True)):
        side = min(CELL, CELL * picture.shape[1] / picture.shape[0])
        inset = (CELL - side) / 2
        box = Box(MARGIN + inset, top, side, height)
        _paint(axes, box, picture)
        _caption(axes, box, title)
        for model, columns in zip(models, lefts, strict=True):
            boxes = [Box(left + inset, top, side, height) for left in columns]
            for head_box, similarity in zip(boxes, model.similarity[index], strict=True):
                draw(axes, head_box, picture, similarity)
            if model.predictions:  # in the second line, below all heads: their captions have one
                words = shorten(f"predicted {model.predictions[index]}", CHARACTERS * cells * len(boxes))
                _write(axes, boxes[0].left, top + height + 1.6 * LINE, words, align="left")
        top += height + 2 * LINE + GAP
    return figure


def _columns(models: Sequence[ModelMaps], cells: int) -> tuple[list[list[float]], float]:
    """The left edge of each model's heads, and the width of the page."""
    lefts, left = [], MARGIN + CELL
    for model in models:
        left += MODEL_GAP
        heads = model.similarity.shape[1]
        lefts.append([left + (CELL + GAP) * cells * head for head in range(heads)])
        left += (CELL + GAP) * cells * heads - GAP
    return lefts, left + MARGIN


def _blank(width: float, height: float) -> tuple[Figure, Axes]:
    """A page of that size, and axes in inches from its top left corner."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    axes.set_axis_off()
    return figure, axes


def _name_columns(axes: Axes, models: Sequence[ModelMaps], lefts: list[list[float]], cells: int, top: float) -> None:
    """Write each model's name, if any, with a line above its heads, and the number above each head."""
    span = CELL * cells + GAP * (cells - 1)
    for model, columns in zip(models, lefts, strict=True):
        if model.name:
            right = columns[-1] + span
            room = int(CHARACTERS * 0.8 * (right - columns[0]) / CELL)
            middle = (columns[0] + right) / 2
            _write(axes, middle, top - 2.3 * LINE, shorten(model.name, room), size=8.5, weight="bold")
            axes.plot([columns[0], right], [top - 1.4 * LINE] * 2, color="0.5", linewidth=0.6)
        for head, left in enumerate(columns, start=1):
            _write(axes, left + span / 2, top - 0.7 * LINE, f"head {head}")


def _paint(axes: Axes, box: Box, pixels: np.ndarray) -> None:
    """Draw an RGB picture, or a map in the colours of `COLOUR_MAP`, into a box."""
    extent = (box.left, box.left + box.width, box.top + box.height, box.top)
    axes.imshow(pixels, extent=extent, aspect="auto", cmap=colormaps[COLOUR_MAP], interpolation="nearest")


def _outline(axes: Axes, box: Box, mask: np.ndarray) -> None:
    """Outline the patches of a mask ``(h, w)`` over a box, white on black to be visible on every colour."""
    padded = np.pad(mask, 1)
    rows = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])  # (y, x): from (x, y) to (x + 1, y)
    columns = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])  # (y, x): from (x, y) to (x, y + 1)
    starts = np.concatenate([rows, columns])[:, ::-1]
    steps = np.repeat([[1, 0], [0, 1]], [len(rows), len(columns)], axis=0)
    scale = np.array([box.width / mask.shape[1], box.height / mask.shape[0]])
    segments = np.stack([starts, starts + steps], axis=1) * scale + [box.left, box.top]
    for colour, width in (("black", 1.8), ("white", 0.8)):
        axes.add_collection(LineCollection(segments, colors=colour, linewidths=width, capstyle="projecting"))


def _caption(axes: Axes, box: Box, text: str) -> None:
    """Write up to two lines below a box, each shortened to a cell's width."""
    for number, line in enumerate(text.splitlines()[:2]):
        if line:
            bottom = box.top + box.height + (number + 0.6) * LINE
            _write(axes, box.left + box.width / 2, bottom, shorten(line, CHARACTERS))


def _write(axes: Axes, x: float, y: float, text: str, size: float = 6.8, align: str = "center", **style) -> None:
    axes.text(x, y, text, fontsize=size, ha=align, va="center", parse_math=False, **style)
