"""Shared by all tests: one thread a process (the suite runs one a core), the golden numbers, and a Slurm."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from helpers import checkpoints as files
from helpers import slurm_cluster

torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden():
    """Read one file of numbers printed by a reference implementation: ``golden("sar_bloblosses.pt")``."""
    return lambda name: torch.load(GOLDEN / name, weights_only=True)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A Slurm of this machine's own, for the whole suite; yields the path for SLURM_CONF."""
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    with slurm_cluster.running(tmp_path_factory.mktemp("slurm")) as configuration:
        yield configuration


def pytest_collection_modifyitems(items):
    """A check marked ``gpu`` cannot run without one; it is skipped with the reason, never silently passed."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """With FAIL_ON_SKIP set (continuous integration installs what tests need) a skip is a failure."""
    report = yield
    if report.skipped and os.environ.get("FAIL_ON_SKIP") and "gpu" not in item.keywords:
        report.outcome, report.longrepr = "failed", f"skipped, and FAIL_ON_SKIP is set: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A ViT of 3 heads for 32 px in patches of 8, whose attention is far from flat."""
    torch.manual_seed(0)
    model = files.make("vit_tiny")
    model.blocks[-1].attn.qkv.weight.data *= 30
    path = tmp_path_factory.mktemp("vit") / "vit.pth"
    torch.save({"model": model.state_dict()}, path)
    return path
