"""Spatial entropy (Eq. 5-9), the connected components under it, and the losses it is compared with.

Shapes: ``similarity`` is always ``(B, H, h, w)``, the maps S of Eq. 4: images, heads, rows and columns of the
patch grid.
"""

from itertools import product

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PAIRS = 64
"""Pairs of patches per image that DRLoc compares: m."""

LOCALISER_WIDTH = 512
"""Width of the two hidden layers of `Localiser`."""

CONSTANT_ULPS = 16
"""A map whose spread is within this many units of float rounding counts as constant: the rest is noise."""

DIRECTIONS = tuple(product((-1, 0, 1), repeat=2))
"""(rows down, columns right) to a cell's neighbours: from north-west over the cell itself to south-east."""


def label_components(mask: Tensor) -> Tensor:
    """8-connected components of every map at once (Eq. 6), in tensor operations only.

    Args:
        mask: bool ``(..., h, w)``. Any leading shape (also one without a map), any grid from 1 x 1 up.

    Returns:
        int64 ``(..., h, w)``: 0 on the background, and one label for all pixels of a component. Labels lie
        between 1 and ``max_components(h, w)`` and differ between the components of a map. A label is the
        number of the last 2 x 2 cell that the component reaches; cells count row by row from 1.

    Raises:
        ValueError: ``mask`` is not bool, or has no pixel grid.

    Method. The grid is cut into 2 x 2 cells, here six of them:

        pixels                      their cells

        # . | . . | . #             1 | 2 | 3          cells 1 and 5 touch at a corner:
        . # | . . | . .            ---+---+---         one component, label 5
        ----+-----+----             4 | 5 | 6
        . . | # . | . .                                cell 3 touches no other:
        . . | . . | . .                                another component, label 3

    Pixels that share a cell always touch, so the cells are the nodes of a graph. Two neighbouring cells touch
    if both have a pixel on the sides that face each other (`_links`). Each cell starts as a tree of its own,
    and `_merge_cells` joins trees in rounds: each tree hooks to the largest tree that it touches, if that is
    larger than itself. A tree is named by its root, which is its largest cell.

    Cost. `tree_bounds` says how many rounds suffice: 7 for 14 x 14 patches, 10 for 30 x 30. A round takes six
    kernels, and a jump to the roots takes one. With the rest these are about 100 for 14 x 14 and 140 for
    30 x 30. They are the same for every input of a size, so a GPU is never waited for. On a CPU the rounds stop
    as soon as nothing changes, after 3 or 4 on noise as on attention maps.
    """
    # Asking whether anything changed costs a CPU nothing, but would stall a GPU and break a compiled graph.
    return _label(mask, early_exit=mask.device.type == "cpu" and not torch.compiler.is_compiling())


