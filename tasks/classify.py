"""Image classification: Mixup and CutMix, cross-entropy, averaged weights; accuracy and measures of the maps."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from augmentation import TrainTransform, erase, eval_transform
from datasets import AugmentedDataset, build_split, relabel
from losses import spatial_entropy
from schedules import Position
from tasks import Evaluator, Task
from tasks.options import classify as options
from tasks.scores import ImageScores
from tasks.settings import build_task_model, split_settings
from utils import Processes, float64


class Classification(Task):
    """``--task classify``: DeiT's training (Tables 1 to 4, 7, 9 and 10).

    Args:
        args: the arguments of the command line.
        dataset: the training or validation images, with ``classes``.
        device: where the model is built.
    """

    options = options
    metric = "acc1"
    main_loss = "cross-entropy"
    prediction = "names"

    def __init__(self, args: argparse.Namespace, dataset: AugmentedDataset, device: torch.device):
        num_classes = len(dataset.classes)
        super().__init__(args, build_task_model(args, num_classes, device), device)
        self.repeats, self.reported, self.erasing = 3 if args.repeated_aug else 1, args.report, args.remode
        self.mixup = build_mixup(args, num_classes)
        smoothing = 0.0 if self.mixup else args.smoothing  # the soft targets of Mixup are already smoothed
        if args.class_weights == "balanced" and not args.eval:
            weights = balanced_weights(dataset.base.targets, num_classes).to(device)
            self.criterion: nn.Module = WeightedCrossEntropy(weights, smoothing)
        else:
            self.criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)
        self.ema_warmup = args.model_ema and args.model_ema_warmup
        ema = {"decay": args.model_ema_decay, "use_warmup": self.ema_warmup}
        self.ema = (ModelEmaV3(self.model, **ema),) if args.model_ema else ()
        self.head_classes, self.class_names = () if args.keep_head else dataset.classes, dataset.classes
        self.records_images, self.layer_decay = args.eval, args.layer_decay

    @classmethod
    def data(cls, args: argparse.Namespace, split: str, processes: Processes) -> AugmentedDataset:
        transform = cls.evaluation_transform(args) if split == "val" else train_transform(args)
        return build_split(split_settings(args), split, transform, processes)

    @classmethod
    def evaluation_transform(cls, args: argparse.Namespace) -> Callable[[Tensor], Tensor]:
        return eval_transform(args.input_size, args.crop_pct)

    @property
    def averaged(self) -> nn.Module | None:
        return self.ema[0].module if self.ema else None

    def schedule(self, position: Position) -> dict[str, float]:
        """With ``--model-ema-warmup`` also ``model_ema_decay``, timm's for the update that follows."""
        schedule = super().schedule(position)
        for ema in self.ema * self.ema_warmup:
            schedule["model_ema_decay"] = ema.get_decay(position.update + 1)
        return schedule

    def notes(self) -> dict[str, str]:
        notes = {}
        if self.layer_decay != 1:
            notes["layer decay"] = f"lr x {self.layer_decay:g} from each block to the one before it"
        if isinstance(self.criterion, WeightedCrossEntropy):
            weights = self.criterion.weights
            ends = [
                f"{weights[label]:.3g} ({self.class_names[label]})" for label in (weights.argmin(), weights.argmax())
            ]
            equal = "all 1, as the classes have equally many images"
            notes["class weights"] = "balanced, " + (equal if weights.min() == weights.max() else " to ".join(ends))
        return notes

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        images, targets = batch["images"], batch["targets"]
        if "erased" in batch:
            images = erase(images, batch["erased"], self.erasing)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        return batch | {"images": images, "targets": targets}

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.run_model(batch["images"], batch.get("pairs"))

    def losses(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"cross_entropy": self.criterion(outputs["logits"], batch["targets"])}

    def parameter_groups(self, args: argparse.Namespace) -> Iterable[dict[str, Any]]:
        """See `tasks.Task.parameter_groups`; with ``--layer-decay`` also by layer, from the head to the stem."""
        if args.layer_decay == 1:
            return super().parameter_groups(args)
        layers = param_groups_layer_decay(
            self.model, args.weight_decay, self.model.no_weight_decay(), layer_decay=args.layer_decay
        )
        return layers + param_groups_weight_decay(nn.ModuleDict(self.other_modules()), args.weight_decay)

    @torch.no_grad()
    def end_update(self, schedule: Mapping[str, float]) -> None:
        for ema in self.ema:
            ema.apply_update_(self.model, schedule.get("model_ema_decay", ema.decay))

    @classmethod
    def relabel(cls, dataset: AugmentedDataset, classes: Sequence[str]) -> list[str]:
        return relabel(dataset, classes)

    def evaluator(self) -> "Accuracy":
        return Accuracy(ImageScores() if self.records_images else None)

    def predict(self, item: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {"probabilities": probabilities_of(self.model(item["images"])[0])}

    @classmethod
    def describe(cls, results: Mapping[str, float]) -> str:
        return (
            f"* Acc@1 {results['acc1']:.3f} Acc@5 {results['acc5']:.3f} loss {results['loss']:.4f} "
            f"spatial entropy {results['spatial_entropy']:.3f} components {results['components']:.2f} "
            f"({results['images']} images)"
        )


class WeightedCrossEntropy(nn.Module):
    """Cross-entropy with a weight for each class, for class numbers and for soft targets, such as those of Mixup.

    The loss of an image with target probabilities y, smoothed, is ``- sum_c w_c y_c log p_c``; the mean is over images.
    For probabilities this is torch's cross-entropy. For class numbers torch divides by the weights of the batch, so
    that the split of an update into micro-batches would change it.

    Args:
        weights: ``(K,)``.
        smoothing: label smoothing.
    """

    weights: Tensor

    def __init__(self, weights: Tensor, smoothing: float):
        super().__init__()
        self.smoothing = smoothing
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits ``(B, K)`` and targets, ``(B,)`` or ``(B, K)``, to a scalar."""
        if targets.ndim == 1:
            targets = F.one_hot(targets, logits.shape[1]).to(self.weights.dtype)
        return F.cross_entropy(logits, targets, self.weights, label_smoothing=self.smoothing)


def balanced_weights(targets: np.ndarray, num_classes: int) -> Tensor:
    """scikit-learn's "balanced" weights n / (k n_c), float32 ``(k,)``; their mean over the n images is 1."""
    counts = np.bincount(targets, minlength=num_classes).clip(min=1)
    return torch.from_numpy(len(targets) / (num_classes * counts)).float()


def probabilities_of(logits: Tensor) -> np.ndarray:
    """The softmax of one image's logits ``(K,)``, on the host, float64."""
    return float64(logits).softmax(dim=0).cpu().numpy()


def train_transform(args: argparse.Namespace) -> TrainTransform:
    """DeiT's augmentation with the settings of the arguments."""
    return TrainTransform(
        args.input_size,
        scale=args.scale,
        hflip=args.hflip,
        color_jitter=args.color_jitter,
        aa=args.aa,
        interpolation=args.train_interpolation,
        reprob=args.reprob,
        recount=args.recount,
    )


def build_mixup(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    """timm's Mixup and CutMix with the settings of the arguments; None if both are off."""
    if not (args.mixup or args.cutmix):
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


class Accuracy(Evaluator):
    """Accuracy, cross-entropy, and spatial entropy and components of the similarity maps; each image counts once.

    Batches hold ``images (B, 3, h, w)``, ``targets (B,)`` and ``replaced (B,)``. Images that could not be read are
    counted, and left out of all means. Results: ``acc1`` and ``acc5`` (percent), ``loss``, ``spatial_entropy`` (nats,
    Eq. 7) and ``components`` per map, as means over images and heads; ``images`` and ``unreadable`` as counts.

    Args:
        recorder: also keeps what is said of each image, for ``scores``.
    """

    MEANS = ("loss", "acc1", "acc5", "spatial_entropy", "components")

    def __init__(self, recorder: ImageScores | None = None):
        self.sums: list[Tensor] = []
        self.recorder = recorder

    def update(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        logits, similarity = model(batch["images"], return_similarity=True)
        self.sums.append(batch_sums(logits.float(), batch["targets"], similarity, batch["replaced"]))
        if self.recorder is not None:
            self.recorder.add(logits.float(), batch["targets"], batch["replaced"])

    def compute(self, processes: Processes) -> dict[str, Any]:
        nothing = torch.zeros(len(self.MEANS) + 2, device=processes.device)
        totals = processes.gather(float64(torch.stack([nothing, *self.sums])).sum(dim=0)).sum(dim=0).tolist()
        count = max(totals[0], 1.0)
        means = {name: total / count for name, total in zip(self.MEANS, totals[1:-1], strict=True)}
        for name in ("acc1", "acc5"):
            means[name] *= 100
        if self.recorder is not None:
            self.scores = self.recorder.gather(processes)
        return means | {"images": int(totals[0]), "unreadable": int(totals[-1])}


def batch_sums(logits: Tensor, targets: Tensor, similarity: Tensor, replaced: Tensor) -> Tensor:
    """Sums over a batch: number of readable images, their `Accuracy.MEANS`, number of unreadable images."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
    entropy, components = spatial_entropy(similarity)
    columns = torch.stack(
        [
            torch.ones_like(targets, dtype=torch.float32),
            nn.functional.cross_entropy(logits, targets, reduction="none"),
            ranked[:, 0].float(),
            ranked.any(dim=1).float(),
            entropy.float().mean(dim=1),
            components.float().mean(dim=1),
        ]
    )
    readable = replaced == 0
    return torch.cat([columns.where(readable, 0).sum(dim=1), (~readable).sum()[None]])
