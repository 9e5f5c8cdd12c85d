"""Linear probe: linear classifiers of the features of a frozen model, by DINO's and MoCo-v3's protocols.

Sources: DINO's ``eval_linear.py``, MoCo-v3's ``main_lincls.py``. Many classifiers, which differ in learning rate and
features, train in one pass over the images. None influences another.

Letters of the axes: L classifiers, B images, D channels of a token.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from augmentation import TrainTransform, eval_transform
from datasets import AugmentedDataset, build_split, relabel
from tasks import Evaluator, Task
from tasks.classify import probabilities_of
from tasks.knn import pooled_features
from tasks.options import linear as options
from tasks.scores import ImageScores
from tasks.settings import build_task_model, split_settings
from utils import Processes, RunError, UserError, float64
from weights import classifier_of, load_weights, read_checkpoint, select_weights


class LinearProbe(nn.Module):
    """A frozen trunk, always in evaluation mode, and linear classifiers of its features.

    A classifier's features are the [CLS] tokens of the last blocks, each after the final norm, the earliest block
    first. With ``patch_mean`` they are [CLS] and the mean of the patch tokens of the last block, channel by channel in
    turn. With one block they are the pooled features, also of models other than ViTs.

    Attributes:
        blocks: the number of blocks that each classifier reads.

    Args:
        trunk: a model without a classifier.
        num_classes: outputs of each classifier.

    Raises:
        UserError: the trunk has fewer blocks, or no [CLS] tokens of them.
    """

    trunk: Any
    heads: nn.ModuleList

    def __init__(self, trunk: nn.Module, blocks: Sequence[int], num_classes: int, patch_mean: bool = False):
        super().__init__()
        self.trunk, self.blocks, self.patch_mean = trunk.requires_grad_(False), tuple(blocks), patch_mean
        self.num_features: int = self.trunk.num_features
        if self._reads_tokens() and not getattr(trunk, "has_class_token", False):
            raise UserError(
                f"{type(trunk).__name__} has no [CLS] tokens of its blocks; give --probe-blocks 1, without "
                "--avgpool-patchtokens"
            )
        if self._reads_tokens() and max(blocks) > len(self.trunk.blocks):
            raise UserError(f"--probe-blocks {max(blocks)}: the model has {len(self.trunk.blocks)} blocks; give fewer")
        widths = [self.num_features * (2 if patch_mean else number) for number in blocks]
        self.heads = nn.ModuleList(new_classifier(width, num_classes) for width in widths)

    def _reads_tokens(self) -> bool:
        return max(self.blocks) > 1 or self.patch_mean

    def train(self, mode: bool = True) -> "LinearProbe":
        super().train(mode)
        self.trunk.eval()
        return self

    @torch.no_grad()
    def features(self, images: Tensor) -> dict[int, Tensor]:
        """The features by number of blocks, ``(B, blocks * D)``, or ``(B, 2 * D)`` with ``patch_mean``."""
        if not self._reads_tokens():
            return {1: pooled_features(self.trunk, images)}
        layers = self.trunk.get_intermediate_layers(images, max(self.blocks), return_prefix_tokens=True, norm=True)
        if self.patch_mean:
            patches, prefix = layers[-1]
            return {1: torch.stack([prefix[:, 0], patches.mean(dim=1)], dim=-1).flatten(1)}
        tokens = [prefix[:, 0] for _, prefix in layers]
        return {number: torch.cat(tokens[-number:], dim=1) for number in set(self.blocks)}

    def forward(self, images: Tensor) -> Tensor:
        """Logits of all classifiers, ``(L, B, classes)``."""
        features = self.features(images)
        return torch.stack([head(features[n]) for head, n in zip(self.heads, self.blocks, strict=True)])

    def set_classifier(self, weight: Tensor, bias: Tensor) -> None:
        """Replace the classifiers by one with these weights, whose width says how many blocks it reads.

        Raises:
            UserError: it has other classes or other features.
        """
        own, (classes, width) = next(self.heads.parameters()), weight.shape
        blocks = 1 if self.patch_mean else width // self.num_features
        if (classes, width) != (len(own), self.num_features * (2 if self.patch_mean else blocks)):
            raise UserError(
                f"the linear classifier is {classes}x{width}, but the data have {len(own)} classes and the trunk's "
                f"tokens {self.num_features} channels; see --data-set, --model and --avgpool-patchtokens"
            )
        probe = LinearProbe(self.trunk, [blocks], classes, self.patch_mean)
        probe.heads[0].load_state_dict({"weight": weight, "bias": bias})
        self.blocks, self.heads = probe.blocks, probe.heads.to(own.device)


def new_classifier(width: int, num_classes: int) -> nn.Linear:
    """A linear classifier with the initial weights of both programs: N(0, 0.01), biases 0."""
    classifier = nn.Linear(width, num_classes)
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)
    return classifier


class LinearClassification(Task):
    """``--task linear``: train and evaluate a `LinearProbe` of the model in ``--finetune``.

    There is a classifier for each learning rate ``--lr`` x factor and each number of blocks. The trunk is checked at
    every evaluation to be what it was at the first update.
    """

    model: LinearProbe
    options = options
    metric = "acc1"
    main_loss = "sum of the cross-entropies of all linear classifiers"
    reference_batch = 256
    prediction = "names"

    def __init__(self, args: argparse.Namespace, dataset: AugmentedDataset, device: torch.device):
        trunk, classes = build_task_model(args, 0, device), len(dataset.classes)
        heads = [(factor, number) for number in args.probe_blocks for factor in args.lr_factors]
        self.names = [f"lr{args.lr * factor:g}_blocks{number}" for factor, number in heads]
        self.factors, self.file = [factor for factor, _ in heads], args.classifier
        probe = LinearProbe(trunk, [number for _, number in heads], classes, args.avgpool_patchtokens)
        super().__init__(args, probe.to(device), device)
        self.trunk_before: dict[str, Tensor] = {}
        self.records_images = args.eval
        self.best: dict[str, float] = {}  # of a loaded checkpoint: the accuracy of each classifier

    @classmethod
    def data(cls, args: argparse.Namespace, split: str, processes: Processes) -> AugmentedDataset:
        if split == "val":
            return build_split(split_settings(args), split, cls.evaluation_transform(args), processes)
        transform = TrainTransform(
            args.input_size, hflip=args.hflip, color_jitter=0, aa="none", interpolation="bilinear", reprob=0
        )
        return build_split(split_settings(args), split, transform, processes)

    @classmethod
    def relabel(cls, dataset: AugmentedDataset, classes: Sequence[str]) -> list[str]:
        return relabel(dataset, classes)

    @classmethod
    def evaluation_transform(cls, args: argparse.Namespace) -> Callable[[Tensor], Tensor]:
        return eval_transform(args.input_size, args.crop_pct, args.eval_interpolation)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": self.model(batch["images"])}

    def losses(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"cross_entropy": cross_entropies(outputs["logits"], batch["targets"]).mean(dim=1).sum()}

    def parameter_groups(self, args: argparse.Namespace) -> Iterable[dict[str, Any]]:
        return [
            {"params": [*head.parameters()], "lr_scale": factor, "weight_decay": args.weight_decay}
            for head, factor in zip(self.model.heads, self.factors, strict=True)
        ]

    def begin_update(self, schedule: Mapping[str, float]) -> None:
        if not self.trunk_before:
            self.trunk_before = {name: value.clone() for name, value in self.model.trunk.state_dict().items()}

    @property
    def exported(self) -> nn.Module:
        return self.model.trunk

    def start_from(self, path: str, key: str | None) -> list[str]:
        return load_weights(self.model.trunk, path, key)

    def load(self, checkpoint: Mapping, key: str | None) -> list[str]:
        """See `Task.load`. The classifiers are this program's, MoCo-v3's or DINO's (``--classifier``).

        Raises:
            UserError: also if there is no classifier to evaluate.
        """
        state, _ = select_weights(checkpoint, key)
        if any(name.startswith("heads.") for name in state):
            self.best = accuracies_of((checkpoint.get("best") or {}).get("results", {}))
            return load_weights(self.model, checkpoint, key, strict_head=True)
        classifier = classifier_of(select_weights(read_checkpoint(self.file))[0] if self.file else state)
        if classifier is None:
            raise UserError(
                f"{self.file or 'the checkpoint'} has no linear classifier; train one without --eval, or name DINO's "
                "with --classifier FILE"
            )
        notes = load_weights(self.model.trunk, checkpoint, key)
        self.model.set_classifier(*classifier)
        self.names = [f"blocks{self.model.blocks[0]}"]
        return [note for note in notes if not note.startswith("head: ")]  # a classifier is not dropped, but moved

    def evaluator(self) -> "LinearAccuracy":
        """An evaluator of all classifiers.

        Raises:
            RunError: a weight or a buffer of the trunk has changed since the first update.
        """
        trunk = self.model.trunk.state_dict()
        changed = [name for name, before in self.trunk_before.items() if not torch.equal(trunk[name], before)]
        if changed:
            raise RunError(
                f"the trunk of the linear probe must not change, but these weights did: {', '.join(changed)}"
            )
        return LinearAccuracy(self.names, ImageScores(len(self.names)) if self.records_images else None)

    def predict(self, item: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """See `Task.predict`; of several classifiers it is the one that was best in the run's best evaluation.

        Raises:
            UserError: the checkpoint does not tell which one that is.
        """
        if len(self.names) > 1 and not self.best:
            raise UserError(
                f"the checkpoint has {len(self.names)} classifiers and no evaluation that tells the best; give best.pth"
            )
        chosen = self.names.index(max(self.best, key=lambda name: self.best[name])) if self.best else 0
        return {"probabilities": probabilities_of(self.model(item["images"])[chosen, 0])}

    @classmethod
    def describe(cls, results: Mapping[str, float]) -> str:
        heads = accuracies_of(results)
        listed = ", ".join(f"{name} {rate:.3f}" for name, rate in heads.items())
        return (
            f"* Acc@1 {results['acc1']:.3f} Acc@5 {results['acc5']:.3f} loss {results['loss']:.4f} "
            f"of {max(heads, key=lambda name: heads[name])}, the best; Acc@1 of all: {listed} "
            f"({results['images']} images)"
        )


def accuracies_of(results: Mapping[str, float]) -> dict[str, float]:
    """The accuracy of each classifier by its name, of the results of an evaluation."""
    return {name.removeprefix("acc1_"): rate for name, rate in results.items() if name.startswith("acc1_")}


def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each classifier and image, ``(L, B)``: logits ``(L, B, classes)``, targets ``(B,)``."""
    losses = F.cross_entropy(logits.flatten(0, 1), targets.repeat(len(logits)), reduction="none")
    return losses.unflatten(0, logits.shape[:2])


