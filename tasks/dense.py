"""What segmentation and detection share: the backbone, its weights, ViTDet's optimisation."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from models.pvt import DensePVT
from models.vitdet import ViTDet
from models_sar import SIZES
from schedules import Position, poly_factor, steps_factor
from tasks import Task
from utils import UserError
from weights import load_trunk


def build_backbone(args: argparse.Namespace) -> ViTDet | DensePVT:
    """The backbone that the arguments describe, with random weights; ``pretrain_size`` is one of ``--model-kwargs``.

    Raises:
        UserError: the sizes give no working model.
    """
    sizes = {
        "patch_size": args.patch_size,
        "last_block": args.last_block,
        "similarity": args.sar_similarity,
        "proj_drop_rate": args.drop,
        "drop_path_rate": args.drop_path,
        **args.model_kwargs,
    }
    try:
        if args.model.startswith("pvt"):
            backbone: ViTDet | DensePVT = DensePVT(img_size=sizes.pop("pretrain_size", 224), **sizes)
        else:
            backbone = ViTDet(img_size=args.input_size, **SIZES[args.model.split("_")[1]] | sizes)
    except Exception as error:  # an impossible size raises errors of many types
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--model {args.model} with {sizes}: {reason}") from error
    if args.grad_checkpointing:
        backbone.set_grad_checkpointing()
    return backbone


class DenseTask(Task):
    """A task whose ``model`` has a ``backbone`` of `build_backbone`.

    ``--lr`` is that of the head, and is not scaled with the batch. That of a block is lower by ``--layer-decay`` for
    each block after it.
    """

    reference_batch = None

    def __init__(self, args: argparse.Namespace, model: nn.Module, device: torch.device):
        super().__init__(args, model.to(device), device)
        self.factor = {"steps": steps_factor, "poly": poly_factor}[args.lr_schedule]
        self.warmup_updates, self.lr_schedule = args.warmup_updates, args.lr_schedule

    @classmethod
    def relabel(cls, dataset: Any, classes: Sequence[str]) -> list[str]:
        if list(dataset.classes) != list(classes):
            few = ", ".join(name for name in dataset.classes if name not in classes) or "the same, in another order"
            raise UserError(f"the images have other classes than the checkpoint ({few}); take images of its classes")
        return []

    def schedule(self, position: Position) -> dict[str, float]:
        lr = self.learning_rate.peak * self.factor(position, self.warmup_updates)
        return super().schedule(position) | {"lr": lr}

    def notes(self) -> dict[str, str]:
        """Lines of the banner."""
        memory = (
            "each step line of a GPU has the peak; a smaller --batch-size with the same total batch needs less, and"
        )
        return {
            "memory": f"{memory} so does --grad-checkpointing",
            "lr": f"{self.learning_rate.peak:g}, not scaled with the batch; {self.lr_schedule}, after "
            f"{self.warmup_updates} updates of warm-up",
        }

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """timm's groups of layers, by names of parameters; what matches none belongs to the last group."""
        return {"stem": r"^model\.backbone\.(?:patch_embed|pos_embed)", "blocks": r"^model\.backbone\.blocks\.(\d+)"}

    def parameter_groups(self, args: argparse.Namespace) -> Iterable[dict[str, Any]]:
        without = () if args.decay_all else ("model.backbone.pos_embed",)
        return param_groups_layer_decay(
            self,
            args.weight_decay,
            no_weight_decay_list=without,
            weight_decay_exclude_1d=not args.decay_all,
            layer_decay=args.layer_decay,
        )

    def start_from(self, path: str, key: str | None) -> list[str]:
        """Start the backbone from a classifier's weights, see `weights.load_trunk`; the rest is random."""
        return load_trunk(cast(nn.Module, self.model.backbone), path, key, other_last_block=True)


def describe_rates(rates: Mapping[str, float]) -> str:
    """Percentages by name in words: ``bird 71.2, boat 60.4``; of more than 25 classes, that log.txt has them."""
    if len(rates) > 25:
        return f"{len(rates)} classes, see log.txt"
    return ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
