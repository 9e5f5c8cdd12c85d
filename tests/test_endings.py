"""How runs end: soon and with their exit code whatever happened, in one line, with nothing lost; one run a folder."""

import errno
import functools
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import faults, runs

import cli
import owner
import utils
from analysis import measures
from arguments import default_workers, parse_arguments
from datasets import build_loader
from launch.status import format_status


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train the small run into a folder, in a child process; returns its exit code."""
    folder = tmp_path_factory.mktemp("child")
    return runs.Child(runs.write_digits(folder / "digits"), folder / "text")


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """`runs.content` of an uninterrupted run on so many processes."""

    @functools.cache
    def content(ranks: int) -> dict:
        output = tmp_path_factory.mktemp("whole")
        assert run(output, "--batch-size", "24", ranks=ranks) == 0
        return runs.content(output)

    return content


def saved(output: Path) -> tuple[int, int]:
    """Epoch and update of a run's checkpoint."""
    checkpoint = torch.load(output / "checkpoint.pth", weights_only=True)
    return checkpoint["epoch"], checkpoint["step"]


# --------------------------------------------------------------------------------------- faults, one of each kind

BY_HAND = "error: ended by a second signal before it could save; the same command resumes the run"


@pytest.mark.parametrize(
    ("place", "fault", "workers", "ranks", "code", "last_line"),
    [
        ("step", "exception", 2, 1, 1, "at epoch 1, update 1"),
        ("loader", "kill", 2, 1, 1, "error: a loader worker was killed"),
        ("loader", "stall", 2, 1, 130, BY_HAND),
        ("evaluation", "memory", 2, 1, 1, "error: out of memory: give a smaller --batch-size"),
        ("checkpoint", "kill", 2, 1, -signal.SIGKILL, ""),
        ("log", "exception", 0, 1, 1, "at epoch 1, update 3"),
        ("step", "exception", 2, 2, 1, "error: lost rank 1 (ValueError: a planted error at epoch 1, update 1)"),
        pytest.param("loader", "memory", 2, 2, 1, "error: lost rank 1 (RunError: a loader", marks=pytest.mark.slow),
        pytest.param("loader", "stall", 0, 2, 130, BY_HAND, marks=pytest.mark.slow),
    ],
)
def test_a_fault_ends_all_processes_within_seconds_and_costs_nothing(
    place, fault, workers, ranks, code, last_line, run, whole, tmp_path
):
    """Loader workers are among them. The same command then ends as if nothing had happened."""
    ending = faults.inject(run, tmp_path / "out", place, fault, workers, ranks, whole(ranks))
    assert ending.seconds < 20
    assert ending.code == code
    assert ending.last_line.startswith(last_line), ending.last_line
    assert (ending.again, ending.identical) == (0, True)


def test_a_trained_epoch_outlives_a_failed_evaluation(run, tmp_path):
    bad = runs.at_call("tasks.classify", "batch_sums", 1, functools.partial(faults.happen, "exception", tmp_path / "_"))
    assert run(tmp_path / "out", before=bad) == 1
    assert saved(tmp_path / "out") == (0, runs.UPDATES)
    assert "epoch 0 is saved before its evaluation, which failed" in run.text()


# ------------------------------------------------------------------------------------------------------ signals


def send_all(*steps: int | float) -> None:
    """Send this process these signals; a float is a pause in seconds."""
    for step in steps:
        time.sleep(step) if isinstance(step, float) else os.kill(os.getpid(), step)


def at_update_3(*steps: int | float):
    return runs.at_call("engine", "update_weights", 3, functools.partial(send_all, *steps))


def lose_the_reader() -> None:
    """Standard output becomes a pipe that nobody reads."""
    source, sink = os.pipe()
    os.close(source)
    os.dup2(sink, 1)


@pytest.mark.parametrize(
    ("hook", "code"),
    [
        pytest.param(at_update_3(signal.SIGHUP), 0, id="the terminal is gone"),
        pytest.param(runs.at_call("engine", "update_weights", 3, lose_the_reader), 0, id="nobody reads the output"),
        pytest.param(at_update_3(signal.SIGINT, signal.SIGINT), 130, id="torchrun passes on what the processes got"),
    ],
)
def test_the_run_is_saved(hook, code, run, tmp_path):
    assert run(tmp_path, before=hook) == code
    assert saved(tmp_path)[0] == 0
    assert 3 <= saved(tmp_path)[1] <= 5
    assert "Error" not in run.text()


def ignore_sighup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_update_3(signal.SIGHUP)()