class LinearAccuracy(Evaluator):
    """Accuracy and cross-entropy of each classifier; each image counts once.

    Batches hold ``images (B, 3, h, w)``, ``targets (B,)`` and ``replaced (B,)``. Unreadable images are counted, and
    otherwise left out. Results: ``acc1``, ``acc5`` (percent) and ``loss`` of the classifier with the best ``acc1``, and
    of each classifier with its name, as ``acc1_lr0.001_blocks4``; ``images`` and ``unreadable`` as counts.

    Args:
        names: of the L classifiers.
        recorder: also keeps what they say of each image; ``scores`` are those of the best.
    """

    MEANS = ("acc1", "acc5", "loss")

    def __init__(self, names: Sequence[str], recorder: ImageScores | None = None):
        self.names, self.recorder = tuple(names), recorder
        self.sums: list[Tensor] = []

    def update(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        logits, targets, readable = model(batch["images"]), batch["targets"], batch["replaced"] == 0
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.recorder is not None:
            self.recorder.add(logits, targets, batch["replaced"])
        right = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == targets[:, None]
        means = torch.stack([right[..., 0], right.any(dim=-1), cross_entropies(logits, targets)])  # (3, L, B)
        counts = torch.stack([readable.sum(), (~readable).sum()])
        sums = float64(means.where(readable, 0)).sum(dim=-1)
        self.sums.append(torch.cat([sums.T.flatten(), float64(counts)]))

    def compute(self, processes: Processes) -> dict[str, Any]:
        nothing = float64(torch.zeros(3 * len(self.names) + 2, device=processes.device))
        totals = processes.gather(torch.stack([nothing, *self.sums]).sum(dim=0)).sum(dim=0)
        scale = totals.new_tensor([100, 100, 1]) / totals[-2].clamp(min=1)
        rows = [dict(zip(self.MEANS, row.tolist(), strict=True)) for row in totals[:-2].unflatten(0, (-1, 3)) * scale]
        best = max(rows, key=lambda row: row["acc1"])
        if self.recorder is not None:
            self.scores = self.recorder.gather(processes, rows.index(best))
        each = {f"{mean}_{name}": row[mean] for name, row in zip(self.names, rows, strict=True) for mean in self.MEANS}
        return best | each | {"images": int(totals[-2]), "unreadable": int(totals[-1])}
