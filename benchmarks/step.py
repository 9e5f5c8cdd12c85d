"""Time a training step: (a) timm's plain ViT, (b) SAR as one would first write it, (c) this project's SAR.

    python -m benchmarks.step                                  # this CPU, both sizes, float32 and bf16
    python -m benchmarks.step --device cuda --batch-size 128   # a GPU

    python -m benchmarks.step --device cuda --compile --ways plain ours
    python -m benchmarks.step --evaluate --ways plain ours             # forward passes of an evaluation, maps included

A step is forward, loss, backward and AdamW at 224 px. (b) keeps the last block's attention scores, computes the
attention from them, and runs OpenCV map by map. Expected: (c) faster than (a), for its last block computes the one
query that the classifier reads. The three run in turn in every repeat; the table holds medians of images a second.
"""

import argparse
import platform
import statistics

import timm
import torch
from timm.models.vision_transformer import Block
from torch import nn

import models_sar
from benchmarks.loss import map_by_map_loss, milliseconds
from cli import HelpFormatter
from losses import SpatialEntropyLoss, spatial_entropy

TYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class NaiveLastBlock(Block):
    """Eq. 10-11 with the whole attention matrix computed, and its scores kept for the loss."""

    def forward(self, x, attn_mask=None, is_causal=False):
        attn, (batch, tokens, channels) = self.attn, x.shape
        qkv = attn.qkv(self.norm1(x)).reshape(batch, tokens, 3, attn.num_heads, attn.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        self.scores = q @ k.transpose(-2, -1) * attn.scale
        x = attn.proj((self.scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, tokens, channels))
        return x + self.mlp(x)


class Plain(nn.Module):
    """(a): the baseline, with no loss but the cross-entropy."""

    def __init__(self, size: str):
        super().__init__()
        self.model = timm.create_model(f"vit_{size}_patch16_224", drop_path_rate=0.1)

    def forward(self, images):
        return self.model(images), None


class Naive(Plain):
    """(b)"""

    def __init__(self, size: str):
        super().__init__(size)
        sizes = models_sar.SIZES[size]
        block = NaiveLastBlock(sizes["embed_dim"], sizes["num_heads"], qkv_bias=True)
        block.norm2 = nn.Identity()
        self.model.blocks[-1] = block  # type: ignore[assignment]

    def forward(self, images):
        logits, scores = self.model(images), self.model.blocks[-1].scores
        return logits, scores[:, :, 0, 1:].unflatten(-1, (14, 14)).float()


class Ours(nn.Module):
    """(c)"""

    def __init__(self, size: str):
        super().__init__()
        self.model = timm.create_model(f"vit_{size}_sar", drop_path_rate=0.1)

    def forward(self, images):
        return self.model(images, return_similarity=True)


def make_evaluation(network: nn.Module, images, dtype):
    """A function that computes what an evaluation does for one batch: logits, and of S the entropy and components."""
    network = network.to(images.device).eval()

    @torch.inference_mode()
    def step():
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            logits, similarity = network(images)
        return logits.float(), None if similarity is None else spatial_entropy(similarity)

    return step


def make_step(network: nn.Module, regulariser, images, targets, dtype):
    """A function that does one whole training step."""
    network = network.to(images.device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=True)
    scaler = torch.amp.GradScaler(images.device.type, enabled=dtype == torch.float16)

    def step():
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            logits, similarity = network(images)
            loss = nn.functional.cross_entropy(logits, targets)
            if regulariser is not None:
                loss = loss + 0.01 * regulariser(similarity)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


WAYS = {"plain": (Plain, None), "naive": (Naive, map_by_map_loss), "ours": (Ours, SpatialEntropyLoss())}


def time_case(size: str, dtype, args) -> dict[str, float]:
    """Median images a second of each way, run in turn."""
    images = torch.randn(args.batch_size, 3, 224, 224, device=args.device)
    targets = torch.randint(1000, (args.batch_size,), device=args.device)
    steps = {}
    for name in args.ways:
        kind, loss = WAYS[name]
        network = kind(size)
        if args.compile:
            network.compile()
        if args.evaluate:
            steps[name] = make_evaluation(network, images, dtype)
        else:
            steps[name] = make_step(network, loss, images, targets, dtype)
    return in_turn(steps, args)


def in_turn(steps: dict, args) -> dict[str, float]:
    """Median images a second of each step; all of them are run in every repeat."""
    times = {name: [] for name in steps}
    for repeat in range(args.repeats + args.warmup):
        for name, step in steps.items():
            elapsed = milliseconds(step, args.device)
            if repeat >= args.warmup:
                times[name].append(elapsed)
    return {name: 1e3 * args.batch_size / statistics.median(values) for name, values in times.items()}


def start(description: str, argv, add_cases) -> argparse.Namespace:
    """Read the command line, ``add_cases(parser)`` being its own part, and say what is timed where."""
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
    add_cases(parser)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of the network")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    parser.add_argument("--batch-size", type=int, default=16, help="images")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds of each case")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    on = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, timm {timm.__version__}, {on}, {args.threads} threads")
    print(f"batch {args.batch_size}, images a second\n")
    return args


def add_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), help="what is timed")
    parser.add_argument("--compile", action="store_true", help="torch.compile each network")
    parser.add_argument("--evaluate", action="store_true", help="time evaluation, not training")
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small"], choices=list(models_sar.SIZES))
    parser.add_argument("--types", nargs="+", default=["float32", "bf16"], choices=list(TYPES))


def main(argv=None) -> None:
    args = start(__doc__, argv, add_sizes)
    print("| model | type | (a) plain timm | (b) naive SAR | (c) ours | c / a | c / b |")
    print("|---|---|---|---|---|---|---|")

    def ratio(one: str, other: str) -> str:
        return f"{rate[one] / rate[other]:.3f}" if {one, other} <= rate.keys() else "-"

    for size in args.sizes:
        for name in args.types:
            rate = time_case(size, TYPES[name], args)
            rates = " | ".join(f"{rate[way]:.1f}" if way in rate else "-" for way in WAYS)
            ratios = f"{ratio('ours', 'plain')} | {ratio('ours', 'naive')}"
            print(f"| vit_{size} | {name} | {rates} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
