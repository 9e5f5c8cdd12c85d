"""On a real Slurm: what is started, signalled, requeued, preempted, killed or cancelled there ends as it should."""

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import runs
from helpers.slurm_cluster import NODES, client, wait_until

import run_with_submitit

UPDATES = 80
"""An epoch of the runs that are interrupted: long enough to be met in its middle."""
LIFE = "Starting with JobEnvironment"
"""What submitit writes first in every life of a job."""
WORDS = "--device cpu --batch-size 4 --total-batch 8 --epochs 2".split()
"""Two epochs of the small run in one or two processes."""


@pytest.fixture(scope="module", autouse=True)
def here(slurm):
    """Slurm's clients find the cluster, and jobs start where the program is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(slurm))
        patch.chdir(runs.ROOT)
        yield


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Scanned digits: so many updates an epoch, and an odd number to be evaluated."""
    folder = runs.write_digits(tmp_path_factory.mktemp("digits"), train=8 * UPDATES // 10)
    next((folder / "val/9").iterdir()).unlink()
    return folder


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory):
    """What the run of so many processes leaves that meets no Slurm."""
    folder = tmp_path_factory.mktemp("undisturbed")
    child = runs.Child(digits, folder / "text")

    @functools.cache
    def finished(processes: int) -> dict:
        assert child(folder / str(processes), *WORDS, ranks=processes) == 0, child.text()
        return runs.content(folder / str(processes))

    return finished


@dataclass
class Submitted:
    """A run that the launcher has given to Slurm, by its output folder."""

    folder: Path

    @property
    def record(self) -> dict:
        return json.loads((self.folder / "job.json").read_text())

    @property
    def lives(self) -> list[str]:
        """What rank 0 printed in each life of the run's jobs."""
        log = Path(self.record["log"])
        return log.read_text().split(LIFE)[1:] if log.exists() else []

    def job(self) -> dict[str, str]:
        """What Slurm knows of the job."""
        return show_job(self.record["job_id"])

    def wait_for(self, condition, what: str, seconds: float = 90) -> None:
        """Wait until ``condition()`` holds; a time-out shows Slurm's state and all that the tasks have printed."""
        try:
            wait_until(condition, seconds, what)
        except TimeoutError as error:
            logs = sorted(Path(self.record["log"]).parent.glob("*.out"))
            pytest.fail("\n".join([str(error), str(self.job()), *(f"{log}:\n{log.read_text()}" for log in logs)]))

    def wait_for_training(self, life: int) -> None:
        """Wait until the run's so-many-th life, counted from 1, has done some updates of an epoch."""
        steps = re.compile(r"^epoch \d+ \[\d+/", re.MULTILINE)
        self.wait_for(
            lambda: len(lives := self.lives) == life and len(steps.findall(lives[-1])) > 1, f"training in life {life}"
        )

    def wait_for_restarts(self, number: int) -> None:
        """Wait until Slurm has requeued the job so many times."""
        self.wait_for(lambda: self.job()["Restarts"] == str(number), f"requeue {number}")

    def wait_for_state(self, state: str, seconds: float = 90) -> dict[str, str]:
        """Wait until Slurm has the job in this state; returns what it knows of it."""
        self.wait_for(lambda: self.job()["JobState"] == state, f"job that is {state}", seconds)
        return self.job()

    def began(self, life: int) -> tuple[int, int]:
        """Epoch and step at which this life began, by its log."""
        said = re.search(r"resuming from .*: epoch (\d+), update (\d+)", self.lives[life - 1])
        return (int(said[1]), int(said[2])) if said else (0, 0)

    def saved(self) -> tuple[int, int]:
        """Epoch and step of the checkpoint."""
        checkpoint = torch.load(self.folder / "checkpoint.pth", weights_only=True)
        return checkpoint["epoch"], checkpoint["step"]


def show_job(job_id: str) -> dict[str, str]:
    """What Slurm knows of a job."""
    return dict(re.findall(r"(\S+?)=(\S*)", client("scontrol", "-o", "show", "job", job_id)))


def launch(job_dir: Path, *words: str) -> Submitted:
    """Give a run to Slurm."""
    assert run_with_submitit.main(["--job-dir", str(job_dir), *words]) == 0
    return Submitted(job_dir)


