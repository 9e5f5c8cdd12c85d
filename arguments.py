"""The command line: every option with its default, argument files, and the checks that cost no time.

The defaults are the paper's ImageNet-1K protocol (``recipes/deit_in1k.args`` says the same, number by
number). A data set or a model may bring defaults of its own for options that were not given.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from cli import HelpFormatter, KeyValues, Parser, at_least, expand_arguments, nearest
from models import FAMILIES, MODELS
from readers import DATASETS, canonical_name
from schedules import LR_SCHEDULES, SAR_SCHEDULES
from tasks import TASKS, add_options, check_options
from utils import UserError

SAR_LOSSES = ("spatial-entropy", "total-variation")  # keys of engine.SAR_TERMS, which imports torch

# What may differ between a checkpoint and the run that goes on from it: nothing here changes the mathematics.
# The split of a total batch into processes and accumulation changes only rounding and who draws what; --amp is
# compared by the data type that it came to.
NOT_MATHEMATICAL = set(
    "data_path output_dir resume eval eval_every save_every print_every log_attention num_workers device amp "
    "batch_size compile grad_checkpointing skip_unreadable download cache_images".split()
)


GONE = {"decay_epochs": None, "decay_rate": None, "mixup_mode": "batch"}
"""Options of earlier versions, which their checkpoints hold: the only value that can be resumed; None: every value."""

# Arguments of a model that have options of their own.
MODEL_OPTIONS = {
    "img_size": "--input-size",
    "patch_size": "--patch-size",
    "last_block": "--last-block",
    "similarity": "--sar-similarity",
    "similarity_query": "--sar-query",
    "proj_drop_rate": "--drop",
    "drop_path_rate": "--drop-path",
    "num_classes": "--data-set",
    "checkpoint_path": "--finetune",
    "pretrained": "--finetune",
}


_count, _index = at_least(int, 1), at_least(int, 0)
_positive, _size = at_least(float, 0, open_low=True), at_least(float, 0)
_fraction = at_least(float, 0, 1)


def build_parser(task: str = "classify") -> argparse.ArgumentParser:
    """All options of a task, grouped as ``--help`` shows them; names are DeiT's where DeiT has the option.

    Raises:
        UserError: no such task.
    """
    parser = Parser(
        prog="main.py",
        description=("Train or evaluate a Vision Transformer with SAR, spatial-attention-based regularisation."),
        usage="main.py [@recipe.args ...] [options]",
        epilog="An argument file (@recipes/deit_in1k.args) stands before all options; options after it win. "
        "DeiT's spellings with underscores are understood.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add_shared_options(parser, task)
    add_options(task, parser)
    return parser


def add_shared_options(parser: argparse.ArgumentParser, task: str) -> None:
    """The options that all tasks have."""
    add_task_option(parser, task)
    for add in (_add_model, _add_data, _add_sar, _add_batch, _add_optimiser, _add_run):
        add(parser)


@cache
def shared_defaults() -> dict[str, Any]:
    """The shared options at their defaults, before a task changes any."""
    parser = Parser()
    add_shared_options(parser, "classify")
    return vars(parser.parse_args([]))


def add_task_option(parser: argparse.ArgumentParser, default: str = "classify") -> None:
    """``--task``, which is read before all other options: it says which there are."""
    parser.add_argument(
        "--task",
        default=default,
        metavar="NAME",
        help=f"what is trained: {', '.join(TASKS)}; or module:Class, a tasks.Task of your own",
    )


def task_of(words: list[str]) -> str:
    """The task that an expanded command line names."""
    parser = Parser(add_help=False, allow_abbrev=False)
    add_task_option(parser)
    return parser.parse_known_args(words)[0].task


def _add_model(parser):
    add = parser.add_argument_group("model").add_argument
    plain = ", ".join(name for name in MODELS if not name.endswith("_sar"))
    add("--model", default="vit_small_sar", metavar="NAME", help=f"{plain}, each also with _sar")
    add("--input-size", type=_count, default=224, metavar="PX", help="image side")
    add(
        "--patch-size",
        type=_count,
        default=None,
        metavar="PX",
        help="patch side, of pyramids in their first stage (default: the model's, 16 or 4; 4 for small digits)",
    )
    add(
        "--model-kwargs",
        nargs="*",
        default={},
        action=KeyValues,
        metavar="KEY=VALUE",
        help="other sizes: embed_dim=96 depth=4 ...",
    )
    add("--drop", type=_fraction, default=0.0, help="dropout of the tokens' projections")
    add("--drop-path", type=_fraction, default=0.1, help="stochastic depth, linear over the blocks")
    add("--finetune", default="", metavar="FILE", help="start from these weights")
    add("--checkpoint-key", default=None, metavar="KEY", help="which weights of that file: model, ema, ...")


def _add_data(parser):
    add = parser.add_argument_group("data").add_argument
    add(
        "--data-set",
        metavar="NAME",
        default=None,
        help=f"{', '.join(DATASETS)} (default: imagenet with --data-path, the embedded digits without)",
    )
    add("--data-path", default=None, metavar="DIR", help="where the data set lies")
    add("--num-workers", type=_index, default=default_workers(), help="loading processes of each training process")
    add("--skip-unreadable", action="store_true", help="replace an unreadable image by another and count it")
    add("--download", action="store_true", help="fetch the set into --data-path, where torchvision can")
    add("--cache-images", action="store_true", help="in training, keep decoded images in memory, one copy a machine")
    add(
        "--crop-pct",
        "--eval-crop-ratio",
        type=at_least(float, 0, 1, open_low=True),
        default=None,
        help="share of the resized image that evaluation crops: 0.875 (256 -> 224), all of small images",
    )
    add(
        "--sampling-ratio",
        type=at_least(float, 0, 1, open_low=True),
        default=1.0,
        help="train on this share of each class's images (Table 3)",
    )
    add("--sampling-seed", type=_index, default=0, help="of that choice; smaller shares lie inside larger ones")


def default_workers() -> int:
    """Loading processes of a training process: its share of the cores, 8 at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(cores, int(os.environ.get("SLURM_CPUS_PER_TASK", cores)))
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _add_sar(parser):
    add = parser.add_argument_group("spatial-attention-based regularisation").add_argument
    add(
        "--sar-weight",
        type=_size,
        default=0.01,
        help="lambda of the spatial entropy; 0 for models without _sar",
    )
    add(
        "--sar-schedule",
        choices=SAR_SCHEDULES,
        default="constant",
        help="the paper's, or the released code's",
    )
    add(
        "--sar-similarity",
        choices=("dot", "cosine", "softmax"),
        default="dot",
        help="Eq. 4, Eq. 15, sec. 4.3",
    )
    add(
        "--sar-query",
        choices=("cls", "mean"),
        default="cls",
        help="whose similarity: that of [CLS], or of the mean of the patches; mean for Swin",
    )
    add(
        "--sar-loss",
        choices=SAR_LOSSES,
        default="spatial-entropy",
        help="of the similarity maps: Eq. 9, or total variation, Eq. 14",
    )
    add(
        "--last-block",
        choices=("standard", "no_msa_skip", "sar", "no_skips"),
        default="sar",
        help="rows A/E, B, C/F, D of Table 1(b); standard for models without _sar; that of --finetune's weights",
    )
    add(
        "--drloc-weight",
        type=_size,
        default=0.0,
        help="of dense relative localisation (Table 4) at its peak, epoch 20; 0 turns it off",
    )


