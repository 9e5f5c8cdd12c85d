"""Training and evaluation as a user meets them: pre-flight errors, options, evaluation, fine-tuning, schedules."""

import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import runs
from PIL import Image

import build
import checkpoints
import engine
import main
import utils
from arguments import parse_arguments
from tasks.classify import Classification
from weights import BLOCK

ROOT = Path(__file__).parents[1]
ONE_EPOCH = ("--epochs", "1", "--warmup-epochs", "0")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.write_digits(tmp_path_factory.mktemp("digits"))


def train(data, output, *more) -> int:
    return main.main(runs.command(data, output, *more))


def last_record(output) -> dict:
    return json.loads((output / "log.txt").read_text().splitlines()[-1])


# ------------------------------------------------------------------------------------------------- pre-flight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--total-batch", "480"), "240 training images are fewer than one --total-batch of 480"),
        (("--total-batch", "30"), "--batch-size 24 x 1 processes does not divide --total-batch 30"),
        (("--model-kwargs", "embed_dim=24", "num_heads=5"), "divisible by num_heads"),
        (("--model-kwargs", "embed_dims=24"), "embed_dims"),
        (("--model-kwargs", "embed_dim=24", "num_heads=0"), "num_heads"),
        (("--model-kwargs", "embed_dim=24", "num_heads=3", "depth=0"), "--model vit_tiny_sar with"),
        (("--model-kwargs", "embed_dim"), "'embed_dim' is not KEY=VALUE"),
        (("--model-kwargs", "img_size=28"), "use --input-size instead"),
        (("--model-kwargs", "class_token=False", "global_pool=avg"), "class_token=True"),
        (("--opt", "adamww"), "--opt adamww"),
        (("--device", "toaster"), "--device toaster"),
        (("--device", "cuda:99"), "sees"),
        (("--device", "mps"), "torch sees no Apple GPU here; use auto, cpu or cuda"),
        (("--resume", str(ROOT)), "is a folder"),
        (("--amp", "fp16", "--device", "cpu"), "--amp fp16 needs a GPU"),
        (("--aa", "rnd-m9"), "--aa rnd-m9"),
        (("--output-dir", "/dev/null/run"), "--output-dir /dev/null/run"),
        (("--data-path", "no_such_folder"), "no_such_folder"),
        (("--download",), "--download"),
        (("--sampling-ratio", "0.1"), "fewer than one --total-batch of 48"),
    ],
)
def test_mistakes_end_before_training_with_one_line(options, message, data, tmp_path, capsys):
    assert train(data, tmp_path, *options) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "log.txt").exists()