def test_under_nohup_a_run_outlives_its_terminal(run, tmp_path):
    assert run(tmp_path, "--epochs", "1", "--warmup-epochs", "0", before=ignore_sighup) == 0
    assert saved(tmp_path) == (1, 0)


@pytest.mark.parametrize(
    ("rank", "number", "told"),
    [
        (
            0,
            signal.SIGINT,
            "SIGINT: the run saves after this update, and ends. Ctrl-C again ends it at once, unsaved\n",
        ),
        (0, signal.SIGUSR2, "SIGUSR2: the run saves after this update, and ends\n"),
        (1, signal.SIGINT, ""),
    ],
)
def test_the_first_signal_is_answered_at_once_and_once(rank, number, told, capfd):
    with utils.StopSignal(SimpleNamespace(is_main=rank == 0, world_size=1)) as stop:
        send_all(number, number, 0.2)
        assert stop.poll()
        assert capfd.readouterr().err == told


def test_a_second_signal_ends_a_run_that_nobody_reads(monkeypatch):
    codes = []
    monkeypatch.setattr(os, "write", functools.partial(refuse, errno.EIO))
    monkeypatch.setattr(os, "_exit", codes.append)
    utils._end_now(130)
    assert codes == [130]


def in_a_hurry(rank: int) -> None:
    utils.SECONDS_TO_SAVE = 0.5


@pytest.mark.parametrize(
    ("steps", "code"),
    [
        ((signal.SIGTERM, 0.7, signal.SIGINT, 60.0), 130),
        ((signal.SIGTERM, 0.7, signal.SIGTERM, 60.0), 128 + signal.SIGTERM),
    ],
)
def test_a_second_signal_ends_a_run_that_does_not_get_on(steps, code, run, tmp_path):
    began = time.monotonic()
    assert run(tmp_path, before=at_update_3(*steps), everywhere=in_a_hurry) == code
    assert time.monotonic() - began < 30
    assert run.text().endswith(BY_HAND + "\n")
    assert not (tmp_path / "checkpoint.pth").exists()


def test_after_a_second_signal_there_is_time_to_save(run, tmp_path):
    steps = signal.SIGTERM, 0.7, signal.SIGTERM
    assert run(tmp_path, before=at_update_3(*steps)) == 0
    assert saved(tmp_path) == (0, 3)


# --------------------------------------------------------------------------------- errors of the machine in a line


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 139.80 GiB. See https://"
            ),
            "smaller --batch-size, which keeps --total-batch, or --grad-checkpointing (CUDA out of memory. Tried to "
            "allocate 2.00 GiB at epoch",
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "smaller --batch-size"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "--grad-checkpointing"),
        (MemoryError(), "out of memory"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "out of memory"),
        (MemoryError("Caught MemoryError in DataLoader worker process 0.\nTraceback\nMemoryError"), "--num-workers"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "fewer --num-workers"),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "fewer --num-workers"),
        (ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)), "a loader worker was killed"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. Workers are out of shared memory."),
            "/dev/shm",
        ),
        (
            RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device"),
            "--shm-size",
        ),
        (RuntimeError("unable to mmap 64 bytes from file </torch_1_2>: Cannot allocate memory (12)"), "--shm-size"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "ulimit -n"),
        (RuntimeError("Failed to find C compiler. Please specify via CC"), "leave --compile out"),
    ],
)
def test_an_error_of_the_machine_is_one_line_with_a_mend(error, words, capsys):
    error.add_note("at epoch 3, update 1")

    def fail() -> int:
        raise error

    assert cli.exit_code(fail) == 1
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    assert words in text
    assert text.endswith("at epoch 3, update 1)\n")


def test_a_mistake_of_the_program_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes"):
        cli.exit_code(lambda: torch.zeros(2) @ torch.zeros(3, 4))


