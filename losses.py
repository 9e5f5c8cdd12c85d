"""Spatial entropy (Eq. 5-9), the connected components under it, and the losses it is compared with.

All of them read ``similarity``, the (B, H, h, w) maps of Eq. 4: images, heads, rows and columns of the
patch grid.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PAIRS = 64
"""Pairs of patches an image that DRLoc compares: m."""
LOCALISER_WIDTH = 512


# A map whose spread is within this many units of float rounding counts as constant: the rest of it is noise.
CONSTANT_ULPS = 16


def label_components(mask: Tensor) -> Tensor:
    """8-connected components of every map at once (Eq. 6), in tensor operations only.

    Args:
        mask: bool ``(..., h, w)``, any leading shape (also with no map in it), any grid from 1 x 1 up.

    Returns:
        int64 ``(..., h, w)``: 0 on the background; the pixels of one component share a label between 1 and
        ``max_components(h, w)``, different from that of every other component of the same map. The label is
        the number, counted row by row from 1, of the last 2 x 2 cell that the component reaches.

    Raises:
        ValueError: ``mask`` is not bool, or has no pixel grid.

    Method. The grid is cut into 2 x 2 cells; pixels that share a cell always touch, so the cell is the node
    and there are at most n = ceil(h/2) ceil(w/2) of them. Every tree of cells starts as one cell, named by
    its largest cell. In a round, each tree hooks to the largest tree it touches, if that is larger than
    itself (one windowed maximum, one scatter-maximum); then pointer jumping makes every cell point at its
    root again.

    Bound. Let c(t) be the number of trees of one component after t rounds. A tree that survives round t + 1
    was larger than all its neighbours. Had it taken in no tree in round t, all its neighbours had hooked to
    still larger ones, and it would have hooked to one of these in round t + 1. So the survivors number at
    most the trees that vanished in round t: c(t+1) <= c(t-1) - c(t) as long as c(t) > 1. With the Fibonacci
    numbers F this gives c(t) <= (n - F(t)) / F(t+1): about 1.44 log2(n) rounds reach one tree (7 for 14 x
    14, 10 for 30 x 30). Hooking goes upwards only, so no cell is further from its root than there were
    trees before the round, and ceil(log2) of that many jumps flatten the trees.

    Cost. 8 kernels a round and one a jump, with the rest about 110 for 14 x 14 and 160 for 30 x 30, mostly
    on one number a cell. They are the same for every input, so a GPU is never waited for. On a CPU the
    rounds stop as soon as nothing changes: after 3 or 4 on noise as on attention maps.
    """
    # Asking whether anything changed costs a CPU nothing, but would stall a GPU and break a compiled graph.
    return _label(mask, early_exit=mask.device.type == "cpu" and not torch.compiler.is_compiling())


def max_components(h: int, w: int) -> int:
    """The largest number of 8-connected components on an h x w grid: one for each 2 x 2 cell."""
    return ((h + 1) // 2) * ((w + 1) // 2)


@torch.no_grad()
def _label(mask: Tensor, early_exit: bool) -> Tensor:
    """``label_components``, with the early exit on request."""
    if mask.dtype != torch.bool or mask.ndim < 2 or 0 in mask.shape[-2:]:
        raise ValueError(f"mask must be bool (..., h, w) with h, w >= 1, got {mask.dtype} {tuple(mask.shape)}")
    h, w = mask.shape[-2:]
    maps = mask.reshape(-1, h, w)
    rows, columns = (h + 1) // 2, (w + 1) // 2
    roots = _merge_cells(_links(maps), rows, columns, early_exit)
    device = mask.device
    numbers = F.pad(torch.arange(1, rows * columns + 1, device=device).view(rows, columns), (1, 0, 1, 0))
    labels = numbers.view(1, -1).expand_as(roots).gather(1, roots)
    row, column = torch.arange(2, h + 2, device=device) // 2, torch.arange(2, w + 2, device=device) // 2
    cell_of_pixel = (row[:, None] * (columns + 1) + column).view(1, -1).expand(len(maps), -1)
    pixels = labels.gather(1, cell_of_pixel).view_as(maps)
    return (pixels * maps).view(mask.shape)


def _links(maps: Tensor) -> Tensor:
    """Which of its 8 neighbours each 2 x 2 cell touches: bool (M, h, w) -> int32 (3, 3, cells of all maps).

    The middle entry says whether the cell holds any pixel. Each map gets an empty row of cells above it and
    an empty column left of it: with all cells in one line, the neighbours are then at the same eight
    distances everywhere.
    """
    h, w = maps.shape[-2:]
    cells = F.pad(maps, (2, w % 2, 2, h % 2)).unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))
    upper, lower = cells.permute(2, 4, 0, 1, 3).flatten(2)
    sides = torch.stack([upper, upper | lower, lower])
    left, right = sides.unbind(1)
    # faces[i, j]: has the cell a pixel where it looks up, anywhere, down (i) and left, anywhere, right (j)?
    faces = torch.stack([left, left | right, right], dim=1)
    stride = (w + 1) // 2 + 1
    facing = F.pad(faces, (stride + 1, stride + 1)).flip(0, 1)
    row_step, column_step, _ = facing.stride()
    # facing[i, j], read at the neighbour in direction (i, j): both walk in one strided view.
    facing = facing.as_strided(faces.shape, (row_step + stride, column_step + 1, 1))
    return (faces & facing).int()


def _merge_cells(links: Tensor, rows: int, columns: int, early_exit: bool) -> Tensor:
    """The root of every cell, int64 (M, (rows + 1) * (columns + 1)); empty cells point at cell 0, which is empty."""
    stride = columns + 1
    cells = (rows + 1) * stride
    parent = links[1, 1].view(-1, cells) * torch.arange(cells, device=links.device)
    trees, fibonacci, following = rows * columns, 0, 1
    while trees > 1:
        # int32 halves the memory traffic, and CPUs have no wide 64-bit multiply
        line = F.pad(parent.flatten().int(), (stride + 1, stride + 1))
        neighbours = line.as_strided(links.shape, (stride, 1, 1))
        largest = (links * neighbours).amax((0, 1)).view_as(parent).long()
        if early_exit and torch.equal(largest, parent):
            break
        parent = parent.scatter_reduce(1, parent, largest, "amax")
        for _ in range((trees - 1).bit_length()):
            parent = parent.gather(1, parent)
        fibonacci, following = following, fibonacci + following
        trees = (rows * columns - fibonacci) // following
    return parent


def thresholded(similarity: Tensor) -> Tensor:
    """B of Eq. 5: what of each map lies above its mean, ``(..., h, w)`` for S ``(..., h, w)``, at least float32.

    A map that is constant up to rounding (see `spatial_entropy`) is 0 everywhere.
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

    With B = relu(S - m), M_j the mass of component j, T = sum_j M_j and p_j = M_j / T, the gradient of H =
    -sum_j p_j log p_j with respect to B at a pixel of component j is -(log p_j + H) / T, and 0 off the
    components; B falls by the mean m, so the gradient with respect to S is that less its mean over the map.
    It is ready at the end of the forward pass and is all that is saved: the backward pass is one
    multiplication.
    """

    @staticmethod
    def forward(ctx, similarity: Tensor) -> tuple[Tensor, Tensor]:
        excess = thresholded(similarity)
        labels = label_components(excess > 0).flatten(-2)
        excess = excess.flatten(-2)

        slots = excess.new_zeros(*excess.shape[:-1], 1 + max_components(*similarity.shape[-2:]))
        mass = slots.scatter_add(-1, labels, excess)
        total = mass.sum(-1, keepdim=True)
        total = total + (total == 0)
        p = mass / total
        log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log()
        entropy = -(p * log_p).sum(-1, keepdim=True)
        num_components = (mass > 0).sum(-1)

        if ctx.needs_input_grad[0]:
            slope = (log_p + entropy) / -total * (mass > 0)  # one for each component, read by all its pixels
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
            # The gradient grows as the map shrinks: of a map of size 1e-7 it leaves float16's range.
            limit = torch.finfo(torch.float16).max
            gradient = gradient.clamp(-limit, limit)
        return gradient.to(ctx.dtype)


def spatial_entropy(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """Spatial entropy of each map (Eq. 5-8): how evenly its components share its mass above the mean.

    Args:
        similarity: float ``(B, H, h, w)``, Eq. 4: [CLS] query against the patch keys, before the softmax.

    Returns:
        ``(entropy, num_components)``: ``entropy (B, H)`` in nats, float32 (float64 for a float64 map), also
        inside autocast, differentiable (once: its gradient is a constant for autograd); ``num_components
        (B, H)``, int64.

    Components are those of S > mean(S), strictly (8-connected, as in the released code), and no eps is
    added anywhere. A map without any, i.e. one that is constant up to rounding (spread within 16 units of
    the last place of its largest magnitude), has entropy 0, no component and gradient zero. Value and
    gradient are finite for all maps of size 1e-20 to 1e20; a NaN or infinity in a map makes its entropy
    NaN.

    Raises:
        ValueError: ``similarity`` is not a floating-point (B, H, h, w) tensor.
    """
    if similarity.ndim != 4 or not similarity.is_floating_point():
        raise ValueError(
            f"similarity must be floating-point (B, H, h, w), got {similarity.dtype} {tuple(similarity.shape)}"
        )
    return _SpatialEntropy.apply(similarity)


class SpatialEntropyLoss(nn.Module):
    """The spatial-entropy loss (Eq. 9): ``spatial_entropy`` averaged over all images and heads.

    ``forward(similarity (B, H, h, w))`` -> scalar. A map without a component counts in the mean with
    entropy 0, as in the paper's Fig. 5 (division by B x H) and the released code. Being a plain mean, the
    average over data-parallel processes of equal batch is the loss of the whole batch.
    """

    def forward(self, similarity: Tensor) -> Tensor:
        entropy, _ = spatial_entropy(similarity)
        return entropy.mean()


class TotalVariationLoss(nn.Module):
    """Total variation of the maps (Eq. 14): the sum of absolute differences between adjacent patches.

    ``forward(similarity (B, H, h, w))`` -> scalar, summed over the grid, averaged over images and heads, in
    float32 (float64 for a float64 map). ``squared=True`` gives the released code's form, half the squared
    differences.
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
    """Dense relative localisation (DRLoc, Table 4): from two tokens, how many rows and columns lie between them.

    Three linear layers on the concatenated tokens of a pair (Y. Liu et al., 2021): 657,410 parameters at width 384. It
    is needed in training only: a model's exported weights know nothing of it.

    ``forward(tokens (B, C, h, w), positions (B, m, 2, 2))`` -> ``(B, m, 2)``, the predicted distance in rows
    and in columns. ``positions[b, i]`` are the (row, column) of the pair's first and second patch, int64.
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
        channels, _, w = tokens.shape[1:]
        index = (positions[..., 0] * w + positions[..., 1]).flatten(1)  # (B, 2m)
        chosen = tokens.flatten(2).gather(2, index[:, None].expand(-1, channels, -1))
        return self.layers(chosen.unflatten(2, (-1, 2)).permute(0, 2, 3, 1).flatten(2))


def localisation_loss(distances: Tensor, positions: Tensor) -> Tensor:
    """Dense relative localisation (Y. Liu et al., 2021; Table 4): the mean absolute error in grid units.

    Args:
        distances: predicted, ``(B, m, 2)``: between the two patches of a pair, in rows and in columns.
        positions: int64 ``(B, m, 2, 2)``, (row, column) of the pair's first and second patch.

    Returns:
        A scalar, in float32 (float64 for float64 predictions), averaged over images, pairs and the two axes.
    """
    true = (positions[:, :, 0] - positions[:, :, 1]).abs()
    return (distances.to(torch.promote_types(distances.dtype, torch.float32)) - true).abs().mean()
