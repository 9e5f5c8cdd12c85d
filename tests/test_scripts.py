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


def test_the_requirements_for_cpus_are_the_same_versions():
    cpu = requirements("requirements-cpu.txt")
    linked = {name: version.removesuffix("+cpu") for name, version in cpu.items()}
    assert linked == requirements("requirements.txt")
    assert {name for name, version in cpu.items() if version.endswith("+cpu")} == {"torch", "torchvision"}


def install(folder: Path, version: tuple[int, int], *files: str) -> subprocess.CompletedProcess:
    """install.sh with an interpreter that says it is this version, and whose pip finds nothing."""
    python = folder / "python"
    python.write_text(
        f"""#!/bin/sh
        case "$1 $2" in
            "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
            "-m pip") echo "ERROR: No matching distribution found" >&2; exit 1 ;;
            *) exec {sys.executable} -c "import sys; sys.version_info = {version}; exec(sys.argv[1])" "$2" ;;
        esac"""
    )
    python.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "VENV": str(folder / "venv"), "PYTHON": str(python)}
    command = ["bash", "scripts/install.sh", *files]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_install_takes_the_versions_of_pyproject(tmp_path):
    low, high = re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', (ROOT / "pyproject.toml").read_text()).groups()
    for minor in range(int(low) - 1, int(high) + 1):
        done = install(tmp_path, (3, minor))
        refused = done.returncode == 2 and "is needed; name one: PYTHON=" in done.stderr
        assert refused == (minor not in range(int(low), int(high))), minor
    assert "Python 3.11 to 3.14" in (ROOT / "README.md").read_text()
    assert (low, high) == ("11", "15")


def test_install_names_the_index_of_the_cpu_builds(tmp_path):
    done = install(tmp_path, (3, 12), "requirements-cpu.txt")
    assert "without CUDA libraries" in done.stdout
    assert done.stderr.endswith("PIP_EXTRA_INDEX_URL=<its address> bash scripts/install.sh requirements-cpu.txt\n")
    assert "index" not in install(tmp_path, (3, 12)).stderr


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