@pytest.mark.slow
def test_no_compiler(tmp_path):
    """The first step would need one."""
    command = [sys.executable, "main.py", "--data-set", "digits", "--epochs", "1", "--compile", "--device", "cpu"]
    small = "--model vit_tiny --model-kwargs embed_dim=24 depth=1 num_heads=3 --input-size 8 --num-workers 0".split()
    variables = os.environ | {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command += [*small, "--output-dir", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=runs.ROOT, env=variables, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: --compile: the network cannot be compiled; install a C++")
    assert "Traceback" not in done.stderr


def test_a_long_path_of_temporary_files_is_an_error_and_no_hang(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", f"/{'d' * 80}")
    with pytest.raises(utils.UserError, match=r"TMPDIR=/d+ has 81 characters.*--num-workers 0"):
        build_loader(torch.arange(4), range(4), 2, num_workers=1)
    assert len(build_loader(torch.arange(4), range(4), 2, num_workers=0)) == 2


# --------------------------------------------------------------------------------------------- files and mounts


def refuse(number: int, *arguments) -> None:
    raise OSError(number, os.strerror(number))


def test_a_mount_that_knows_no_permissions_and_no_flushing_is_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "chmod", functools.partial(refuse, errno.EPERM))
    monkeypatch.setattr(os, "fsync", functools.partial(refuse, errno.EINVAL))
    utils.write_json(tmp_path / "file", {"a": 1})
    assert json.loads((tmp_path / "file").read_text()) == {"a": 1}


def test_files_have_the_permissions_of_the_users_umask(tmp_path):
    before = os.umask(0o027)
    try:
        utils.write_json(tmp_path / "file", {})
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_disk_without_room_for_a_checkpoint_is_told_in_words(tmp_path):
    class Full:
        def write(self, data):
            refuse(errno.EFBIG)

        def flush(self):
            pass

    with pytest.raises(utils.RunError, match="file: File too large; an earlier file there is unchanged; make room"):
        utils.write_atomically(tmp_path / "file", lambda file: torch.save({"a": torch.zeros(9999)}, Full()))


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "w.pth").touch()
    (tmp_path / "mine.args").write_text("--epochs 7")
    args = parse_arguments(["@~/mine.args", "--output-dir=~/run", "--resume=~/w.pth"])
    assert (args.output_dir, args.resume, args.finetune) == (f"{tmp_path}/run", f"{tmp_path}/w.pth", "")
    assert args.epochs == 7
    args = measures.parse_args(["--images=~/a", "--checkpoint=~/b", "--checkpoint=c", "--out=~/d"])
    assert (args.images, args.checkpoint, args.out) == (f"{tmp_path}/a", [f"{tmp_path}/b", "c"], tmp_path / "d")


# --------------------------------------------------------------------------------- variables that others have left


@pytest.fixture
def environ(monkeypatch):
    """Set the processes' variables to these alone."""
    for name in [*os.environ]:
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name)
    return lambda **variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "1"}, "RANK=1, no WORLD_SIZE"),
        ({"WORLD_SIZE": "4"}, "no RANK, WORLD_SIZE=4"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4, WORLD_SIZE=4"),
        ({"RANK": "x"}, "RANK=x"),
        ({"SLURM_CPUS_PER_TASK": "many"}, "unset SLURM_CPUS_PER_TASK"),
        ({"LOCAL_WORLD_SIZE": "-1"}, "unset LOCAL_WORLD_SIZE"),
    ],
)
def test_variables_that_make_no_sense_are_named(variables, named, environ):
    environ(**variables)
    with pytest.raises(utils.UserError, match=named):
        utils.processes_here() and default_workers()


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "SLURM_CPUS_PER_TASK", "LOCAL_WORLD_SIZE", "LOCAL_RANK"])
def test_an_empty_variable_is_none(name, environ):
    environ(**{name: ""})
    assert utils.processes_here() == (0, 1, 0)
    assert default_workers() >= 1
    environ(LOCAL_RANK="3", LOCAL_WORLD_SIZE="0")
    assert utils.processes_here() == (0, 1, 0), "of a process that is alone"
    assert default_workers() >= 1


def test_a_process_tells_whom_it_waits_for_and_how_to_run_alone(environ, monkeypatch, capsys):
    environ(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="4", SLURM_LOCALID="0")
    monkeypatch.setattr(utils, "TELL_AFTER", 0.01)
    with utils._telling_of_the_wait(0, 4):
        time.sleep(0.2)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL, "Ctrl-C ends the wait"
    assert signal.getsignal(signal.SIGINT) != signal.SIG_DFL
    assert "waiting for the other processes: SLURM_STEP_NUM_TASKS=4" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- one run in a folder


@pytest.fixture
def quick(monkeypatch):
    """A heart that beats faster."""
    monkeypatch.setattr(owner, "HEARTBEAT", 0.1)
    monkeypatch.setattr(owner, "SILENCE", 0.6)


def leave_note(folder: Path, **other) -> Path:
    """The note of another owner, which differs from this process in these values."""
    path = folder / owner.NOTE
    path.write_text(json.dumps(owner.Owner(folder).note | other))
    return path


def test_a_second_run_is_refused_while_the_first_lives(run, tmp_path):
    with owner.owned(tmp_path):
        assert run(tmp_path) == 2
        assert f"--output-dir {tmp_path}: a run (process {os.getpid()} on " in run.text()
        assert f"give --output-dir {tmp_path}_2 (if it runs no more, remove" in run.text()
        assert not (tmp_path / "args.json").exists()
    assert not list(tmp_path.iterdir())


