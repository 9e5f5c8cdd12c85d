"""The command line: defaults, argument files, DeiT's spellings, and one clear line for each mistake."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import write_checkpoint

from arguments import SAR_LOSSES, build_parser, differences, parse_arguments
from cli import ELSEWHERE
from engine import SAR_TERMS
from utils import UserError

ROOT = Path(__file__).parents[1]


def test_defaults_are_the_imagenet_recipe():
    data = ["--data-path", "somewhere"]
    for model in (["--model", "vit_small_sar"], ["--model", "vit_small"]):
        by_default = vars(parse_arguments([*model, *data]))
        by_recipe = vars(parse_arguments([f"@{ROOT / 'recipes/deit_in1k.args'}", *model, *data]))
        assert by_default == by_recipe


def test_the_recipe_names_every_number_of_the_protocol():
    """An option that is left out of the recipe would follow a changed default unseen."""
    words = (ROOT / "recipes/deit_in1k.args").read_text().split()
    groups = {"batch and length", "optimiser and schedule", "augmentation"}
    options = {
        next((name for name in action.option_strings if name in words), action.option_strings[0])
        for group in build_parser()._action_groups
        if group.title in groups
        for action in group._group_actions
    }
    not_of_the_protocol = {
        "--seed",
        "--unscale-lr",
        "--sched-on-updates",
        "--crop-pct",
        "--clip-grad",
        "--opt-betas",
        "--decay-epochs",
        "--decay-rate",
    }
    assert options - not_of_the_protocol <= set(words)


def test_facts_of_the_protocol():
    args = parse_arguments(["--data-path", "somewhere"])
    assert (args.total_batch, args.batch_size, args.epochs, args.lr) == (1024, 128, 300, 5e-4)
    assert (args.weight_decay, args.warmup_epochs, args.warmup_lr, args.min_lr) == (0.05, 5, 1e-6, 1e-5)
    assert (args.drop_path, args.mixup, args.cutmix, args.smoothing, args.reprob) == (
        0.1,
        0.8,
        1.0,
        0.1,
        0.25,
    )
    assert (args.clip_grad, args.model_ema_decay, args.crop_pct) == (None, 0.99996, None)
    assert (args.aa, args.color_jitter, args.train_interpolation) == ("rand-m9-mstd0.5-inc1", 0.4, "bicubic")


@pytest.mark.parametrize(("model", "weight", "block"), [("vit_small_sar", 0.01, "sar"), ("vit_small", 0.0, "standard")])
def test_the_model_brings_lambda_and_last_block(model, weight, block):
    args = parse_arguments(["--model", model, "--data-path", "x"])
    assert (args.sar_weight, args.last_block) == (weight, block)
    args = parse_arguments(["--model", model, "--data-path", "x", "--sar-weight", "0.5", "--last-block", "no_skips"])
    assert (args.sar_weight, args.last_block) == (0.5, "no_skips")


def test_the_data_set_brings_defaults_that_a_given_option_overrides():
    args = parse_arguments([])
    assert (args.data_set, args.crop_pct, args.hflip) == ("digits", 1.0, 0.0)
    assert args.epochs < 300
    assert parse_arguments(["--epochs", "300"]).epochs == 300
    assert parse_arguments(["--data-path", "x"]).data_set == "imagenet"


def test_deits_names(tmp_path):
    args = parse_arguments(["--data_set", "IMNET", "--data_path=x_y", "--warmup_epochs", "3", "--no_model_ema"])
    assert (args.data_set, args.data_path, args.warmup_epochs, args.model_ema) == (
        "imagenet",
        "x_y",
        3,
        False,
    )
    assert parse_arguments(["--data-set", "CIFAR", "--data-path", "x"]).data_set == "cifar100"


def test_argument_files_are_split_like_a_shells_and_overridden(tmp_path):
    first, second = tmp_path / "first.args", tmp_path / "second.args"
    first.write_text("# a comment\n--epochs 7 --data-path 'a folder'  # with a space\n--lr 1e-3\n")
    second.write_text("--lr 2e-3\n")
    args = parse_arguments([f"@{first}", f"@{second}", "--epochs", "8"])
    assert (args.epochs, args.data_path, args.lr) == (8, "a folder", 2e-3)


def test_model_kwargs_are_python_values():
    args = parse_arguments(["--model-kwargs", "embed_dim=48", "qkv_bias=False", "--epochs", "1"])
    assert args.model_kwargs == {"embed_dim": 48, "qkv_bias": False}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model vit_smal_sar", "no model 'vit_smal_sar'; did you mean vit_small_sar"),
        ("--epocs 3", "no option --epocs; did you mean --epochs"),
        ("--epochs -3", "'-3' is not a whole number of at least 1"),
        ("--lr inf", "'inf' is not a number above 0"),
        ("--mixup-mode batch", "leave --mixup-mode out: Mixup draws once for each batch"),
        ("--wd 0.1", "no option --wd; here it is --weight-decay"),
        ("-b 64", "no option -b; here it is --batch-size"),
        ("--num_classes 10", "no option --num-classes; here it is nothing: the classes are those of the data"),
        ("--dist-eval", "leave --dist-eval out: evaluation is always distributed"),
        ("--epochs many", "'many' is not a whole number"),
        ("--lr 0", "'0' is not a number above 0"),
        ("--sar-weight -0.1", "'-0.1' is not a number of at least 0"),
        ("--sar-weight nan", "'nan' is not a number of at least 0"),
        ("--drop-path 1.5", "'1.5' is not a number of at least 0 and at most 1"),
        ("--last-block none", "invalid choice: 'none'"),
        ("--data-set imagnet --data-path x", "imagenet"),
        ("--input-size 225 --patch-size 16", "--input-size 225 is not divisible by --patch-size 16"),
        ("--data-path x --batch-size 127", "--batch-size 127 is odd"),
        ("--report ema --no-model-ema", "--report ema needs --model-ema"),
        ("--resume nothing.pth", "--resume nothing.pth: no such file"),
        (
            "--resume timm:vit",
            "--resume timm:vit: a run resumes from a file; --finetune starts one",
        ),
        ("--finetune nothing.pth", "--finetune nothing.pth: no such file"),
        ("@nothing.args", "argument file nothing.args: No such file"),
        ("--lr 1e-3 @recipes/deit_in1k.args", "must come before all options"),
    ],
)
def test_mistakes_are_one_line_that_names_the_mend(words, message):
    with pytest.raises(UserError) as error:
        parse_arguments(words.split())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_odd_batch_is_fine_without_mixup():
    assert parse_arguments("--batch-size 127 --mixup 0 --cutmix 0".split()).batch_size == 127


def test_differences_leave_out_what_does_not_change_the_mathematics():
    args = parse_arguments(["--epochs", "3"])
    saved = {**vars(args), "num_workers": 99, "batch_size": 2, "output_dir": "elsewhere", "lr": 1.0}
    assert differences(vars(args), saved) == [f"--lr: 1.0 in the checkpoint, {args.lr} now"]


def test_weights_may_be_named_in_other_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.zeros(1)}, "weights.pth")
    args = parse_arguments(["--finetune", "weights.pth"])
    assert differences(vars(args), {**vars(args), "finetune": str(tmp_path / "weights.pth")}) == []
    assert differences(vars(args), {**vars(args), "finetune": "others.pth"}) == [
        "--finetune: others.pth in the checkpoint, weights.pth now"
    ]


def test_fine_tuning_takes_the_model_and_its_sizes_from_a_run_of_this_program(tmp_path):
    """Model, sizes and lambda as the run had them; what is given wins, and a single size joins the others."""
    own = str(write_checkpoint(tmp_path / "own.pth", ["one", "two"]))
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 3}

    def parsed(words):
        args = parse_arguments(["--finetune", own, "--data-path", "x", *words.split()])
        return args.model, args.input_size, args.patch_size, args.model_kwargs, args.last_block, args.sar_weight

    assert parsed("") == ("vit_tiny_sar", 8, 2, sizes, "sar", 0.01)
    assert parsed("--input-size 12") == ("vit_tiny_sar", 12, 2, sizes, "sar", 0.01)
    assert parsed("--model vit_tiny") == ("vit_tiny", 8, 2, sizes, "sar", 0.0)
    kwargs = sizes | {"num_heads": 4, "qkv_bias": False}
    assert parsed("--model-kwargs num_heads=4 qkv_bias=False") == ("vit_tiny_sar", 8, 2, kwargs, "sar", 0.01)
    assert parsed("--model pvt_small") == ("pvt_small", 224, 4, {}, "sar", 0.0), "another architecture"
    assert parsed("--task dino")[:4] == ("vit_tiny_sar", 8, 2, sizes)
    dense = parsed("--task segment --data-set voc2012 --patch-size 4 --input-size 64")
    assert dense[:4] == ("vit_tiny_sar", 64, 4, {"pretrain_size": 8} | sizes), "its images are larger"


def test_an_option_younger_than_the_checkpoint_was_at_its_default():
    args = parse_arguments(["--epochs", "3"])
    saved = {name: value for name, value in vars(args).items() if name != "drloc_weight"}
    assert differences(vars(args), saved) == []
    args.drloc_weight = 0.1
    assert differences(vars(args), saved) == ["--drloc-weight: 0.0 in the checkpoint, 0.1 now"]


def test_removed_options_of_a_checkpoint_matter_only_at_values_that_cannot_be_resumed():
    args = vars(parse_arguments(["--epochs", "3"]))
    assert differences(args, args | {"decay_epochs": 30, "mixup_mode": "batch"}) == []
    assert differences(args, args | {"mixup_mode": "pair"}) == ["--mixup-mode: pair in the checkpoint, None now"]


def test_argument_files_may_begin_with_others(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "base.args").write_text("# a base\n--epochs 7 --lr 1e-3\n")
    (tmp_path / "inside/variant.args").write_text("@../base.args  # seen from here\n--epochs 9\n")
    args = parse_arguments([f"@{tmp_path / 'inside/variant.args'}", "--seed", "1"])
    assert (args.epochs, args.lr, args.seed) == (9, 1e-3, 1)
    (tmp_path / "base.args").write_text("@inside/variant.args\n")
    with pytest.raises(UserError, match="includes itself"):
        parse_arguments([f"@{tmp_path / 'base.args'}"])


def test_help_shows_every_option_once_with_its_group(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    text = capsys.readouterr().out
    for group in ("model:", "data:", "spatial-attention-based regularisation:", "augmentation:", "run:"):
        assert f"\n{group}\n" in text
    assert text.count("\n  --sar-weight ") == 1


def test_nothing_on_the_command_line_is_one_word():
    with pytest.raises(UserError, match="unrecognized arguments"):
        parse_arguments([""])


def test_the_options_of_other_programs_lead_to_options_of_this_one():
    known = {name for action in build_parser()._actions for name in action.option_strings}
    for name, here in ELSEWHERE.items():
        assert name not in known
        assert set(re.findall(r"--[a-z-]+", here)) <= known, name


def test_amp_alone_is_auto():
    assert parse_arguments(["--amp", "--data-set", "digits"]).amp == "auto"


def test_every_option_trains_something_in_a_test():
    """By name, in the files whose tests train; what only asks (--help) and the negations are in this file."""
    files = (
        "test_main.py",
        "test_engine.py",
        "test_resume.py",
        "test_processes.py",
        "test_tasks.py",
        "helpers/runs.py",
        "test_knn.py",
        "test_linear.py",
    )
    words = set(re.findall(r"--[a-z][a-z0-9-]*", "".join((ROOT / "tests" / name).read_text() for name in files)))
    for action in [*build_parser()._actions, *build_parser("knn")._actions, *build_parser("linear")._actions]:
        assert words & set(action.option_strings) or action.dest == "help", action.option_strings


def test_loading_processes_follow_the_cores_that_a_process_has(monkeypatch):
    """torchrun's processes share the machine's; srun says how many a task has."""
    monkeypatch.setattr("arguments.os.sched_getaffinity", lambda _: set(range(64)))
    for name in ("LOCAL_WORLD_SIZE", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    assert parse_arguments(["--data-path", "somewhere"]).num_workers == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert parse_arguments(["--data-path", "somewhere"]).num_workers == 4
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "5")
    assert parse_arguments(["--data-path", "somewhere"]).num_workers == 5


def test_every_loss_of_the_maps_is_one_of_the_engines():
    assert set(SAR_LOSSES) == set(SAR_TERMS)


def test_help_and_typing_errors_import_nothing_slow():
    """In a process of its own: torch, timm and torchvision take seconds to import."""
    code = (
        "import sys, main\n"
        "code = main.main(['--modle', 'x'])\n"
        "slow = {'torch', 'timm', 'torchvision', 'numpy', 'PIL', 'scipy', 'matplotlib'} & sys.modules.keys()\n"
        "sys.exit(f'imported {slow}' if slow or code != 2 else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