def _add_batch(parser):
    add = parser.add_argument_group("batch and length").add_argument
    add("--batch-size", type=_count, default=128, help="images a process computes at once")
    add("--total-batch", type=_count, default=1024, help="images an update; accumulation follows from it")
    add("--epochs", type=_count, default=300, help="each sees every image once")
    add("--seed", type=at_least(int, 0, 2**63 - 1), default=0, help="of weights, order, augmentation, dropout")


def _add_optimiser(parser):
    add = parser.add_argument_group("optimiser and schedule").add_argument
    add("--opt", default="adamw", metavar="NAME", help="timm's: adamw, sgd (Nesterov's), momentum (plain), lamb, ...")
    add("--opt-eps", type=_positive, default=1e-8, help="its epsilon")
    add("--opt-betas", type=_fraction, nargs=2, default=None, help="the optimiser's own if not given")
    add("--weight-decay", type=_size, default=0.05, help="not of biases, norms, tokens and positions")
    add("--clip-grad", type=_positive, default=None, help="largest gradient norm")
    add(
        "--lr",
        type=_positive,
        default=5e-4,
        help="at its peak, for the task's reference batch (classify: 512); scaled linearly with the total batch",
    )
    add("--unscale-lr", action="store_true", help="take --lr as it stands")
    add("--sched", choices=LR_SCHEDULES, default="cosine", help="after the warm-up")
    add("--sched-on-updates", action=argparse.BooleanOptionalAction, default=False, help="not once an epoch")
    add("--warmup-epochs", type=_index, default=5, help="linear, from --warmup-lr")
    add("--warmup-lr", type=_size, default=1e-6, help="not scaled")
    add("--min-lr", type=_size, default=1e-5, help="not scaled")
    add("--cooldown-epochs", type=_index, default=0, help="epochs at the lowest rate, after --epochs")


