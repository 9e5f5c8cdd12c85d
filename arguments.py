"""The command line of main.py: every option with its default, and the checks that need no data.

The defaults are the paper's ImageNet-1K protocol, the same as in ``recipes/deit_in1k.args``. A data set or a model may
have its own defaults for options that are not given.
"""

import argparse
import math
import os
import sys
from collections import ChainMap
from collections.abc import Mapping
from functools import cache, lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cli import KeyValues, Parser, at_least, expand_arguments, nearest
from fetch import is_name
from models import FAMILIES, MODELS
from readers import DataSet, canonical_name, sets_of
from schedules import LR_SCHEDULES, SAR_SCHEDULES
from tasks import TASKS, add_options, against_accumulation, check_options, defaults_of_size, has_defaults_of_size
from utils import UserError, environment_number, processes_here, readable

SAR_LOSSES = ("spatial-entropy", "total-variation")  # keys of engine.SAR_TERMS, which imports torch

# Options that may differ between a checkpoint and a run that resumes from it, as they do not change the mathematics.
# Splitting a total batch into processes and micro-batches changes only rounding and the ranks' random numbers. --amp is
# compared by the resulting data type.
NOT_MATHEMATICAL = set(
    "data_path output_dir resume eval export eval_every save_every print_every log_attention num_workers device amp "
    "batch_size compile grad_checkpointing skip_unreadable download cache_images".split()
)


GONE = {"decay_epochs": None, "decay_rate": None, "mixup_mode": "batch"}
"""Options of earlier versions, with the only value of a checkpoint that can be resumed; None: any value."""

# Arguments of models that are set by options other than --model-kwargs.
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

LARGE = 40_000
"""Number of images from which the defaults of a user's own set are the same for all sizes."""

TRUNK = ("model", "input_size", "patch_size", "model_kwargs", "last_block")
"""Options whose defaults are those of the run that wrote the weights of ``--finetune``."""
DENSE = ("detect", "segment")
"""Tasks whose images have another size than those that their backbone was trained with before."""


_count, _index = at_least(int, 1), at_least(int, 0)
_positive, _size = at_least(float, 0, open_low=True), at_least(float, 0)
_fraction = at_least(float, 0, 1)


def build_parser(task: str = "classify") -> argparse.ArgumentParser:
    """A parser of all options of a task, grouped as in ``--help``; names are DeiT's where DeiT has the option.

    Raises:
        UserError: there is no such task.
    """
    parser = Parser(
        prog="main.py",
        description="Train or evaluate a Vision Transformer with SAR, spatial-attention-based regularisation.\n\n"
        "    python main.py --model vit_small_sar --data-path /data/imagenet\n"
        "    python main.py --eval --resume output/quickstart/best.pth",
        usage="main.py [@recipe.args ...] [options]",
        epilog="An argument file, such as @recipes/deit_in1k.args, comes before all options, which override it.\n"
        "DeiT's spellings with underscores work, too.",
    )
    add_shared_options(parser, task)
    add_options(task, parser)
    return parser


def add_shared_options(parser: argparse.ArgumentParser, task: str) -> None:
    """Add the options that all tasks share."""
    add_task_option(parser, task)
    for add in (_add_model, partial(_add_data, sets=sets_of(task)), _add_sar, _add_batch, _add_optimiser, _add_run):
        add(parser)


@cache
def shared_defaults() -> dict[str, Any]:
    """Defaults of the shared options, before a task changes any."""
    parser = Parser()
    add_shared_options(parser, "classify")
    return vars(parser.parse_args([]))


def add_task_option(parser: argparse.ArgumentParser, default: str = "classify") -> None:
    """Add ``--task``, which is read first, as the other options depend on it."""
    parser.add_argument(
        "--task",
        default=default,
        metavar="NAME",
        help=f"training task: {', '.join(TASKS)}, or module:Class for a class derived from tasks.Task",
    )


def task_of(words: list[str]) -> str:
    """The task that a command line with expanded argument files names."""
    parser = Parser(add_help=False)
    add_task_option(parser)
    return parser.parse_known_args(words)[0].task


