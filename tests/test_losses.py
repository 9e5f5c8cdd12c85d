"""The spatial-entropy loss, its connected components, total variation, and the schedule of lambda."""

import ast
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import losses
from losses import (
    SpatialEntropyLoss,
    TotalVariationLoss,
    label_components,
    max_components,
    spatial_entropy,
    tree_bounds,
)
from models_sar import similarity_map
from schedules import SAR_SCHEDULES, sar_weight_schedule

cv2 = pytest.importorskip("cv2", reason="OpenCV is the independent labelling")
ndimage = pytest.importorskip("scipy.ndimage", reason="scipy is the second independent labelling")

ROOT = Path(__file__).parent.parent
GRIDS = [
    (1, 1),
    (1, 2),
    (2, 1),
    (1, 13),
    (17, 1),
    (7, 7),
    (7, 11),
    (14, 14),
    (16, 16),
    (24, 24),
    (30, 30),
    (32, 32),
]
GRID_NAMES = [f"{h}x{w}" for h, w in GRIDS]


# --- connected components -----------------------------------------------------------------------------------


def opencv_labels(mask):
    """Labels of each map of a bool (M, h, w) by OpenCV."""
    maps = mask.byte().numpy()
    return torch.stack([torch.from_numpy(cv2.connectedComponents(m, connectivity=8)[1]) for m in maps]).long()


def scipy_labels(mask):
    """Labels of a bool (M, h, w) by scipy, all maps in one call (they do not touch along the first axis)."""
    within_a_map = [[[0] * 3] * 3, [[1] * 3] * 3, [[0] * 3] * 3]
    labels = torch.from_numpy(ndimage.label(mask.numpy(), structure=within_a_map)[0]).long()
    before = labels.flatten(1).amax(1).cummax(0).values.roll(1)  # it counts on from map to map
    before[0] = 0
    return (labels - before[:, None, None]).clamp_min(0)


def canonical(labels):
    """Name each component of an (M, h, w) labelling by 1 + the linear index of its last pixel."""
    flat = labels.flatten(1)
    position = torch.arange(1, flat.shape[1] + 1).expand_as(flat)
    last = torch.zeros(len(flat), int(labels.max()) + 1, dtype=torch.long).scatter_reduce(1, flat, position, "amax")
    return (last.gather(1, flat) * (flat > 0)).view_as(labels)


def spiral(h, w):
    """A one-pixel spiral with one-pixel gaps: the longest path that a grid can hold."""
    mask = torch.zeros(h, w, dtype=torch.bool)
    row, column, step = 0, -1, (0, 1)
    lengths = [w, *itertools.chain.from_iterable((h - 1 - 2 * i, w - 1 - 2 * i) for i in range(max(h, w)))]
    for length in lengths:
        if length <= 0:
            break
        for _ in range(length):
            row, column = row + step[0], column + step[1]
            mask[row, column] = True
        step = (step[1], -step[0])
    return mask


def serpentine(h, w):
    """Every other row full, joined at the right and left ends in turn."""
    mask = torch.zeros(h, w, dtype=torch.bool)
    mask[::2] = True
    mask[1::4, -1] = True
    mask[3::4, 0] = True
    return mask


def comb(h, w):
    """A full first row with a tooth in every other column."""
    mask = torch.zeros(h, w, dtype=torch.bool)
    mask[0] = True
    mask[:, ::2] = True
    return mask


def worst_shapes(h, w):
    """Shapes with long paths, many contacts or many components, in all orientations, as one bool (M, h, w)."""
    row, column = torch.arange(h)[:, None], torch.arange(w)[None]
    zigzag = (row % 4 - 2).abs()  # a staircase that turns back and forth
    shapes = [
        torch.zeros(h, w, dtype=torch.bool),
        torch.ones(h, w, dtype=torch.bool),
        row == column,
        (row + column) % 2 == 0,
        (row + column) % 3 == 0,
        (row - column) % 4 == 0,
        (row % 2 == 0) & (column % 2 == 0),
        (row % 3 != 2) & (column % 3 != 2),
        (column - zigzag) % 4 == 0,
        (column % 4 == 0) | ((row == h - 1) & (column % 8 < 5)),
        *(make(h, w) for make in (spiral, serpentine, comb)),
        *(make(w, h).T for make in (spiral, serpentine, comb)),
    ]
    shapes = torch.stack(shapes)
    shapes = torch.cat([shapes, ~shapes])
    return torch.cat([shapes, shapes.flip(1), shapes.flip(2), shapes.flip(1, 2)])