@pytest.fixture
def train(digits, tmp_path):
    """Give the run to Slurm, on one node if nothing else is said; the same run every time."""

    def submit(*words: str, processes: int = 2) -> Submitted:
        small = [*runs.SMALL, "--data-path", str(digits), *WORDS]
        return launch(tmp_path / "run", "--ngpus", str(processes), "--timeout", "9", *small, *words)

    return submit


@pytest.fixture
def status(tmp_path, capsys):
    """What --status says of the run, on one line."""

    def ask() -> str:
        capsys.readouterr()
        assert run_with_submitit.main(["--job-dir", str(tmp_path / "run"), "--status"]) == 0
        return " ".join(capsys.readouterr().out.split())

    return ask


def pid_of(job_id: str, rank: int) -> int:
    """The process of this rank of the job: all nodes are this machine. (The batch script, too, calls itself 0.)"""
    wanted = {f"SLURM_JOB_ID={job_id}".encode(), b"SLURM_STEP_ID=0", f"SLURM_PROCID={rank}".encode()}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if wanted <= set(environment):
            return int(folder.name)
    raise ProcessLookupError(f"rank {rank} of job {job_id}")


def handles_usr2(job_id: str) -> bool:
    """Whether rank 0 has begun to catch the signal."""
    try:
        status = Path(f"/proc/{pid_of(job_id, rank=0)}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False
    return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (signal.SIGUSR2 - 1) & 1)


def requeue(job_id: str) -> None:
    client("scontrol", "requeue", job_id)


def preempt(job_id: str) -> None:
    """Let a job of the partition with the higher priority take the nodes for a moment."""
    client("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")


def processes_with(folder: Path) -> list[str]:
    """Command lines of the living processes that name this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            found.append(path.read_text().replace("\0", " "))
    return [line for line in found if str(folder) in line]


# ------------------------------------------------------------------------------------------------ begin and end


def test_the_cluster_ends_with_the_tests_even_if_they_are_killed(tmp_path):
    """With jobs and all; the daemons name the folder of the cluster on their command lines."""
    hold = "import pathlib, sys, time\nfrom helpers import slurm_cluster\n"
    hold += "with slurm_cluster.running(pathlib.Path(sys.argv[1])) as path:\n"
    hold += "    print('up', flush=True)\n    time.sleep(600)"
    command = [sys.executable, "-c", hold, str(tmp_path)]
    with subprocess.Popen(command, cwd=runs.ROOT / "tests", stdout=subprocess.PIPE, text=True) as tests:
        assert tests.stdout.readline() == "up\n"
        job = ["sbatch", "--output=/dev/null", f"--wrap=: {tmp_path}; sleep 600"]
        subprocess.run(job, env=os.environ | {"SLURM_CONF": f"{tmp_path}/slurm.conf"}, check=True, timeout=20)
        assert len(processes_with(tmp_path)) >= 6, "these tests, the keeper, munged, slurmctld and two slurmd"
        tests.kill()
    wait_until(lambda: not processes_with(tmp_path), 30, "end of all daemons")


@pytest.mark.slow
def test_srun_alone_joins_its_tasks(digits, undisturbed, tmp_path):
    command = [sys.executable, "main.py", *runs.command(digits, tmp_path / "out", *WORDS)]
    text = client("srun", "--nodes=2", "--ntasks-per-node=1", *command, seconds=120)
    assert "batch  4 per process x 2 x 1 accumulated = 8" in text
    runs.assert_identical(runs.content(tmp_path / "out"), undisturbed(2))


def test_two_nodes_and_one_node_train_alike(train, digits, undisturbed, tmp_path):
    """One command as typed in a shell, both jobs at once: the same weights as two processes that met no Slurm."""
    folder = tmp_path / "two nodes"
    command = ["run_with_submitit.py", "--job-dir", str(folder), "--nodes", "2", "--ngpus", "1"]
    words = [*runs.SMALL, "--data-path", str(digits), *WORDS]
    done = subprocess.run([sys.executable, *command, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for nodes, run in enumerate((train(), Submitted(folder)), start=1):
        job = run.wait_for_state("COMPLETED")
        assert (job["NumNodes"], job["NumTasks"], job["Restarts"]) == (str(nodes), "2", "0")
        assert run.lives[0].count("(59 images)") == 4, "each image once: two epochs, the weights and their average"
        runs.assert_identical(runs.content(run.folder), undisturbed(2))


def test_the_default_request_is_accepted_as_it_stands(tmp_path):
    """The paper's: eight GPUs on a node, a task each, ten cores a task."""
    run = launch(tmp_path, "--data-set", "digits", "--device", "cpu", "--batch-size", "4")
    run.wait_for(lambda: run.job()["JobState"] != "PENDING", "started job")
    job = run.job()
    client("scancel", "--signal=KILL", "--full", run.record["job_id"])
    run.wait_for(lambda: not client("squeue", "-h"), "empty queue")
    assert job["JobState"] == "RUNNING"
    assert (job["NumNodes"], job["NumTasks"], job["CPUs/Task"], job["NumCPUs"]) == ("1", "8", "10", "80")
    assert job["TresPerNode"] == "gres:gpu:8"
    assert job["TimeLimit"] == "1-22:40:00"


