"""Weighted k-nearest-neighbour classification of frozen features, as in DINO's ``eval_knn.py``; ``--task knn``.

The bank is the training set under the transform of evaluation. A validation image takes the class for which its k
nearest neighbours in the bank vote: each votes with the weight exp(s / 0.07), where s is the cosine of both features.

Letters of the axes: N images of the bank, T validation images, D channels of a feature, K neighbours.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from augmentation import eval_transform
from datasets import AugmentedDataset, build_split
from readers import DATASETS
from samplers import Draw
from tasks import Evaluator, Task
from tasks.options import knn as options
from tasks.settings import build_task_model, split_settings
from utils import Processes, float64, float64_device
from weights import load_weights

TEMPERATURE = 0.07
NEIGHBOURS = (10, 20, 100, 200)

# A product of so many rows takes 64 MiB, and what is computed from it a few times that.
BANK_ROWS, TEST_ROWS = 8192, 1024


class NearestNeighbourProbe(Task):
    """``--task knn``: the k-NN accuracy of a checkpoint's features; nothing is trained.

    A classifier in the checkpoint is dropped.
    """

    options = options
    metric = "knn20"

    def __init__(self, args: argparse.Namespace, dataset: "BankAndQueries", device: torch.device):
        super().__init__(args, build_task_model(args, 0, device), device)

    @classmethod
    def data(cls, args: argparse.Namespace, split: str, processes: Processes) -> "BankAndQueries":
        return knn_split(args, processes)

    def load(self, checkpoint: Mapping, key: str | None) -> list[str]:
        return load_weights(self.model, checkpoint, key)

    def evaluator(self) -> "KNearestNeighbours":
        return KNearestNeighbours()

    @classmethod
    def describe(cls, results: Mapping[str, float]) -> str:
        rates = [f"{k} {results[f'knn{k}']:.3f} ({results[f'knn{k}_top5']:.3f})" for k in NEIGHBOURS]
        return f"* k-NN Acc@1 (Acc@5) of k = {', '.join(rates)} ({results['images']} images)"


class BankAndQueries(Dataset):
    """Training images, the bank, followed by validation images; items have ``bank``, 1 for the former and else 0.

    Attributes:
        parts: both splits, the validation images last.
        classes: those of the validation images.
    """

    def __init__(self, train: AugmentedDataset, val: AugmentedDataset):
        self.parts, self.classes = (train, val), val.classes

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        train, val = self.parts
        if draw.index < len(train):
            return train[draw] | {"bank": 1}
        return val[draw._replace(index=draw.index - len(train))] | {"bank": 0}


def knn_split(args: argparse.Namespace, processes: Processes) -> BankAndQueries:
    """The images of a k-NN evaluation, with all shared options; called by all processes.

    Raises:
        UserError: see `datasets.build_split`.
    """
    settings, transform = replace(split_settings(args), pairs=0), eval_transform(args.input_size, args.crop_pct)
    return BankAndQueries(*(build_split(settings, split, transform, processes) for split in ("train", "val")))


def evaluation_note(args: argparse.Namespace) -> dict[str, str]:
    """A line of the banner if the images have no classes, for tasks that k-NN evaluates."""
    if DATASETS[args.data_set].has_classes:
        return {}
    return {"evaluation": "none: the images have no classes, so there is no k-NN accuracy and no best.pth"}


def pooled_features(model: nn.Module, images: Tensor) -> Tensor:
    """The features before the classifier, ``(B, D)``, of any model with timm's interface: [CLS] in most ViTs."""
    return model.forward_head(model.forward_features(images), pre_logits=True)