def random_maps(h, w, maps=60):
    """Random maps from sparse to full."""
    torch.manual_seed(h * 100 + w)
    return torch.rand(maps, h, w) < torch.linspace(0.02, 0.98, maps)[:, None, None]


@pytest.mark.parametrize("grid", GRIDS, ids=GRID_NAMES)
def test_components_are_those_of_opencv_and_scipy(grid):
    """Also without the early exit, i.e. as on a GPU: there the stated number of rounds has to suffice."""
    mask = torch.cat([worst_shapes(*grid), random_maps(*grid)])
    expected = canonical(opencv_labels(mask))
    assert torch.equal(expected, canonical(scipy_labels(mask)))
    assert torch.equal(canonical(label_components(mask)), expected)
    assert torch.equal(canonical(losses._label(mask, early_exit=False)), expected)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (15, 1), (2, 7)], ids=lambda grid: f"{grid[0]}x{grid[1]}")
def test_every_mask_of_a_small_grid(grid):
    pixels = math.prod(grid)
    mask = (torch.arange(2**pixels)[:, None] >> torch.arange(pixels) & 1).bool().view(-1, *grid)
    expected = canonical(scipy_labels(mask))
    assert torch.equal(canonical(label_components(mask)), expected)
    assert torch.equal(canonical(losses._label(mask, early_exit=False)), expected)


def test_labels_are_local_to_a_map():
    mask = random_maps(14, 14).view(3, 4, 5, 14, 14)
    labels = label_components(mask)
    assert labels.shape == mask.shape
    assert labels.dtype == torch.int64
    assert torch.equal(labels > 0, mask)
    assert labels.max() <= max_components(14, 14)
    assert torch.equal(label_components(mask[1, 2, 3]), labels[1, 2, 3])
    assert torch.equal(label_components(mask.transpose(0, 2)), labels.transpose(0, 2))


def test_label_is_the_number_of_the_last_cell():
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[0, 0] = True  # cell 1 of 3 rows of 4 cells
    mask[1, 4] = mask[2, 5] = True  # cells 3 and 7
    mask[4, 6] = True  # cell 12
    assert label_components(mask)[mask].tolist() == [1, 7, 7, 12]


