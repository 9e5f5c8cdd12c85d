"""DINO (Caron et al., 2021): a student learns to give its teacher's answer from every crop of an image.

The mathematics is that of facebookresearch/dino, commit 7c446df: ``main_dino.py``, ``utils.py``.

Letters of the axes: B images of a micro-batch, V crops of an image, K prototypes, C channels of a feature.
"""

import argparse
import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from datasets import build_split
from readers import DATASETS
from schedules import Position, teacher_temperature, warmup_cosine
from tasks import Task
from tasks.heads import DINOHead, feature_deviation, load_all_or_none, on_device
from tasks.knn import KNearestNeighbours, evaluation_note, knn_split
from tasks.options import dino as options
from tasks.settings import build_task_model, split_settings
from tasks.views import dino_views
from utils import Processes, in_process_group
from weights import dino_head_of, load_weights, read_checkpoint

STUDENT_TEMPERATURE = 0.1
CENTRE_MOMENTUM = 0.9
SMALL_SET, MOST_PROTOTYPES = 20_000, 4096
"""A training set of fewer images collapses easily with more prototypes than that."""
COLLAPSED = 1e-3
"""A loss within this fraction of ln K counts as that of a uniform answer."""


class CrossEntropyOfCrops(torch.autograd.Function):
    """DINO's loss: the mean over images and over the 2 (V - 1) pairs i != v of -sum q_i log softmax(z_v / .1).

    ``apply(logits (V, B, K), targets (2, B, K))`` returns a scalar; z are the student's logits of all crops, global
    ones first, and q the teacher's probabilities of the two global ones, which get no gradient.

    The loss is linear in q, so each crop needs one product: local ones with q_0 + q_1, a global one with the other q.

    Memory: the forward pass keeps the logits, which the head has made anyway, and the targets. The backward pass adds
    one array of the logits' size, their gradient; all else is of a single crop. The activations of the backbone are
    many times more; ``--grad-checkpointing`` is what bounds them. A backward pass for each resolution would, too, but
    DistributedDataParallel would then reduce the gradients once for each.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        total = logits.new_zeros(())
        for z, q, _ in _crops_with_targets(logits, targets):
            total -= (z / STUDENT_TEMPERATURE).log_softmax(dim=-1).mul_(q).sum()
        return total / _num_terms(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        logits, targets = ctx.saved_tensors
        result = torch.empty_like(logits)
        for row, (z, q, sum_of_q) in zip(result, _crops_with_targets(logits, targets), strict=True):
            torch.softmax(z / STUDENT_TEMPERATURE, dim=-1, out=row)
            row.mul_(sum_of_q).sub_(q)
        return result.mul_(gradient / (STUDENT_TEMPERATURE * _num_terms(logits))), None


def _crops_with_targets(logits: Tensor, targets: Tensor):
    """Each crop's logits ``(B, K)``, the sum of the targets it is compared with, and what that sums to over K."""
    both = targets[0] + targets[1]
    for crop, z in enumerate(logits):
        yield (z, targets[1 - crop], 1) if crop < 2 else (z, both, 2)


def _num_terms(logits: Tensor) -> int:
    crops, images, _ = logits.shape
    return 2 * (crops - 1) * images


class Centre(nn.Module):
    """The centre of the teacher's logits: a moving average of their mean, updated once an update of the weights.

    Attributes:
        center: ``(1, K)``, 0 at first; the name is that in DINO's files.
    """

    center: Tensor

    def __init__(self, out_dim: int):
        super().__init__()
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.begin()

    def begin(self) -> None:
        """Forget the logits that were added."""
        self.total, self.rows = torch.zeros_like(self.center), 0

    def add(self, logits: Tensor) -> None:
        """Add the teacher's raw logits ``(rows, K)`` of a micro-batch."""
        self.total = self.total + logits.sum(dim=0, keepdim=True)
        self.rows += len(logits)

    def update(self) -> None:
        """Move towards the mean of what all processes have added; each has added equally many rows."""
        rows = self.rows
        if in_process_group():
            dist.all_reduce(self.total)
            rows *= dist.get_world_size()
        self.center.mul_(CENTRE_MOMENTUM).add_(self.total / rows, alpha=1 - CENTRE_MOMENTUM)