def test_a_mistake_on_the_command_line_of_a_shell(tmp_path):
    done = subprocess.run(
        [sys.executable, "main.py", "--model", "vit_smal_sar", "--output-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: no model 'vit_smal_sar'; did you mean vit_small_sar")
    assert "Traceback" not in done.stderr


def test_a_gpu_without_kernels_is_told_from_one_with():
    from utils import has_kernels

    cuda_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
    assert not has_kernels(cuda_13, 7, 0)  # V100
    assert has_kernels(cuda_13, 8, 9)  # sm_86 code runs on it
    assert has_kernels(cuda_13, 9, 0)
    assert has_kernels(cuda_13, 13, 0)  # compiled from the PTX
    assert has_kernels(["sm_70", "sm_90a"], 7, 0)


def unreadable(data, tmp_path, split: str) -> Path:
    copy = runs.write_digits(tmp_path / "data")
    broken = copy / split / "3" / f"{0 if split == 'train' else 24}.png"
    broken.write_bytes(broken.read_bytes()[:40])
    return broken


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_unreadable_image_stops_the_run_and_is_named(split, workers, data, tmp_path, capsys):
    broken = unreadable(data, tmp_path, split)
    assert train(broken.parents[2], tmp_path / "out", *ONE_EPOCH, "--num-workers", workers) == 2
    error = capsys.readouterr().err.strip()
    assert str(broken) in error
    assert len(error.splitlines()) == 1


def test_unreadable_images_are_replaced_and_counted_on_request(data, tmp_path):
    broken = unreadable(data, tmp_path, "train")
    unread_in_val = broken.parents[2] / "val" / "3" / "24.png"
    unread_in_val.write_bytes(b"no image")
    assert train(broken.parents[2], tmp_path / "out", *ONE_EPOCH, "--skip-unreadable") == 0
    record = last_record(tmp_path / "out")
    assert record["train_unreadable"] == 1
    assert (record["test_unreadable"], record["test_images"]) == (1, 59)


# ---------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "options",
    [
        "--model vit_tiny",
        "--model vit_tiny --sar-weight 0.1 --sar-similarity cosine",
        "--sar-schedule warmup-cosine --sar-similarity softmax --sar-query mean",
        "--last-block no_msa_skip --drop 0 --drop-path 0",
        "--last-block no_skips --unscale-lr --lr 1e-3",
        "--mixup 0 --cutmix 0 --smoothing 0.2 --batch-size 15 --total-batch 45",
        "--mixup 0.2 --cutmix 0.5 --mixup-prob 0.5 --mixup-switch-prob 0.2",
        "--opt sgd --weight-decay 1e-4 --clip-grad 1.0",
        "--opt adam --opt-eps 1e-6 --opt-betas 0.8 0.9",
        "--opt lamb",
        "--sched constant --warmup-lr 1e-5",
        "--aa none --color-jitter 0.3 --hflip 0 --reprob 0.5 --remode const --recount 2 --scale 0.5 1.0",
        "--aa augmix-m3-w2 --remode rand --input-size 40 --patch-size 4 --train-interpolation random",
        "--amp bf16 --grad-checkpointing",
        "--report ema --crop-pct 0.9 --print-every 1 --seed 3",
        "--no-model-ema --num-workers 1 --device cpu --amp off",
        "--class-weights balanced --model-ema-warmup --report ema",
        "--class-weights balanced --mixup 0 --cutmix 0 --amp bf16",
        "--sar-loss total-variation --sar-weight 0.001 --drloc-weight 0.1",
        "--model vit_tiny --drloc-weight 0.1 --grad-checkpointing --no-model-ema",
        "--sampling-ratio 0.5 --sampling-seed 3 --cache-images",
        "--layer-decay 0.65 --drloc-weight 0.1",
    ],
)
def test_options_train(options, data, tmp_path):
    assert train(data, tmp_path, *ONE_EPOCH, *options.split()) == 0
    record = last_record(tmp_path)
    assert math.isfinite(record["train_loss"])
    assert record["test_images"] == 60