def _add_model(parser):
    add = parser.add_argument_group("model").add_argument
    plain = ", ".join(name for name in MODELS if not name.endswith("_sar"))
    add("--model", default="vit_small_sar", metavar="NAME", help=f"{plain}; each also with the suffix _sar")
    add("--input-size", type=_count, default=224, metavar="PX", help="side of the input images")
    add(
        "--patch-size",
        type=_count,
        default=None,
        metavar="PX",
        help="side of a patch, in pyramids that of the first stage (default: the model's, 16 or 4; 4 for small digits)",
    )
    add(
        "--model-kwargs",
        nargs="*",
        default={},
        action=KeyValues,
        metavar="KEY=VALUE",
        help="further arguments of the model, such as embed_dim=96 depth=4",
    )
    add("--drop", type=_fraction, default=0.0, help="dropout rate of the projections in attention and MLP")
    add(
        "--drop-path",
        type=_fraction,
        default=0.1,
        help="drop rate of stochastic depth at the last block, increasing linearly from 0",
    )
    add(
        "--finetune",
        default="",
        metavar="FILE",
        help="initialise the model with the weights of this file, or by name: hf-hub:OWNER/NAME, "
        "timm:deit_small_patch16_224.fb_in1k, https://...",
    )
    add("--checkpoint-key", default=None, metavar="KEY", help="entry of the weights in the file, such as model or ema")


def _add_data(parser, sets):
    add = parser.add_argument_group("data").add_argument
    add(
        "--data-set",
        metavar="NAME",
        default=None,
        help=f"{', '.join(sets)} (default in classification: imagenet with --data-path, else the embedded digits)",
    )
    add("--data-path", default=None, metavar="DIR", help="folder of the data set")
    add("--num-workers", type=_index, default=default_workers(), help="number of data-loading workers per process")
    add(
        "--skip-unreadable",
        action="store_true",
        help="replace unreadable images by others, and count them; python -m analysis.check lists them",
    )
    add("--download", action="store_true", help="download the data set to --data-path, if torchvision can")
    add(
        "--cache-images",
        action="store_true",
        help="keep decoded images in memory during training, one copy per machine",
    )
    add(
        "--crop-pct",
        "--eval-crop-ratio",
        type=at_least(float, 0, 1, open_low=True),
        default=None,
        help="fraction of the resized image that evaluation crops (default: 0.875, 224 of 256 px; 1 for small images)",
    )
    add(
        "--val-split",
        type=at_least(float, 0, 0.5),
        default=None,
        metavar="SHARE",
        help="hold this share of each class out for validation, for --data-set folder without val/; 0: evaluate "
        "nothing",
    )
    add(
        "--sampling-ratio",
        type=at_least(float, 0, 1, open_low=True),
        default=1.0,
        help="fraction of the training images of each class that is used (Table 3)",
    )
    add(
        "--sampling-seed",
        type=_index,
        default=0,
        help="seed of the subset, and of --val-split; a smaller subset is part of every larger one",
    )


