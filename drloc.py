"""Dense relative localisation (DRLoc, Table 4): the MLP that trains beside a model, and both in one module.

From the tokens of two random patches the MLP predicts how many rows and columns lie between them
(Y. Liu et al., 2021). It is needed in training only: a model's exported weights know nothing of it.

Letters of the axes: B images, C channels, h x w patches, m pairs an image.
"""

import torch
from torch import Tensor, nn

PAIRS = 64  # m
HIDDEN = 512


class Localiser(nn.Module):
    """Three linear layers on the concatenated tokens of a pair: 657,410 parameters at width 384.

    ``forward(tokens (B, C, h, w), positions (B, m, 2, 2))`` -> ``(B, m, 2)``, the predicted distance in rows
    and in columns. ``positions[b, i]`` are the (row, column) of the pair's first and second patch, int64.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 * channels, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, 2),
        )

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        channels, _, w = tokens.shape[1:]
        index = (positions[..., 0] * w + positions[..., 1]).flatten(1)  # (B, 2m)
        chosen = tokens.flatten(2).gather(2, index[:, None].expand(-1, channels, -1))
        return self.layers(chosen.unflatten(2, (-1, 2)).permute(0, 2, 3, 1).flatten(2))


class Trainee(nn.Module):
    """All that a step trains: the model, and the localiser beside it where DRLoc is on.

    The optimiser, the averaged weights and DistributedDataParallel see this module; evaluation and exported
    weights only its ``model``.
    """

    def __init__(self, model: nn.Module, localiser: Localiser | None = None):
        super().__init__()
        self.model = model
        self.localiser = localiser

    def no_weight_decay(self) -> set[str]:
        """timm's convention: parameters whose names are not for weight decay."""
        return {f"model.{name}" for name in self.model.no_weight_decay()}

    def forward(self, images: Tensor, similarity: bool = False, draws: Tensor | None = None) -> dict[str, Tensor]:
        """``logits (B, classes)``, and what the regularisers read.

        Args:
            images: ``(B, 3, height, width)``.
            similarity: add ``similarity (B, H, h, w)``, Eq. 4.
            draws: for the localiser, uniform in [0, 1), ``(B, m, 2, 2)``: each patch's row and column as a
                share of the grid; adds ``positions`` and ``distances`` as in :class:`Localiser`.
        """
        if not similarity and draws is None:
            return {"logits": self.model(images)}
        values = self.model(images, return_similarity=similarity, return_tokens=draws is not None)
        names = ["logits", *["similarity"] * similarity, *["tokens"] * (draws is not None)]
        outputs = dict(zip(names, values, strict=True))
        if draws is not None:
            tokens = outputs.pop("tokens")
            h, w = tokens.shape[2:]
            outputs["positions"] = torch.stack([draws[..., 0] * h, draws[..., 1] * w], dim=-1).long()
            outputs["distances"] = self.localiser(tokens, outputs["positions"])
        return outputs
