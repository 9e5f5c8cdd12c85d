"""The gallery in a real browser: what it shows for every slider, head and key is what Python measures."""

import re
import shutil

import numpy as np
import pytest
import torch
from helpers import browser
from helpers.browser import Browser
from PIL import Image
from sklearn.datasets import load_sample_images

from analysis.attention import attention_of, keep_mass, measure_maps
from analysis.gallery import gallery_html, needed_mass
from analysis.panels import ModelMaps

EVIL = "</script><script>window.broken = 1</script><b>&amp;\"'" + "long " * 40


def maps_of(seed: int, images: int, heads: int, h: int, w: int) -> torch.Tensor:
    return 2 * torch.randn(images, heads, h, w, generator=torch.Generator().manual_seed(seed))


PICTURES = [
    np.asarray(Image.fromarray(photo).resize(size)) / 255
    for photo in load_sample_images().images
    for size in ((320, 214), (200, 320))
]
TITLES = ["a temple", EVIL, "a flower", "upright"]
MODELS = [
    ModelMaps("small", maps_of(0, 4, 3, 8, 8), ["temple", EVIL, "flower", "flower"]),
    ModelMaps("large " + EVIL, maps_of(1, 4, 6, 14, 14)),
]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if browser.CHROMIUM is None:
        pytest.skip("no Chromium here")
    profile = tmp_path_factory.mktemp("chromium")
    with Browser(profile) as page:
        yield page
    shutil.rmtree(profile, ignore_errors=True)


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    path = tmp_path_factory.mktemp("gallery") / "index.html"
    path.write_text(gallery_html(PICTURES, TITLES, MODELS), encoding="utf-8")
    return path


@pytest.fixture
def page(chromium, gallery):
    """The gallery, just opened, in a window in which all its rows are in view."""
    chromium.errors.clear()
    chromium.resize(1280, 3000)
    chromium.open(gallery)
    chromium.wait("document.querySelectorAll('figcaption:empty').length === 2 * 4")  # the means, hidden as yet
    yield chromium
    assert not chromium.errors


def captions(page) -> list[list[list[str]]]:
    """The words under all shown maps: [image][model][its maps, one after the other], when all are drawn."""
    page.run("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))")
    return page.run(
        """[...document.querySelectorAll('tbody tr')].map((row) => [...row.querySelectorAll('td')].map((cell) =>
        [...cell.querySelectorAll('figure')].filter((figure) => !figure.hidden).map((figure) =>
        [...figure.querySelectorAll('figcaption div')].map((line) => line.textContent).join('\\n'))))"""
    )


def expected(name: str, similarity: torch.Tensor, attention: torch.Tensor, mass: float) -> str:
    measured = measure_maps(similarity[None, None])
    components = int(measured["components"])
    kept = int(keep_mass(attention, mass).sum())
    noun = f"component{'' if components == 1 else 's'} > mean"
    return (
        f"{name} · H {abs(float(measured['entropy'])):.2f}\n{components} {noun}\n{kept} of {attention.numel()} patches"
    )


def expected_heads(mass: float) -> list[list[list[str]]]:
    attentions = [attention_of(model.similarity) for model in MODELS]
    return [
        [
            [
                expected(f"head {head + 1}", model.similarity[image, head], attention[image, head], mass)
                for head in range(model.similarity.shape[1])
            ]
            for model, attention in zip(MODELS, attentions, strict=True)
        ]
        for image in range(len(PICTURES))
    ]


def slide_to(page, percentage: int) -> None:
    """Move the slider as a user's drag does: its value, and the event that tells of it."""
    slider = "document.getElementById('mass')"
    page.run(f"{slider}.value = {percentage}, {slider}.dispatchEvent(new Event('input', {{bubbles: true}}))")


def pixel(page, model: int, head: int, y: int, x: int) -> list[int]:
    """The colour in the middle of a patch of the first image's map, RGB 0..255."""
    h, w = MODELS[model].similarity.shape[-2:]
    return page.run(
        f"""(() => {{
        const canvas = document.querySelectorAll('tbody tr')[0].querySelectorAll('td')[{model}]
          .querySelectorAll('canvas')[{head}];
        const x = Math.floor(({x} + 0.5) * canvas.width / {w}), y = Math.floor(({y} + 0.5) * canvas.height / {h});
        return [...canvas.getContext('2d').getImageData(x, y, 1, 1).data].slice(0, 3);
        }})()"""
    )


# ------------------------------------------------------------------------------------------------- the data


def test_needed_mass_is_the_rule_of_keep_mass_for_every_percentage():
    ties = torch.ones(1, 1, 4, 5)
    ties[..., 2:, :] = 3
    sharp = torch.zeros(1, 1, 4, 5).index_fill(-1, torch.tensor([2]), 1e4)
    for attention in (attention_of(MODELS[0].similarity), ties / ties.sum(), attention_of(sharp)):
        needed = needed_mass(attention)
        for percentage in range(101):
            assert torch.equal(needed <= percentage, keep_mass(attention, percentage / 100))


