"""MoCo-v3 (Chen et al., 2021): each view of an image is to find the other among the views of all images of the batch.

The mathematics is that of facebookresearch/moco-v3, commit c349e6e: ``main_moco.py``, ``moco/builder.py``, ``vits.py``.

Letters of the axes: B images of this process, N images of all, V = 2 views of an image, C channels of a feature, D
channels of a query or key.
"""

import argparse
import math
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from timm.layers import build_sincos2d_pos_embed
from timm.models import clean_state_dict
from torch import Tensor, nn

from datasets import build_split
from readers import DATASETS
from schedules import Position, cosine_after_warmup
from tasks import Task
from tasks.heads import MoCoHead, feature_deviation, load_all_or_none, on_device
from tasks.knn import KNearestNeighbours, evaluation_note, knn_split
from tasks.options import moco as options
from tasks.settings import build_task_model, split_settings
from tasks.views import moco_views
from utils import Processes, in_process_group
from weights import MOCO_HEADS, load_weights, read_checkpoint, self_supervised

PROJECTOR_LAYERS, PREDICTOR_LAYERS = 3, 2
COLLAPSED = 0.02
"""A feature deviation below this is called a collapse; that of features in random directions is about 1."""


class MoCo(Task):
    """``--task moco``: MoCo-v3, with the spatial entropy of the base encoder's maps of both views (Table 12).

    The base encoder (a ViT and a projector) and the predictor are trained: both views pass them and become queries.
    The momentum encoder is the base encoder's moving average and gives the keys. It has the same kind of last block,
    and neither dropout nor a loss of its own. Positions are fixed, and the patch embedding keeps its initial values.

    Batches hold ``views (B, 2, 3, h, w)``. Rows of outputs are view-major: view 1 of all images first. BatchNorm's
    statistics and the keys are those of all processes, so their number does not change the mathematics.

    Args:
        args: the arguments of the command line.
        dataset: not used.
        device: where the networks are built.
    """

    options = options
    metric = "knn20"
    main_loss = "MoCo-v3's contrastive loss"
    weight_names = ("base", "momentum")
    reference_batch = 256

    def __init__(self, args: argparse.Namespace, dataset: Any, device: torch.device):
        # 1. the ViTs; both are drawn from the same seed
        without_noise = {"drop": 0.0, "drop_path": 0.0, "grad_checkpointing": False}
        momentum = build_backbone(argparse.Namespace(**vars(args) | without_noise), device)
        super().__init__(args, build_backbone(args, device), device)
        # 2. the heads
        sizes = cast(int, momentum.num_features), args.moco_mlp_dim, args.moco_dim, PROJECTOR_LAYERS
        self.base_projector, momentum_projector = (on_device(MoCoHead(*sizes), device) for _ in range(2))
        predictor = MoCoHead(args.moco_dim, args.moco_mlp_dim, args.moco_dim, PREDICTOR_LAYERS)
        self.predictor = on_device(predictor, device)
        # 3. the momentum encoder is a copy without gradients; in a tuple, it is no submodule
        momentum.load_state_dict(self.model.state_dict())
        momentum_projector.load_state_dict(self.base_projector.state_dict())
        self.momentum_encoder = (momentum.requires_grad_(False), momentum_projector.requires_grad_(False))
        self.args = args

    # ------------------------------------------------------------------------------------------ command line

    @classmethod
    def data(cls, args: argparse.Namespace, split: str, processes: Processes) -> Any:
        if split == "train":
            return build_split(split_settings(args), split, moco_views(args.input_size, args.crop_min), processes)
        return knn_split(args, processes) if DATASETS[args.data_set].has_classes else None

    @property
    def averaged(self) -> nn.Module:
        return self.momentum_encoder[0]

    # ------------------------------------------------------------------------------------------- a micro-batch

    def schedule(self, position: Position) -> dict[str, float]:
        args = self.args
        return super().schedule(position) | {
            "lr": cosine_after_warmup(
                position, self.learning_rate.peak, args.min_lr, args.warmup_epochs, warmup_start=args.warmup_lr
            ),
            "momentum": cosine_after_warmup(position, args.moco_m, 1.0) if args.moco_m_cos else args.moco_m,
        }

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        # 1. queries; BatchNorm's statistics are those of a view
        images = rearrange(batch["views"], "B V c h w -> (V B) c h w")
        outputs: dict[str, Any] = self.run_model(images)
        features = outputs.pop("logits")
        queries = [self.predictor(self.base_projector(view)) for view in features.chunk(2)]
        # 2. keys, by the momentum encoder of this update
        momentum, projector = self.momentum_encoder
        with torch.no_grad():
            keys = [projector(view) for view in momentum(images).chunk(2)]
        # 3. each view against the other one
        contrast = [contrast_logits(*pair, self.args.moco_t) for pair in zip(queries, reversed(keys), strict=True)]
        return outputs | {"contrast": torch.stack(contrast), "features": features.detach()}

    def losses(self, outputs: dict[str, Any], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        terms = [contrastive_loss(logits, self.args.moco_t) for logits in outputs["contrast"]]
        return {"moco": torch.stack(terms).sum()}

    def measures(self, outputs: dict[str, Any], terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """How many views find the other one, in percent, and what shows a collapse of the base encoder."""
        logits = outputs["contrast"]
        hits = logits.argmax(dim=-1) == own_keys(logits[0])
        return {
            "contrast_accuracy": 100 * hits.float().mean(),
            "feature_deviation": feature_deviation(outputs["features"].chunk(2)[0]),
        }

    def warning(self, means: Mapping[str, float]) -> str:
        if means["feature_deviation"] > COLLAPSED:
            return ""
        return (
            "all images have nearly the same feature: nothing is learned. If this lasts, try a lower --lr, more "
            "--warmup-epochs, or a larger --total-batch"
        )

    def notes(self) -> dict[str, str]:
        args, heads = self.args, cast(Any, self.model).blocks[0].attn.num_heads
        guess = 4 * args.moco_t * math.log(args.total_batch)
        notes = {
            "views": f"2 x {args.input_size} px (area {args.crop_min:g} to 1)",
            "expected": f"the loss of a guess is 4 T ln {args.total_batch} = {guess:.2f}; it does not measure quality, "
            f"{self.metric} does",
        }
        if args.model.startswith("vit_small") and heads != MOCO_HEADS:
            notes["heads"] = f"{heads}; MoCo-v3's own ViT-S has {MOCO_HEADS}: --model-kwargs num_heads={MOCO_HEADS}"
        return notes | evaluation_note(args)

    # ---------------------------------------------------------------------------------------------- an update

    def parameter_groups(self, args: argparse.Namespace) -> Iterable[dict[str, Any]]:
        """All that is trained decays, biases and norms too."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [{"params": trained, "weight_decay": args.weight_decay}]

    @torch.no_grad()
    def begin_update(self, schedule: Mapping[str, float]) -> None:
        """The momentum encoder follows the base encoder of before the step; only what is trained is averaged."""
        pairs = [(mean, weight) for mean, weight in self._encoder_pairs() if weight.requires_grad]
        means, weights = zip(*pairs, strict=True)
        torch._foreach_lerp_(means, weights, 1 - schedule["momentum"])  # type: ignore[call-overload]

    def _encoder_pairs(self) -> Iterable[tuple[nn.Parameter, nn.Parameter]]:
        """All parameters of the momentum encoder, each with the base encoder's."""
        encoders = zip(self.momentum_encoder, (self.model, self.base_projector), strict=True)
        return chain.from_iterable(zip(mean.parameters(), base.parameters(), strict=True) for mean, base in encoders)

    # --------------------------------------------------------------------------------- checkpoints, evaluation

    def other_modules(self) -> dict[str, nn.Module]:
        return {
            "base_projector": self.base_projector,
            "momentum_projector": self.momentum_encoder[1],
            "predictor": self.predictor,
        }

    @torch.no_grad()
    def start_from(self, path: str, key: str | None) -> list[str]:
        """Go on with both encoders and the predictor of a MoCo-v3 run, else as other tasks do.

        The file is a training checkpoint of this program or of the official one. With ``key``, or without two encoders
        in the file, both ViTs start from the same weights. Positions are those of the file, and stay.
        """
        checkpoint = read_checkpoint(path)
        states = states_beside_backbones(checkpoint)
        if key is not None or not states:
            return super().start_from(path, key)
        notes = load_weights(self.model, checkpoint, "base") + load_weights(self.averaged, checkpoint, "momentum")
        complete = load_all_or_none(self.other_modules(), states)
        for mean, weight in self._encoder_pairs():
            if not weight.requires_grad:  # official momentum encoders have drifted here by rounding
                mean.copy_(weight)
        if complete:
            return [*notes, "base and momentum encoder with projectors and predictor"]
        return [*notes, "projectors and predictor start anew: those of the file have other sizes"]

    def evaluated(self) -> dict[str, nn.Module]:
        return {"test": self.model}

    def evaluator(self) -> KNearestNeighbours:
        return KNearestNeighbours()


def contrast_logits(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Cosines of this process's queries ``(B, D)`` with the keys ``(B, D)`` of all processes, over T: ``(B, N)``.

    Float32 also inside autocast (float64 for float64).
    """
    with torch.autocast(queries.device.type, enabled=False):
        every = gather_rows(F.normalize(keys, dim=1))
        return F.normalize(queries, dim=1) @ every.T / temperature


def gather_rows(x: Tensor) -> Tensor:
    """The rows ``(B, D)`` of all processes, rank 0's first, ``(N, D)``; without gradients."""
    if not in_process_group():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def own_keys(logits: Tensor) -> Tensor:
    """The column of each row's own image in the logits ``(B, N)`` of this process, ``(B,)``."""
    first = len(logits) * (dist.get_rank() if in_process_group() else 0)
    return torch.arange(first, first + len(logits), device=logits.device)


def contrastive_loss(logits: Tensor, temperature: float) -> Tensor:
    """The mean over this process's images of the cross-entropy, times 2 T (``MoCo.contrastive_loss``).

    Args:
        logits: `contrast_logits`, ``(B, N)``.
        temperature: T.
    """
    return 2 * temperature * F.cross_entropy(logits, own_keys(logits))


def fixed_positions(grid: tuple[int, int], width: int) -> Tensor:
    """MoCo-v3's position embedding of h x w patches, row by row: sines and cosines, ``(h * w, width)``.

    On a square grid it is that of ``vits.py``. On an oblong one that counts along columns, and patches along rows; this
    function does, too.
    """
    return build_sincos2d_pos_embed(list(grid), dim=width, interleave_sin_cos=True)


@torch.no_grad()
def build_backbone(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """A ViT without classifier, with MoCo-v3's fixed positions, initial values and frozen patch embedding.

    Its linear layers have Xavier's uniform initial values, queries, keys and values as three matrices, and no biases
    at first. timm's [CLS] has the official ones.
    """
    model: Any = build_task_model(args, 0, device)
    width = model.embed_dim
    # 1. positions; zeros for [CLS]
    patches = fixed_positions(model.patch_embed.grid_size, width)
    model.pos_embed.copy_(F.pad(patches, (0, 0, model.pos_embed.shape[1] - len(patches), 0)))
    model.pos_embed.requires_grad_(False)
    # 2. initial values
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            for matrix in module.weight.chunk(3) if name.endswith("qkv") else [module.weight]:
                nn.init.xavier_uniform_(matrix)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    # 3. the patch embedding, as a linear layer of 3 p^2 inputs
    convolution = model.patch_embed.proj
    bound = math.sqrt(6 / (convolution.weight[0].numel() + width))
    nn.init.uniform_(convolution.weight, -bound, bound)
    nn.init.zeros_(convolution.bias)
    convolution.requires_grad_(not args.stop_grad_conv1)
    return model


def states_beside_backbones(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """State dicts of heads in a checkpoint with two encoders, by the names of `MoCo.other_modules`; else empty."""
    names = ("base_projector", "momentum_projector", "predictor")
    if "momentum_projector" in checkpoint:
        return {name: checkpoint[name] for name in names}
    program = self_supervised(checkpoint)
    if program is None or program.name != "MoCo-v3":
        return {}
    state = clean_state_dict(checkpoint["state_dict"])
    prefixes = dict(zip(names, ("base_encoder.head.", "momentum_encoder.head.", "predictor."), strict=True))
    return {
        name: {key.removeprefix(prefix): weight for key, weight in state.items() if key.startswith(prefix)}
        for name, prefix in prefixes.items()
    }