def max_components(h: int, w: int) -> int:
    """The largest number of 8-connected components on an h x w grid: one per 2 x 2 cell."""
    return ((h + 1) // 2) * ((w + 1) // 2)


def tree_bounds(cells: int) -> list[int]:
    """For each round of `_merge_cells`, how many trees one component can still have at its start.

    Args:
        cells: nodes of the graph, n; every component starts as at most n trees.

    Returns:
        The bounds, from ``cells`` down to the last one above 1. Their number is the number of rounds, about
        1.44 log2(n).

    Proof. Let c(t) be the number of trees of one component after t rounds.

    1. A tree that survives round t + 1 was larger than all its neighbours at the start of that round.
    2. Suppose that it took in no tree in round t. Then each of its neighbours had hooked to a still larger
       tree, so it touched a larger tree afterwards and would have hooked in round t + 1: a contradiction.
    3. So every survivor took in at least one of the c(t-1) - c(t) trees that vanished in round t:
       c(t+1) <= c(t-1) - c(t), as long as c(t) > 1.
    4. With the Fibonacci numbers F(0) = 0, F(1) = 1, ... it follows that c(t) <= (n - F(t)) / F(t+1).
    """
    bounds, trees = [], cells
    fibonacci, following = 0, 1
    while trees > 1:
        bounds.append(trees)
        fibonacci, following = following, fibonacci + following
        trees = (cells - fibonacci) // following
    return bounds


@torch.no_grad()
def _label(mask: Tensor, early_exit: bool) -> Tensor:
    """`label_components`, with the early exit on request.

    The cells of all maps lie in one line, map by map and row by row. An empty row of cells precedes each map,
    and an empty cell precedes each row. So a neighbour is at the same distance everywhere in the line, and the
    last cell of a row never touches the first cell of the next.
    """
    if mask.dtype != torch.bool or mask.ndim < 2 or 0 in mask.shape[-2:]:
        raise ValueError(f"mask must be bool (..., h, w) with h, w >= 1, got {mask.dtype} {tuple(mask.shape)}")
    h, w = mask.shape[-2:]
    maps = mask.reshape(-1, h, w)
    rows, columns = (h + 1) // 2, (w + 1) // 2

    # From pixels to cells: which cells touch, and the last cell of each component.
    roots = _merge_cells(_links(maps), rows, columns, early_exit)

    # From cells back to pixels: the numbers of the cells leave out the empty ones.
    numbers = torch.arange(1, rows * columns + 1, device=mask.device).view(rows, columns)
    numbers = F.pad(numbers, (1, 0, 1, 0)).flatten().expand_as(roots)
    labels = numbers.gather(1, roots)
    cells = torch.arange(roots.shape[1], device=mask.device).view(rows + 1, columns + 1)
    cell_of_pixel = repeat(cells[1:, 1:], "row column -> (row 2) (column 2)")[:h, :w]
    pixels = labels.gather(1, cell_of_pixel.flatten().expand(len(maps), -1)).view_as(maps)
    return (pixels * maps).view(mask.shape)


def _links(maps: Tensor) -> Tensor:
    """Which of its eight neighbours each cell touches, and whether it has a pixel at all.

    Args:
        maps: bool ``(M, h, w)``.

    Returns:
        int32 ``(3, 3, M * cells of a map)``, 0 or 1, in the order of `DIRECTIONS`. The middle entry says
        whether the cell has a pixel. The cells are those of the line that `_label` describes.

    A cell, its four pixels, and its neighbours:

        north-west |    north    | north-east
        -----------+-------------+-----------
                   |   nw   ne   |
              west |             | east
                   |   sw   se   |
        -----------+-------------+-----------
        south-west |    south    | south-east

    The cell and its northern neighbour touch if the cell has a pixel at nw or ne and the neighbour has one at
    sw or se. The cell and its north-eastern neighbour touch if the cell has ne and the neighbour has sw.
    """
    h, w = maps.shape[-2:]
    row_step = (w + 1) // 2 + 1  # cells from one to that below it
    margin = row_step + 1  # no neighbour is further away; with empty cells at both ends of the line, all exist

    # The four pixels of each cell, each as a line.
    pixels = F.pad(maps, (2, w % 2, 2, h % 2))
    lines = rearrange(pixels, "m (row south) (column east) -> south east (m row column)", south=2, east=2)
    (nw, ne), (sw, se) = F.pad(lines, (margin, margin))

    # Has a cell a pixel on the side where it looks in a direction?
    north, south, west, east = nw | ne, sw | se, nw | sw, ne | se
    side = dict(zip(DIRECTIONS, (nw, north, ne, west, north | south, east, sw, south, se), strict=True))

    # Both sides must have one: the cell's own, and that of the neighbour which looks back.
    size = lines.shape[-1]
    own = torch.stack([side[direction] for direction in DIRECTIONS])[:, margin:-margin]
    opposite = [side[-down, -right].narrow(0, margin + down * row_step + right, size) for down, right in DIRECTIONS]
    return (own & torch.stack(opposite)).unflatten(0, (3, 3)).int()


def _merge_cells(links: Tensor, rows: int, columns: int, early_exit: bool) -> Tensor:
    """The root of every cell: the last cell of its component.

    Args:
        links: see `_links`.
        rows, columns: of a map's cells, without the empty ones.
        early_exit: stop after a round without change.

    Returns:
        int64 ``(M, (rows + 1) * (columns + 1))``, positions within the map. Empty cells point at cell 0,
        which is empty.
    """
    row_step, size = columns + 1, links.shape[-1]
    margin = row_step + 1
    cells = torch.arange((rows + 1) * row_step, device=links.device)
    parent = links[1, 1].view(-1, len(cells)) * cells

    # One line for all rounds, int32: half the memory traffic, and CPUs have no wide 64-bit multiply.
    line = links.new_zeros(margin + size + margin)
    here = line[margin:-margin].view_as(parent)
    around = _windows(line, size, row_step)

    for trees in tree_bounds(rows * columns):
        # The largest tree that each cell touches; its own tree is one of them.
        here.copy_(parent)
        largest = (links * around).amax((0, 1)).view_as(parent).long()
        if early_exit and torch.equal(largest, parent):
            break
        # Each root hooks to the largest tree that a cell of its own touches.
        parent = parent.scatter_reduce(1, parent, largest, "amax")
        # Every cell points at its root again: a root is at most `trees` steps away, and a jump halves that.
        for _ in range((trees - 1).bit_length()):
            parent = parent.gather(1, parent)
    return parent


def _windows(line: Tensor, size: int, row_step: int) -> Tensor:
    """Each cell's 3 x 3 neighbourhood: a view ``(3, 3, size)`` of a line with a margin at both ends.

    ``[1 + down, 1 + right]`` is the line shifted by so many rows and columns, in the order of `DIRECTIONS`.
    """
    shifts = line.unfold(0, size, 1)  # shifts[i]: the line from its i-th cell on
    three_rows = shifts.unfold(0, 3, row_step)  # of these, three neighbouring ones in each of three rows
    return three_rows.movedim(-1, 1)


def thresholded(similarity: Tensor) -> Tensor:
    """B of Eq. 5: the part of each map above its mean.

    Args:
        similarity: S, float ``(..., h, w)``.

    Returns:
        ``(..., h, w)``, float32 (float64 for float64 maps). A map that is constant up to rounding (see
        `spatial_entropy`) is 0 everywhere.
    """
    values = similarity.to(torch.promote_types(similarity.dtype, torch.float32)).flatten(-2)
    lowest, highest = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    # A shift does not change the entropy, but the mean of 10000 + x is rounded more than that of x.
    values = values - lowest
    rounding = CONSTANT_ULPS * torch.finfo(values.dtype).eps * torch.maximum(lowest.abs(), highest.abs())
    spread = highest - lowest
    threshold = torch.where(spread <= rounding, spread, values.mean(-1, keepdim=True))
    return F.relu(values - threshold).view_as(similarity)


class _SpatialEntropy(torch.autograd.Function):
    """Entropy and number of components of each map, with the gradient in closed form.

    Let B = relu(S - m) with the mean m, M_j the mass of component j, T = sum_j M_j and p_j = M_j / T. The
    entropy is H = -sum_j p_j log p_j (Eq. 8).

    1. The gradient with respect to B is -(log p_j + H) / T at a pixel of component j, and 0 elsewhere.
    2. The mean m depends on every pixel. So the gradient with respect to S is the gradient of step 1 less its
       mean over the map.

    The forward pass computes this gradient and saves nothing else. The backward pass is one multiplication.
    """

    @staticmethod
    def forward(ctx, similarity: Tensor) -> tuple[Tensor, Tensor]:
        # Connected components of what lies above the mean, Eq. 5 and 6.
        excess = thresholded(similarity)
        labels = label_components(excess > 0).flatten(-2)
        excess = excess.flatten(-2)

        # Probability of each component, Eq. 7; slot 0 is the background, whose mass is 0.
        slots = excess.new_zeros(*excess.shape[:-1], 1 + max_components(*similarity.shape[-2:]))
        mass = slots.scatter_add(-1, labels, excess)
        total = mass.sum(-1, keepdim=True)
        total = total + (total == 0)
        p = mass / total

        # Entropy, Eq. 8. A slot without mass has p = 0 and adds nothing.
        log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log()
        entropy = -(p * log_p).sum(-1, keepdim=True)
        num_components = (mass > 0).sum(-1)

        # Gradient with respect to S. The slope is one number per component, read by all its pixels.
        if ctx.needs_input_grad[0]:
            slope = (log_p + entropy) / -total * (mass > 0)
            gradient = slope.gather(-1, labels)
            gradient = gradient - gradient.mean(-1, keepdim=True)
            ctx.save_for_backward(gradient.view_as(similarity))
            ctx.dtype = similarity.dtype
        ctx.mark_non_differentiable(num_components)
        return entropy.squeeze(-1), num_components

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_entropy: Tensor, _) -> Tensor:
        (gradient,) = ctx.saved_tensors
        gradient = gradient * grad_entropy[..., None, None]
        if ctx.dtype == torch.float16:
            # The gradient grows as the map shrinks: for values of about 1e-7 it exceeds float16's range.
            limit = torch.finfo(torch.float16).max
            gradient = gradient.clamp(-limit, limit)
        return gradient.to(ctx.dtype)