@pytest.mark.parametrize(
    ("words", "names"),
    [
        pytest.param(("--partition", "nowhere"), "invalid partition specified: nowhere", id="partition"),
        pytest.param(("--ngpus", "9"), "node configuration is not available", id="too many GPUs"),
        pytest.param(("--job-dir", "/proc/nowhere"), "/proc/nowhere", id="job dir"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(words, names, tmp_path, capsys):
    command = "--data-set digits --device cpu --batch-size 1 --total-batch 72".split()
    assert run_with_submitit.main(["--job-dir", str(tmp_path / "run"), *command, *words]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: uncommitted")]
    assert len(errors) == 1, errors
    assert re.match(rf"error: .*{names}", errors[0]), errors
    assert client("squeue", "-h") == ""


# ------------------------------------------------------------------------------------- interrupted, and going on


def assert_went_on(run: Submitted, life: int) -> None:
    """This life began within an epoch, at what the life before it had saved."""
    epoch, step = run.began(life)
    assert (epoch, step) > run.began(life - 1)
    assert 0 < step < UPDATES, run.lives
    assert f"saved at epoch {epoch}, update {step}" in run.lives[life - 2]


def test_a_signal_in_the_middle_requeues_and_loses_nothing(train, undisturbed):
    run = train("--nodes", "2", "--ngpus", "1")
    run.wait_for_training(life=1)
    client("scancel", "--signal=USR2", run.record["job_id"])
    run.wait_for_restarts(1)
    job = run.wait_for_state("COMPLETED")
    assert job["Restarts"] == "1"
    assert_went_on(run, life=2)
    runs.assert_identical(runs.content(run.folder), undisturbed(2))


def test_a_preemption_and_a_bare_requeue_lose_nothing(train, undisturbed):
    """Slurm wants the nodes for another job, then requeues without a word."""
    run = train(processes=1)
    for life, interrupt in enumerate((preempt, requeue), start=1):
        run.wait_for_training(life)
        interrupt(run.record["job_id"])
        run.wait_for_restarts(life)
    assert run.wait_for_state("COMPLETED")["Restarts"] == "2"
    assert_went_on(run, life=2)
    assert_went_on(run, life=3)
    runs.assert_identical(runs.content(run.folder), undisturbed(1))


def test_a_killed_process_ends_the_whole_job(train, status):
    run = train()
    job_id = run.record["job_id"]
    run.wait_for_training(life=1)
    os.kill(pid_of(job_id, rank=1), signal.SIGKILL)
    run.wait_for_state("FAILED", seconds=20)
    assert "error: lost rank 1" in run.lives[0]
    assert re.search(rf"run {job_id} failed .*lost rank 1", status())


def test_a_cancelled_run_is_kept_and_the_same_command_goes_on(train, status, undisturbed):
    run = train(processes=1)
    first = run.record["job_id"]
    run.wait_for_training(life=1)
    assert f"run {first} running" in status()
    client("scancel", first)
    run.wait_for_state("CANCELLED")
    epoch, step = run.saved()
    assert 0 < step < UPDATES
    assert f"run {first} stopped" in status()

    run = train(processes=1)
    assert run.wait_for_state("COMPLETED")["Restarts"] == "0"
    assert run.began(life=1) == (epoch, step)
    assert f"run {run.record['job_id']} finished" in status()
    runs.assert_identical(runs.content(run.folder), undisturbed(1))


@pytest.mark.slow
def test_time_outs_are_not_counted_against_a_short_job(train):
    """submitit alone gives up at the fourth USR2 to a job of less than ten minutes."""
    run = train("--epochs", "12")
    for life in range(1, 5):
        run.wait_for_training(life)
        client("scancel", "--signal=USR2", run.record["job_id"])
        run.wait_for_restarts(life)
    assert run.wait_for_state("COMPLETED")["Restarts"] == "4"
    assert run.saved() == (12, 0)


@pytest.mark.slow
def test_slurm_tells_a_job_when_its_time_is_up(train):
    run = train("--timeout", "1", "--slurm-arg", "signal_delay_s=30", "--epochs", "100")
    run.wait_for_restarts(1)
    run.wait_for_training(life=2)
    client("scancel", run.record["job_id"])
    run.wait_for_state("CANCELLED")
    assert run.began(life=2) > (0, 0)


@pytest.mark.slow
def test_a_signal_before_training_begins_the_job_anew(train, undisturbed):
    """submitit's own handler meets it."""
    run = train()
    run.wait_for(lambda: handles_usr2(run.record["job_id"]), "handler of submitit")
    client("scancel", "--signal=USR2", run.record["job_id"])
    run.wait_for_restarts(1)
    assert run.wait_for_state("COMPLETED")["Restarts"] == "1"
    assert "epoch" not in run.lives[0]
    runs.assert_identical(runs.content(run.folder), undisturbed(2))


@pytest.mark.slow
def test_a_lost_node_loses_nothing_that_is_saved(train, undisturbed):
    """Slurm takes a node for dead; the job waits for another one."""
    run = train("--nodes", "2", "--ngpus", "1")
    run.wait_for(lambda: (run.folder / "checkpoint.pth").exists(), "checkpoint")
    lost = pid_of(run.record["job_id"], rank=1)
    client("scontrol", "update", f"nodename={NODES[1]}", "state=down", "reason=test")
    os.kill(lost, signal.SIGKILL)
    run.wait_for_restarts(1)
    client("scontrol", "update", f"nodename={NODES[1]}", "state=resume")
    assert run.wait_for_state("COMPLETED")["Restarts"] == "1"
    assert run.began(life=2) > (0, 0)
    runs.assert_identical(runs.content(run.folder), undisturbed(2))


# ------------------------------------------------------------------------------------------------------- sweeps


def test_a_sweep_of_four_points(digits, tmp_path, capsys):
    small = [*runs.SMALL, "--data-path", str(digits), "--device", "cpu", "--epochs", "1", "--warmup-epochs", "0"]
    sweep = "--sweep last_block=standard,sar --sweep seed=0,1 --max-parallel 2 --ngpus 1".split()
    points = [f"last_block={block},seed={seed}" for block in ("standard", "sar") for seed in (0, 1)]
    command = ["--job-dir", str(tmp_path), *small, *sweep]
    assert run_with_submitit.main(command) == 0
    submitted = [Submitted(tmp_path / point) for point in points]
    ids = [run.record["job_id"] for run in submitted]
    array = ids[0].partition("_")[0]
    assert ids == [f"{array}_{index}" for index in range(4)]
    assert show_job(array)["ArrayTaskThrottle"] == "2"
    for run in submitted:
        run.wait_for_state("COMPLETED")
    weights = [torch.load(tmp_path / point / "best.pth", weights_only=True)["model"]["head.bias"] for point in points]
    assert len({tuple(bias.tolist()) for bias in weights}) == 4

    capsys.readouterr()
    assert run_with_submitit.main(["--job-dir", str(tmp_path), "--status"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "4 runs: 4 finished"
    assert run_with_submitit.main(command) == 0
    assert capsys.readouterr().out.count("already finished") == 4
    assert client("squeue", "-h") == ""


@pytest.mark.slow
def test_a_table_is_submitted_and_then_reported(tmp_path):
    """The table script again, when its runs are over, prints the report."""
    chosen = ["--launch", "submitit --ngpus 2", "--smoke", "--rows", "A", "F", "--out", str(tmp_path)]

    def table() -> str:
        script = ["env", f"PYTHON={sys.executable}", "bash", "scripts/table1b_components.sh"]
        return client(*script, *chosen, seconds=60)

    assert "submitted" in table()
    submitted = [Submitted(path.parent) for path in tmp_path.glob("runs/**/job.json")]
    assert len(submitted) == 2
    assert "already queued" in table()
    for run in submitted:
        run.wait_for_state("COMPLETED")
    assert len(re.findall(r"^\| [AF]: .* \| 2/2 \|", table(), re.MULTILINE)) == 2
