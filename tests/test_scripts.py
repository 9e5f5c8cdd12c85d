"""The scripts run, the pictures have something on them, and what is written twice says the same."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import runs
import torch

import main
from analysis import maps
from arguments import parse_arguments
from utils import UserError

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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    data = runs.write_digits(folder / "digits")
    assert main.main(runs.command(data, folder / "out", "--input-size", "16")) == 0
    return folder / "out"


def test_maps_are_drawn_for_different_classes(trained, tmp_path, capsys):
    picture = tmp_path / "maps.png"
    assert maps.main(["--checkpoint", str(trained / "best.pth"), "--out", str(picture), "--images", "4"]) == 0
    assert str(picture) in capsys.readouterr().out
    pixels = matplotlib.image.imread(picture)
    assert min(pixels.shape[:2]) > 500
    assert pixels.std() > 0.1


def test_every_component_gets_a_colour_of_its_own():
    import matplotlib.pyplot as plt

    values = torch.zeros(5, 5)
    values[0, 0], values[4, 4] = 2.0, 1.0
    figure, axis = plt.subplots()
    maps._draw_components(axis, values, torch.ones(10, 10, 3).numpy())
    painted = axis.images[0].get_array()
    plt.close(figure)
    heavy, light, ground = painted[0, 0], painted[9, 9], painted[4, 4]
    assert len({tuple(colour.round(3)) for colour in (heavy, light, ground)}) == 3
    assert (painted[:2, :2] == heavy).all()
    orange = torch.tensor(maps.COLOURS[0] / 255)
    assert torch.allclose(torch.tensor(heavy - 0.35 * 0.6), 0.65 * orange, atol=1e-6), "the heaviest comes first"


def test_maps_of_a_foreign_checkpoint_are_refused(tmp_path, capsys):
    torch.save({"model": {"weight": torch.zeros(1)}}, tmp_path / "foreign.pth")
    assert maps.main(["--checkpoint", str(tmp_path / "foreign.pth")]) == 2
    assert "not written by main.py" in capsys.readouterr().err


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
    assert done.stdout.splitlines()[-1] == f"similarity maps drawn: {tmp_path / 'out/maps.png'}"
    assert (tmp_path / "out/maps.png").exists()


def test_the_step_benchmark_prints_its_table():
    command = "scripts/benchmark_step.py --sizes tiny --types float32 --batch-size 1 --repeats 1 --warmup 0 --threads 1"
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\| vit_tiny \| float32( \| [\d.]+){5} \|", done.stdout.splitlines()[-1])


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_readmes_python_runs():
    (block,) = readme_blocks("python")
    names = {}
    exec(block, names)
    assert names["similarity"].shape == (8, 6, 14, 14)
    assert names["model"].patch_embed.proj.weight.grad.abs().sum() > 0


def test_readmes_commands_are_understood():
    """Every option of every main.py command there exists; only the files it names are not here."""
    commands = [line for block in readme_blocks("bash") for line in block.splitlines() if "main.py" in line]
    commands = [line for line in commands if not line.startswith("#")]
    assert len(commands) >= 7
    for line in commands:
        words = shlex.split(line.partition("main.py")[2], comments=True)
        try:
            parse_arguments(words)
        except UserError as error:
            if "no such file" not in str(error):
                raise
