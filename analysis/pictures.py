"""Photographs with what a model predicts for them, drawn with Pillow: boxes, classes of pixels, names.

Letters and lines grow with the picture, and every label lies inside it. A class has the same colour in all pictures.
A ``found`` is what `tasks.Task.predict` returns, or `tasks.Task.truth`, which has no scores.
"""

import colorsys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from analysis.panels import shorten
from augmentation import as_pillow
from tasks.segment import voc_palette

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]

MIN_SCORE = 0.5
"""The score of a box from which on it is drawn by default."""
PANEL = 320
"""The longer side of each picture in TensorBoard, px."""
SIDES = (480, 1600)
"""The smallest and the largest longer side of a picture, px; others are resized."""
OPACITY = 0.5  # of the colours of pixels
GOLDEN = (5**0.5 - 1) / 2
WHITE, BLACK, GREY = (255, 255, 255), (0, 0, 0), (120, 120, 120)


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with Matplotlib, in px."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)


def font_for(picture: Image.Image) -> ImageFont.FreeTypeFont:
    """The font of a picture's labels."""
    return font(max(12, round(max(picture.size) / 45)))


def fit_text(text: str, face: ImageFont.FreeTypeFont, width: float) -> str:
    """The text in one line; its middle is cut out as far as it is longer than ``width`` px."""
    line = " ".join(text.split())
    shown = [line, *(shorten(line, length) for length in range(len(line) - 1, 1, -1))]
    return next((text for text in shown if face.getlength(text) <= width), "…")


def colour_of(label: int) -> Colour:
    """The colour of a class of objects; classes that follow each other have very different hues."""
    red, green, blue = colorsys.hsv_to_rgb(label * GOLDEN % 1, 0.65, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def ink_on(colour: Colour) -> Colour:
    """Black or white, whichever is easier to read on a colour."""
    red, green, blue = colour
    return BLACK if 0.3 * red + 0.59 * green + 0.11 * blue > 110 else WHITE


def resized(image: Image.Image, sides: tuple[int, int] = SIDES) -> Image.Image:
    """A copy of an image, resized so that its longer side is within ``sides``."""
    longer = max(image.size)
    factor = min(max(longer, sides[0]), sides[1]) / longer
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image.copy() if factor == 1 else image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3)


# --------------------------------------------------------------------------------------------------- boxes


def draw_boxes(
    picture: Image.Image, found: Mapping[str, np.ndarray], size: Sequence[int], classes: Sequence[str]
) -> Image.Image:
    """The picture with boxes, names and, if there are any, masks and scores; the best box lies on top.

    Args:
        picture: RGB.
        found: ``boxes (N, 4)``: x1, y1, x2, y2; ``labels (N,)``; maybe ``scores (N,)``, ``masks``, bool ``(N, h, w)``.
        size: height and width of the image in whose px the boxes are.
        classes: names.
    """
    # 1. from the worst to the best: masks
    picture, face = picture.copy(), font_for(picture)
    scores = found.get("scores")
    order = np.argsort(scores, kind="stable") if scores is not None else np.arange(len(found["boxes"]))
    for place in order if "masks" in found else ():
        mask = Image.fromarray(found["masks"][place]).resize(picture.size, Image.Resampling.NEAREST)
        colour = Image.new("RGB", picture.size, colour_of(int(found["labels"][place])))
        picture.paste(colour, mask=Image.fromarray(np.asarray(mask) * np.uint8(255 * OPACITY)))
    draw, width = ImageDraw.Draw(picture), max(2, round(max(picture.size) / 300))
    boxes = found["boxes"] * np.tile([picture.width / size[1], picture.height / size[0]], 2)
    # 2. lines, with a dark edge on both sides
    for place in order:
        x1, y1, x2, y2 = boxes[place].round().tolist()
        x2, y2 = max(x2, x1), max(y2, y1)
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=BLACK, width=width + 2)
        draw.rectangle((x1, y1, x2, y2), outline=colour_of(int(found["labels"][place])), width=width)
    # 3. labels; that of the best box chooses its place first
    taken: list[Box] = []
    for place in order[::-1]:
        label = int(found["labels"][place])
        text = classes[label] if scores is None else f"{classes[label]} {scores[place]:.2f}"
        text = fit_text(text, face, picture.width - 8)
        area = _place_label((face.getlength(text) + 8, face.size * 1.3), boxes[place].tolist(), picture.size, taken)
        taken.append(area)
        draw.rectangle(area, fill=colour_of(label))
        middle = ((area[0] + area[2]) / 2, (area[1] + area[3]) / 2)
        draw.text(middle, text, font=face, fill=ink_on(colour_of(label)), anchor="mm")
    return picture