def test_a_killed_run_of_this_host_is_recognised(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    leave_note(tmp_path, process=ended.pid)
    with owner.owned(tmp_path):
        pass
    leave_note(tmp_path, process_start="of another process with this id")
    with owner.owned(tmp_path):
        pass
    (tmp_path / owner.NOTE).write_text("")  # killed while it wrote
    with owner.owned(tmp_path):
        assert owner.read_note(tmp_path / owner.NOTE)["process"] == os.getpid()
    assert not (tmp_path / owner.NOTE).exists()


@pytest.mark.parametrize("other", [{"host": "another"}, {"process_namespace": "a container's"}])
def test_an_owner_that_cannot_be_asked_is_dead_when_it_is_silent(other, tmp_path, quick):
    path = leave_note(tmp_path, **other)
    with owner.owned(tmp_path):
        note = owner.read_note(path)
        assert (note["host"], note["process"]) == (platform.node(), os.getpid())


def test_an_owner_on_another_host_lives_while_its_heart_beats(tmp_path, quick):
    first = owner.Owner(tmp_path)
    first.note["host"] = "another"
    first.claim()
    with first.touching(), pytest.raises(utils.UserError, match=r"on another.*give --output-dir \S+_2 "):
        owner.Owner(tmp_path).claim()


def test_a_run_whose_folder_was_taken_saves_nothing_more(tmp_path):
    first = owner.Owner(tmp_path)
    first.claim()
    path = leave_note(tmp_path, host="another")
    with pytest.raises(utils.RunError, match="has taken the folder"):
        first.check()
    with first.touching():
        pass
    assert path.exists(), "the note of another run is left alone"


def test_leftovers_are_cleared_but_those_of_launchers(tmp_path):
    for name in (".best.pth.1.tmp", ".job.json.2.tmp"):
        (tmp_path / name).touch()
    with owner.owned(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {owner.NOTE, ".job.json.2.tmp"}


# ----------------------------------------------------------------------------------- longer on purpose; the status


def test_a_run_can_be_made_longer_in_another_folder(run, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    short = ("--epochs", "1", "--warmup-epochs", "0")
    assert run(first, *short) == 0
    # 1. in its own folder it is refused, with the way
    longer = ("--epochs", "2", "--warmup-epochs", "0")
    assert run(first, *longer) == 2
    assert f"give the same, or --output-dir {first}_2 and --resume {first / 'checkpoint.pth'}, to" in run.text()
    # 2. elsewhere it goes on
    resume = ("--resume", str(first / "checkpoint.pth"))
    assert run(second, *longer, *resume) == 0
    assert "is of a run of 1 epochs: from here on schedules are those of 2 epochs" in run.text()
    assert [line["epoch"] for line in runs.content(second)["log.txt"]] == [1]
    assert run(second, *longer, *resume) == 0
    assert "already trained for 2 epochs" in run.text()
    # 3. other mathematics are refused, with a mend that was not followed yet
    assert run(tmp_path / "third", *longer, *resume, "--lr", "1") == 2
    assert f"--finetune {first / 'checkpoint.pth'}" in run.text()


def test_the_status_knows_runs_that_were_never_submitted(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    line = '{{"epoch": {}, "metric": "knn20", "reported": "ema", "test_ema_knn20": {}, "test_ema_images": 9}}\n'
    for name, epoch in (("a", 2), ("b", 1)):
        (tmp_path / name).mkdir()
        utils.write_json(tmp_path / name / "args.json", {"epochs": 1, "cooldown_epochs": 1})
        torch.save({"epoch": epoch}, tmp_path / name / "checkpoint.pth")
    assert format_status(tmp_path).splitlines() == [
        "run  job  state",
        "a    -    finished  2 of 2 epochs",
        "b    -    stopped   1 of 2 epochs (without Slurm)",
        "2 runs: 1 finished, 1 stopped",
    ]
    # 2. with results beside the states
    (tmp_path / "a/log.txt").write_text(line.format(0, 55.5) + '{"epoch": 1, "reported": "ema"}\n' + line.format(2, 50))
    (tmp_path / "b/log.txt").write_text("no log")
    assert format_status(tmp_path).splitlines()[:3] == [
        "run  job  state     metric  last    best",
        "a    -    finished  knn20   50.000  55.500  2 of 2 epochs",
        "b    -    stopped                           1 of 2 epochs (without Slurm)",
    ]
    assert format_status(tmp_path, as_csv=True).splitlines() == [
        "run,job,state,metric,last,best,details",
        "a,-,finished,knn20,50.000,55.500,2 of 2 epochs",
        "b,-,stopped,,,,1 of 2 epochs (without Slurm)",
    ]
