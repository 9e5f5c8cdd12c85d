"""A self-contained HTML page to browse attention maps: images in rows, models in columns.

The page's markup, style and script are in ``gallery.html``; this module computes its data. Each map is stored as three
bytes per patch, at the resolution of the patch grid:

- ``level``: the attention, scaled from the map's minimum (0) to its maximum (255), as the colour map needs it;
- ``needed``: the smallest whole percentage of mass at which `attention.keep_mass` keeps the patch (101: never). The
  page thresholds it, and so shows the same masks as Python without summing up values itself;
- ``rank``: the rank by mass of the patch's component above the mean, 0 for none (`panels.rank_components`).

The mean attention over the heads follows each model's heads as a further map.
"""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from analysis.attention import MASS, attention_of, keep_mass, measure_maps
from analysis.panels import COLOUR_MAP, COLOURS, ModelMaps, rank_components

TEMPLATE = Path(__file__).with_suffix(".html")
JPEG_QUALITY = 85


def gallery_html(
    pictures: Sequence[np.ndarray], titles: Sequence[str], models: Sequence[ModelMaps], mass: float = MASS
) -> str:
    """The HTML page with all its data.

    Args:
        pictures: RGB, ``(height, width, 3)`` in 0..1, of any sizes. They are embedded unresized: pass display size.
        titles: one per picture; any characters.
        models: at least one; their grids and numbers of heads may differ.
        mass: initial position of the slider, a fraction; rounded to whole percent.
    """
    data = {
        "mass": round(100 * mass),
        "images": [_image(picture, title) for picture, title in zip(pictures, titles, strict=True)],
        "models": [_model(model) for model in models],
        "map_colours": (colormaps[COLOUR_MAP](range(256))[:, :3] * 255).round().astype(int).tolist(),
        "component_colours": COLOURS.tolist(),
    }
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # a title must not close the script element
    return TEMPLATE.read_text(encoding="utf-8").replace("{{DATA}}", text)


def needed_mass(attention: Tensor) -> Tensor:
    """The smallest whole percentage of mass at which each patch of ``(..., h, w)`` is kept: uint8, 101 for never."""
    needed = torch.zeros_like(attention, dtype=torch.uint8)
    for percentage in range(101):
        needed += ~keep_mass(attention, percentage / 100)
    return needed


def _image(picture: np.ndarray, title: str) -> dict:
    file = io.BytesIO()
    Image.fromarray((picture * 255).round().astype(np.uint8)).save(file, "JPEG", quality=JPEG_QUALITY)
    height, width = picture.shape[:2]
    source = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    return {"title": title, "picture": source, "width": width, "height": height}


def _model(model: ModelMaps) -> dict:
    """A model's encoded maps, measures and predictions for all images."""
    similarity = model.similarity
    attention = attention_of(similarity)
    mean = attention.mean(dim=1, keepdim=True)
    attention, measured = torch.cat([attention, mean], dim=1), torch.cat([similarity, mean], dim=1)
    least, greatest = attention.amin(dim=(-2, -1), keepdim=True), attention.amax(dim=(-2, -1), keepdim=True)
    level = (attention - least) / (greatest - least).clamp_min(torch.finfo(attention.dtype).tiny) * 255
    measures = measure_maps(measured)
    columns: dict[str, Any] = {
        "level": map(_encode, level.round()),
        "needed": map(_encode, needed_mass(attention)),
        "rank": map(_encode, rank_components(measured).clamp(max=255)),
        "entropy": measures["entropy"].abs().tolist(),
        "components": measures["components"].tolist(),
        "prediction": model.predictions or [None] * len(similarity),
    }
    images = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return {"name": model.name, "heads": similarity.shape[1], "grid": list(similarity.shape[-2:]), "images": images}


def _encode(values: Tensor) -> str:
    return base64.b64encode(values.to(torch.uint8).numpy().tobytes()).decode()