def test_the_drawing_of_the_docstring():
    mask = torch.tensor([[1, 0, 0, 0, 0, 1], [0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    assert label_components(mask)[mask].tolist() == [5, 3, 5, 5]


def test_bounds_on_the_number_of_trees():
    """n, n - 1 and from then on (n - F(t)) / F(t + 1), rounded down, as long as that is more than one tree."""
    assert tree_bounds(1) == []
    assert tree_bounds(49) == [49, 48, 24, 15, 9, 5, 3]
    assert [len(tree_bounds(cells)) for cells in (2, 15 * 15)] == [1, 10]


def test_as_many_components_as_a_grid_can_hold():
    mask = torch.zeros(7, 11, dtype=torch.bool)
    mask[::2, ::2] = True
    assert label_components(mask).unique().tolist() == list(range(max_components(7, 11) + 1))


def test_no_maps():
    assert label_components(torch.zeros(0, 6, 14, 14, dtype=torch.bool)).shape == (0, 6, 14, 14)


@pytest.mark.parametrize("mask", [torch.ones(4, 4), torch.ones(4, dtype=torch.bool), torch.zeros(3, 0, 4).bool()])
def test_a_mask_that_is_none_is_refused(mask):
    with pytest.raises(ValueError, match=r"mask must be bool \(\.\.\., h, w\)"):
        label_components(mask)


def test_labelling_compiles_to_one_graph():
    compiled = torch.compile(label_components, fullgraph=True, backend="aot_eager", dynamic=False)
    mask = random_maps(7, 11)
    assert torch.equal(compiled(mask), label_components(mask))


# --- spatial entropy ----------------------------------------------------------------------------------------


def plain_entropy(similarity):
    """Eq. 5-8 without eps for one (h, w) map, one mask a component."""
    excess = (similarity - similarity.mean()).relu()
    count, labels = cv2.connectedComponents((excess > 0).byte().numpy(), connectivity=8)
    p = torch.stack([excess[torch.from_numpy(labels == j)].sum() for j in range(1, count)]) / excess.sum()
    return -(p * p.log()).sum()


def loss_and_gradient(loss, similarity):
    similarity = similarity.detach().clone().requires_grad_()
    value = loss(similarity)
    value.backward()
    return value.detach(), similarity.grad


@pytest.fixture(scope="module")
def cases(golden):
    """Maps with the numbers that the authors' code printed for them, and Eq. 5-9 without its eps."""
    return golden("sar_bloblosses.pt")["cases"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entropy_equals_the_golden_numbers(cases, dtype):
    for case in cases:
        entropy, num_components = spatial_entropy(case["S"].to(dtype))
        assert entropy.dtype == dtype
        assert torch.equal(num_components, case["n_components_f64"]), case["name"]
        torch.testing.assert_close(
            entropy.double(), case["entropy_per_head_eq7_no_eps_f64"], atol=1e-6, rtol=0, msg=case["name"]
        )
        loss = SpatialEntropyLoss()(case["S"].to(dtype)).double()
        torch.testing.assert_close(loss, case["loss_eq9_no_eps_f64"], atol=1e-6, rtol=0, msg=case["name"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_equals_the_golden_numbers(cases, dtype):
    """Their eps of 1e-9 shows in the map of size 1e-3, whose gradient is 15: 1e-5 of the gradient."""
    compared = 0
    for case in cases:
        _, gradient = loss_and_gradient(SpatialEntropyLoss(), case["S"].to(dtype))
        if case["blob_f64"]["status"] == "ok":
            expected = case["blob_f64"]["grad"].to(dtype)
            torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5, msg=case["name"])
            compared += 1
        else:  # their code raises: no map of the batch has a component
            assert gradient.eq(0).all(), case["name"]
    assert compared == 40


def test_components_equal_the_golden_labels(cases):
    for case in cases:
        similarity = case["S"].double()
        labels = label_components(similarity > similarity.mean((-2, -1), keepdim=True))
        assert torch.equal(canonical(labels.flatten(0, 1)), canonical(case["labels_f64"].long().flatten(0, 1)))


@pytest.mark.parametrize(("entry", "tolerance"), [("blob_f64", 1e-7), ("blob_f32", 1e-5), ("blob_f16", 2e-3)])
def test_the_released_loss_differs_by_its_eps_and_rounding_only(cases, entry, tolerance):
    for case in cases:
        if case[entry]["status"] == "ok":
            loss = SpatialEntropyLoss()(case["S"].double())
            assert loss.item() == pytest.approx(case[entry]["loss"].item(), abs=tolerance), case["name"]


@pytest.mark.parametrize("grid", [(7, 11), (14, 14), (5, 1), (1, 9)])
def test_value_and_gradient_equal_a_plain_loop(grid):
    torch.manual_seed(0)
    similarity = torch.randn(3, 2, *grid, dtype=torch.float64)
    loss, gradient = loss_and_gradient(SpatialEntropyLoss(), similarity)
    plain, plain_gradient = loss_and_gradient(
        lambda s: torch.stack([plain_entropy(m) for m in s.flatten(0, 1)]).mean(), similarity
    )
    torch.testing.assert_close(loss, plain, atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient, plain_gradient, atol=1e-12, rtol=0)


def test_gradcheck():
    torch.manual_seed(0)
    similarity = torch.randn(2, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: spatial_entropy(s)[0], similarity)


def test_the_gradient_is_a_constant_for_autograd():
    similarity = torch.randn(1, 1, 6, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(SpatialEntropyLoss()(similarity), similarity, create_graph=True)
    assert not gradient.requires_grad


def test_entropy_ignores_shift_and_scale():
    torch.manual_seed(0)
    similarity = torch.randn(2, 3, 14, 14, dtype=torch.float64)
    entropy, _ = spatial_entropy(similarity)
    torch.testing.assert_close(spatial_entropy(1e3 * similarity - 7e4)[0], entropy, atol=1e-9, rtol=0)


def test_a_map_without_component_counts_in_the_mean_with_entropy_zero():
    two_dots = torch.zeros(1, 1, 5, 5)
    two_dots[..., 0, 0] = two_dots[..., 4, 4] = 1
    both = torch.cat([two_dots, torch.full_like(two_dots, 3)], dim=1)
    entropy, num_components = spatial_entropy(both)
    torch.testing.assert_close(entropy, torch.tensor([[math.log(2), 0]]))
    assert num_components.tolist() == [[2, 0]]
    assert SpatialEntropyLoss()(both).item() == pytest.approx(math.log(2) / 2)


SIZES = [1e-20, 1e-12, 1e-7, 1e-5, 1e-3, 1.0, 1e4, 6e4, 1e12, 1e20]


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 2), (14, 14), (30, 30)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_value_and_gradient_are_finite(dtype, grid):
    torch.manual_seed(0)
    limit = torch.finfo(dtype).max
    for size, signs in itertools.product(SIZES, ("both", "positive", "one", "nearly constant")):
        similarity = torch.randn(2, 3, *grid)
        if signs == "positive":
            similarity = similarity.abs()
        elif signs == "one":
            similarity = F.one_hot(torch.randint(grid[0] * grid[1], (2, 3)), grid[0] * grid[1]).view(2, 3, *grid)
        elif signs == "nearly constant":
            similarity = 1 + 1e-6 * similarity
        similarity = (similarity * size).clamp(-limit, limit).to(dtype)
        loss, gradient = loss_and_gradient(SpatialEntropyLoss(), similarity)
        assert loss.dtype == torch.float32
        assert gradient.dtype == dtype
        assert loss.isfinite(), (size, signs)
        assert gradient.isfinite().all(), (size, signs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.0, 1e-20, 6e4])
def test_a_constant_map_has_entropy_and_gradient_zero(dtype, value):
    loss, gradient = loss_and_gradient(SpatialEntropyLoss(), torch.full((2, 3, 14, 14), value, dtype=dtype))
    assert loss == 0
    assert gradient.eq(0).all()


@pytest.mark.parametrize("value", [0.1, -3.0, 1e-20, 1e20])
def test_a_map_constant_up_to_rounding_has_entropy_and_gradient_zero(value):
    torch.manual_seed(0)
    similarity = torch.full((2, 3, 14, 14), value) * (1 + 1e-7 * torch.randn(2, 3, 14, 14))
    assert similarity.std() > 0
    loss, gradient = loss_and_gradient(SpatialEntropyLoss(), similarity)
    assert loss == 0
    assert gradient.eq(0).all()


def test_one_component_has_entropy_and_gradient_zero():
    """p = 1: neither value nor gradient may keep rounding noise."""
    row, column = torch.arange(14)[:, None], torch.arange(14)[None]
    bump = torch.exp(-((row - 5.3) ** 2 + (column - 8.1) ** 2) / 9).view(1, 1, 14, 14)
    assert spatial_entropy(bump)[1].item() == 1
    loss, gradient = loss_and_gradient(SpatialEntropyLoss(), bump)
    assert loss == 0
    assert gradient.eq(0).all()


def test_a_component_barely_above_the_mean():
    """p close to 0: -p log p vanishes, its gradient stays finite."""
    similarity = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    similarity[..., 0, 0] = 8
    similarity[..., 2, 2] = 1 + 1e-14  # the mean is 1
    similarity[..., 0, 2] = -1e-14
    entropy, num_components = spatial_entropy(similarity)
    assert num_components.item() == 2
    assert 0 < entropy.item() < 1e-12
    _, gradient = loss_and_gradient(SpatialEntropyLoss(), similarity)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_map_is_not_hidden(bad):
    similarity = torch.randn(1, 2, 5, 5)
    similarity[0, 0, 2, 2] = bad
    entropy, _ = spatial_entropy(similarity)
    assert entropy.isnan().tolist() == [[True, False]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    similarity = torch.randn(2, 3, 14, 14)
    plain = loss_and_gradient(SpatialEntropyLoss(), similarity)
    with torch.autocast("cpu", dtype=dtype):
        inside = loss_and_gradient(SpatialEntropyLoss(), similarity)
    assert inside[0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def test_entropy_without_gradient():
    similarity = torch.randn(2, 3, 14, 14)
    with torch.no_grad():
        entropy, _ = spatial_entropy(similarity)
    assert not entropy.requires_grad
    assert torch.equal(entropy, spatial_entropy(similarity.requires_grad_())[0])


def test_loss_compiles_to_one_graph():
    similarity = torch.randn(2, 3, 7, 11)
    compiled = torch.compile(SpatialEntropyLoss(), fullgraph=True, backend="aot_eager")
    for a, b in zip(
        loss_and_gradient(compiled, similarity),
        loss_and_gradient(SpatialEntropyLoss(), similarity),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("similarity", [torch.randn(3, 14, 14), torch.ones(1, 1, 4, 4, dtype=torch.long)])
def test_a_similarity_that_is_none_is_refused(similarity):
    with pytest.raises(ValueError, match="similarity must be floating-point"):
        SpatialEntropyLoss()(similarity)


@pytest.mark.gpu
def test_gpu_gives_the_same_without_waiting():
    torch.manual_seed(0)
    similarity = torch.randn(16, 6, 14, 14)
    mask = torch.cat([worst_shapes(14, 14), random_maps(14, 14)])
    on_gpu, mask_on_gpu = similarity.cuda().requires_grad_(), mask.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = SpatialEntropyLoss()(on_gpu)
        loss.backward()
        labels = label_components(mask_on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected, gradient = loss_and_gradient(SpatialEntropyLoss(), similarity)
    torch.testing.assert_close(loss.cpu(), expected)
    torch.testing.assert_close(on_gpu.grad.cpu(), gradient, atol=1e-7, rtol=1e-5)
    assert torch.equal(labels.cpu(), label_components(mask))


# --- total variation ----------------------------------------------------------------------------------------


def test_total_variation_equals_the_golden_numbers(cases):
    for case in cases:
        similarity = case["S"].double()
        torch.testing.assert_close(TotalVariationLoss()(similarity), case["tv_paper_eq14_f64"], atol=0, rtol=1e-12)
        released = TotalVariationLoss(squared=True)(similarity)
        torch.testing.assert_close(released, case["tv_code_f64"]["loss"], atol=0, rtol=1e-12)


def test_total_variation_by_hand():
    similarity = torch.tensor([[[[1.0, 4.0], [3.0, 2.0]]]], dtype=torch.float16)
    assert TotalVariationLoss()(similarity).item() == 3 + 1 + 2 + 2
    assert TotalVariationLoss(squared=True)(similarity).item() == (9 + 1 + 4 + 4) / 2
    assert TotalVariationLoss()(similarity).dtype == torch.float32


def test_total_variation_of_one_pixel_is_zero():
    loss, gradient = loss_and_gradient(TotalVariationLoss(), torch.ones(2, 3, 1, 1))
    assert loss == 0
    assert gradient.eq(0).all()


# --- the schedule of lambda ---------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [20, 100, 300])
def test_warmup_cosine_equals_the_released_schedule_at_whole_epochs(golden, epochs):
    expected = golden("sar_blob_weight_schedule.pt")[f"epochs{epochs}_w0.01"].tolist()
    ours = [sar_weight_schedule("warmup-cosine", 0.01, epoch, epochs) for epoch in range(epochs)]
    assert ours == pytest.approx(expected, abs=1e-15)


def test_warmup_cosine_between_epochs():
    weights = [sar_weight_schedule("warmup-cosine", 0.01, step / 100, 100) for step in range(100 * 100 + 1)]
    assert weights[0] == 0
    assert weights[450] == pytest.approx(0.005)
    assert weights[950] == weights[1000] == 0.01
    assert weights[5500] == pytest.approx(0.005)
    assert weights[-1] == pytest.approx(0, abs=1e-18)
    assert max(abs(a - b) for a, b in itertools.pairwise(weights)) < 1.2e-5


def test_a_run_within_the_warmup_sees_its_start_only():
    assert sar_weight_schedule("warmup-cosine", 0.01, 0, 5) == 0
    assert sar_weight_schedule("warmup-cosine", 0.01, 4.5, 5) == pytest.approx(0.005)
    assert sar_weight_schedule("warmup-cosine", 0.01, 10, 10) == 0.01


def test_after_the_last_epoch_the_weight_stays_zero():
    assert sar_weight_schedule("warmup-cosine", 0.01, 310, 300) == pytest.approx(0, abs=1e-18)


def test_constant_weight():
    assert {sar_weight_schedule("constant", 0.01, epoch, 3) for epoch in (0, 0.5, 3)} == {0.01}


def test_an_unknown_schedule_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'cosine'.*constant, warmup-cosine"):
        sar_weight_schedule("cosine", 0.01, 0, 100)
    assert SAR_SCHEDULES == ("constant", "warmup-cosine")


# --- the module and its benchmark ---------------------------------------------------------------------------


def test_losses_stand_alone():
    """The losses work in anybody's loop: of this project they import nothing."""
    imports = [n for n in ast.walk(ast.parse(Path(losses.__file__).read_text())) if isinstance(n, ast.ImportFrom)]
    local = {path.stem for path in ROOT.glob("*.py")}
    assert not local & {node.module.split(".")[0] for node in imports}


def test_benchmark_prints_its_table():
    command = "-m benchmarks.loss --batch-sizes 2 --grids 14 7 --heads 3 --repeats 1 --threads 1".split()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(r"torch \S+, OpenCV \S+, .*1 thread", done.stdout)
    assert len(re.findall(r"^\| (?:random|smooth) \| (?:14 x 14|7 x 7) \| 2 \|", done.stdout, re.MULTILINE)) == 4


def test_benchmark_compares_equal_losses():
    from benchmarks.loss import BASELINES, make_maps

    maps = make_maps("smooth", 3, 2, 14, "cpu")
    for baseline in BASELINES.values():
        for ours, theirs in zip(
            loss_and_gradient(SpatialEntropyLoss(), maps), loss_and_gradient(baseline, maps), strict=True
        ):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


# ------------------------------------------------------------------------- the maps before the softmax, not after it


def maps_after_learning_their_scale(kind: str):
    """Minimise the entropy over nothing but the length of each head's query and keys; returns (before, after)."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(8, 2, 16, generator=generator)
    k = torch.randn(8, 2, 37, 16, generator=generator)
    length = torch.full((8, 2), 2.0, requires_grad=True)
    optimizer = torch.optim.Adam([length], lr=0.05)
    maps = []
    for _ in range(600):
        similarity = similarity_map(q * length[..., None], k * length[..., None, None], 16**-0.5, (6, 6), kind)
        optimizer.zero_grad()
        SpatialEntropyLoss()(similarity).backward()
        optimizer.step()
        maps.append(similarity.detach())
    return maps[0], maps[-1]


def test_after_the_softmax_growing_norms_collapse_the_maps_to_one_token():
    """Section 4.3: the network can cheat by the norms of query and keys alone."""
    before, after = maps_after_learning_their_scale("softmax")
    assert spatial_entropy(before)[0].mean() > 0.5
    assert spatial_entropy(after)[0].max() < 1e-6
    assert (spatial_entropy(after)[1] == 1).all()
    tokens = (after > after.mean((-2, -1), keepdim=True)).sum((-2, -1))
    assert (tokens == 1).float().mean() > 0.9


@pytest.mark.parametrize("kind", ["dot", "cosine"])
def test_before_the_softmax_the_norms_change_nothing(kind):
    before, after = maps_after_learning_their_scale(kind)
    torch.testing.assert_close(spatial_entropy(after)[0], spatial_entropy(before)[0], atol=1e-4, rtol=0)
    assert spatial_entropy(after)[0].mean() > 0.3