def _add_run(parser):
    add = parser.add_argument_group("run").add_argument
    add("--output-dir", default=None, metavar="DIR", help="default: output/ + model + data set + seed")
    add("--resume", default="", metavar="FILE", help="go on from another run's checkpoint")
    add("--eval", action="store_true", help="evaluate --resume, --finetune or the output folder's best.pth")
    add("--eval-every", type=_count, default=1, metavar="EPOCHS", help="evaluate so often, and at the end")
    add("--save-every", type=_count, default=1, metavar="EPOCHS", help="write checkpoint.pth so often, and at the end")
    add("--print-every", type=_count, default=50, metavar="UPDATES", help="print and tell TensorBoard so often")
    add(
        "--log-attention",
        type=_index,
        default=0,
        metavar="EPOCHS",
        help="draw a few validation images' attention in TensorBoard so often, and at the end; 0: never",
    )
    add("--device", default="auto", metavar="NAME", help="auto (a GPU if there is one), cpu or cuda")
    add(
        "--amp",
        choices=("auto", "bf16", "fp16", "off"),
        default="auto",
        help="auto: what the device is good at",
    )
    add("--compile", action="store_true", help="torch.compile the model")
    add("--grad-checkpointing", action="store_true", help="less memory, more time")


def parse_arguments(argv: list[str] | None = None, saved: dict | None = None) -> argparse.Namespace:
    """Read the command line into a namespace whose values are final: nothing changes them later.

    Args:
        argv: the words after the program's name; ``sys.argv``'s if None.
        saved: for ``--eval``, ``args`` of the checkpoint: its model and data are the defaults, if this program
            wrote it. Without it, ``--eval``'s arguments are not checked yet.
    Raises:
        UserError: an unknown option or name, a value out of range, or values that exclude each other.
    """
    words = expand_arguments(sys.argv[1:] if argv is None else argv)
    saved_defaults = _saved_defaults(saved)
    parser = build_parser(task_of([f"--task={saved_defaults.get('task', 'classify')}", *words]))
    # without the checkpoint its task is not known, and so not all options
    read = _read_known if saved is None and "--eval" in words else argparse.ArgumentParser.parse_args
    first = read(parser, words)
    defaults = saved_defaults or _context_defaults(first, parser)
    parser.set_defaults(**{name: value for name, value in defaults.items() if hasattr(first, name)})
    args = read(parser, words)
    args.data_set = canonical_name(args.data_set)
    if args.patch_size is None:
        args.patch_size = _own_patch_size(args)
    if args.output_dir is None:
        args.output_dir = f"output/{args.model}_{args.data_set}_seed{args.seed}"
    if saved is not None or not args.eval:
        check_arguments(args)
        check_options(args)
    return args


