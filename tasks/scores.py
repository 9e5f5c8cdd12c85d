"""What a classifier says of each image of an evaluation, gathered in the images' order from all processes."""

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from utils import Processes, float64


@dataclass(frozen=True)
class Scores:
    """One entry for each readable image, ascending by its index in the data set.

    Attributes:
        index: int64 ``(N,)``.
        true, predicted: int64 ``(N,)``, classes.
        loss: float64 ``(N,)``, cross-entropy in nats.
        confidence: float64 ``(N,)``, probability of the predicted class.
    """

    index: np.ndarray
    true: np.ndarray
    predicted: np.ndarray
    loss: np.ndarray
    confidence: np.ndarray

    def __len__(self) -> int:
        return len(self.index)


class ImageScores:
    """Collects the `Scores` of one or more classifiers over the batches of this process.

    Nothing waits for the device before `gather`. An image takes 40 bytes for each classifier.

    Args:
        classifiers: their number L.
    """

    def __init__(self, classifiers: int = 1):
        self.rows: list[Tensor] = []
        self.classifiers = classifiers

    def add(self, logits: Tensor, targets: Tensor, replaced: Tensor) -> None:
        """Add the next batch in the order of `samplers.EvalSampler`.

        Args:
            logits: ``(B, classes)``, or ``(L, B, classes)`` of several classifiers.
            targets, replaced: ``(B,)``; images with ``replaced`` other than 0 are left out.
        """
        logits = logits.reshape(self.classifiers, *logits.shape[-2:])
        logs = float64(logits).log_softmax(dim=-1)
        # the same call as in the accuracies, which decides between equal logits
        predicted = logits.topk(min(5, logits.shape[-1]), dim=-1).indices[..., :1].to(logs.device)
        labels = targets.expand(self.classifiers, -1)[..., None].to(logs.device)
        columns = [labels, predicted, -logs.gather(-1, labels), logs.gather(-1, predicted).exp()]
        columns.append(replaced.expand(self.classifiers, -1)[..., None])
        self.rows.append(torch.cat([float64(column) for column in columns], dim=-1))

    def gather(self, processes: Processes, classifier: int = 0) -> Scores:
        """The scores of one classifier over all processes; called once by all of them."""
        # 1. all processes' rows, as many as of the one with the most images
        nothing = float64(torch.zeros(0, 5, device=processes.device))
        own = torch.cat([nothing, *(rows[classifier] for rows in self.rows)])
        counts = processes.gather(torch.tensor(len(own), device=processes.device))
        padded = own.new_zeros(int(counts.max()), 5)
        padded[: len(own)] = own
        # 2. process r has the images r, r + world_size, ...: the padding is at the end
        rows = rearrange(processes.gather(padded), "rank image column -> (image rank) column")[: int(counts.sum())]
        index = (rows[:, 4] == 0).nonzero()[:, 0]
        true, predicted, loss, confidence, _ = rows[index].detach().numpy().T
        return Scores(index.numpy(), true.astype(np.int64), predicted.astype(np.int64), loss, confidence)