class KNearestNeighbours(Evaluator):
    """Accuracy of a weighted k-NN classification, for several k in one pass.

    Batches hold ``images (B, 3, h, w)``, ``targets (B,)``, ``bank (B,)`` and ``replaced (B,)``, in the order of
    `samplers.EvalSampler`. Images that could not be read are counted, and otherwise left out. Classes are those of the
    bank. Where the bank has fewer than k images, all of them vote.

    The result is the same for any number of processes. Similarities are float64, and of equal ones the image that
    comes first in the bank is nearer. Each process keeps the features of its own images. The processes send the bank
    to each other in pieces, so that none holds more of it than its share.

    Results, in percent: ``knn10`` and so on for each k, the share of images whose most voted class is right, and
    ``knn10_top5``, with a right class among the (up to) five that have most votes; a class without a vote is never
    among them. ``images`` counts the classified images, ``unreadable`` those left out.

    Args:
        neighbours: the values of k.
    """

    def __init__(self, neighbours: Sequence[int] = NEIGHBOURS):
        self.neighbours = tuple(neighbours)
        self.features: list[Tensor] = []
        self.rows: list[Tensor] = []

    def update(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        features = pooled_features(model, batch["images"])
        self.features.append(features.to(torch.promote_types(features.dtype, torch.float32)))
        self.rows.append(torch.stack([batch["targets"], batch["bank"], batch["replaced"]], dim=1))

    def compute(self, processes: Processes) -> dict[str, Any]:
        # 1. this process's share of the bank and of the validation images
        device = float64_device(processes.device)
        rows = [row.to(device) for row in self.rows]
        targets, bank, replaced = torch.cat([torch.empty(0, 3, dtype=torch.int64, device=device), *rows]).T
        widths = torch.tensor(self.features[0].shape[1] if self.features else 0, device=device)
        width = int(processes.gather(widths).max())  # a process without images does not know it
        features = torch.cat([torch.empty(0, width, device=device), *(each.to(device) for each in self.features)])
        position = processes.rank + processes.world_size * torch.arange(len(targets), device=device)
        of_bank, of_test = (replaced == 0) & (bank == 1), (replaced == 0) & (bank == 0)
        own = features[of_bank], torch.stack([position[of_bank], targets[of_bank]], dim=1)
        # 2. the nearest neighbours of the validation images, which meet the bank piece by piece
        most = max(self.neighbours)
        chunks = [NearestNeighbours(chunk, most) for chunk in features[of_test].split(TEST_ROWS)]
        for piece, places in bank_pieces(*own, processes):
            piece = F.normalize(float64(piece), dim=1)
            for chunk in chunks:
                chunk.add(piece, places)
        # 3. votes, and sums over all processes
        sums = float64(torch.zeros(2 * len(self.neighbours) + 2, device=device))
        sums[-2:] = torch.stack([of_test.sum(), replaced.sum()])
        for chunk, labels in zip(chunks, targets[of_test].split(TEST_ROWS), strict=True):
            ranks = [chunk_rank for k in self.neighbours for chunk_rank in hits(chunk.votes(k), labels)]
            sums[:-2] += torch.stack(ranks).sum(dim=1)
        totals = processes.gather(sums).sum(dim=0).tolist()
        names = [f"knn{k}{suffix}" for k in self.neighbours for suffix in ("", "_top5")]
        rates = {name: 100 * total / max(totals[-2], 1) for name, total in zip(names, totals, strict=False)}
        return rates | {"images": int(totals[-2]), "unreadable": int(totals[-1])}


class NearestNeighbours:
    """The nearest neighbours, seen so far, of a chunk of features.

    Attributes:
        similarity: cosines ``(T, K)``, float64, the largest first.
        places: position in the bank and label of each neighbour, ``(T, K, 2)``.

    Args:
        features: ``(T, D)``, any length.
        most: the largest number of neighbours to keep.
    """

    def __init__(self, features: Tensor, most: int):
        self.features, self.most = F.normalize(float64(features), dim=1), most
        self.similarity = self.features.new_empty(len(features), 0)
        self.places = torch.empty(len(features), 0, 2, dtype=torch.int64, device=features.device)

    def add(self, bank: Tensor, places: Tensor) -> None:
        """Compare with a piece of the bank: features ``(N, D)`` of length 1, float64, and places ``(N, 2)``."""
        similarity = self.features @ bank.T
        found = self._nearest(similarity, places[:, 0])
        similarity = torch.cat([self.similarity, similarity.gather(1, found)], dim=1)
        places = torch.cat([self.places, places[found]], dim=1)
        kept = self._nearest(similarity, places[..., 0])
        self.similarity = similarity.gather(1, kept)
        self.places = places.gather(1, kept[..., None].expand(-1, -1, 2))

    def _nearest(self, similarity: Tensor, position: Tensor) -> Tensor:
        """Indices of the largest similarities ``(T, N)``, at most `most`; of equal ones the lower position is first."""
        key = (similarity * 2**30).round().long() * 2**32 - position  # the similarity in the upper half of the bits
        return key.topk(min(self.most, key.shape[1]), dim=1).indices

    def votes(self, k: int) -> Tensor:
        """Sum of the weights of the k nearest neighbours by class, ``(T, classes)``; zeros without a neighbour."""
        weights, labels = (self.similarity[:, :k] / TEMPERATURE).exp(), self.places[:, :k, 1]
        classes = int(labels.max()) + 1 if labels.numel() else 1
        return weights.new_zeros(len(weights), classes).scatter_add_(1, labels, weights)


def hits(votes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the class of most votes ``(T, classes)`` is the label ``(T,)``, and whether one of the first five is."""
    ranked, order = votes.sort(dim=1, descending=True, stable=True)
    right = ((order == labels[:, None]) & (ranked > 0))[:, :5]
    return right[:, 0], right.any(dim=1)


def bank_pieces(features: Tensor, places: Tensor, processes: Processes) -> Iterator[tuple[Tensor, Tensor]]:
    """The bank of all processes in pieces of at most `BANK_ROWS` images; all processes get the same pieces.

    Args:
        features: this process's share, ``(N, D)``.
        places: position in the bank and label of each image, ``(N, 2)``.
    """
    sizes = processes.gather(torch.tensor(len(features), device=features.device)).tolist()
    for rank, size in enumerate(sizes):
        for start in range(0, size, BANK_ROWS):
            end = min(start + BANK_ROWS, size)
            if rank == processes.rank:
                piece = features[start:end].contiguous(), places[start:end].contiguous()
            else:
                piece = features.new_empty(end - start, features.shape[1]), places.new_empty(end - start, 2)
            if processes.world_size > 1:
                for part in piece:
                    dist.broadcast(part, rank)
            yield piece