class DINO(Task):
    """``--task dino``: DINO, with the spatial entropy of the student's maps (Table 12).

    The student and its projection head are trained. The teacher and its head are their moving average; the teacher is
    evaluated. It has the student's kind of last block, and neither dropout nor a loss of its own.

    Batches hold ``global_views (B, 2, 3, h, w)`` and, with local crops, ``local_views (B, V - 2, 3, h', w')``. The
    crops of one resolution pass the backbone together, and all crops the head. Rows of outputs are crop-major: crop 0
    of all images first.

    Args:
        args: the arguments of the command line.
        dataset: the training images; only their number is used.
        device: where the networks are built.
    """

    options = options
    metric = "knn20"
    main_loss = "DINO's cross-entropy between crops"
    weight_names = ("student", "teacher")
    reference_batch = 256

    def __init__(self, args: argparse.Namespace, dataset: Any, device: torch.device):
        # 1. the backbones; both are drawn from the same seed
        without_noise = {"drop": 0.0, "drop_path": 0.0, "grad_checkpointing": False}
        teacher = build_backbone(argparse.Namespace(**vars(args) | without_noise), device)
        super().__init__(args, build_backbone(args, device), device)
        # 2. the heads
        width = cast(int, teacher.num_features)
        sizes = width, args.out_dim, args.use_bn_in_head, args.norm_last_layer
        self.student_head, teacher_head = (on_device(DINOHead(*sizes), device) for _ in range(2))
        # 3. the teacher is a copy without gradients; in a tuple, it is no submodule
        teacher.load_state_dict(self.model.state_dict())
        teacher_head.load_state_dict(self.student_head.state_dict())
        self.teacher = (teacher.requires_grad_(False), teacher_head.requires_grad_(False))
        self.centre = Centre(args.out_dim).to(device)
        self.reported, self.sar_views, self.args, self.num_images = "teacher", args.sar_views, args, len(dataset)
        self.teacher_temp = args.warmup_teacher_temp

    # ------------------------------------------------------------------------------------------ command line

    @classmethod
    def data(cls, args: argparse.Namespace, split: str, processes: Processes) -> Any:
        if split == "train":
            scales = (args.global_crops_scale, args.local_crops_scale)
            views = dino_views(args.input_size, options.local_size(args), args.local_crops_number, *scales)
            return build_split(split_settings(args), split, views, processes)
        return knn_split(args, processes) if DATASETS[args.data_set].has_classes else None

    @property
    def averaged(self) -> nn.Module:
        return self.teacher[0]

    # ------------------------------------------------------------------------------------------- a micro-batch

    def schedule(self, position: Position) -> dict[str, float]:
        args = self.args
        return super().schedule(position) | {
            "lr": warmup_cosine(
                position, self.learning_rate.peak, args.min_lr, args.warmup_epochs, warmup_start=args.warmup_lr
            ),
            "weight_decay": warmup_cosine(position, args.weight_decay, args.weight_decay_end),
            "teacher_momentum": warmup_cosine(position, args.momentum_teacher, 1.0),
            "teacher_temp": teacher_temperature(
                position.epoch, args.warmup_teacher_temp, args.teacher_temp, args.warmup_teacher_temp_epochs
            ),
            "last_layer_frozen": float(position.epoch < args.freeze_last_layer),
        }

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        # 1. the student sees all crops, one pass a resolution
        images = rearrange(batch["global_views"], "B V c h w -> (V B) c h w")
        outputs: dict[str, Any] = self.run_model(images)
        features = [outputs.pop("logits")]
        if "local_views" in batch:
            small = rearrange(batch["local_views"], "B V c h w -> (V B) c h w")
            local = self.run_model(small) if self.sar_views == "all" else {"logits": self.model(small)}
            features.append(local["logits"])
            if "similarity" in local:
                outputs["similarity"] = [outputs["similarity"], local["similarity"]]
        # 2. the teacher sees the global ones
        teacher, teacher_head = self.teacher
        with torch.no_grad():
            teacher_features = teacher(images)
            teacher_logits = teacher_head(teacher_features)
        student_logits = self.student_head(torch.cat(features))
        return outputs | {"student": student_logits, "teacher": teacher_logits, "features": teacher_features}

    def losses(self, outputs: dict[str, Any], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.centre.add(outputs["teacher"])
        targets = self.targets(outputs)
        logits = rearrange(outputs["student"], "(V B) K -> V B K", B=targets.shape[1])
        return {"dino": CrossEntropyOfCrops.apply(logits, targets)}

    def targets(self, outputs: dict[str, Any]) -> Tensor:
        """The teacher's probabilities of the two global crops, ``(2, B, K)``: centred and sharpened."""
        logits = (outputs["teacher"] - self.centre.center) / self.teacher_temp
        return rearrange(logits.softmax(dim=-1), "(V B) K -> V B K", V=2)

    # --------------------------------------------------------------------------------------------- monitoring

    def measures(self, outputs: dict[str, Any], terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The teacher's entropy, the divergence of the student from it, and what shows a collapse."""
        entropy = torch.special.entr(self.targets(outputs)).sum(dim=-1).mean()
        return {
            "teacher_entropy": entropy,
            "kl": terms["dino"] - entropy,
            "feature_deviation": feature_deviation(outputs["features"].chunk(2)[0]),
            "centre_norm": self.centre.center.norm(),
        }

    def warning(self, means: Mapping[str, float]) -> str:
        uniform = math.log(self.args.out_dim)
        if any(abs(means[name] - uniform) > COLLAPSED * uniform for name in ("dino", "teacher_entropy")):
            return ""
        return (
            f"the loss is ln K = {uniform:.4f}: the teacher's answer is uniform, and nothing is learned. "
            "If this lasts, try a smaller --out-dim, a lower --teacher-temp, or a larger --total-batch"
        )

    def notes(self) -> dict[str, str]:
        args, uniform = self.args, f"a loss that stays at ln K = {math.log(self.args.out_dim):.2f} is a collapse"
        many = args.out_dim > MOST_PROTOTYPES and self.num_images < SMALL_SET
        few = f", which is likely with {self.num_images:,} images: see recipes/dino_small.args" if many else ""
        course = ["falls"]
        if args.freeze_last_layer:
            course = [f"rises when the last layer is free (epoch {args.freeze_last_layer})", "then falls"]
        notes = {
            "views": describe_views(args),
            "prototypes": f"{args.out_dim:,}; {uniform}{few}",
            "expected": f"the loss {', '.join(course)}; it does not measure quality, {self.metric} does",
        }
        return notes | evaluation_note(args)

    # ---------------------------------------------------------------------------------------------- an update

    def parameter_groups(self, args: argparse.Namespace) -> Iterable[dict[str, Any]]:
        """Weights with two or more axes decay, tokens and positions too; biases and norms do not."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        decayed = [parameter for parameter in trained if parameter.ndim > 1]
        others = [parameter for parameter in trained if parameter.ndim <= 1]
        return [
            {"params": decayed, "weight_decay": args.weight_decay, "decays": True},
            {"params": others, "weight_decay": 0.0, "decays": False},
        ]

    def begin_update(self, schedule: Mapping[str, float]) -> None:
        self.teacher_temp = schedule["teacher_temp"]
        self.centre.begin()

    def finish_gradients(self, schedule: Mapping[str, float]) -> None:
        """Clip each tensor's norm by itself; without a gradient, a frozen last layer gets no optimiser state."""
        if self.clip_grad:
            clip_each(self.parameters(), self.clip_grad)
        if schedule["last_layer_frozen"]:
            for parameter in self.student_head.last_layer.parameters():
                parameter.grad = None

    @torch.no_grad()
    def end_update(self, schedule: Mapping[str, float]) -> None:
        """The teacher follows the student of after the step; a weight that both share stays as it is (lerp)."""
        for teacher, student in zip(self.teacher, (self.model, self.student_head), strict=True):
            mean, weights = list(teacher.parameters()), list(student.parameters())
            torch._foreach_lerp_(mean, weights, 1 - schedule["teacher_momentum"])  # type: ignore[arg-type]
        self.centre.update()

    # --------------------------------------------------------------------------------- checkpoints, evaluation

    def other_modules(self) -> dict[str, nn.Module]:
        return {"student_head": self.student_head, "teacher_head": self.teacher[1], "centre": self.centre}

    def start_from(self, path: str, key: str | None) -> list[str]:
        """Go on with both networks, their heads and the centre of a DINO run, else as other tasks do.

        The file is a training checkpoint of this program or of the official one. With ``key``, or without two networks
        in the file, both backbones start from the same weights.
        """
        checkpoint = read_checkpoint(path)
        if key is not None or not {"student", "teacher"} <= checkpoint.keys():
            return super().start_from(path, key)
        notes = load_weights(self.model, checkpoint, "student") + load_weights(self.averaged, checkpoint, "teacher")
        if load_all_or_none(self.other_modules(), states_beside_backbones(checkpoint)):
            return [*notes, "student and teacher with projection heads and centre"]
        return [*notes, "projection heads and centre start anew: the file has none, or --out-dim differs"]

    def evaluated(self) -> dict[str, nn.Module]:
        return {"test_teacher": self.averaged}

    def evaluator(self) -> KNearestNeighbours:
        return KNearestNeighbours()


def describe_views(args: argparse.Namespace) -> str:
    """The crops in words, for the banner."""
    groups = {
        f"2 x {args.input_size} px": args.global_crops_scale,
        f"{args.local_crops_number} x {options.local_size(args)} px": args.local_crops_scale,
    }
    texts = [f"{crops} (area {low:g} to {high:g})" for crops, (low, high) in groups.items()]
    return " + ".join(texts if args.local_crops_number else texts[:1])


def states_beside_backbones(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """State dicts of heads and centre in a checkpoint, by the names of `DINO.other_modules`; without those it lacks."""
    if "dino_loss" not in checkpoint:
        return {name: checkpoint[name] for name in ("student_head", "teacher_head", "centre") if name in checkpoint}
    heads = {f"{network}_head": dino_head_of(checkpoint, network) for network in ("student", "teacher")}
    return heads | {"centre": checkpoint["dino_loss"]}


def build_backbone(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """A ViT without classifier, with DINO's initial values and positions for crops of any size.

    timm's initial values are DINO's, but for [CLS].
    """
    model = build_task_model(args, 0, device, positions="dino")
    nn.init.trunc_normal_(cast(Tensor, model.cls_token), std=0.02)
    return model


def clip_each(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Multiply each gradient by min(1, limit / (norm + 1e-6)), without waiting for the device."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    factors = (limit / (norms + 1e-6)).clamp(max=1)
    torch._foreach_mul_(gradients, list(factors.unbind()))
