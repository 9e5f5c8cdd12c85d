"""The pages show what was measured: every picture, map, mask, component and word is where it belongs."""

import io

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from analysis import panels
from analysis.attention import attention_of, keep_mass
from analysis.panels import ModelMaps
from losses import spatial_entropy


@pytest.fixture
def similarity():
    """Four images, two heads, an oblong grid."""
    return 2 * torch.randn(4, 2, 5, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pictures():
    return list(np.random.default_rng(0).uniform(size=(4, 20, 35, 3)))


def words(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def drawn(figure) -> np.ndarray:
    """The figure as an RGB image."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return matplotlib.image.imread(io.BytesIO(file.getvalue()))[..., :3]


def test_the_panel_for_tensorboard_has_a_row_an_image_and_a_map_a_head(similarity):
    images = torch.randn(4, 3, 16, 16)
    figure = panels.attention_panel(images, similarity, titles=["one", "two\npredicted three", "four", "five"])
    arrays = [image.get_array() for image in figure.axes[0].images]
    assert len(arrays) == 4 * (1 + 2)
    assert arrays[0].shape == (16, 16, 3)
    for index, head in ((0, 0), (3, 1)):
        np.testing.assert_allclose(arrays[3 * index + 1 + head], attention_of(similarity)[index, head].numpy())
    said = words(figure)
    assert {"one", "predicted three", "five", "head 1", "head 2"} <= set(said)
    entropy, components = spatial_entropy(similarity)
    noun = "component" if components[2, 1] == 1 else "components"
    assert f"H {entropy[2, 1]:.2f} · {components[2, 1]} {noun}" in said


def test_the_panel_takes_what_training_has(similarity):
    """A bfloat16 model on any device; and TensorBoard can show it."""
    from torch.utils.tensorboard._utils import figure_to_image

    figure = panels.attention_panel(torch.zeros(4, 3, 8, 8), similarity.bfloat16().requires_grad_(), mass=0.4)
    assert any("40%" in word for word in words(figure))
    shown = figure_to_image(figure)
    assert shown.shape[0] == 3
    assert shown.std() > 10


def test_outlines_follow_the_patches(similarity, pictures):
    """The line's length is the perimeter of the mask, in patches."""
    figure = panels.attention_page(pictures, list("abcd"), [ModelMaps("", similarity)])
    mask = np.pad(keep_mass(attention_of(similarity)[0, 0]).numpy().astype(int), 1)
    perimeter = np.abs(np.diff(mask, axis=0)).sum() + np.abs(np.diff(mask, axis=1)).sum()
    assert len(figure.axes[0].collections[0].get_segments()) == perimeter


def test_masks_dim_what_is_left_out(similarity, pictures):
    figure = panels.mask_page(pictures, list("abcd"), [ModelMaps("", similarity)], mass=0.3)
    shown = figure.axes[0].images[1].get_array()
    mask = keep_mass(attention_of(similarity)[0, 0], 0.3).numpy()
    kept = np.kron(mask, np.ones((4, 5), dtype=bool))
    np.testing.assert_array_equal(shown[kept], pictures[0][kept])
    assert shown[~kept].max() <= 0.35
    assert f"{mask.sum()} of 35 patches" in words(figure)


def test_every_component_gets_a_colour_of_its_own():
    values = torch.zeros(1, 2, 5, 5)
    values[0, :, 0, 0], values[0, :, 4, 4] = 1.0, 2.0  # the second is the heavier
    values[0, 1] = 7.0  # nothing is above its mean
    ranks = panels.rank_components(values)
    assert ranks[0, 0, 0, 0] == 2
    assert ranks[0, 0, 4, 4] == 1
    assert (ranks[0, 0] > 0).sum() == 2
    assert (ranks[0, 1] == 0).all()
    figure = panels.component_page([np.ones((10, 10, 3))], [""], [ModelMaps("", values)])
    shown = figure.axes[0].images[2].get_array()
    orange, blue = panels.COLOURS[:2] / 255
    np.testing.assert_allclose(shown[9, 9], 0.35 * 0.6 + 0.65 * orange)
    np.testing.assert_allclose(shown[:2, :2], np.broadcast_to(0.35 * 0.6 + 0.65 * blue, (2, 2, 3)))
    np.testing.assert_allclose(shown[5, 5], 0.6)
    assert "H 0.63 · 2 components" in words(figure)
    assert "H 0.00 · 0 components" in words(figure)


def test_the_ranks_are_the_components_of_the_loss(similarity):
    ranks = panels.rank_components(similarity)
    _, components = spatial_entropy(similarity)
    assert torch.equal(ranks.amax(dim=(-2, -1)), components)
    excess = (similarity - similarity.mean(dim=(-2, -1), keepdim=True)).clamp(min=0)
    mass = torch.stack([(excess * (ranks == rank)).sum(dim=(-2, -1)) for rank in range(1, 6)])
    assert (mass[:-1] >= mass[1:]).all(), "from the heaviest to the lightest"
    assert torch.equal(ranks > 0, excess > 0)


@pytest.mark.parametrize("page", [panels.attention_page, panels.mask_page, panels.component_page])
def test_models_of_other_grids_and_heads_stand_beside_each_other(similarity, pictures, page):
    """No word lies on another or leaves the page, however long; no map lies on another."""
    pictures[1] = pictures[1].transpose(1, 0, 2)  # one upright among the oblong
    models = [ModelMaps("small", similarity), ModelMaps("long/" * 20, torch.randn(4, 1, 14, 14))]
    figure = page(pictures, ["n" * 60 + "\n" + "predicted $x_{1}$ " * 5, "b", "c", "d"], models)
    assert drawn(figure).std() > 0.1
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.axes[0].texts]
    boxes += [image.get_window_extent(renderer) for image in figure.axes[0].images]
    page_box = figure.bbox.padded(0.5)
    for number, box in enumerate(boxes):
        assert page_box.containsx(box.x0)
        assert page_box.containsx(box.x1)
        assert page_box.containsy(box.y0)
        assert page_box.containsy(box.y1)
        for other in boxes[:number]:
            assert not box.padded(-0.5).overlaps(other.padded(-0.5))
