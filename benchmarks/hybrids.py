"""Time a training step of each architecture, without and with SAR.

    python -m benchmarks.hybrids                                  # this CPU
    python -m benchmarks.hybrids --device cuda --batch-size 64    # a GPU

A step is forward, loss, backward and AdamW at 224 px, with the spatial entropy where there is SAR. Expected: no slower
with SAR; the last block of ViT, T2T-ViT and PVT computes one query in both. The two run in turn in every repeat; the
table holds medians of images a second.
"""

import argparse

import timm
import torch
from torch import nn

from benchmarks.step import TYPES, in_turn, make_step, start
from losses import SpatialEntropyLoss
from models import MODELS, register

ARCHITECTURES = ("vit_small", "t2t_vit_14", "t2t_vit_t_14", "pvt_small", "cvt_13", "swin_tiny")


class Registered(nn.Module):
    """A model by name, asked for S or not."""

    def __init__(self, name: str, similarity: bool):
        super().__init__()
        register(name)
        self.model, self.similarity = timm.create_model(name, drop_path_rate=0.1), similarity

    def forward(self, images):
        return self.model(images, return_similarity=True) if self.similarity else (self.model(images), None)


def time_architecture(name: str, dtype, args) -> dict[str, float]:
    """Median images a second without and with SAR, run in turn."""
    images = torch.randn(args.batch_size, 3, 224, 224, device=args.device)
    targets = torch.randint(1000, (args.batch_size,), device=args.device)
    steps = {
        "plain": make_step(Registered(name, similarity=False), None, images, targets, dtype),
        "sar": make_step(Registered(f"{name}_sar", similarity=True), SpatialEntropyLoss(), images, targets, dtype),
    }
    return in_turn(steps, args)


def add_models(parser: argparse.ArgumentParser) -> None:
    plain = [name for name in MODELS if not name.endswith("_sar")]
    parser.add_argument("--models", nargs="+", default=ARCHITECTURES, choices=plain, metavar="NAME")
    parser.add_argument("--type", default="float32", choices=list(TYPES), help="data type of the forward pass")


def main(argv=None) -> None:
    args = start(__doc__, argv, add_models)
    print("| model | plain | with SAR | SAR / plain |")
    print("|---|---|---|---|")
    for name in args.models:
        rate = time_architecture(name, TYPES[args.type], args)
        print(f"| {name} | {rate['plain']:.1f} | {rate['sar']:.1f} | {rate['sar'] / rate['plain']:.3f} |", flush=True)


if __name__ == "__main__":
    main()
