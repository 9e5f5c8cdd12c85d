"""Many processes: they do the mathematics of one, meet under torchrun and srun, and end together when one is lost."""

import datetime
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import runs
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import build
import training
import utils
from arguments import parse_arguments
from samplers import EvalSampler
from tasks.classify import Accuracy, Classification


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train the small run into a folder, in child processes; returns rank 0's exit code."""
    folder = tmp_path_factory.mktemp("child")
    return runs.Child(runs.write_digits(folder / "digits", val=7), folder / "text")  # 70 images to evaluate


def torchrun(*words: str) -> subprocess.CompletedProcess:
    """Two processes of this command, a script and its arguments, from the repository's folder."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    path = os.pathsep.join(map(str, (runs.ROOT, runs.ROOT / "tests")))
    return subprocess.run(
        [*launcher, *words],
        cwd=runs.ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
    )


# ------------------------------------------------------------------------------------------ the same mathematics

# Ten updates of 48 images; nothing is drawn by rank (dropout, drop-path, Mixup), and augmentation is the position's.
ALIKE = "--drop 0 --drop-path 0 --mixup 0 --cutmix 0 --opt sgd --lr 1 --epochs 2 --drloc-weight 20 --batch-size".split()


@pytest.fixture(scope="module")
def alone(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone")
    assert run(output, *ALIKE, "48") == 0
    return runs.content(output)


def assert_alike(one: dict, two: dict) -> None:
    """Weights equal to rounding, and the log with them."""
    for line_one, line_two in zip(one["log.txt"], two["log.txt"], strict=True):
        assert line_two["test_images"] == 70  # an odd number for two processes of 2 x 12
        assert line_two["train_loss"] == pytest.approx(line_one["train_loss"], abs=1e-5)
        assert line_two["test_loss"] == pytest.approx(line_one["test_loss"], abs=1e-5)
        assert line_two["test_spatial_entropy"] == pytest.approx(line_one["test_spatial_entropy"], abs=1e-3)
    for part in ("model", "localiser"):
        weights, others = (content["checkpoint.pth"][part] for content in (one, two))
        moved = {name: (others[name] - weight).abs().max().item() for name, weight in weights.items()}
        print(f"{part}: largest difference {max(moved.values()):.1e}")  # shown by pytest -s
        assert max(moved.values()) < 3e-5, moved  # with the wrong pairs of patches: 2e-4


@pytest.mark.parametrize(
    ("processes", "batch_size"),
    [pytest.param(1, "24", id="two micro-steps"), pytest.param(2, "24", id="two processes"), (2, "12")],
)
def test_however_a_total_batch_is_split_the_weights_are_the_same(run, processes, batch_size, alone, tmp_path):
    """SAR and DRLoc included; each image evaluated once."""
    assert run(tmp_path, *ALIKE, batch_size, ranks=processes) == 0
    assert_alike(alone, runs.content(tmp_path))


def test_torchrun_trains_as_one_process_does(run, alone, tmp_path):
    done = torchrun("main.py", *runs.command(run.data, tmp_path, *ALIKE, "24"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("batch  ") == 1, "only rank 0 speaks"
    assert_alike(alone, runs.content(tmp_path))


@pytest.mark.parametrize("processes", [1, 2])
def test_repeated_augmentation_trains(run, processes, tmp_path):
    assert run(tmp_path, "--repeated-aug", "--epochs", "1", "--batch-size", "24", ranks=processes) == 0
    assert runs.content(tmp_path)["log.txt"][0]["train_loss"] < 3


@pytest.mark.slow
def test_compiled_processes_train_as_one_does(run, alone, tmp_path):
    assert run(tmp_path, *ALIKE, "12", "--compile", ranks=2) == 0
    assert_alike(alone, runs.content(tmp_path))


class BatchNormed(nn.Module):
    """A classifier of 4-pixel images with running statistics, and maps beside its logits."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3))

    def forward(self, images, return_similarity=False):
        logits = self.layers(images)
        return (logits, images) if return_similarity else logits