def default_workers() -> int:
    """Default number of data-loading workers per process: its share of the cores, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(cores, environment_number("SLURM_CPUS_PER_TASK", cores))
    return max(1, min(8, cores // max(1, environment_number("LOCAL_WORLD_SIZE", 1))))


def _add_sar(parser):
    add = parser.add_argument_group("spatial-attention-based regularisation").add_argument
    add(
        "--sar-weight",
        type=_size,
        default=0.01,
        help="weight lambda of the loss of the similarity maps; 0 for models without _sar",
    )
    add(
        "--sar-schedule",
        choices=SAR_SCHEDULES,
        default="constant",
        help="schedule of lambda: constant (the paper) or warmup-cosine (the released code)",
    )
    add(
        "--sar-similarity",
        choices=("dot", "cosine", "softmax"),
        default="dot",
        help="similarity S of query and keys: dot (Eq. 4), cosine (Eq. 15) or softmax (Section 4.3)",
    )
    add(
        "--sar-query",
        choices=("cls", "mean"),
        default="cls",
        help="query of S: the [CLS] token (cls), or the mean of the patches; mean for Swin",
    )
    add(
        "--sar-loss",
        choices=SAR_LOSSES,
        default="spatial-entropy",
        help="loss of the similarity maps: spatial entropy (Eq. 9) or total variation (Eq. 14)",
    )
    add(
        "--last-block",
        choices=("standard", "no_msa_skip", "sar", "no_skips"),
        default="sar",
        help="rows A/E, B, C/F, D of Table 1(b); standard for models without _sar; follows --finetune's weights",
    )
    add(
        "--drloc-weight",
        type=_size,
        default=0.0,
        help="peak weight of the dense-relative-localisation loss (Table 4), reached at epoch 20; 0 turns it off",
    )


def _add_batch(parser):
    add = parser.add_argument_group("batch and length").add_argument
    add("--batch-size", type=_count, default=128, help="images per process in one forward pass")
    add("--total-batch", type=_count, default=1024, help="images per update; gradient accumulation follows from it")
    add("--epochs", type=_count, default=300, help="number of epochs, without --cooldown-epochs")
    add(
        "--seed",
        type=at_least(int, 0, 2**63 - 1),
        default=0,
        help="seed of weights, image order, augmentation and dropout",
    )


def _add_optimiser(parser):
    add = parser.add_argument_group("optimiser and schedule").add_argument
    add(
        "--opt",
        default="adamw",
        metavar="NAME",
        help="optimiser by timm's name: adamw, sgd (with Nesterov momentum), momentum (without), lamb, ...",
    )
    add("--opt-eps", type=_positive, default=1e-8, help="epsilon of the optimiser")
    add(
        "--opt-betas",
        type=_fraction,
        nargs=2,
        default=None,
        help="betas of the optimiser (default: the optimiser's own)",
    )
    add(
        "--weight-decay",
        type=_size,
        default=0.05,
        help="weight decay; in classification not of biases, norms, tokens and position embeddings",
    )
    add(
        "--clip-grad",
        type=_size,
        default=None,
        help="clip the norm of the gradients to this value: of all together, in dino of each tensor; 0: no clipping",
    )
    add(
        "--lr",
        type=_positive,
        default=5e-4,
        help="peak learning rate for the task's reference batch (classify: 512, dino and moco: 256), scaled linearly "
        "to --total-batch",
    )
    add("--unscale-lr", action="store_true", help="use --lr without scaling")
    add("--sched", choices=LR_SCHEDULES, default="cosine", help="schedule of the learning rate after the warm-up")
    add(
        "--sched-on-updates",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="change the learning rate at every update, not only once per epoch",
    )
    add("--warmup-epochs", type=_index, default=5, help="epochs of linear warm-up from --warmup-lr")
    add("--warmup-lr", type=_size, default=1e-6, help="learning rate at the start of the warm-up; not scaled")
    add("--min-lr", type=_size, default=1e-5, help="learning rate at the end of the schedule; not scaled")
    add("--cooldown-epochs", type=_index, default=0, help="further epochs at --min-lr, after --epochs")


def _add_run(parser):
    add = parser.add_argument_group("run").add_argument
    add(
        "--output-dir",
        default=None,
        metavar="DIR",
        help="folder of the run; of a classifier, --eval writes into its subfolder eval (default: "
        "output/<model>_<data set>_seed<seed>, with --eval the folder of the checkpoint)",
    )
    add("--resume", default="", metavar="FILE", help="resume from the checkpoint of another run")
    add("--eval", action="store_true", help="only evaluate --resume, --finetune or best.pth in --output-dir")
    add(
        "--export",
        default="",
        metavar="FILE",
        help="write the weights of --resume, --finetune or best.pth as *.safetensors (timm), *.pth (DINO), *.pth.tar "
        "(MoCo-v3), or a folder of the Hugging Face Hub; evaluate them with --eval alone",
    )
    add("--eval-every", type=_count, default=1, help="evaluate every N epochs and at the end")
    add("--save-every", type=_count, default=1, help="save every N epochs and at the end")
    add("--print-every", type=_count, default=50, help="log to the terminal and TensorBoard every N updates")
    add(
        "--log-attention",
        type=_index,
        default=0,
        help="draw attention maps of a few validation images in TensorBoard every N epochs and at the end; 0: never",
    )
    add(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto (a CUDA GPU if there is one, else the CPU), cpu, cuda, cuda:0 or mps (Apple)",
    )
    add(
        "--amp",
        nargs="?",
        const="auto",
        choices=("auto", "bf16", "fp16", "off"),
        default="auto",
        help="mixed precision; auto: bf16 or fp16 on a GPU, by its capability, and off on a CPU",
    )
    add("--compile", action="store_true", help="compile the network with torch.compile")
    add(
        "--grad-checkpointing",
        action="store_true",
        help="recompute activations in the backward pass: less memory, more time",
    )


def parse_arguments(
    argv: list[str] | None = None,
    saved: dict | None = None,
    planned: Mapping[str, argparse.Namespace] = MappingProxyType({}),
    processes: int | None = None,
) -> argparse.Namespace:
    """Parse the command line; the values are final, and nothing changes them later.

    Args:
        argv: the words after the program's name; those of ``sys.argv`` if None.
        saved: for ``--eval``, ``args`` of the checkpoint; its model and data are the defaults if this program wrote
            it. Without it, the arguments of ``--eval`` are not checked yet.
        planned: files that ``--finetune`` may name although they do not exist yet: path -> arguments of the run that
            will write it.
        processes: of the run; those of this one's environment if None.

    Raises:
        UserError: an unknown option or name, a value out of range, or values that exclude each other.
    """
    # 1. the options that exist depend on the task
    words = expand_arguments(sys.argv[1:] if argv is None else argv)
    if is_option("--export", words):
        words = [*words, "--eval"]  # it takes the weights and the arguments of a checkpoint, too
    saved_defaults = _saved_defaults(saved)
    parser = build_parser(task_of([f"--task={saved_defaults.get('task', 'classify')}", *words]))
    # without the checkpoint of --eval its task is unknown, and so are some options
    read = _read_known if saved is None and "--eval" in words else argparse.ArgumentParser.parse_args
    # 2. defaults that depend on other options: parse, set them, parse again
    first = read(parser, words)
    model = first.model if is_option("--model", words) else None
    of_size: dict[str, Any] = {}
    if not first.eval and (images := own_images(first)):
        values = vars(read(parser, words, argparse.Namespace(**dict.fromkeys(vars(first)))))
        given = {name: value for name, value in values.items() if value is not None}
        of_size = defaults_of_size(first.task, images, given, processes or processes_here()[1])
    defaults = saved_defaults or _context_defaults(first, model, parser, planned, of_size)
    parser.set_defaults(**{name: value for name, value in defaults.items() if hasattr(first, name)})
    args = read(parser, words)
    # 3. values that follow from others, and checks
    args.data_set = canonical_name(args.data_set, _sets_for(args))
    if args.patch_size is None:
        args.patch_size = _own_patch_size(args)
    if args.output_dir is None:
        args.output_dir = f"output/{args.model}_{args.data_set}_seed{args.seed}"
    if saved is not None or not args.eval:
        check_arguments(args, planned)
        check_options(args)
    return args


def is_given(option: str, argv: list[str] | None = None) -> bool:
    """Whether a command line, or an argument file in it, has an option such as ``--output-dir``."""
    return is_option(option, expand_arguments(sys.argv[1:] if argv is None else argv))


def is_option(option: str, words: list[str]) -> bool:
    """Whether an option is among the expanded words of a command line."""
    return option in [word.partition("=")[0] for word in words]


def _read_known(
    parser: argparse.ArgumentParser, words: list[str], namespace: argparse.Namespace | None = None
) -> argparse.Namespace:
    return parser.parse_known_args(words, namespace)[0]


def own_images(args: argparse.Namespace) -> int | None:
    """The number of images that a run trains on, for a user's own data set; about, if it is a share of them.

    None for other sets and for tasks to which it does not matter, or if the files cannot be found or read: their
    reader will say why.
    """
    if not (has_defaults_of_size(args.task) and args.data_set and args.data_path):
        return None
    share = args.sampling_ratio * (1 - (args.val_split or 0))
    try:
        images = _count_training(args.task, args.data_set, args.data_path, math.ceil(LARGE / share))
    except (UserError, OSError):
        return None
    return max(1, round(share * images)) if images else None


@lru_cache(maxsize=8)  # the runs of a sweep have the same images
def _count_training(task: str, data_set: str, data_path: str, enough: int) -> int:
    """See `readers.DataSet.count`; 0 for a set that is not a user's own."""
    sets = sets_of(task)
    count = sets[canonical_name(data_set, sets)].count
    return 0 if count is None else count(Path(data_path).expanduser(), enough)


