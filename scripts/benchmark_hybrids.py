"""Time a training step of each architecture, without and with SAR.

    python scripts/benchmark_hybrids.py                                  # this CPU
    python scripts/benchmark_hybrids.py --device cuda --batch-size 64    # a GPU

A step is forward, loss, backward and AdamW at 224 px, with the spatial entropy where there is SAR. Expected: no slower
with SAR; the last block of ViT and T2T-ViT computes one query in both. The two run in turn in every repeat; the table
holds medians of images a second.
"""

import argparse
import platform
import sys
from pathlib import Path

import timm
import torch
from benchmark_step import TYPES, in_turn, make_step
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from arguments import MODELS
from losses import SpatialEntropyLoss

ARCHITECTURES = ("vit_small", "t2t_vit_14", "t2t_vit_t_14", "pvt_small", "cvt_13", "swin_tiny")


class Registered(nn.Module):
    """A model by name, asked for S or not."""

    def __init__(self, name: str, similarity: bool):
        super().__init__()
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


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    plain = [name for name in MODELS if not name.endswith("_sar")]
    parser.add_argument("--models", nargs="+", default=ARCHITECTURES, choices=plain, metavar="NAME")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="default: cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    parser.add_argument("--type", default="float32", choices=list(TYPES), help="default: float32")
    parser.add_argument("--batch-size", type=int, default=16, help="default: 16")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds of each case (default: 7)")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them (default: 1)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    on = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, timm {timm.__version__}, {on}, {args.threads} threads, {args.type}")
    print(f"batch {args.batch_size}, images a second\n")
    print("| model | plain | with SAR | SAR / plain |")
    print("|---|---|---|---|")
    for name in args.models:
        rate = time_architecture(name, TYPES[args.type], args)
        print(f"| {name} | {rate['plain']:.1f} | {rate['sar']:.1f} | {rate['sar'] / rate['plain']:.3f} |", flush=True)


if __name__ == "__main__":
    main()