def test_the_page_needs_nothing_beside_it(gallery):
    text = gallery.read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|<link|<script[^>]+src|url\(", text)
    assert len(re.findall(r"data:image/jpeg;base64,", text)) == len(PICTURES)
    assert "{{" not in text


# ---------------------------------------------------------------------------------------------- what it shows


def test_numbers_under_the_maps_are_pythons_for_any_mass(page):
    assert captions(page) == expected_heads(0.6)
    for percentage in (0, 1, 37, 99, 100):
        slide_to(page, percentage)
        assert captions(page) == expected_heads(percentage / 100)
        assert page.run("document.getElementById('mass-shown').value") == f"{percentage} %"


def test_the_mean_over_heads_is_a_map_of_its_own(page):
    page.press("0")
    shown = captions(page)
    for index, model in enumerate(MODELS):
        for image in range(len(PICTURES)):
            mean = attention_of(model.similarity)[image].mean(dim=0)
            assert shown[image][index] == [expected("mean over heads", mean, mean, 0.6)]


def test_masks_follow_the_slider(page):
    """A patch that is dropped is dark and grey, and has the picture's own colour once it is kept."""
    attention = attention_of(MODELS[1].similarity)[0, 2]
    needed = needed_mass(attention)
    y, x = divmod(int((needed * (needed < 100)).argmax()), 14)
    assert 60 < needed[y, x] < 100
    height, width = PICTURES[0].shape[:2]
    own = PICTURES[0][int((y + 0.5) * height / 14), int((x + 0.5) * width / 14)] * 255
    dropped = pixel(page, 1, 2, y, x)
    assert max(dropped) - min(dropped) <= 3
    assert max(dropped) <= 0.35 * max(own) + 8
    slide_to(page, int(needed[y, x]))
    captions(page)
    np.testing.assert_allclose(pixel(page, 1, 2, y, x), own, atol=25)  # JPEG
    slide_to(page, int(needed[y, x]) - 1)
    captions(page)
    assert pixel(page, 1, 2, y, x) == dropped


def test_attention_and_components_have_their_colours(page):
    """The brightest patch of a map is yellow, the heaviest component orange, what is in none dark and grey."""
    similarity = MODELS[0].similarity[0, 1]
    y, x = divmod(int(similarity.argmax()), 8)
    page.press("t")
    captions(page)
    red, green, blue = pixel(page, 0, 1, y, x)
    assert min(red, green) > blue + 80
    page.press("c")
    captions(page)
    low = divmod(int(similarity.argmin()), 8)
    dark = pixel(page, 0, 1, *low)
    assert max(dark) - min(dark) <= 3
    assert pixel(page, 0, 1, y, x)[0] > 60
    page.press("m")
    captions(page)
    assert pixel(page, 0, 1, *low) != dark


def test_a_head_that_a_model_has_not_is_said(page):
    page.press("5")
    shown = captions(page)[0]
    assert shown[0] == []
    assert shown[1] == expected_heads(0.6)[0][1][4:5]
    assert page.run("document.querySelector('td p').checkVisibility()")
    assert page.run("document.querySelector('td p').textContent") == "has 3 heads"


# ------------------------------------------------------------------------------------------------------ keys


def test_arrow_keys_move_the_mass_wherever_the_focus_is(page):
    mass = "document.getElementById('mass').valueAsNumber"
    page.press("ArrowRight")
    page.press("ArrowLeft", shift=True)
    assert page.run(mass) == 51
    page.run("document.getElementById('mass').focus()")
    page.press("ArrowRight")
    assert page.run(mass) == 52
    assert captions(page) == expected_heads(0.52)
    for _ in range(8):
        page.press("ArrowLeft", shift=True)
    assert page.run(mass) == 0


def test_keys_pick_heads_and_views(page):
    head, view = "document.getElementById('head').value", "document.querySelector('[name=view]:checked').value"
    for key, shift, chosen in (("2", False, "1"), ("h", False, "2"), ("H", True, "1"), ("0", False, "mean")):
        page.press(key, shift)
        assert page.run(head) == chosen
    page.press("h")
    assert page.run(head) == "all", "after the last comes the first"
    page.press("9")
    assert page.run(head) == "all", "no model has nine heads"
    page.press("3")
    assert captions(page)[2][0] == expected_heads(0.6)[2][0][2:3]
    page.press("a")
    assert captions(page) == expected_heads(0.6)
    for key, chosen in (("t", "attention"), ("c", "components"), ("m", "mask")):
        page.press(key)
        assert page.run(view) == chosen


def test_arrow_keys_go_through_the_images(page):
    here = "[...document.querySelectorAll('tbody tr')].findIndex((row) => row.matches('.here'))"
    assert page.run(here) == 0
    page.press("ArrowUp")
    assert page.run(here) == 0
    page.resize(1280, 600)
    for _ in range(5):
        page.press("ArrowDown")
    assert page.run(here) == 3
    assert page.run("document.activeElement.matches('.here')")
    assert page.run("document.activeElement.getBoundingClientRect().top < innerHeight")


def test_head_picker_and_buttons_work_by_hand(page):
    """The native controls: a click on a radio button, a letter typed into the list of heads."""
    place = page.run(
        "(() => { const box = document.querySelector('[value=components]').getBoundingClientRect();"
        "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
    )
    before = pixel(page, 0, 0, 0, 0)
    page.click(*place)
    captions(page)
    assert page.run("document.querySelector('[name=view]:checked').value") == "components"
    assert pixel(page, 0, 0, 0, 0) != before
    page.run("document.getElementById('head').focus()")
    page.press("m")  # the native list's own: the first entry with m
    assert page.run("document.getElementById('head').value") == "mean"
    assert page.run("document.querySelector('[name=view]:checked').value") == "components"
    assert [len(maps) for maps in captions(page)[0]] == [1, 1]


# -------------------------------------------------------------------------------------------------- the page


def test_titles_are_text_whatever_they_hold(page):
    assert page.run("typeof window.broken") == "undefined"
    assert page.run("document.querySelectorAll('tbody th .name')[1].title") == EVIL
    assert page.run("document.querySelectorAll('thead th .name')[1].textContent") == "large " + EVIL
    assert page.run("document.querySelectorAll('td .name')[2].textContent") == "predicted " + EVIL
    assert page.run("document.querySelectorAll('b').length") == 0


@pytest.mark.parametrize("width", [1280, 800])
@pytest.mark.parametrize("key", ["a", "0"])
def test_nothing_overlaps_or_is_cut(page, width, key):
    page.resize(width, 3000)
    page.press(key)
    captions(page)
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run("[...document.querySelectorAll('figcaption div')].every((it) => it.scrollWidth <= it.clientWidth)")
    boxes = page.run(
        """[...document.querySelectorAll(
        '#bar h1, #bar > div, fieldset, summary, tbody img, th .name, figcaption, canvas')]
        .map((it) => it.getBoundingClientRect()).filter((box) => box.width)
        .map((box) => [box.left, box.top, box.right, box.bottom])"""
    )
    assert len(boxes) > 20
    for number, (left, top, right, bottom) in enumerate(boxes):
        for other in boxes[:number]:
            assert left >= other[2] - 1 or right <= other[0] + 1 or top >= other[3] - 1 or bottom <= other[1] + 1


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_contrast_in_light_and_dark(page, dark):
    """At least 4.5 to 1, WCAG's level AA."""
    page.resize(1280, 800, dark=dark)
    colours = page.run(
        """['body', '#bar', 'thead .note', 'details'].map((name) => getComputedStyle(document.querySelector(name)))
        .flatMap((style) => [style.color, style.backgroundColor])"""
    )
    channels = [[int(number) / 255 for number in re.findall(r"\d+", colour)[:3]] for colour in colours]
    linear = [[c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour] for colour in channels]
    body, page_colour, bar_text, bar, note, _, details, _ = (
        0.2126 * red + 0.7152 * green + 0.0722 * blue for red, green, blue in linear
    )
    assert (page_colour < 0.1) == dark
    for text, ground in ((body, page_colour), (note, page_colour), (bar_text, bar), (details, bar)):
        assert (max(text, ground) + 0.05) / (min(text, ground) + 0.05) >= 4.5


def test_controls_and_maps_have_names_for_screen_readers(page):
    nodes = page("Accessibility.getFullAXTree")["nodes"]
    named = {(node["role"]["value"], node.get("name", {}).get("value")) for node in nodes if not node["ignored"]}
    controls = {("slider", "Mass kept"), ("combobox", "Head"), ("group", "Over the image"), ("radio", "mask")}
    assert controls <= named
    images = [name for role, name in named if role in ("img", "image")]
    assert any(
        re.fullmatch(r"a temple, small, mask, head 1 · H [\d.]+, .*, \d+ of 64 patches", name) for name in images
    )
    assert all(images)


def test_two_hundred_images_open_quickly_and_are_drawn_when_they_come_into_view(chromium, tmp_path):
    rows = [index % len(PICTURES) for index in range(200)]
    models = [ModelMaps(model.name, model.similarity[rows]) for model in MODELS]
    path = tmp_path / "index.html"
    path.write_text(gallery_html([PICTURES[row] for row in rows], [str(row) for row in rows], models, mass=0.3))
    chromium.resize(1280, 800)
    chromium.open(path)
    chromium.wait("document.querySelectorAll('figcaption:not(:empty)').length >= 9")
    assert chromium.run("document.getElementById('mass').value") == "30"
    assert chromium.run("performance.getEntriesByType('navigation')[0].loadEventEnd") < 10_000  # ms, a busy machine's
    drawn = "[...document.querySelectorAll('tbody tr')].map((row) => row.querySelector('figcaption').textContent > '')"
    assert sum(chromium.run(drawn)) < 20
    chromium.run("document.querySelectorAll('tbody tr')[199].scrollIntoView()")
    chromium.wait(f"{drawn}[199]")
    assert sum(chromium.run(drawn)) < 40