def _read_known(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    return parser.parse_known_args(words)[0]


def _saved_defaults(saved) -> dict:
    if not isinstance(saved, dict) or "sar_weight" not in saved:
        return {}
    of_that_run = NOT_MATHEMATICAL - {"data_path"} | {"finetune", "checkpoint_key"}
    return {name: value for name, value in saved.items() if name not in of_that_run}


def _context_defaults(args: argparse.Namespace, parser: argparse.ArgumentParser) -> dict:
    """Defaults that depend on the data set, the model and the weights, for options that were not given."""
    data_set = args.data_set or ("imagenet" if args.data_path else "digits")
    regularised = args.model.endswith("_sar")
    last_block = "sar" if regularised else "standard"
    if Path(args.finetune).is_file():  # fine-tuning keeps the pre-training's architecture (appendix E.4)
        from weights import last_block_of  # imports torch

        last_block = last_block_of(args.finetune, args.checkpoint_key) or last_block
    brought = {
        "data_set": data_set,
        "sar_weight": 0.01 if regularised else 0.0,
        "sar_query": MODELS[args.model].query if args.model in MODELS else "cls",
        "last_block": last_block,
        **DATASETS[canonical_name(data_set)].defaults,
    }
    shared = shared_defaults()  # a default that the task has changed is its protocol's, and stays
    return {
        name: value for name, value in brought.items() if name not in shared or shared[name] == parser.get_default(name)
    }


def _own_patch_size(args) -> int:
    """The model's; 4 for a ViT on small pictures of digits, and below two of its own patches, which leave no map."""
    family = MODELS.get(args.model, FAMILIES[0])
    small = family is FAMILIES[0] and args.input_size < (4 if args.data_set == "digits" else 2) * family.patch_size
    return 4 if small else family.patch_size


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot work, before any time is spent.

    Raises:
        UserError: one line that names the option and the mend.
    """
    if args.model not in MODELS:
        raise UserError(f"no model {args.model!r}{nearest(args.model, MODELS)} Known: {', '.join(MODELS)}")
    for name in args.model_kwargs.keys() & MODEL_OPTIONS.keys():
        raise UserError(f"--model-kwargs {name}: say it with {MODEL_OPTIONS[name]}")
    if args.input_size % args.patch_size:
        raise UserError(
            f"--input-size {args.input_size} is not divisible by --patch-size {args.patch_size}; "
            f"the nearest that is: {max(1, round(args.input_size / args.patch_size)) * args.patch_size}"
        )
    for option in ("resume", "finetune"):
        path = getattr(args, option)
        if path and not args.eval and not Path(path).exists():
            raise UserError(f"--{option} {path}: no such file")


@cache
def default_arguments(task: str) -> dict[str, Any]:
    """Every option of a task at its default, data sets' and models' own ones aside."""
    return vars(build_parser(task).parse_args([]))


def differences(arguments: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """What differs in anything mathematical between these arguments and a checkpoint's, a line each."""
    # an option that the checkpoint does not know yet had the effect of its default
    saved = {**default_arguments(saved.get("task", "classify")), **saved}
    without_effect = {name for name, value in GONE.items() if value is None or saved.get(name, value) == value}
    names = sorted((arguments.keys() | saved.keys()) - NOT_MATHEMATICAL - without_effect)
    if os.path.realpath(saved["finetune"]) == os.path.realpath(arguments["finetune"]):
        names.remove("finetune")  # the same file, in other words
    return [
        f"--{name.replace('_', '-')}: {saved.get(name)} in the checkpoint, {arguments.get(name)} now"
        for name in names
        if arguments.get(name) != saved.get(name)
    ]


def brought_defaults(args: argparse.Namespace) -> dict:
    """The data set's own defaults that are in force, by option."""
    brought = DATASETS[args.data_set].defaults
    return {
        f"--{name.replace('_', '-')}": value for name, value in brought.items() if getattr(args, name, None) == value
    }