def evaluate_uneven(rank: int, world_size: int, port: int, results) -> None:
    """Train a step on ``rank``'s images, evaluate its share of 7, one a batch: four, or three on the second of two."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = utils.start_processes("cpu")
    torch.manual_seed(0)
    model = BatchNormed()
    images, targets = torch.randn(7, 1, 2, 2), torch.arange(7) % 3
    network = DistributedDataParallel(model) if world_size > 1 else model
    network(images[rank::2]).sum().backward()
    dataset = [
        {"images": image, "targets": target, "replaced": 0} for image, target in zip(images, targets, strict=True)
    ]
    sampler = [draw.index for draw in EvalSampler(7, rank, world_size)]
    loader = torch.utils.data.DataLoader(dataset, sampler=sampler)
    plan = SimpleNamespace(amp_dtype=None)
    task = SimpleNamespace(evaluated=lambda: {"test": model}, evaluator=Accuracy)
    run = SimpleNamespace(task=task, plan=plan, processes=processes, epoch=0)
    run.stop = utils.StopSignal(processes)
    for _ in range(3):  # a rank that asked less often than the other would be waited for in the next passes
        means = training.evaluate_run(run, loader)
    results.put(means)
    utils.end_processes()


def test_seven_images_on_two_processes_of_a_model_with_running_statistics():
    """Each image once, none left to wait for, with rank 0's statistics, which are those that are saved."""
    alone, together = (evaluations(world_size) for world_size in (1, 2))
    assert together[0] == together[1]
    assert together[0]["test"]["images"] == 7
    assert together[0]["test"] == pytest.approx(alone[0]["test"])


