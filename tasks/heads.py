"""Projection heads of self-supervised training, and batch normalisation over processes.

Letters of the axes: N rows (crops of images), C channels of a feature, D width of the bottleneck, K prototypes.
"""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from utils import in_process_group


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation with the statistics of all processes' rows, of which each process has equally many.

    It is for CPUs, which torch's SyncBatchNorm refuses: `on_device` puts that in its place on a GPU. The state is that
    of ``nn.BatchNorm1d``.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and in_process_group()):
            return super().forward(x)
        # 1. mean and variance of all rows; the gradients of both reach all processes
        rows = len(x) * torch.distributed.get_world_size()
        mean = all_reduce(x.sum(dim=0)) / rows
        centred = x - mean
        variance = all_reduce(centred.square().sum(dim=0)) / rows
        # 2. running statistics, of the unbiased variance
        with torch.no_grad():
            running_mean, running_var = cast(Tensor, self.running_mean), cast(Tensor, self.running_var)
            momentum = cast(float, self.momentum)
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_((variance * rows / (rows - 1)).to(running_var), momentum)
            cast(Tensor, self.num_batches_tracked).add_(1)
        # 3. normalise
        y = centred * (variance + self.eps).rsqrt()
        return y * self.weight + self.bias if self.affine else y


def on_device(head: nn.Module, device: torch.device) -> nn.Module:
    """The head on ``device``; on a GPU each `BatchNorm` becomes torch's SyncBatchNorm, of the same state."""
    head = head.to(device)
    return nn.SyncBatchNorm.convert_sync_batchnorm(head) if device.type == "cuda" else head


class PrototypeLayer(nn.Module):
    """Products with K rows of norm g: a weight-normalised linear layer without bias, ``(N, D)`` to ``(N, K)``.

    Attributes:
        weight_v: ``(K, D)``, the directions.
        weight_g: ``(K, 1)``, the norms g, 1 at first.

    Args:
        in_dim, out_dim: D and K.
        train_norm: g is trained.
    """

    def __init__(self, in_dim: int, out_dim: int, train_norm: bool):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=train_norm)
        self.weight_v = nn.Parameter(nn.Linear(in_dim, out_dim, bias=False).weight.detach())  # torch's initial values

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight_v, dim=1) * self.weight_g)


class DINOHead(nn.Module):
    """DINO's projection head (``vision_transformer.DINOHead``): features ``(N, C)`` to logits ``(N, K)``.

    An MLP to a bottleneck with GELUs, L2 normalisation, and a `PrototypeLayer`. It computes in float32 (float64 for
    float64 weights) also inside autocast. Names of the weights are DINO's.

    Args:
        in_dim, out_dim: C and K.
        batch_norm: a `BatchNorm` before each GELU.
        norm_last_layer: the norms g of the last layer stay 1.
        layers: linear layers of the MLP.
        hidden_dim, bottleneck_dim: widths of its hidden layers, and D.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        batch_norm: bool = False,
        norm_last_layer: bool = True,
        layers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ):
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (layers - 1), bottleneck_dim]
        parts: list[nn.Module] = []
        for number in range(layers):
            parts.append(nn.Linear(widths[number], widths[number + 1]))
            if number < layers - 1:
                parts += [*[BatchNorm(hidden_dim)] * batch_norm, nn.GELU()]
        self.mlp = nn.Sequential(*parts) if layers > 1 else parts[0]
        for part in parts:
            if isinstance(part, nn.Linear):
                trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)
        self.last_layer = PrototypeLayer(bottleneck_dim, out_dim, train_norm=not norm_last_layer)

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            x = self.mlp(features.to(self.last_layer.weight_v.dtype))
            return self.last_layer(F.normalize(x, dim=-1))


class MoCoHead(nn.Sequential):
    """MoCo-v3's projector or predictor (``moco/builder.py``, ``MoCo_ViT``): features ``(N, C)`` to ``(N, D)``.

    Linear layers without bias, each followed by a `BatchNorm`; then ReLU, but after the last, whose normalisation has
    no weights. It computes in float32 (float64 for float64 weights) also inside autocast. Weights have torch's initial
    values and MoCo-v3's names.

    Args:
        in_dim, out_dim: C and D.
        hidden_dim: width of the hidden layers.
        layers: linear layers; MoCo-v3's projector has 3, its predictor 2.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, layers: int):
        parts: list[nn.Module] = []
        for number, (before, after) in enumerate(pairwise([in_dim, *[hidden_dim] * (layers - 1), out_dim]), start=1):
            parts += [nn.Linear(before, after, bias=False), BatchNorm(after, affine=number < layers)]
            parts += [nn.ReLU(inplace=True)] * (number < layers)
        super().__init__(*parts)

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.to(cast(Tensor, self[0].weight).dtype))


def feature_deviation(features: Tensor) -> Tensor:
    """What shows a collapse, a scalar: 0 if all images have the same feature, about 1 if features are spread.

    It is the deviation over the images of the L2-normalised features ``(N, C)``, as a mean over channels, times
    sqrt(C).
    """
    features = F.normalize(features.float(), dim=-1)
    return features.std(dim=0, correction=0).mean() * math.sqrt(features.shape[1])


def load_all_or_none(modules: Mapping[str, nn.Module], states: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Load a state dict into each of several modules, by name; returns whether all names and shapes agree.

    Otherwise nothing is loaded.
    """
    if _shapes_of(states) != _shapes_of({name: module.state_dict() for name, module in modules.items()}):
        return False
    for name, module in modules.items():
        module.load_state_dict(states[name])
    return True


def _shapes_of(states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, torch.Size]]:
    return {name: {key: weight.shape for key, weight in state.items()} for name, state in states.items()}