def above(found: Mapping[str, np.ndarray], least: float) -> dict[str, np.ndarray]:
    """The boxes with a score of at least ``least`` and what belongs to them; all of them without scores."""
    kept = found["scores"] >= least if "scores" in found else slice(None)
    return {part: found[part][kept] for part in ("boxes", "labels", "scores", "masks") if part in found}


def _place_label(label: Sequence[float], box: Box, picture: Sequence[int], taken: Iterable[Box]) -> Box:
    """Where to write a label of (width, height): at a corner of its box, inside the picture, off the other labels."""
    (width, height), (x1, y1, x2, y2) = label, box
    places = []
    for top, left in product((y1 - height, y1, y2 - height, y2), (x1, x2 - width)):
        left = min(max(left, 0), max(picture[0] - 1 - width, 0))
        top = min(max(top, 0), max(picture[1] - 1 - height, 0))
        places.append((left, top, left + width, top + height))

    def covered(place: Box) -> float:
        sides = [(min(place[2], t[2]) - max(place[0], t[0]), min(place[3], t[3]) - max(place[1], t[1])) for t in taken]
        return sum(max(w, 0) * max(h, 0) for w, h in sides)

    return min(places, key=covered)  # the first of equal ones


# -------------------------------------------------------------------------------------------------- pixels


def draw_pixels(picture: Image.Image, labels: np.ndarray, classes: Sequence[str]) -> Image.Image:
    """The picture in the colours of its pixels' classes, each region with a white edge; below it a legend.

    Args:
        picture: RGB.
        labels: ``(h, w)`` of any size; numbers that are no class, such as void, leave the picture as it is.
        classes: names.
    """
    width, height = picture.size
    small = np.asarray(Image.fromarray(labels.astype(np.int32)).resize((width, height), Image.Resampling.NEAREST))
    known, colours = (small < len(classes))[..., None], voc_palette()[np.minimum(small, 255)]
    pixels = np.where(known, (1 - OPACITY) * np.asarray(picture) + OPACITY * colours, np.asarray(picture))
    pixels[_edges(small, max(1, round(max(picture.size) / 500)))] = 255
    painted = Image.fromarray(pixels.round().astype(np.uint8))
    return _above(painted, _legend(painted, shares_of(labels, len(classes)), classes))


def shares_of(labels: np.ndarray, num_classes: int) -> dict[int, float]:
    """The share of all pixels by class, of the classes that are found, the largest first."""
    counts = np.bincount(labels.ravel(), minlength=num_classes)[:num_classes]
    order = np.argsort(-counts, kind="stable").tolist()
    return {label: counts[label] / labels.size for label in order if counts[label]}


def _edges(labels: np.ndarray, width: int) -> np.ndarray:
    """Bool ``(h, w)``: the pixels up to ``width`` px above or left of one of another class."""
    edges = np.zeros(labels.shape, bool)
    for step in range(1, width + 1):
        edges[:-step] |= labels[:-step] != labels[step:]
        edges[:, :-step] |= labels[:, :-step] != labels[:, step:]
    return edges


def _legend(picture: Image.Image, shares: Mapping[int, float], classes: Sequence[str]) -> Image.Image:
    """Lines as wide as the picture with the colour, name and share of each class."""
    # 1. where each entry stands: (line, left, text, colour)
    face, line, left, entries = font_for(picture), 0, 0.0, []
    side = face.size
    for label, share in shares.items():
        percent = f"{share:.1%}" if share >= 0.0005 else "< 0.1%"
        text = fit_text(f"{classes[label]} {percent}", face, picture.width - 3 * side)
        width = 2.5 * side + face.getlength(text)
        if left > 0 and left + width > picture.width:
            line, left = line + 1, 0.0
        entries.append((line, left, text, label))
        left += width
    # 2. draw them
    pitch = 1.7 * side
    legend = Image.new("RGB", (picture.width, round(pitch * (line + 1) + 0.5 * side)), WHITE)
    draw = ImageDraw.Draw(legend)
    for line, left, text, label in entries:
        x, middle = left + side / 2, pitch * (line + 0.5) + side / 4
        colour = tuple(voc_palette()[label].tolist())
        draw.rectangle((x, middle - side / 2, x + side, middle + side / 2), fill=colour, outline=GREY)
        draw.text((x + 1.4 * side, middle), text, font=face, fill=BLACK, anchor="lm")
    return legend