def evaluations(world_size: int) -> list[dict]:
    context = runs.Child.context
    results = context.SimpleQueue()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    children = [
        context.Process(target=evaluate_uneven, args=(rank, world_size, port, results)) for rank in range(world_size)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * world_size
    return [results.get() for _ in children]


@pytest.mark.parametrize(
    ("total_batch", "more", "static"), [("32", "", True), ("64", "", False), ("32", "--compile", False)]
)
def test_gradients_are_exchanged_without_extra_work(total_batch, more, static):
    """A group of this process alone stands for many."""
    words = f"--model vit_tiny_sar --model-kwargs embed_dim=24 depth=1 num_heads=3 --input-size 8 --patch-size 2 {more}"
    args = parse_arguments(f"{words} --batch-size 16 --total-batch {total_batch}".split())
    two = utils.Processes(0, 2, torch.device("cpu"))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        train_set = Classification.data(args, "train", utils.Processes(0, 1, torch.device("cpu")))
        plan = build.build_plan(args, two, train_set)
        network = build.wrap(Classification(args, train_set, two.device), plan, two, args.compile)
        assert network.gradient_as_bucket_view
        assert not network.find_unused_parameters
        assert network.static_graph == static
    finally:
        del network
        utils.end_processes()


# ----------------------------------------------------------------------------------------------- when one is lost


def test_a_killed_process_ends_all_and_is_named(run, tmp_path):
    kill = runs.killed_at_update(runs.UPDATES + 3)
    began = time.monotonic()
    assert run(tmp_path, "--batch-size", "8", before=kill, ranks=3) == 1
    assert time.monotonic() - began < 60
    for rank in (0, 1):
        assert (
            run.text(rank)
            .splitlines()[-1]
            .startswith(f"{'' if rank == 0 else '[rank 1] '}error: lost rank 2 (silent) at epoch 1, update ")
        )
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["epoch"] == 1
    assert run(tmp_path, "--batch-size", "8", ranks=3) == 0


def test_torchrun_leaves_rank_0_the_time_to_name_the_killed_process(run, tmp_path):
    script = (
        "import os, sys, main\n"
        "from helpers import runs\n"
        "if os.environ['RANK'] == '1': runs.killed_at_update(3)()\n"
        "sys.exit(main.main(sys.argv[1:]))"
    )
    words = runs.command(run.data, tmp_path, "--batch-size", "24")
    done = torchrun("--no-python", sys.executable, "-c", script, *words)
    assert done.returncode != 0
    assert "\nerror: lost rank 1 (silent) at epoch 0, update " in done.stderr


def fail(message: str):
    raise ValueError(message)


def test_an_error_of_one_process_is_told_by_all(run, tmp_path):
    """Its own log has the traceback, rank 0's the first line."""
    bad = runs.at_call("engine", "update_weights", 3, functools.partial(fail, "no room"))
    assert run(tmp_path, "--batch-size", "24", before=bad, ranks=2) == 1
    assert (
        run.text()
        .splitlines()[-1]
        .startswith("error: lost rank 1 (ValueError: no room at epoch 0, update 2) at epoch 0, update ")
    )
    lines = [line for line in run.text(1).splitlines() if line.startswith("[rank 1] ")]
    assert lines[0] == "[rank 1] Traceback (most recent call last):"
    assert lines[-2:] == ["[rank 1] ValueError: no room", "[rank 1] at epoch 0, update 2"]


def impatient(rank: int) -> None:
    utils.GROUP_TIMEOUT = datetime.timedelta(seconds=6)


def test_a_process_that_hangs_is_named_when_the_time_is_over(run, tmp_path):
    hang = runs.at_call("engine", "update_weights", 3, functools.partial(time.sleep, 10))
    assert run(tmp_path, "--batch-size", "24", before=hang, everywhere=impatient, ranks=2) == 1
    assert run.text().splitlines()[-1].startswith("error: lost rank 1 (silent) at epoch 0, update ")


def test_what_all_processes_have_to_say_is_said_once(tmp_path):
    done = torchrun("main.py", "--data-set", "folder", "--data-path", str(tmp_path / "nothing"))
    assert done.returncode != 0
    assert done.stderr.count("error: --data-path") == 1, done.stderr


def look_at_the_end(rank: int, output) -> None:
    """Let rank 0 be slow to save, and see that rank 1 does not leave before."""
    if rank == 0:
        runs.at_call("os", "replace", 5, functools.partial(time.sleep, 1.5))()
    else:
        runs.at_call("main", "end_processes", 1, functools.partial(saved_whole, output))()


def saved_whole(output) -> None:
    assert torch.load(output / "checkpoint.pth", weights_only=True)["epoch"] == 1


def test_processes_end_together(run, tmp_path):
    everywhere = functools.partial(look_at_the_end, output=tmp_path)
    assert run(tmp_path, "--epochs", "1", "--batch-size", "24", everywhere=everywhere, ranks=2) == 0
    assert "Error" not in run.text(1)


def test_all_processes_end_with_the_code_of_the_signal_that_one_received(run, tmp_path):
    stop = runs.killed_at_update(3, by=signal.SIGUSR2)
    assert run(tmp_path, "--batch-size", "24", before=stop, ranks=2) == os.EX_TEMPFAIL
    assert "saved at epoch 0, update 4; the same command resumes the run" in run.text()


# ------------------------------------------------------------------------------------------------ how they meet

STEP = {
    "SLURM_PROCID": "9",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


@pytest.fixture
def environ(monkeypatch):
    """Set the processes' variables to these alone."""

    def replace(**variables: str) -> None:
        for name in [*STEP, "SLURM_RESTART_COUNT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return replace


def test_ranks_come_from_torchrun_or_else_from_srun(environ):
    environ()
    assert utils.processes_here() == (0, 1, 0)
    environ(**STEP)
    assert utils.processes_here() == (9, 16, 1)
    environ(**STEP, RANK="3", WORLD_SIZE="4", LOCAL_RANK="3")  # torchrun inside srun
    assert utils.processes_here() == (3, 4, 3)
    environ(SLURM_PROCID="0", SLURM_NTASKS="16", SLURM_LOCALID="0")  # a batch script, before any srun
    assert utils.processes_here() == (0, 1, 0)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[07-08]", "gpu07"), ("gpu3", "gpu3"), ("a1,b[2-3]", "a1"), ("r[1-2]n[5,7]", "r1n5"), ("127.[1-2]", "127.1")],
)
def test_srun_s_tasks_meet_on_the_first_node(nodes, first, environ):
    environ(**STEP | {"SLURM_STEP_NODELIST": nodes})
    assert utils.rendezvous_url().startswith(f"tcp://{first}:")


def test_every_life_of_a_job_and_every_step_has_a_meeting_point_of_its_own(environ):
    points = set()
    for job in (100, 101, 475):
        for step in (0, 1):
            for life in ("", "1", "2"):
                environ(**STEP | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
                os.environ |= {"SLURM_RESTART_COUNT": life} if life else {}
                points.add(utils.rendezvous_url())
    assert len(points) == 18


def test_a_given_meeting_point_counts(environ):
    environ(**STEP, MASTER_ADDR="here", MASTER_PORT="29500")
    assert utils.rendezvous_url() == "env://"


def test_processes_that_cannot_meet_say_so_in_one_line(environ):
    environ(RANK="1", WORLD_SIZE="2")
    with pytest.raises(utils.RunError, match=r"the 2 processes could not meet: .*MASTER_ADDR"):
        utils.start_processes("cpu")


@pytest.mark.parametrize(
    ("variables", "visible", "index"),
    [(STEP, 8, 1), (STEP, 1, 0), ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 8, 1)],
)
def test_a_task_takes_its_gpu_also_where_it_sees_no_other(variables, visible, index, environ, monkeypatch):
    environ(**variables)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90"])
    assert utils.pick_device("cuda", utils.processes_here()[2]).index == index
