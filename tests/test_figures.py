"""The pages show what was measured: every picture, map, mask, component and word is where it belongs."""

import base64
import dataclasses
import io
import json
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from helpers import runs
from helpers.checkpoints import OWN
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from sklearn.datasets import load_sample_images

import checkpoints
import main
from analysis import figures, panels
from analysis.attention import attention_of, keep_mass, similarity_maps
from analysis.images import squash
from analysis.models import load_model
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


def test_the_panel_for_tensorboard_has_the_image_and_a_map_a_head(similarity):
    figure = panels.attention_panel(torch.randn(3, 16, 16), similarity[2], title="a rather long name")
    arrays = [image.get_array() for image in figure.axes[0].images]
    assert len(arrays) == 1 + 2
    assert arrays[0].shape == (16, 16, 3)
    for head in (0, 1):
        np.testing.assert_allclose(arrays[1 + head], attention_of(similarity)[2, head].numpy())
    entropy, _ = spatial_entropy(similarity)
    assert words(figure) == ["a rat… name", *(f"H {value:.2f}" for value in entropy[2].abs())]
    assert all(text.get_fontsize() * 300 / (72 * figure.get_figwidth()) > 10 for text in figure.axes[0].texts), "px"


def test_the_panel_takes_what_training_has(similarity):
    """A bfloat16 model on any device; and TensorBoard can show it."""
    from torch.utils.tensorboard._utils import figure_to_image

    figure = panels.attention_panel(torch.zeros(3, 8, 8), similarity[0].bfloat16().requires_grad_())
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
    models = [
        ModelMaps("small", similarity, ["cat", "dog" * 20, "cat", "cat"]),
        ModelMaps("long/" * 20, torch.randn(4, 1, 14, 14)),
    ]
    figure = page(pictures, ["n" * 60 + "\n" + "predicted $x_{1}$ " * 5, "b", "c", "d"], models)
    assert drawn(figure).std() > 0.1
    assert words(figure).count("predicted cat") == 3
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


# ----------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return runs.write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def small(digits, tmp_path_factory):
    """A checkpoint of two heads and a grid of 4 x 4."""
    return train(
        digits, tmp_path_factory.mktemp("small"), "--input-size 8 --model-kwargs embed_dim=24 num_heads=2 depth=1"
    )


@pytest.fixture(scope="module")
def large(digits, tmp_path_factory):
    """A checkpoint of three heads and a grid of 8 x 8."""
    return train(digits, tmp_path_factory.mktemp("large"), "--input-size 16")


