"""Checkpoints of other programs and of this one, with small weights."""

import argparse
from pathlib import Path

import timm
import torch

import models_sar  # noqa: F401 - registers the models
from arguments import parse_arguments
from tasks.settings import build_task_model

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 32, "patch_size": 8, "num_classes": 5}
OWN_SIDE = 8
OWN = (
    "--data-set folder --data-path x --model vit_tiny_sar --input-size 8 --patch-size 2 "
    "--model-kwargs embed_dim=24 depth=2 num_heads=3"
).split()


def make(name="vit_tiny", **kwargs):
    return timm.create_model(name, **{**SMALL, **kwargs})


def with_prefix(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def dino_head(prefix=""):
    """Projection head: three layers and a weight-normalised last one."""
    names = ["mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.4.bias", "last_layer.weight_g", "last_layer.weight_v"]
    return {f"{prefix}head.{name}": torch.randn(4) for name in names}


def headless(seed=1):
    torch.manual_seed(seed)
    return make(num_classes=0).state_dict()


def write_dino(path, student, teacher, heads=True, backbone="backbone."):
    """A training checkpoint in DINO's layout: the student in DistributedDataParallel, the teacher not."""
    torch.save(
        {
            "student": with_prefix(f"module.{backbone}", student) | (dino_head("module.") if heads else {}),
            "teacher": with_prefix(backbone, teacher) | (dino_head() if heads else {}),
            "optimizer": {"state": {}, "param_groups": []},
            "epoch": 100,
            "args": argparse.Namespace(arch="vit_small", patch_size=16, out_dim=65536),
            "fp16_scaler": {},
            "dino_loss": {"center": torch.zeros(1, 4)},
        },
        path,
    )


def moco_head(prefix):
    """Projector or predictor: linear layers without biases between batch norms."""
    names = ["0.weight", "1.weight", "1.bias", "1.running_mean", "1.num_batches_tracked", "3.weight", "4.running_var"]
    return {f"{prefix}.{name}": torch.randn(4) for name in names}


def write_moco(path, base, momentum):
    """A training checkpoint in MoCo-v3's layout."""
    state = {}
    for name, encoder in (("base_encoder", base), ("momentum_encoder", momentum)):
        state |= with_prefix(f"module.{name}.", encoder) | moco_head(f"module.{name}.head")
    state |= moco_head("module.predictor")
    torch.save({"epoch": 300, "arch": "vit_small", "state_dict": state, "optimizer": {}, "scaler": {}}, path)


def moco_positions(width, side):
    """As MoCo-v3 lays them out: sine and cosine of the row, then of the column, and zeros for [CLS]."""
    frequencies = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    rows = torch.arange(side).repeat_interleave(side)[:, None] * frequencies
    columns = torch.arange(side).repeat(side)[:, None] * frequencies
    grid = torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()], dim=1)
    return torch.cat([torch.zeros(1, width), grid])[None]


def write_checkpoint(path: Path, classes: list[str], seed: int = 0, more: str = "") -> Path:
    """A small model of these classes, not trained, as main.py saves one."""
    args = parse_arguments([*OWN, "--seed", str(seed), *more.split()])
    model = build_task_model(args, len(classes), torch.device("cpu"))
    with torch.no_grad():
        model.get_classifier().weight.normal_(std=1.0)  # the initial one is so small that all logits are alike
    torch.save({"model": model.state_dict(), "args": vars(args), "data": {"classes": classes}}, path)
    return path
