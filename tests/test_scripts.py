"""The scripts run, the pictures have something on them, and what is written twice says the same."""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import dino, hybrids, step

ROOT = Path(__file__).parents[1]


def requirements(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    return dict(re.split("={2,3}", line) for line in lines if line and not line.startswith("#"))


def test_the_requirement_files_differ_in_torch_only():
    today, v100 = requirements("requirements.txt"), requirements("requirements-v100.txt")
    assert today.keys() == v100.keys()
    assert {name for name in today if today[name] != v100[name]} == {"torch", "torchvision"}
    for name in ("requirements.txt", "requirements-v100.txt"):
        assert "\ntorch===" in "\n" + (ROOT / name).read_text()


def test_quickstart(tmp_path):
    """The whole script, with an environment that is there already and a much smaller model."""
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/installed").mkdir()
    shutil.copy(ROOT / "requirements.txt", tmp_path / "venv/installed")
    python = tmp_path / "venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    small = "--epochs 1 --warmup-epochs 0 --batch-size 128 --total-batch 128 --input-size 16".split()
    done = subprocess.run(
        ["bash", "scripts/quickstart.sh", *small],
        cwd=ROOT,
        env={
            "PATH": "/usr/bin:/bin",
            "VENV": str(tmp_path / "venv"),
            "OUT": str(tmp_path / "out"),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"\* Acc@1 [\d.]+ Acc@5 [\d.]+ .*\(360 images\)", done.stdout)
    assert done.stdout.splitlines()[-1].startswith(
        f"attention maps drawn: {tmp_path / 'out/figures/index.html'} (10 images"
    )
    assert (tmp_path / "out/figures/components-1.png").exists()


QUICK = "--batch-size 1 --repeats 1 --warmup 0 --threads 1".split()


@pytest.mark.parametrize(
    ("more", "row"),
    [
        ("", r"( \| [\d.]+){5}"),
        ("--evaluate --ways plain ours", r" \| [\d.]+ \| - \| [\d.]+ \| [\d.]+ \| -"),
    ],
)
def test_the_step_benchmark_prints_its_table(more, row, capsys):
    step.main(["--sizes", "tiny", "--types", "float32", *QUICK, *more.split()])
    assert re.fullmatch(rf"\| vit_tiny \| float32{row} \|", capsys.readouterr().out.splitlines()[-1])


def test_the_benchmark_of_architectures_prints_its_table(capsys):
    hybrids.main(["--models", "swin_tiny", *QUICK])
    assert re.fullmatch(r"\| swin_tiny( \| [\d.]+){3} \|", capsys.readouterr().out.splitlines()[-1])


def test_the_benchmark_of_dinos_loss_compares_equal_losses_and_prints_its_table(capsys, monkeypatch):
    monkeypatch.setattr(dino, "measure_memory", lambda options: dict.fromkeys(dino.WAYS, 1.0))  # in new processes
    dino.main("--out-dim 50 --local-crops 2 --batch-size 3 --repeats 1 --threads 1".split())
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert all(re.fullmatch(r"\| (pairs|ours) \| [\d.]+ \| 1 \|", line) for line in lines)
    inputs = dino.make_inputs(argparse.Namespace(local_crops=2, batch_size=3, out_dim=50, device="cpu"))
    losses = [dino.forward_and_backward(way, *inputs) for way in dino.WAYS]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