def test_cooldown_epochs_follow_at_the_lowest_rate(data, tmp_path):
    options = "--epochs 2 --warmup-epochs 1 --cooldown-epochs 1 --min-lr 3e-5".split()
    assert train(data, tmp_path, *options) == 0
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert len(lines) == 3
    assert lines[2]["train_lr"] == pytest.approx(3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("drloc_weight", ["0", "0.1"])
def test_compile(drloc_weight, data, tmp_path):
    assert train(data, tmp_path, *ONE_EPOCH, "--compile", "--drloc-weight", drloc_weight) == 0
    assert math.isfinite(last_record(tmp_path)["train_loss"])


def test_a_single_folder_of_classes_is_divided(data, tmp_path):
    assert train(data / "val", tmp_path, *ONE_EPOCH, "--val-split", "0.2", "--total-batch", "24") == 0
    record = last_record(tmp_path)
    assert (record["train_images"], record["test_images"]) == (50, 10)
    assert len(json.loads((tmp_path / "split.json").read_text())["val"]) == 10


def test_a_share_of_the_images_is_trained_on_and_kept_with_the_run(data, tmp_path):
    for name, seed in (("one", "0"), ("two", "5")):
        assert train(data, tmp_path / name, *ONE_EPOCH, "--sampling-ratio", "0.25", "--seed", seed) == 0
    one, two = (json.loads((tmp_path / name / "subset.json").read_text()) for name in ("one", "two"))
    assert one == two, "the choice has a seed of its own"
    assert len(one["images"]) == 60
    record = last_record(tmp_path / "one")
    assert (record["train_images"], record["test_images"]) == (60, 60)
    assert train(data, tmp_path / "whole", *ONE_EPOCH) == 0
    assert not (tmp_path / "whole/subset.json").exists()
    assert train(data, tmp_path / "one", *ONE_EPOCH, "--sampling-ratio", "0.5") == 2
    assert json.loads((tmp_path / "one/subset.json").read_text()) == one, "a refused command leaves it alone"


def test_cached_images_train_the_same_weights_and_are_decoded_last(data, tmp_path, capsys):
    assert train(data, tmp_path / "files", *ONE_EPOCH) == 0
    assert train(data, tmp_path / "memory", *ONE_EPOCH, "--cache-images") == 0
    assert "240 decoded images" in capsys.readouterr().out
    files, memory = (runs.content(tmp_path / name) for name in ("files", "memory"))
    runs.assert_identical(memory["log.txt"], files["log.txt"])
    runs.assert_identical(memory["checkpoint.pth"]["model"], files["checkpoint.pth"]["model"])
    for options, code in (((), 0), (("--lr", "1"), 2), (("--total-batch", "30"), 2)):
        assert train(data, tmp_path / "memory", *ONE_EPOCH, "--cache-images", *options) == code
        assert "decoded images" not in capsys.readouterr().out, "nothing is left to train, or it is refused"


@pytest.mark.parametrize("more", [(), ("--sar-weight", "0")])
def test_maps_of_two_by_two_patches_have_no_entropy(more, data, tmp_path, capsys):
    code = train(data, tmp_path, "--patch-size", "4", *ONE_EPOCH, *more)
    assert code == (0 if more else 2)
    if not more:
        assert "S has 2 x 2 patches, which are always one component" in capsys.readouterr().err


def test_digits_need_nothing_and_stay_in_the_default_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = "--model vit_tiny_sar --model-kwargs embed_dim=12 depth=1 num_heads=1 --epochs 1 --input-size 12"
    assert main.main(small.split()) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["output"]
    (folder,) = (tmp_path / "output").iterdir()
    assert folder.name == "vit_tiny_sar_digits_seed0"
    out = capsys.readouterr().out
    assert "defaults  of digits: --" in out
    assert "1,437 training images" in out
    assert last_record(folder)["test_images"] == 360


# ------------------------------------------------------------------------------- evaluation and fine-tuning


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    assert train(data, output) == 0
    return output


def described(record: dict, prefix: str) -> str:
    return Classification.describe({name.removeprefix(prefix): value for name, value in record.items()})


def test_eval_takes_model_and_sizes_from_the_checkpoint(data, trained, tmp_path, capsys):
    for key, prefix in (("model", "test_"), ("ema", "test_ema_")):
        words = ["--eval", "--resume", str(trained / "checkpoint.pth"), "--data-path", str(data)]
        assert main.main([*words, "--checkpoint-key", key, "--num-workers", "0"]) == 0
        line = capsys.readouterr().out.splitlines()[-1]
        assert line == described(last_record(trained), prefix)


def test_eval_needs_something_to_evaluate(data, tmp_path, capsys):
    assert main.main(["--eval", "--data-path", str(data), "--output-dir", str(tmp_path / "none")]) == 2
    assert f"nothing to evaluate at {tmp_path / 'none/best.pth'}" in capsys.readouterr().err
    assert main.main(["--eval", "--resume", "gone.pth"]) == 2
    assert "nothing to evaluate at gone.pth" in capsys.readouterr().err


def test_eval_refuses_a_head_of_other_classes(trained, tmp_path, capsys):
    other = tmp_path / "data"
    for split in ("train", "val"):
        for name in ("one", "two"):
            (other / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(other / split / name / "0.png")
    assert main.main(["--eval", "--resume", str(trained / "best.pth"), "--data-path", str(other)]) == 2
    error = capsys.readouterr().err
    assert f"{trained / 'best.pth'}: the checkpoint has no class one, two; its 10 are 0, 1, 2, 3, 4 and 5 more" in error
    assert len(error.splitlines()) == 1


def test_eval_of_some_of_the_classes_finds_them_by_name(data, trained, tmp_path, capsys):
    """The accuracy over parts of the classes, weighted by their images, is that over all."""
    hits, counted = 0.0, 0
    for part in (range(4), range(4, 10)):
        for number in part:
            (tmp_path / f"{part[0]}/val").mkdir(parents=True, exist_ok=True)
            for split in ("train", "val"):
                (tmp_path / f"{part[0]}/{split}").mkdir(exist_ok=True)
                (tmp_path / f"{part[0]}/{split}/{number}").symlink_to(data / split / str(number))
        words = ["--eval", "--resume", str(trained / "best.pth"), "--data-path", str(tmp_path / str(part[0]))]
        assert main.main([*words, "--num-workers", "0"]) == 0
        text = capsys.readouterr().out
        assert f"the images are of {len(part)} of its 10 classes, which were found by name" in text
        hits += float(re.search(r"Acc@1 (\S+)", text)[1]) * len(part)
        counted += len(part)
    best = torch.load(trained / "best.pth", weights_only=True)["best"]
    assert hits / counted == pytest.approx(best["acc1"], abs=1e-2)


def test_an_average_that_cannot_move_is_warned_of(data, tmp_path, capsys):
    assert train(data, tmp_path, *ONE_EPOCH, "--model-ema-decay", "0.99996") == 0
    assert "--model-ema-decay 0.99996: after all 5 updates the average still holds 100 %" in capsys.readouterr().out


def test_finetune_begins_a_run_from_weights_and_says_what_it_dropped(trained, tmp_path, capsys):
    other = runs.write_digits(tmp_path / "data")
    for split in ("train", "val"):
        for path in sorted((other / split / "9").iterdir()):
            path.rename(other / split / "8" / f"nine_{path.name}")
        (other / split / "9").rmdir()
    options = ("--finetune", str(trained / "best.pth"), "--input-size", "16", *ONE_EPOCH)
    assert train(other, tmp_path / "out", *options) == 0
    out = capsys.readouterr().out
    assert "head: 10 -> 9 classes" in out
    assert "pos_embed" in out
    assert last_record(tmp_path / "out")["epoch"] == 0


@pytest.mark.parametrize("more", [(), ("--keep-head",)])
def test_finetune_drops_a_head_whose_classes_have_other_names(more, trained, tmp_path, capsys):
    other = runs.write_digits(tmp_path / "data")
    for split in ("train", "val"):
        (other / split / "9").rename(other / split / "nine")
    assert (
        train(other, tmp_path / "out", "--finetune", str(trained / "best.pth"), "--lr", "1e-9", *ONE_EPOCH, *more) == 0
    )
    dropped = "head: of 10 classes with other names, dropped and re-initialised" in capsys.readouterr().out
    assert dropped != bool(more)
    heads = [
        torch.load(path / "best.pth", weights_only=True)["model"]["head.weight"] for path in (trained, tmp_path / "out")
    ]
    assert torch.allclose(*heads, atol=1e-3) == bool(more)


def test_finetune_keeps_the_last_block_of_the_weights(trained, data, tmp_path):
    """Appendix E.4; our checkpoints say which it is, of others the second LayerNorm tells."""
    weights = torch.load(trained / "best.pth", weights_only=True)["model"]
    torch.save({"model": weights}, tmp_path / "released.pth")
    for file in (trained / "best.pth", tmp_path / "released.pth"):
        args = parse_arguments(["--finetune", str(file), "--model", "vit_tiny", "--data-path", "x"])
        assert (args.last_block, args.sar_weight) == ("sar", 0.0)
    options = ("--finetune", str(trained / "best.pth"), "--model", "vit_tiny", "--sar-weight", "0")
    assert train(data, tmp_path / "out", *options, *ONE_EPOCH) == 0
    saved = torch.load(tmp_path / "out/checkpoint.pth", weights_only=True)
    assert "blocks.1.norm2.weight" not in saved["model"]


def test_a_finetuned_checkpoint_needs_its_pretraining_no_more(trained, data, tmp_path, capsys):
    pretrained = tmp_path / "pretrained.pth"
    pretrained.write_bytes((trained / "checkpoint.pth").read_bytes())
    options = ("--finetune", str(pretrained), "--checkpoint-key", "ema", "--no-model-ema", *ONE_EPOCH)
    assert train(data, tmp_path / "out", *options) == 0
    pretrained.unlink()
    assert main.main(["--eval", "--resume", str(tmp_path / "out/best.pth"), "--num-workers", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == described(last_record(tmp_path / "out"), "test_")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--model vit_small --input-size 8 --patch-size 2 --finetune",
            "--model vit_small does not fit the weights, which are of --model vit_tiny; leave it out",
        ),
        (
            "--model-kwargs depth=1 mlp_ratio=2 --finetune",
            "--model-kwargs depth=1 --model-kwargs mlp_ratio=2 does not fit the weights, which are of "
            "--model-kwargs depth=2; leave it out",
        ),
        ("--model-kwargs embed_dim=48 --eval --resume", "embed_dim=48 does not fit the weights, which are of"),
    ],
)
def test_sizes_that_contradict_those_of_the_weights_are_one_short_line(
    options, message, trained, data, tmp_path, capsys
):
    words = [*options.split(), str(trained / "best.pth"), "--data-set", "folder", "--data-path", str(data)]
    assert main.main([*words, "--output-dir", str(tmp_path), "--total-batch", "48", "--batch-size", "48"]) == 2
    error = capsys.readouterr().err
    assert f"error: {trained / 'best.pth'}: " in error
    assert message in error
    assert len(error) < len(str(trained)) + 220


def test_fine_tuning_needs_no_sizes(trained, data, tmp_path, capsys):
    words = ["--finetune", str(trained / "best.pth"), "--data-set", "folder", "--data-path", str(data), *ONE_EPOCH]
    more = ["--batch-size", "48", "--total-batch", "48", "--num-workers", "0", "--output-dir", str(tmp_path)]
    assert main.main([*words, *more]) == 0
    assert "vit_tiny_sar, " in capsys.readouterr().out
    saved = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert saved["model"].keys() == torch.load(trained / "best.pth", weights_only=True)["model"].keys()


def test_the_average_of_a_fine_tuned_model_begins_at_its_weights(trained):
    run = runs.build(" ".join(runs.SMALL).replace("folder", "digits"))
    checkpoints.start_or_resume(run, finetune=str(trained / "best.pth"))
    weights = torch.load(trained / "best.pth", weights_only=True)["model"]
    assert all(torch.equal(value, weights[name]) for name, value in run.task.averaged.state_dict().items())


def test_finetuning_is_in_training_mode(trained, data, tmp_path, monkeypatch):
    """Unlike the released code's: dropout and drop-path work."""
    modes, original = set(), Classification.losses

    def losses(self, outputs, batch):
        modes.update(module.training for module in self.modules())
        return original(self, outputs, batch)

    monkeypatch.setattr(Classification, "losses", losses)
    assert train(data, tmp_path, "--finetune", str(trained / "best.pth"), "--epochs", "2") == 0
    assert modes == {True}


def test_finetune_follows_the_weights_that_are_named(trained, tmp_path):
    """Nothing but the named entry says what the block is; of DINO's files the teacher is taken."""
    weights = torch.load(trained / "best.pth", weights_only=True)["model"]
    words = ["--finetune", str(tmp_path / "weights.pth"), "--model", "vit_tiny", "--data-path", "x"]
    torch.save({"one": weights, "other": weights}, tmp_path / "weights.pth")
    assert parse_arguments([*words, "--checkpoint-key", "one"]).last_block == "sar"
    with pytest.raises(utils.UserError, match="one, other"):
        parse_arguments(words)
    torch.save({"teacher": weights, "student": weights}, tmp_path / "weights.pth")
    assert parse_arguments(words).last_block == "sar"


def test_finetune_of_another_last_block_on_demand_is_refused_with_the_mend(trained, data, tmp_path, capsys):
    options = ("--finetune", str(trained / "best.pth"), "--last-block", "standard")
    assert train(data, tmp_path, *options) == 2
    assert "--last-block sar" in capsys.readouterr().err


def test_resume_of_another_model_is_refused(trained, data, tmp_path, capsys):
    assert train(data, tmp_path, "--resume", str(trained / "best.pth"), "--model", "vit_tiny") == 2
    assert "--model: vit_tiny_sar in the checkpoint, vit_tiny now" in capsys.readouterr().err


def test_other_arguments_in_the_same_folder_are_refused_with_a_folder_that_is_free(data, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train(data, folder, *ONE_EPOCH) == 0
    (tmp_path / "run_2").mkdir()
    assert train(data, folder, *ONE_EPOCH, "--smoothing", "0.2") == 2
    error = capsys.readouterr().err
    assert f"give the same, or --output-dir {folder}_3 (--smoothing: 0.1 in the checkpoint, 0.2 now)" in error


def test_a_changed_data_set_is_refused(trained, tmp_path, capsys):
    fewer = runs.write_digits(tmp_path / "fewer", train=23)
    assert train(fewer, tmp_path / "a", "--resume", str(trained / "best.pth")) == 2
    assert "training images differ from the checkpoint's" in capsys.readouterr().err
    renamed = runs.write_digits(tmp_path / "renamed")
    for split in ("train", "val"):
        (renamed / split / "9").rename(renamed / split / "nine")
    assert train(renamed, tmp_path / "b", "--resume", str(trained / "best.pth")) == 2
    assert "classes differ from the checkpoint's" in capsys.readouterr().err


def test_another_precision_is_refused_though_auto_chose_it(trained, data, tmp_path, capsys):
    assert train(data, tmp_path, "--resume", str(trained / "best.pth"), "--amp", "bf16") == 2
    assert "torch.float32 in the checkpoint, torch.bfloat16 now: see --amp" in capsys.readouterr().err


def test_eval_evaluates_the_weights_that_were_reported(data, tmp_path, capsys):
    assert train(data, tmp_path, "--report", "ema") == 0
    best = torch.load(tmp_path / "best.pth", weights_only=True)["best"]
    capsys.readouterr()
    assert main.main(["--eval", "--resume", str(tmp_path / "best.pth"), "--num-workers", "0"]) == 0
    assert f"Acc@1 {best['acc1']:.3f} " in capsys.readouterr().out


def test_a_foreign_log_is_not_overwritten(data, tmp_path, capsys):
    (tmp_path / "log.txt").write_text("my notes\n")
    assert train(data, tmp_path) == 2
    assert "not a log of this program" in capsys.readouterr().err
    assert (tmp_path / "log.txt").read_text() == "my notes\n"


def test_tensorboard_shows_every_point_once_after_a_resume(data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(data, tmp_path, "--epochs", "2", "--cooldown-epochs", "1", "--save-every", "2") == 0
    for name in ("checkpoint.pth", "best.pth"):
        (tmp_path / name).unlink()
    assert train(data, tmp_path, "--epochs", "2", "--cooldown-epochs", "1", "--save-every", "2") == 0
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("test/acc1")] == [5, 10, 15]
    assert [event.step for event in events.Scalars("train/loss")] == [3, 5, 8, 10, 13, 15]
    scalars = events.Tags()["scalars"]
    assert {tag.partition("/")[0] for tag in scalars} == {"train", "test", "test_ema", "time"}
    assert not {"train/sar_weight", "test/images", "test_ema/unreadable"} & {*scalars}
    assert events.Tensors("arguments/text_summary")[0].step == 0


def test_attention_is_drawn_every_few_epochs_and_changes_no_weight(data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name, options in {"drawn": ["--log-attention", "2", "--sar-similarity", "cosine"], "not": []}.items():
        same = ["--epochs", "3", "--sar-similarity", "cosine"]
        assert train(data, tmp_path / name, *same, *options) == 0
    events = EventAccumulator(str(tmp_path / "drawn"), size_guidance={"images": 0})
    events.Reload()
    assert list(events.Tags()["images"]) == [f"attention/{number}" for number in (1, 2, 3, 4)]
    drawn = events.Images("attention/1")
    assert [image.step for image in drawn] == [10, 15], "after two epochs of five updates, and at the end"
    pictures = [np.asarray(Image.open(io.BytesIO(image.encoded_image_string))) for image in drawn]
    assert pictures[0].shape == pictures[1].shape
    assert (pictures[0] != pictures[1]).any(), "the same images, seen by other weights"
    weights = [torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)["model"] for name in ("drawn", "not")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_resume_of_foreign_weights_points_to_finetune(trained, data, tmp_path, capsys):
    weights = torch.load(trained / "best.pth", weights_only=True)["model"]
    torch.save({"model": weights}, tmp_path / "deit.pth")
    assert train(data, tmp_path / "out", "--resume", str(tmp_path / "deit.pth")) == 2
    assert "use --finetune" in capsys.readouterr().err


def test_a_truncated_own_checkpoint_is_refused_by_name(data, tmp_path, capsys):
    (tmp_path / "checkpoint.pth").write_bytes(b"PK\x03\x04 torn")
    assert train(data, tmp_path) == 2
    assert "checkpoint.pth" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- the maths


DIGITS = (
    "--data-set digits --model vit_tiny_sar --input-size 8 --patch-size 2 "
    "--model-kwargs embed_dim=24 depth=2 num_heads=3 "
)


def test_lr_is_scaled_by_the_total_batch():
    run = runs.build(DIGITS + "--lr 5e-4 --batch-size 64 --total-batch 256")
    assert run.task.learning_rate.peak == 2.5e-4
    assert (run.plan.accumulation, run.plan.updates_per_epoch) == (4, 5)


@pytest.mark.parametrize("per_update", [False, True], ids=["each epoch", "each update"])
def test_schedules_at_their_corners(per_update):
    """Learning rate at step 0, in and at the end of the warm-up, at the end; and set alike after a resume."""
    words = "--total-batch 128 --batch-size 128 --lr 4e-3 --warmup-epochs 2 --epochs 12 --warmup-lr 1e-6 --min-lr 1e-5"
    words += " --sar-weight 0.01 --sar-schedule warmup-cosine" + (
        " --sched-on-updates" if per_update else " --no-sched-on-updates"
    )
    run = runs.build(DIGITS + words)
    updates = run.plan.updates_per_epoch
    assert updates == 11

    def at(epoch, step):
        run.epoch, run.step = epoch, step
        schedule = engine.set_schedule(run)
        assert schedule["lr"] == run.optimizer.param_groups[0]["lr"]
        return schedule["lr"], schedule["sar_weight"]

    def cosine(t):
        return 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * t / 12))

    def warmup(t):
        return 1e-6 + (1e-3 - 1e-6) * t / 2

    half = 5 / 11 if per_update else 0
    expected = {
        (0, 0): (1e-6, 0.0),
        (0, 5): (warmup(half), 0.01 * 5 / 11 / 9),
        (1, 0): (warmup(1), 0.01 / 9),
        (2, 0): (cosine(2), 0.01 * 2 / 9),
        (9, 0): (cosine(9), 0.01),
        (11, 10): (
            cosine(11 + (10 / 11 if per_update else 0)),
            0.005 * (1 + math.cos(math.pi * (1 + 10 / 11) / 2)),
        ),
    }
    for place, (lr, weight) in expected.items():
        assert at(*place) == (pytest.approx(lr), pytest.approx(weight))
    for place in reversed(expected):  # nothing depends on what was asked before
        assert at(*place)[0] == pytest.approx(expected[place][0])


SIZES = {
    "vit_tiny_sar": "--input-size 32 --patch-size 8 --model-kwargs embed_dim=24 depth=2 num_heads=3",
    "t2t_vit_14": "--input-size 32 --model-kwargs embed_dim=24 depth=2 num_heads=3 token_dim=8",
    "pvt_small": "--input-size 64 --model-kwargs embed_dims=8,8,8,8 depths=1,1,1,1 num_heads=1,1,1,1",
    "cvt_13": "--input-size 64 --model-kwargs embed_dims=8,8,12 depths=1,1,1 num_heads=1,1,2",
    "swin_tiny": "--input-size 64 --model-kwargs embed_dim=8 depths=1,1,1,1 num_heads=1,1,1,1",
}


@pytest.mark.parametrize("model", SIZES)
def test_layer_decay_lowers_the_rate_from_layer_to_layer_and_decays_the_same_weights(model):
    words = f"--data-set digits --model {model} {SIZES[model]} --drloc-weight 0.1 --weight-decay 0.03 --layer-decay "
    found = []
    for layer_decay in ("1", "0.5"):
        run = runs.build(words + layer_decay)
        run.epoch = 2
        peak = engine.set_schedule(run)["lr"]
        names = {id(parameter): name for name, parameter in run.task.named_parameters()}
        groups = [(names[id(p)], group) for group in run.optimizer.param_groups for p in group["params"]]
        assert len(groups) == len(names) == len(dict(groups))
        found.append({name: (group["lr"] / peak, group["weight_decay"]) for name, group in groups})
    plain, by_layer = found
    assert {name: decay for name, (_, decay) in plain.items()} == {name: decay for name, (_, decay) in by_layer.items()}
    assert {rate for rate, _ in plain.values()} == {1.0}
    blocks = {match[0] for name in by_layer if (match := BLOCK.match(name.removeprefix("model.")))}
    assert {rate for rate, _ in by_layer.values()} == {0.5**power for power in range(len(blocks) + 2)}
    assert {by_layer[name][0] for name in by_layer if name.startswith(("model.head.", "localiser."))} == {1.0}


def test_a_run_with_layer_decay_goes_on_bit_for_bit(data, tmp_path):
    words = ("--layer-decay", "0.65", "--epochs", "2")
    for folder, stops in (("whole", False), ("stopped", True)):
        if stops:
            with pytest.MonkeyPatch.context() as patches:
                patches.setattr(utils.StopSignal, "poll", lambda stop: True)
                assert train(data, tmp_path / folder, *words) == 0
        assert train(data, tmp_path / folder, *words) == 0
    runs.assert_identical(*(runs.content(tmp_path / folder) for folder in ("whole", "stopped")))


def test_accumulation_is_the_same_mathematics(tmp_path):
    """One batch of 64 and two of 32 give the same weights, to rounding, where nothing is random.

    After few updates: rounding moves a patch across the mean of its map sooner or later, which changes a component.
    """
    words = (
        DIGITS + "--total-batch 64 --drop-path 0 --sar-weight 0.1 --opt sgd --lr 0.5 --warmup-epochs 0 --batch-size "
    )
    weights = []
    for batch_size in (64, 32):
        run = runs.build(words + str(batch_size))
        run.stop.received = None
        run.stop.poll = lambda run=run: run.step == 4
        engine.train_one_epoch(run)
        weights.append(torch.cat([p.flatten() for p in run.task.model.parameters()]))
    assert torch.allclose(*weights, atol=1e-6)
    assert run.step == 4


@pytest.mark.parametrize("bad_step", [3, 11])
def test_a_loss_that_is_not_finite_ends_the_run_and_is_never_saved(bad_step, data, tmp_path, monkeypatch, capsys):
    calls = [0]
    original = torch.nn.CrossEntropyLoss.forward

    def forward(self, logits, targets):
        calls[0] += 1
        return original(self, logits, targets) * (math.inf if calls[0] == 2 * bad_step else 1)

    monkeypatch.setattr(torch.nn.CrossEntropyLoss, "forward", forward)
    assert train(data, tmp_path, "--print-every", "100") == 1
    error = capsys.readouterr().err
    epoch, step = divmod(bad_step - 1, runs.UPDATES)
    assert f"not finite at epoch {epoch}, update {step}, rank 0: loss inf, cross_entropy inf, spatial_entropy" in error
    saved = tmp_path / "checkpoint.pth"
    assert saved.exists() == (epoch > 0)
    if epoch:
        checkpoint = torch.load(saved, weights_only=True)
        assert (checkpoint["epoch"], checkpoint["step"]) == (epoch, 0)


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """The loss of the last step may still be finite when its update is not."""
    run = runs.build(DIGITS + f"--output-dir {tmp_path}")
    checkpoints.save(run, "checkpoint.pth")
    before = (tmp_path / "checkpoint.pth").read_bytes()
    run.task.model.head.weight.data[0, 0] = math.nan
    with pytest.raises(engine.NonFiniteLoss, match="weights are not finite"):
        checkpoints.save(run, "checkpoint.pth")
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


def test_processes_that_would_begin_at_different_places_are_refused(tmp_path, monkeypatch):
    """As with an output folder that each node has for itself."""
    run = runs.build(DIGITS + f"--output-dir {tmp_path}")
    monkeypatch.setattr(utils.Processes, "gather", lambda self, place: torch.stack([place, place + 1]))
    with pytest.raises(utils.UserError, match="name a shared folder"):
        checkpoints.start_or_resume(run)


def test_plan_says_why_mixed_precision(monkeypatch):
    cuda = torch.device("cuda", 0)
    for capability, dtype in (((7, 0), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert build.choose_amp("auto", cuda)[0] is dtype
    assert build.choose_amp("auto", torch.device("cpu"))[0] is None
    assert build.choose_amp("off", cuda) == (None, "--amp off")


def test_augmentation_does_not_disturb_the_models_own_randomness(data, tmp_path):
    """Dropout and drop-path draw the same with loader workers and without: the runs are identical."""
    contents = []
    for workers in ("0", "1", "2"):
        assert train(data, tmp_path / workers, "--num-workers", workers, *ONE_EPOCH) == 0
        contents.append(runs.content(tmp_path / workers))
    runs.assert_identical(contents[0], contents[1])
    runs.assert_identical(contents[0], contents[2])


def test_plan_is_not_written_into_the_arguments(data, tmp_path):
    given = vars(parse_arguments(runs.command(data, tmp_path)))
    assert train(data, tmp_path) == 0
    assert json.loads((tmp_path / "args.json").read_text()) == given
