"""Every recipe's resolved values against the protocol that it claims to be, number by number."""

from pathlib import Path

import pytest

from arguments import build_parser, parse_arguments

ROOT = Path(__file__).parents[1]

# Written out once more on purpose: the recipes are the only other place.
COMMON = {
    "input_size": 224,
    "patch_size": 16,
    "opt": "adamw",
    "opt_eps": 1e-8,
    "opt_betas": None,  # AdamW's: 0.9, 0.999
    "weight_decay": 0.05,
    "unscale_lr": False,
    "sched": "cosine",
    "warmup_lr": 1e-6,
    "min_lr": 1e-5,
    "cooldown_epochs": 0,
    "drop": 0.0,
    "drop_path": 0.1,
    "color_jitter": 0.4,
    "aa": "rand-m9-mstd0.5-inc1",
    "train_interpolation": "bicubic",
    "scale": [0.08, 1.0],
    "hflip": 0.5,
    "reprob": 0.25,
    "remode": "pixel",
    "recount": 1,
    "smoothing": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "mixup_prob": 1.0,
    "mixup_switch_prob": 0.5,
    "crop_pct": None,  # 256 -> 224
    "sar_weight": 0.01,
    "sar_schedule": "constant",
    "sar_similarity": "dot",
    "sar_query": "cls",
    "sar_loss": "spatial-entropy",
    "drloc_weight": 0.0,
    "last_block": "sar",
    "sampling_ratio": 1.0,
    "repeated_aug": False,
    "report": "model",
}
DEIT = {
    "data_set": "imagenet",
    "total_batch": 1024,
    "peak_lr": 1e-3,
    "epochs": 300,
    "warmup_epochs": 5,
    "sched_on_updates": False,
    "clip_grad": None,
    "model_ema": True,
    "model_ema_decay": 0.99996,
    "eval_every": 1,
    "save_every": 1,
}
SWIN = {
    "data_set": "imagenet100",
    "epochs": 100,
    "warmup_epochs": 20,
    "sched_on_updates": True,
    "clip_grad": 5.0,
    "model_ema": False,
}
RECIPES = {
    "deit_in1k": DEIT,
    "swin_in100_100": DEIT | SWIN,
    "swin_in100_300": DEIT | SWIN | {"epochs": 300},
    "small_sets": DEIT | {"epochs": 5000, "model_ema": False, "eval_every": 50, "save_every": 10},
    "finetune": DEIT | {"total_batch": 512, "peak_lr": 5e-4, "epochs": 100, "warmup_epochs": 3, "model_ema": False},
}
T2T = DEIT | {
    "total_batch": 512,
    "unscale_lr": True,
    "peak_lr": 5e-4,
    "warmup_epochs": 10,
    "cooldown_epochs": 10,
    "report": "ema",
    "train_interpolation": "random",
    "crop_pct": 0.9,
}
PVT = DEIT | {"repeated_aug": True, "model_ema": False}
CVT = DEIT | {"total_batch": 2048, "unscale_lr": True, "peak_lr": 2e-3, "model_ema": False}
IN100 = {"data_set": "imagenet100", "epochs": 100}
RECIPES |= {
    "t2t_in1k": T2T,
    "t2t_in1k_paper": T2T | {"total_batch": 1024, "peak_lr": 1e-3},
    "t2t_in100": T2T | IN100,
    "pvt_in1k": PVT,
    "pvt_in100": PVT | IN100,
    "cvt_in1k": CVT,
    "cvt_in1k_paper": CVT | {"peak_lr": 2e-2},
    "cvt_in100": CVT | IN100,
}
FURTHER = {"swin_in100_300", "t2t_in1k_paper", "t2t_in100", "pvt_in100", "cvt_in1k_paper", "cvt_in100"}
"""Recipes that begin with another one, where the rest is said."""
DINO = {"dino", "dino_in100", "dino_in100_boosted", "dino_small"}  # tests/test_dino.py
MOCO = {"moco_in100", "moco_in100_12heads", "moco_small"}  # tests/test_moco.py
PROBES = {"linear_dino", "linear_moco"}  # tests/test_linear.py
DENSE = {"segment_voc", "segment_ade20k", "detect_voc"}  # tests/test_segment.py, tests/test_detect.py
NO_PROTOCOL = {
    "quickstart",
    "laptop",  # tests/test_own_data.py
    "smoke",
    "smoke_t2t",
    "smoke_pvt",
    "smoke_cvt",
    "smoke_dino",
    "smoke_moco",
    "smoke_linear",
    "smoke_segment",
    "smoke_segment_pvt",
    "smoke_detect",
}  # of ours


def resolved(name: str, *more: str) -> dict:
    args = vars(parse_arguments([f"@{ROOT}/recipes/{name}.args", "--model", "vit_small_sar", *more]))
    return args | {"peak_lr": args["lr"] if args["unscale_lr"] else args["lr"] * args["total_batch"] / 512}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_its_protocol(name):
    expected = COMMON | RECIPES[name]
    found = resolved(name)
    assert {key: found[key] for key in expected} == expected


def test_every_recipe_is_tested():
    tested = RECIPES.keys() | NO_PROTOCOL | DINO | MOCO | PROBES | DENSE
    assert {path.stem for path in (ROOT / "recipes").glob("*.args")} == tested


@pytest.mark.parametrize("name", RECIPES)
def test_eight_gpus_need_no_accumulation(name):
    args = resolved(name)
    assert args["batch_size"] * 8 == args["total_batch"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_data_sets_own_defaults_change_nothing_of_a_protocol(name):
    """What a recipe leaves open, a data set could fill: digits, which bring most, change only their own crop."""
    own = {"crop_pct", "data_set", "output_dir", "num_workers"}
    by_recipe, with_digits = resolved(name), resolved(name, "--data-set", "digits")
    assert {key for key in by_recipe if by_recipe[key] != with_digits[key]} <= own


def test_no_value_of_the_protocol_is_left_out_of_this_test():
    groups = {"batch and length", "optimiser and schedule", "augmentation", "model"}
    tested = COMMON.keys() | DEIT.keys() | {"lr", "batch_size"}
    of_other_schedules = {"decay_epochs", "decay_rate"}
    of_a_run = {"seed", "model", "model_kwargs", "finetune", "checkpoint_key"}
    options = {
        action.dest
        for group in build_parser()._action_groups
        if group.title in groups or group.title.startswith("spatial")
        for action in group._group_actions
    }
    assert options <= tested | of_other_schedules | of_a_run


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_where_it_comes_from(name):
    text = (ROOT / f"recipes/{name}.args").read_text()
    first = text.splitlines()[0]
    if name in FURTHER:
        assert first.removeprefix("@").removesuffix(".args") in RECIPES.keys() - FURTHER
        return
    for said in ("Source:", "otal batch", "Hardware in the paper: 8 x V100 32 GB"):
        assert said in text
    assert name == "deit_in1k" or first == "@deit_in1k.args"
    assert name == "deit_in1k" or "guess" in text.lower()