def train(data: Path, folder: Path, options: str) -> Path:
    assert main.main(runs.command(data, folder, "--epochs", "2", *options.split())) == 0
    return folder / "best.pth"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three images, in two folders: parts of two photographs, wide and tall."""
    folder = tmp_path_factory.mktemp("photos")
    china, flower = map(Image.fromarray, load_sample_images().images)
    for number in range(3):
        path = folder / ("a" if number < 2 else "b") / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        photo, size = (china, (300, 200)) if number % 2 else (flower, (100, 250))
        photo.crop((10 * number, 0, 10 * number + size[0], size[1])).save(path)
    return folder


def draw(*words) -> int:
    return figures.main([str(word) for word in words])


def gallery_data(folder: Path) -> dict:
    text = (folder / "index.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1])


def test_two_models_side_by_side(small, large, photos, tmp_path, capsys, monkeypatch):
    """All pages and the gallery; drawn again with fewer images, no page of before is left."""
    monkeypatch.setattr(figures, "ROWS", 2)
    out = tmp_path / "out"
    command = ["--checkpoint", small, "--checkpoint", large, "--images", photos, "--out", out, "--device", "cpu"]
    assert draw(*command, "--name", "without", "--name", "with", "--mass", "0.5") == 0
    assert capsys.readouterr().out.endswith(
        f"attention maps drawn: {out}/index.html (3 images; 6 pages as PNG and PDF beside it)\n"
    )
    pages = [f"{kind}-{number}.png" for kind in ("attention", "components", "masks") for number in (1, 2)]
    assert sorted(path.name for path in out.iterdir()) == sorted([*pages, "figures.pdf", "index.html"])
    pdf = (out / "figures.pdf").read_bytes()
    assert len(re.findall(rb"/Type /Page\b", pdf)) == 6
    assert b"/Type3" not in pdf, "conferences refuse such fonts"
    for page in pages:
        assert matplotlib.image.imread(out / page)[..., :3].std() > 0.1
    data = gallery_data(out)
    assert data["mass"] == 50
    assert [image["title"] for image in data["images"]] == ["a/0.jpg", "a/1.jpg", "b/2.jpg"]
    assert [(model["name"], model["heads"], model["grid"]) for model in data["models"]] == [
        ("without", 2, [4, 4]),
        ("with", 3, [8, 8]),
    ]
    assert [image["width"] > image["height"] for image in data["images"]] == [False, True, False]
    for image in data["models"][0]["images"]:
        assert re.fullmatch(r"\d \d+%", image["prediction"]), "their folders are no digits"

    assert draw(*command, "--count", "2") == 0
    assert sorted(path.name for path in out.glob("*.png")) == ["attention-1.png", "components-1.png", "masks-1.png"]
    data = gallery_data(out)
    assert [image["title"] for image in data["images"]] == ["a/0.jpg", "b/2.jpg"], "spread over all"
    assert [model["name"] for model in data["models"]] == [Path(small).parent.name, Path(large).parent.name]


def test_the_gallery_has_the_models_maps(large, photos, tmp_path):
    assert draw("--checkpoint", large, "--images", photos, "--count", "1", "--input-size", "24", "--out", tmp_path) == 0
    model = gallery_data(tmp_path)["models"][0]
    trained = load_model(large, input_size=24)
    image = squash(24)(Image.open(photos / "a/0.jpg").convert("RGB"))
    attention = attention_of(similarity_maps(trained.model, image[None]))[0]
    needed = np.frombuffer(base64.b64decode(model["images"][0]["needed"]), np.uint8).reshape(-1, 12, 12)
    assert len(needed) == model["heads"] + 1
    np.testing.assert_array_equal(needed[:-1] <= 60, keep_mass(attention).numpy())


def test_validation_images_have_their_classes_and_predictions(small, large, tmp_path):
    """Without --images: the first checkpoint's own, each of another class; a moved data set can be named."""
    assert draw("--checkpoint", large, "--checkpoint", small, "--out", tmp_path / "out", "--count", "4") == 0
    data = gallery_data(tmp_path / "out")
    titles = [image["title"] for image in data["images"]]
    assert len(set(titles)) == 4
    assert set(titles) <= set("0123456789")
    for model, size, path in zip(data["models"], (16, 8), (large, small), strict=True):
        trained = load_model(path)
        assert (trained.input_size, model["grid"]) == (size, [size // 2] * 2)
        for image, title in zip(model["images"], titles, strict=True):
            name, _, mark = image["prediction"].split(" ", 2)
            assert name in trained.classes
            assert mark == ("✓" if name == title else f"✗ true: {title}")


def test_predictions_are_the_models(large, digits):
    """Of images as small as these the whole is evaluated, so the pictures' models agree with the evaluation."""
    args = figures.build_parser().parse_args(["--checkpoint", str(large), "--out", "unused", "--count", "10"])
    samples = figures.validation_samples(args)
    trained = load_model(large)
    maps = figures.compute_maps("model", trained, samples)
    with torch.inference_mode():
        logits = trained.model(torch.stack([squash(16)(sample.image) for sample in samples]))
    for said, row, sample in zip(maps.predictions, logits.softmax(dim=-1), samples, strict=True):
        name = trained.classes[int(row.argmax())]
        assert said == figures.describe_prediction(name, float(row.max()), sample.label, trained.classes)
        assert said.startswith(f"{name} {100 * float(row.max()):.0f}%")
    assert figures.compute_maps("model", dataclasses.replace(trained, classes=None), samples).predictions is None
    trained.model.reset_classifier(0)
    for classes in (trained.classes, []):  # of a data set with classes, and of --data-set images
        without = dataclasses.replace(trained, classes=classes)
        assert figures.compute_maps("model", without, samples).predictions is None, "a self-supervised model"


def test_of_a_run_on_images_without_classes_the_images_are_named(photos, tmp_path, capsys):
    words = f"--task dino {' '.join(OWN[4:])} --data-set images --data-path {photos} --output-dir {tmp_path}"
    run = runs.build(f"{words} --num-workers 0 --out-dim 16 --local-crops-number 0 --batch-size 1 --total-batch 1")
    checkpoints.save(run, "checkpoint.pth")
    command = ("--checkpoint", tmp_path / "checkpoint.pth", "--out", tmp_path / "out", "--device", "cpu")
    assert draw(*command) == 2
    assert "checkpoint.pth: its --data-set images has no classes to show; give --images" in capsys.readouterr().err
    assert draw(*command, "--images", photos) == 0
    assert not gallery_data(tmp_path / "out")["models"][0]["images"][0].get("prediction")


@pytest.mark.parametrize(
    ("label", "said"),
    [("cat", "cat 87% ✓"), ("dog", "cat 87% ✗ true: dog"), ("holidays", "cat 87%"), (None, "cat 87%")],
)
def test_a_prediction_is_compared_with_the_folder_if_that_is_a_class(label, said):
    assert figures.describe_prediction("cat", 0.871, label, ["cat", "dog"]) == said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--images": "nowhere"}, "nowhere: no such folder"),
        ({"--checkpoint": "nowhere.pth"}, "nowhere.pth"),
        ({"--out": "file"}, "--out file"),
        ({"--name": ["one", "two"]}, "2 --name for 1 --checkpoint"),
        ({"--mass": "60"}, "'60' is not a number of at least 0 and at most 1"),
        ({"--input-size": "15"}, "15 is not divisible"),
        ({"--images": None, "--checkpoint": "foreign.pth", "--num-heads": "3"}, "give --images"),
        ({"--images": None, "--data-path": "nowhere"}, "nowhere"),
        ({"--data-path": "somewhere"}, "either --images or --data-path"),
    ],
)
def test_what_cannot_be_drawn_is_said_before_anything_is(large, photos, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "compute_maps", None)  # no model runs
    Path("file").touch()
    torch.save(load_model(large).model.state_dict() | {}, "foreign.pth")
    options = {"--checkpoint": large, "--images": photos, "--out": "out"} | change
    words = [[name, word] for name, value in options.items() if value for word in np.atleast_1d(value)]
    assert draw(*np.concatenate(words)) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


def test_a_damaged_image_is_named(large, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/half.jpg").write_bytes(b"no image")
    assert draw("--checkpoint", large, "--images", tmp_path / "images", "--out", tmp_path / "out") == 2
    assert "half.jpg" in capsys.readouterr().err