def spatial_entropy(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """Spatial entropy of each map (Eq. 5-8): how evenly its components share its mass above the mean.

    Args:
        similarity: S of Eq. 4, float ``(B, H, h, w)``: [CLS] query against the patch keys, before the softmax.

    Returns:
        ``(entropy, num_components)``. ``entropy (B, H)`` is in nats, float32 (float64 for a float64 map), also
        inside autocast. It is differentiable once: its gradient is a constant for autograd.
        ``num_components (B, H)`` is int64.

    Raises:
        ValueError: ``similarity`` is not a floating-point (B, H, h, w) tensor.

    Components are 8-connected, as in the released code, and made of the pixels with S > mean(S), strictly. No
    eps is added anywhere.

    A map is constant up to rounding if its spread is within 16 units of the last place of its largest
    magnitude. It has entropy 0, no component and gradient zero. Value and gradient are finite for all maps of
    size 1e-20 to 1e20. A NaN or infinity in a map makes its entropy NaN.
    """
    if similarity.ndim != 4 or not similarity.is_floating_point():
        raise ValueError(
            f"similarity must be floating-point (B, H, h, w), got {similarity.dtype} {tuple(similarity.shape)}"
        )
    return _SpatialEntropy.apply(similarity)


class SpatialEntropyLoss(nn.Module):
    """The spatial-entropy loss (Eq. 9): ``spatial_entropy`` averaged over all images and heads.

    ``forward(similarity (B, H, h, w))`` -> scalar in nats. A map without a component counts in the mean with
    entropy 0, as in the paper's Fig. 5 (division by B x H) and in the released code. The mean over data-parallel
    processes of equal batch is the loss of the whole batch.
    """

    def forward(self, similarity: Tensor) -> Tensor:
        entropy, _ = spatial_entropy(similarity)
        return entropy.mean()


class TotalVariationLoss(nn.Module):
    """Total variation of the maps (Eq. 14): the sum of absolute differences between adjacent patches.

    ``forward(similarity (B, H, h, w))`` -> scalar, summed over the grid, averaged over images and heads, in
    float32 (float64 for a float64 map).

    Args:
        squared: take half the squared differences, the form of the released code.
    """

    def __init__(self, squared: bool = False):
        super().__init__()
        self.squared = squared

    def forward(self, similarity: Tensor) -> Tensor:
        values = similarity.to(torch.promote_types(similarity.dtype, torch.float32))
        total = sum(self._cost(values.diff(dim=axis)).sum((-2, -1)) for axis in (-2, -1))
        return total.mean()

    def _cost(self, difference: Tensor) -> Tensor:
        return 0.5 * difference.square() if self.squared else difference.abs()


class Localiser(nn.Module):
    """Dense relative localisation (DRLoc, Table 4): how many rows and columns lie between two tokens.

    Three linear layers on the concatenated tokens of a pair (Y. Liu et al., 2021): 657,410 parameters at width
    384. Only training needs it: a model's exported weights do not contain it.

    ``forward(tokens (B, C, h, w), positions (B, m, 2, 2))`` -> ``(B, m, 2)``, the predicted distance in rows
    and in columns. ``positions[b, i]`` holds the (row, column) of the pair's first and second patch, int64.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 * channels, LOCALISER_WIDTH),
            nn.ReLU(),
            nn.Linear(LOCALISER_WIDTH, LOCALISER_WIDTH),
            nn.ReLU(),
            nn.Linear(LOCALISER_WIDTH, 2),
        )

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        _, channels, _, w = tokens.shape
        row, column = positions.unbind(-1)
        index = repeat(row * w + column, "b pair end -> b c (pair end)", c=channels)
        patches = rearrange(tokens, "b c h w -> b c (h w)")
        pairs = rearrange(patches.gather(2, index), "b c (pair end) -> b pair (end c)", end=2)
        return self.layers(pairs)


def localisation_loss(distances: Tensor, positions: Tensor) -> Tensor:
    """Dense relative localisation (Y. Liu et al., 2021; Table 4): the mean absolute error in grid units.

    Args:
        distances: ``(B, m, 2)``, predicted between the two patches of a pair, in rows and in columns.
        positions: int64 ``(B, m, 2, 2)``, (row, column) of the pair's first and second patch.

    Returns:
        A scalar, float32 (float64 for float64 predictions), averaged over images, pairs and the two axes.
    """
    true = (positions[:, :, 0] - positions[:, :, 1]).abs()
    return (distances.to(torch.promote_types(distances.dtype, torch.float32)) - true).abs().mean()