# --------------------------------------------------------------------------------------------------- names


def draw_names(
    photograph: Image.Image, title: str, names: Sequence[str], probabilities: Sequence[float]
) -> Image.Image:
    """A cell of a sheet: a title, the photograph, and a line with a bar for each name.

    Args:
        photograph: RGB.
        title: above it.
        names, probabilities: the most probable classes, the best first.
    """
    # 1. the photograph in a square
    side, line, face = 260, 22, font(13)
    cell = Image.new("RGB", (side, line + side * 3 // 4 + 6 + line * len(names)), WHITE)
    draw, picture = ImageDraw.Draw(cell), photograph.copy()
    draw.text((side / 2, line / 2), fit_text(title, face, side), font=face, fill=BLACK, anchor="mm")
    picture = resized(picture, (side, side))
    picture.thumbnail((side, side * 3 // 4))
    left, top = (side - picture.width) // 2, line + (side * 3 // 4 - picture.height) // 2
    cell.paste(picture, (left, top))
    draw.rectangle((left, top, left + picture.width - 1, top + picture.height - 1), outline=(200, 200, 200))
    # 2. the names
    for rank, (name, probability) in enumerate(zip(names, probabilities, strict=True)):
        top = line + side * 3 // 4 + 6 + line * rank
        colour = (140, 190, 235) if rank == 0 else (215, 225, 235)
        draw.rectangle((0, top, max(1, round((side - 1) * probability)), top + line - 4), fill=colour)
        percent = f"{probability:.1%}"
        draw.text((side - 3, top + line / 2 - 2), percent, font=face, fill=BLACK, anchor="rm")
        room = side - 12 - face.getlength(percent)
        draw.text((4, top + line / 2 - 2), fit_text(name, face, room), font=face, fill=BLACK, anchor="lm")
    return cell


def draw_sheet(cells: Sequence[Image.Image], columns: int = 4, gap: int = 18) -> Image.Image:
    """Cells of one size in rows, from left to right."""
    width, height = cells[0].size
    columns, rows = min(columns, len(cells)), -(-len(cells) // columns)
    sheet = Image.new("RGB", (gap + columns * (width + gap), gap + rows * (height + gap)), WHITE)
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        sheet.paste(cell, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet


# ------------------------------------------------------------------------------------- truth and prediction


def draw_panel(
    item: Mapping[str, Any], founds: Mapping[str, Mapping[str, np.ndarray]], classes: Sequence[str]
) -> Image.Image:
    """A small picture for each found of one image of an evaluation, side by side.

    Args:
        item: of an evaluation data set: ``images``, uint8 ``(1, 3, h, w)``; ``inside`` and ``size``, the height and
            width of the image without padding, and before it was resized.
        founds: by their headings, of boxes with a score of at least `MIN_SCORE`, or of the classes of pixels.
        classes: names.
    """
    height, width = item["inside"]
    picture = resized(as_pillow(item["images"][0, :, :height, :width]), (PANEL, PANEL))
    pictures = {}
    for heading, found in founds.items():
        if "boxes" in found:
            pictures[heading] = draw_boxes(picture, above(found, MIN_SCORE), item["size"], classes)
        else:
            pictures[heading] = draw_pixels(picture, found["classes"], classes)
    return draw_comparison(pictures)


def draw_comparison(pictures: Mapping[str, Image.Image]) -> Image.Image:
    """Pictures of one width side by side, each below its heading."""
    parts = []
    for heading, picture in pictures.items():
        face = font_for(picture)
        strip = Image.new("RGB", (picture.width, round(1.6 * face.size)), WHITE)
        text = fit_text(heading, face, picture.width)
        ImageDraw.Draw(strip).text((picture.width / 2, strip.height / 2), text, font=face, fill=BLACK, anchor="mm")
        parts.append(_above(strip, picture))
    gap = 8
    size = (sum(part.width + gap for part in parts) - gap, max(part.height for part in parts))
    whole, left = Image.new("RGB", size, WHITE), 0
    for part in parts:
        whole.paste(part, (left, 0))
        left += part.width + gap
    return whole


def _above(upper: Image.Image, lower: Image.Image) -> Image.Image:
    """One picture above another of the same width."""
    whole = Image.new("RGB", (upper.width, upper.height + lower.height), WHITE)
    whole.paste(upper, (0, 0))
    whole.paste(lower, (0, upper.height))
    return whole