def undetermined(args: argparse.Namespace, words: list[str]) -> list[str]:
    """The options whose defaults follow from the number of images, if these are not on this machine.

    Args:
        args: of a run.
        words: its command line; options in it are left out.
    """
    if not has_defaults_of_size(args.task) or sets_of(args.task)[args.data_set].count is None or own_images(args):
        return []
    names = [name.replace("_", "-") for name in defaults_of_size(args.task, LARGE, {}, 1)]
    words = expand_arguments(words)
    return [f"--{name}" for name in names if not (is_option(f"--{name}", words) or is_option(f"--no-{name}", words))]


def _saved_defaults(saved) -> dict:
    """The arguments of a checkpoint that are defaults of ``--eval``; none if another program wrote it."""
    if not isinstance(saved, dict) or "sar_weight" not in saved:
        return {}
    training_only = NOT_MATHEMATICAL - {"data_path"} | {"finetune", "checkpoint_key"}
    return {name: value for name, value in saved.items() if name not in training_only}


def _sets_for(args: argparse.Namespace) -> Mapping[str, DataSet]:
    """The data sets that a command line can name; ``--eval`` may evaluate any task, which its checkpoint tells."""
    return ChainMap(sets_of(args.task), *(sets_of(task) for task in TASKS)) if args.eval else sets_of(args.task)


