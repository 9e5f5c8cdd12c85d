"""Maps of attention: the mass that is kept, what is measured of them, and the images they are computed from."""

import numpy as np
import pytest
import scipy.ndimage
import torch
from helpers.image_sets import photograph, picture

from analysis.attention import attention_of, component_sizes, keep_mass, measure_maps
from analysis.images import as_picture, squash
from readers.files import list_images
from readers.images import UnreadableImage, read_image
from utils import UserError


def slow_keep_mass(attention, mass):
    """One map ``(h, w)``, patch by patch: from the smallest, of equal ones the earlier first."""
    values = attention.flatten()
    order = sorted(range(len(values)), key=lambda index: (values[index].item(), index))
    kept, total = torch.zeros(len(values), dtype=torch.bool), torch.zeros((), dtype=values.dtype)
    for index in order:
        total = total + values[index] / values.sum()
        kept[index] = bool(total > 1 - mass)
    return kept.view_as(attention)


@pytest.mark.parametrize("mass", [0.05, 0.6, 0.95])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kept_mass_equals_a_loop_over_patches(mass, dtype):
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(4, 3, 5, 7, generator=generator, dtype=dtype)
    maps[2] = (4 * maps[2]).ceil() / 4  # many equal patches
    maps[3] = 1.0
    kept = keep_mass(maps, mass)
    assert torch.equal(kept, torch.stack([slow_keep_mass(one, mass) for one in maps.flatten(0, 1)]).view_as(kept))


def test_of_equal_patches_the_later_ones_stay():
    maps = torch.full((1, 1, 2, 4), 0.25, dtype=torch.float64)
    assert keep_mass(maps, 0.5).flatten().tolist() == [False] * 4 + [True] * 4


def test_no_less_than_the_mass_stays_and_not_a_patch_more():
    maps = attention_of(torch.randn(8, 2, 14, 14, generator=torch.Generator().manual_seed(1)))
    kept = keep_mass(maps, 0.6)
    share = (maps * kept).sum((-2, -1))
    smallest = maps.where(kept, torch.inf).amin((-2, -1))
    assert (share >= 0.6 - 1e-6).all()
    assert (share - smallest <= 0.6 + 1e-6).all()


def test_attention_is_the_softmax_row_without_its_class_token():
    scores = torch.randn(2, 3, 26, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    row = scores.softmax(-1)[..., 1:]
    expected = row / row.sum(-1, keepdim=True)
    torch.testing.assert_close(attention_of(scores[..., 1:].unflatten(-1, (5, 5))).flatten(2), expected)


def test_measures_equal_scipys_components():
    similarity = torch.randn(5, 3, 9, 6, generator=torch.Generator().manual_seed(3))
    similarity[4, 2] = 1.5  # constant: no component
    measured = measure_maps(similarity)
    for place in np.ndindex(5, 3):
        values = similarity[place].double()
        labels, number = scipy.ndimage.label((values > values.mean()).numpy(), np.ones((3, 3)))
        sizes = np.bincount(labels.flatten())[1:]
        assert measured["components"][place] == number
        assert measured["largest"][place] == sizes.max(initial=0)
        assert measured["kept"][place] == sizes.sum()
    assert measured["entropy"][4, 2] == 0


def test_sizes_of_components():
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 1], [1, 0, 0, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    assert sorted(component_sizes(mask).tolist(), reverse=True)[:4] == [3, 2, 1, 0]


# ------------------------------------------------------------------------------------------------- images


def test_images_are_listed_below_a_folder_in_order(tmp_path):
    for name in ("b.PNG", "a/z.jpg", "a/.hidden.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [str(path.relative_to(tmp_path)) for path in list_images(tmp_path)] == ["a/z.jpg", "b.PNG"]
    (tmp_path / "a/round").symlink_to(tmp_path)
    assert len(list_images(tmp_path)) == 2, "a link in a circle is not followed"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no image in it or below; known are .jpg, .*"):
        list_images(tmp_path / "empty")
    with pytest.raises(UserError, match=r"absent: no such folder; give one with images in it$"):
        list_images(tmp_path / "absent")


def test_an_image_is_rgb_or_named(tmp_path):
    picture(mode="L").save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").mode == "RGB"
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(UnreadableImage, match=r"broken.jpg: cannot be read \(.*\); replace it with an intact file$"):
        read_image(tmp_path / "broken.jpg")


def test_squashing_keeps_the_whole_image_and_can_be_undone():
    image = photograph(1)
    squashed = squash(48)(image)
    expected = np.asarray(image.resize((48, 48), 3)) / 255
    assert squashed.shape == (3, 48, 48)
    assert np.abs(as_picture(squashed) - expected).max() < 1e-3