def _context_defaults(
    args: argparse.Namespace,
    model: str | None,
    parser: argparse.ArgumentParser,
    planned: Mapping[str, argparse.Namespace],
    of_size: Mapping[str, Any],
) -> dict:
    """Defaults that depend on the data set, the model and the weights of ``--finetune``.

    Args:
        args: parsed with the defaults of the task.
        model: that the command line names; None if it names none.
        parser: of the task.
        planned: see `parse_arguments`.
        of_size: defaults that depend on the number of a user's own images.
    """
    # 1. fine-tuning keeps the architecture of the pre-training (Appendix E.4)
    last_block, trained = None, vars(planned[args.finetune]) if args.finetune in planned else {}
    if not trained and (is_name(args.finetune) or Path(args.finetune).is_file()):
        from weights import is_own, last_block_of, read_checkpoint  # imports torch

        checkpoint = read_checkpoint(args.finetune, lazily=True)
        last_block = last_block_of(checkpoint, args.checkpoint_key)
        trained = checkpoint["args"] if is_own(checkpoint) else {}
    trunk = _trunk_of(trained, args.task, model)
    # 2. the model, and what depends on it and on the data set
    sets, data_set = _sets_for(args), args.data_set or ("imagenet" if args.data_path else "digits")
    model = model or trunk.get("model", args.model)
    regularised = model.endswith("_sar")
    defaults = {
        "data_set": data_set,
        "sar_weight": 0.01 if regularised else 0.0,
        "sar_query": MODELS[model].query if model in MODELS else "cls",
        "last_block": last_block or ("sar" if regularised else "standard"),
        **sets[canonical_name(data_set, sets)].defaults,
        **of_size,
    }
    # 3. a default that the task has changed is part of its protocol, and is kept; the weights' sizes are not in one
    shared = shared_defaults()
    kept = {name for name, value in shared.items() if value != parser.get_default(name)}
    return {name: value for name, value in defaults.items() if name not in kept} | trunk


def _trunk_of(trained: Mapping[str, Any], task: str, model: str | None) -> dict[str, Any]:
    """The options of `TRUNK` that a run takes from the one that wrote its weights.

    Args:
        trained: that run's arguments; empty if another program wrote the weights.
        task: of the new run.
        model: that the command line names; nothing is taken with another one than that run's, but for ``_sar``.
    """
    before = trained.get("model", "")
    if before not in MODELS or (model or before).removesuffix("_sar") != before.removesuffix("_sar"):
        return {}
    trunk = {name: trained[name] for name in TRUNK if name in trained}
    if task in DENSE and trained.get("task", "classify") not in DENSE:
        size = trunk.pop("input_size")
        if size != shared_defaults()["input_size"]:
            trunk["model_kwargs"] = {"pretrain_size": size} | trunk["model_kwargs"]
    return trunk


def _own_patch_size(args) -> int:
    """The model's patch size; 4 for a ViT on small digits, and on images of fewer than two patches a side."""
    family = MODELS.get(args.model, FAMILIES[0])
    small = family is FAMILIES[0] and args.input_size < (4 if args.data_set == "digits" else 2) * family.patch_size
    return 4 if small else family.patch_size


def check_arguments(args: argparse.Namespace, planned: Mapping[str, argparse.Namespace]) -> None:
    """Refuse arguments that cannot work, before anything is built; ``planned`` as for `parse_arguments`.

    Raises:
        UserError: one line that names the option and what to change.
    """
    if args.model not in MODELS:
        raise UserError(f"no model {args.model!r}{nearest(args.model, MODELS)} Known: {', '.join(MODELS)}")
    for name in args.model_kwargs.keys() & MODEL_OPTIONS.keys():
        raise UserError(f"--model-kwargs {name}: use {MODEL_OPTIONS[name]} instead")
    if args.input_size % args.patch_size:
        raise UserError(
            f"--input-size {args.input_size} is not divisible by --patch-size {args.patch_size}; "
            f"the nearest size that is: {max(1, round(args.input_size / args.patch_size)) * args.patch_size}"
        )
    if readable(args.output_dir) != args.output_dir:
        raise UserError(f"--output-dir {args.output_dir}: the name is no UTF-8, which TensorBoard needs; name another")
    for option in ("resume", "finetune"):
        path = getattr(args, option)
        named = is_name(path)
        if named and option == "resume" and not args.eval:
            raise UserError(f"--resume {path}: a run resumes from a file; --finetune starts one from weights by name")
        if path and not (args.eval or named or path in planned or Path(path).exists()):
            raise UserError(f"--{option} {path}: no such file")


def accumulation(args, world_size: int) -> int:
    """The number of micro-batches per update on ``world_size`` processes.

    Raises:
        UserError: the total batch is not divisible so; the message lists batch sizes for which it is. Or the task
            refuses several micro-batches; the message gives the reason and the sizes without them.
    """
    per_micro_batch = args.batch_size * world_size
    reason = against_accumulation(args)
    if reason and args.total_batch != per_micro_batch:
        whole = f"--batch-size {args.total_batch // world_size}, or " * (args.total_batch % world_size == 0)
        raise UserError(
            f"--batch-size {args.batch_size} x {world_size} processes is not --total-batch {args.total_batch}: "
            f"{reason}, which accumulation would change; give {whole}--total-batch {per_micro_batch}"
        )
    if args.total_batch % per_micro_batch == 0:
        return args.total_batch // per_micro_batch
    share = args.total_batch // world_size if args.total_batch % world_size == 0 else 0
    fitting = [size for size in range(2, share + 1, 2) if share % size == 0]
    raise UserError(
        f"--batch-size {args.batch_size} x {world_size} processes does not divide "
        f"--total-batch {args.total_batch}; batch sizes that do: "
        f"{', '.join(map(str, fitting[-6:])) or 'none'}; or give --total-batch {per_micro_batch}"
    )


@cache
def default_arguments(task: str) -> dict[str, Any]:
    """Defaults of all options of a task, without those of data sets and models."""
    return vars(build_parser(task).parse_args([]))


def differences(arguments: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """The mathematical differences between these arguments and those of a checkpoint, one line each."""
    # an option newer than the checkpoint had the effect of its default
    saved = {**default_arguments(saved.get("task", "classify")), **saved}
    without_effect = {name for name, value in GONE.items() if value is None or saved.get(name, value) == value}
    names = sorted((arguments.keys() | saved.keys()) - NOT_MATHEMATICAL - without_effect)
    if os.path.realpath(saved["finetune"]) == os.path.realpath(arguments["finetune"]):
        names.remove("finetune")  # two paths of the same file
    return [
        f"--{name.replace('_', '-')}: {saved.get(name)} in the checkpoint, {arguments.get(name)} now"
        for name in names
        if arguments.get(name) != saved.get(name)
    ]


def data_set_defaults(args: argparse.Namespace, images: int, processes: int) -> dict:
    """The data set's own defaults that this run uses, by option; ``images`` are those that it trains on."""
    data_set = sets_of(args.task)[args.data_set]
    defaults = data_set.defaults
    if data_set.count is not None:
        defaults = defaults_of_size(args.task, images, {}, processes)
    return {
        f"--{name.replace('_', '-')}": value for name, value in defaults.items() if getattr(args, name, None) == value
    }
