"""The launcher without a cluster: what it would give Slurm, what a job does, what it tells, and runs without Slurm.

Slurm's clients are shell scripts here (`fake_slurm.py`). `test_slurm.py` has the real ones.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import runs
from helpers.fake_slurm import FakeSlurm, sbatch_options

import main
import run_with_submitit
from arguments import parse_arguments
from launch import job
from launch import runs as launch_runs
from launch import slurm as launch_slurm
from launch.job import SlurmJob

TINY = ["--data-set", "digits", "--batch-size", "4", "--total-batch", "32", "--epochs", "2", "--warmup-epochs", "0"]


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """Nothing of a job that the tests themselves may run in, a clean repository, and no cluster at all."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SUBMITIT_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin_without_slurm")
    code = {"commit": "c0ffee", "uncommitted_changes": False}
    monkeypatch.setattr(launch_slurm, "environment", lambda: code)
    return code


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", str(fake.folder))
    return fake


def call(*words: str, job_dir: str = "dir") -> int:
    """The launcher's command line with a tiny run's."""
    return run_with_submitit.main(["--job-dir", job_dir, *TINY, *words])


def pretend(folder: Path, *words: str, epoch: int = 2) -> None:
    """Leave the checkpoint of a run that stands at this epoch."""
    args = parse_arguments([*TINY, *words])
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"args": vars(args), "epoch": epoch}, folder / "checkpoint.pth")


def record(folder: Path) -> dict:
    return json.loads((folder / "job.json").read_text())


# ------------------------------------------------------------------------------------------ what Slurm is asked


def test_the_papers_request(slurm, tmp_path, capsys):
    assert call("--batch-size", "4") == 0
    (text,) = slurm.submitted
    assert sbatch_options(text) == {
        "nodes": "1",
        "gpus-per-node": "8",
        "ntasks-per-node": "8",
        "cpus-per-task": "10",
        "time": "2800",
        "job-name": "sar",
        "signal": "USR2@120",
        "requeue": "",
        "open-mode": "append",
        "output": f"{tmp_path}/dir/submitit/%j_0_log.out",
        "wckey": "submitit",
    }
    (srun,) = [line for line in text.splitlines() if line.startswith("srun")]
    assert "--kill-on-bad-exit=1 --cpus-per-task=10" in srun
    assert f"{sys.executable} -u -m submitit.core._submit {tmp_path}/dir/submitit" in srun
    assert re.search(r"^dir +70 +submitted$", capsys.readouterr().out, re.MULTILINE)


def test_what_else_is_asked(slurm):
    words = "--nodes 2 --ngpus 4 --timeout 60 --partition gpu --slurm-arg account=lab --slurm-arg mail-user=a@b"
    more = "--slurm-arg cpus_per_task=6 --slurm-arg exclusive --slurm-arg signal_delay_s=300 --slurm-arg job-name=x"
    assert call(*words.split(), *more.split()) == 0
    (text,) = slurm.submitted
    options = sbatch_options(text)
    assert "--cpus-per-task=6" in text.partition("srun")[2]
    assert (options["nodes"], options["ntasks-per-node"], options["gpus-per-node"]) == ("2", "4", "4")
    assert (options["time"], options["partition"], options["cpus-per-task"]) == ("60", "gpu", "6")
    assert (options["account"], options["mail-user"], options["job-name"]) == ("lab", "a@b", "x")
    assert (options["exclusive"], options["signal"]) == ("", "USR2@300")


def test_no_gpus(slurm):
    assert call("--ngpus", "0", "--nodes", "2") == 0
    options = sbatch_options(slurm.submitted[0])
    assert options["ntasks-per-node"] == "1"
    assert "gpus-per-node" not in options


def test_underscores_and_argument_files_hold_the_launchers_options_too(slurm, tmp_path):
    Path("site.args").write_text("--partition gpu --slurm_arg account=lab\n--lr 1e-3 # a comment")
    assert run_with_submitit.main(["--job_dir", "dir", *TINY, "--slurm_arg", "qos=x", "@site.args"]) == 0
    options = sbatch_options(slurm.submitted[0])
    assert (options["partition"], options["account"], options["qos"]) == ("gpu", "lab", "x")
    assert record(tmp_path / "dir")["args"]["lr"] == 1e-3


def test_a_job_finds_the_program_wherever_it_starts(slurm, tmp_path):
    """The lines before srun, run by a shell in a folder that has a main.py of its own."""
    assert call() == 0
    setup = slurm.submitted[0].partition("# setup\n")[2].partition("\n\n")[0]
    (tmp_path / "main.py").write_text("raise SystemExit('the wrong one')")
    code = "import launch.job, importlib.util as util; print(util.find_spec('main').origin)"
    shell = f"{setup}\n{shlex.join([sys.executable, '-c', code])}"
    environ = {"PYTHONPATH": "elsewhere", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["sh", "-c", shell], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.stdout.strip() == str(runs.ROOT / "main.py"), done.stderr


def test_a_job_inherits_nothing_of_the_job_that_submits_it(slurm, tmp_path, monkeypatch):
    """But where Slurm's configuration is, and the user's own defaults, where the command says nothing else."""
    mine = {"SLURM_CONF": "here", "SBATCH_ACCOUNT": "lab", "SBATCH_PARTITION": "mine", "MINE": "1"}
    hidden = {"SLURM_MEM_PER_CPU": "1", "SLURM_JOB_ID": "3", "RANK": "1", "SBATCH_QOS": "low", "SBATCH_NO_REQUEUE": "1"}
    for name, value in (mine | hidden).items():
        monkeypatch.setenv(name, value)
    slurm.script("sbatch", f"env > {slurm.folder}/environment; echo job 70")
    assert call("--slurm-arg", "qos=high") == 0
    there = dict(line.split("=", 1) for line in (slurm.folder / "environment").read_text().splitlines())
    assert {name: there[name] for name in mine} == mine
    assert not hidden.keys() & there.keys()
    assert {name: os.environ[name] for name in hidden} == hidden
    (tmp_path / "dir/job.json").unlink()
    assert call("--slurm-arg", "qos=high", "--partition", "gpu") == 0  # a variable would count more than the file
    assert "SBATCH_PARTITION" not in (slurm.folder / "environment").read_text()


def test_the_pickled_job_is_main_with_the_words_as_they_are_now(slurm, tmp_path):
    """An argument file that changes while the job waits changes nothing."""
    from submitit.core.utils import DelayedSubmission

    Path("my.args").write_text("--lr 1e-3")
    assert call("@my.args", "--sweep", "seed=3,4") == 0
    delayed = DelayedSubmission.load(tmp_path / "dir/submitit/70_1_submitted.pkl")
    job = delayed.function
    assert isinstance(job, SlurmJob)
    assert job.words == ["--lr", "1e-3", *TINY, "--seed=4", "--output-dir", f"{tmp_path}/dir/seed=4"]
    assert (job.folder, job.epochs, job.commit) == (f"{tmp_path}/dir/seed=4", 2, "c0ffee")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--slurm-arg time=5", "--slurm-arg time=5: use --timeout"),
        ("--slurm-arg gpus-per-node=5", "use --ngpus"),
        ("--slurm-arg array=0-3", "use --sweep"),
        ("--slurm-arg =3", "expected KEY=VALUE"),
        ("--slurm-arg account=", "expected KEY=VALUE"),
        ("--slurm-arg cpus_per_gpu=10", "use --slurm-arg cpus_per_task=N"),
        ("--slurm-arg setup=x", "--slurm-arg setup=x: not an option of sbatch"),
        ("--timeout 2", "--timeout 2: Slurm signals a job 120 s before its time limit"),
        ("--ngpus 3", "--batch-size 4 x 3 processes does not divide --total-batch 32"),
        ("--output-dir x", "leave --output-dir out; --job-dir sets"),
        ("--eval", "--eval takes minutes"),
        ("--partitoin gpu", "no option --partitoin; did you mean --partition"),
        ("--epocs 3", "no option --epocs; did you mean --epochs"),
        ("--nodes 0", "'0' is not a whole number of at least 1"),
        ("--job-dir dir/%j", "--job-dir dir/%j: leave % out"),
        ("--sweep sar_weight", "--sweep sar_weight: expected NAME=VALUE,VALUE"),
        ("--sweep sar_weight=", "--sweep sar_weight=: expected NAME=VALUE,VALUE"),
        ("--sweep sar_weight=0,,1", "expected NAME=VALUE,VALUE"),
        ("--sweep sar_wieght=0,1", "sar_wieght=0: no option --sar-wieght; did you mean --sar-weight"),
        ("--sweep sar_weight=0,x", "sar_weight=x: argument --sar-weight: 'x' is not a number"),
        ("--sweep seed=0,1 --seed 5", "--sweep over --seed, which is given a second time"),
        ("--sweep seed=0 --sweep seed=1", "--sweep over --seed, which is given a second time"),
        ("--sweep seed=0,1,0", "--sweep: 2 runs would share the folder seed=0"),
        ("--sweep output_dir=a,b", "leave --output-dir out"),
        ("--sweep --seed=0,1", "--sweep --seed=0,1: leave the hyphens out, --sweep seed=0,1"),
        (f"--sweep finetune={'a' * 200}", "is too long for the name of a folder"),
        ("--local --nodes 2", "--local runs on this machine alone; leave --nodes out"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_submitted(words, message, slurm, tmp_path, capsys):
    assert call(*words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1
    assert not slurm.submitted
    assert not (tmp_path / "dir").exists()


def test_the_job_dir_is_required(capsys):
    assert run_with_submitit.main(["--status"]) == 2
    assert capsys.readouterr().err.startswith("error: --job-dir DIR is missing")
    assert run_with_submitit.main(["--job-dir", "", "--status"]) == 2


def test_a_cluster_with_kinds_of_gpus(slurm):
    assert call("--slurm-arg", "gres=gpu:v100:8") == 0
    options = sbatch_options(slurm.submitted[0])
    assert options["gres"] == "gpu:v100:8"
    assert options["ntasks-per-node"] == "8"
    assert "gpus-per-node" not in options


def test_submitit_s_own_signal_is_refused(slurm, capsys, monkeypatch):
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    assert call() == 2
    assert "SUBMITIT_PREEMPT_SIGNAL is set: unset it" in capsys.readouterr().err


def test_what_slurm_refuses_is_one_line_in_its_words(slurm, tmp_path, capsys):
    said = (
        "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: Invalid partition"
    )
    slurm.script("sbatch", f"printf '%s\n' '{said}' >&2; exit 1")
    assert call("--sweep", "seed=0,1") == 2
    told = "invalid partition specified: x; Batch job submission failed: Invalid partition"
    assert capsys.readouterr().err == f"error: sbatch refuses the job: {told}\n"
    assert [path.name for path in (tmp_path / "dir/submitit").iterdir()] == ["launcher.lock"]
    assert not (tmp_path / "dir/seed=0").exists()


def test_no_slurm_here(tmp_path, capsys):
    assert call() == 2
    assert "no sbatch on this machine; submit on a login node" in capsys.readouterr().err
    assert not (tmp_path / "dir").exists()


def test_a_slurm_that_does_not_answer(slurm, monkeypatch, capsys):
    monkeypatch.setattr(job, "CLIENT_SECONDS", 0.2)
    slurm.script("squeue", "exec sleep 20")
    begun = time.monotonic()
    assert call() == 2
    assert time.monotonic() - begun < 10
    assert "Slurm does not answer (" in capsys.readouterr().err
    slurm.script("squeue", "echo first >&2; echo 'slurm_load_jobs error: no controller' >&2; exit 1")
    assert call() == 2
    assert "Slurm does not answer (slurm_load_jobs error: no controller); try again" in capsys.readouterr().err


def test_a_job_dir_that_cannot_be_written(slurm, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert call(job_dir="file/dir") == 2
    assert f"{tmp_path}/file/dir/submitit: Not a directory; choose a writable folder" in capsys.readouterr().err


def test_data_that_only_the_nodes_have(slurm, capsys):
    assert call("--data-set", "folder", "--data-path", "/only/there") == 2
    assert "its images decide on defaults: submit where it is, or give --" in capsys.readouterr().err
    assert call("--data-set", "imagenet", "--data-path", "/only/there") == 0
    assert "warning: --data-path /only/there does not exist on this machine" in capsys.readouterr().err


def test_a_dirty_tree_is_said_and_recorded(slurm, clean, tmp_path, capsys):
    assert call() == 0
    assert capsys.readouterr().err == ""
    clean["uncommitted_changes"] = True
    assert call(job_dir="other") == 0
    assert "warning: uncommitted changes" in capsys.readouterr().err
    assert [record(tmp_path / name)["uncommitted_changes"] for name in ("dir", "other")] == [False, True]


def test_the_record_of_a_submission(slurm, tmp_path):
    assert call() == 0
    job = record(tmp_path / "dir")
    assert (job["job_id"], job["epochs"], job["commit"]) == ("70", 2, "c0ffee")
    assert (job["python"], job["working_directory"]) == (sys.executable, str(tmp_path))
    assert job["log"] == f"{tmp_path}/dir/submitit/70_0_log.out"
    assert job["words"] == [*TINY, "--output-dir", f"{tmp_path}/dir"]
    assert time.strptime(job["submitted"], "%Y-%m-%dT%H:%M:%S%z")


def test_help_is_the_launchers(capsys):
    with pytest.raises(SystemExit) as end:
        run_with_submitit.main(["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "for example: run_with_submitit.py --job-dir DIR" in text
    assert "All other options and @recipe.args files are passed to main.py" in text
    assert "--weight-decay" not in text
    assert "[]" not in text


# ------------------------------------------------------------------------------------------------------- sweeps


def test_a_sweep_is_one_array_of_all_combinations(slurm, tmp_path, capsys):
    assert call("--sweep", "sar_weight=0,0.01,0.1", "--sweep", "seed=0,1", "--max-parallel", "4") == 0
    (text,) = slurm.submitted
    assert sbatch_options(text)["array"] == "0-5%4"
    names = [f"sar_weight={weight},seed={seed}" for weight in ("0", "0.01", "0.1") for seed in (0, 1)]
    table = capsys.readouterr().out.splitlines()[1:7]
    assert [line.split() for line in table] == [[name, f"70_{k}", "submitted"] for k, name in enumerate(names)]
    for index, name in enumerate(names):
        job = record(tmp_path / "dir" / name)
        assert (job["job_id"], job["log"]) == (f"70_{index}", f"{tmp_path}/dir/submitit/70_{index}_0_log.out")
        assert f"sar_weight={job['args']['sar_weight']:g},seed={job['args']['seed']}" == name


def test_a_sweep_may_go_over_an_option_of_an_argument_file(slurm, tmp_path):
    Path("my.args").write_text("--lr 1e-3")
    assert call("@my.args", "--sweep", "lr=0.5,1") == 0
    assert record(tmp_path / "dir/lr=0.5")["args"]["lr"] == 0.5


def test_values_with_slashes_name_folders_too(slurm, tmp_path):
    (tmp_path / "w").mkdir()
    for name in ("a", "b"):
        torch.save({"model": {"blocks.0.norm2.weight": torch.ones(1)}}, tmp_path / "w" / name)
    assert call("--sweep", "finetune=w/a,w/b") == 0
    assert record(tmp_path / "dir/finetune=w_a")["args"]["finetune"] == "w/a"


def test_what_is_finished_or_queued_is_left_alone(slurm, tmp_path, capsys):
    sweep = ("--sweep", "seed=0,1,2,3")
    assert call(*sweep) == 0
    pretend(tmp_path / "dir/seed=0", "--seed", "0")
    pretend(tmp_path / "dir/seed=3", "--seed", "3", epoch=1)
    slurm.queue("70_1 RUNNING None", "70_2 PENDING Resources", "99_3 RUNNING None")
    capsys.readouterr()
    assert call(*sweep) == 0
    assert [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()[1:5]] == [
        ["seed=0", "-", "already finished"],
        ["seed=1", "70_1", "already queued, running"],
        ["seed=2", "70_2", "already queued, pending: Resources"],
        ["seed=3", "71", "submitted"],
    ]
    assert "--array" not in slurm.submitted[1]
    pretend(tmp_path / "dir/seed=3", "--seed", "3")
    slurm.queue("70_1 RUNNING None", "70_2 PENDING Resources")
    assert call(*sweep) == 0
    assert len(slurm.submitted) == 2, "nothing is left to submit"


def test_a_folder_or_a_queued_job_of_another_run_is_refused(slurm, tmp_path, capsys):
    pretend(tmp_path / "dir/seed=1", "--seed", "1", "--lr", "3")
    assert call("--sweep", "seed=0,1") == 2
    assert "dir/seed=1 holds a run with other arguments; choose another folder (--lr: 3.0 in" in capsys.readouterr().err
    assert call("--scale", "0.2", "0.9", job_dir="other") == 0
    slurm.queue("70 PENDING Priority")
    assert call("--scale", "0.2", "0.9", job_dir="other") == 0, "the same run"
    assert call(job_dir="other") == 2
    error = capsys.readouterr().err
    assert "other: job 70 has other arguments; scancel it first (--scale: [0.2, 0.9] in the job, [0.08, 1.0]" in error
    assert len(slurm.submitted) == 1


def test_a_run_whose_job_is_just_ending_is_not_left_out_silently(slurm, tmp_path, capsys):
    assert call() == 0
    slurm.queue("70 COMPLETING None")
    assert call() == 2
    assert "dir: its job 70 is about to end; repeat the command in a minute" in capsys.readouterr().err
    pretend(tmp_path / "dir")
    assert call() == 0, "a finished run's job may take its time"
    assert len(slurm.submitted) == 1


def test_a_run_that_is_trained_here_is_not_submitted_and_held(slurm, tmp_path, capsys, monkeypatch):
    codes = []
    monkeypatch.setattr(launch_runs, "run_command", lambda command: codes.append(call("--sweep", "seed=0,1")) or 130)
    assert call("--local", "--ngpus", "1", "--sweep", "seed=0,1") == 130
    assert codes == [2]
    assert "seed=0: another launcher is training it on a machine without Slurm" in capsys.readouterr().err
    assert not slurm.submitted
    assert call("--sweep", "seed=0,1") == 0, "it has ended"


def test_the_status_knows_of_a_run_that_is_trained_here(slurm, capsys, monkeypatch):
    """It was submitted, and its job is gone."""
    status = ["--job-dir", "dir", "--status"]
    monkeypatch.setattr(launch_runs, "run_command", lambda command: run_with_submitit.main(status) or 130)
    assert call() == 0
    assert call("--local", "--ngpus", "1") == 130
    assert re.search(r"^dir +70 +running +0 of 2 epochs \(without Slurm\)$", capsys.readouterr().out, re.MULTILINE)
    assert run_with_submitit.main(status) == 0
    assert "70   stopped" in capsys.readouterr().out


def test_a_lock_ends_with_its_process(tmp_path):
    code = "import launch.runs as runs, pathlib, sys, time\nwith runs.hold_lock(pathlib.Path(sys.argv[1]), 'training'):"
    command = [sys.executable, "-c", f"{code} print('held', flush=True), time.sleep(60)", str(tmp_path)]
    with subprocess.Popen(command, cwd=runs.ROOT, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout.readline() == "held\n"
        assert launch_runs.is_locked(tmp_path)
        launcher.kill()
    assert not launch_runs.is_locked(tmp_path)


def test_a_damaged_record_is_named(slurm, tmp_path, capsys):
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir/job.json").write_text("{")
    assert call() == 2
    assert "dir/job.json cannot be read; remove it if no job" in capsys.readouterr().err


def test_two_launchers_do_not_submit_the_same(slurm, tmp_path, capsys, monkeypatch):
    """The second waits while the first asks what is queued, and submits."""
    slurm.queue("70 RUNNING None")
    asked, ask = [], launch_slurm.jobs_in_queue

    def slow():
        asked.append(1)
        if len(asked) == 1:
            other = threading.Thread(target=call)
            other.start()
            time.sleep(0.5)
            others.append(other)
        return {} if len(asked) == 1 else ask()

    others: list[threading.Thread] = []
    monkeypatch.setattr(launch_slurm, "jobs_in_queue", slow)
    assert call() == 0
    others[0].join()
    assert len(slurm.submitted) == 1
    assert f"another launcher is submitting with {tmp_path}/dir/submitit; waiting" in capsys.readouterr().out


@pytest.mark.parametrize("sweep", [(), ("--sweep", "seed=0,1,2")])
def test_a_dry_run_prints_exactly_what_is_submitted(sweep, slurm, tmp_path, capsys):
    assert call("--dry-run", "--partition", "gpu", *sweep) == 0
    assert not slurm.submitted
    assert not (tmp_path / "dir").exists()
    text = capsys.readouterr().out
    assert call("--partition", "gpu", *sweep) == 0
    assert slurm.submitted[0] in text
    seeds = sweep[1].partition("=")[2].split(",") if sweep else []
    commands = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("main.py ")]
    assert commands == (
        [[*TINY, f"--seed={seed}", "--output-dir", f"{tmp_path}/dir/seed={seed}"] for seed in seeds]
        or [[*TINY, "--output-dir", f"{tmp_path}/dir"]]
    )


def test_a_dry_run_knows_the_queue_where_there_is_one(slurm, tmp_path, capsys, monkeypatch):
    assert call("--sweep", "seed=0,1,2") == 0
    pretend(tmp_path / "dir/seed=0", "--seed", "0")
    slurm.queue("70_1 RUNNING None")
    capsys.readouterr()
    assert call("--dry-run", "--sweep", "seed=0,1,2") == 0
    text = capsys.readouterr().out
    assert "# seed=0: already finished\n# seed=1: already queued, job 70_1\n" in text
    assert text.count("main.py ") == 1
    monkeypatch.setenv("PATH", "/nowhere")
    assert call("--dry-run", "--sweep", "seed=0,1,2") == 0
    text = capsys.readouterr().out
    assert "# assuming an empty queue: no squeue on this machine" in text
    assert text.count("main.py ") == 2


# ------------------------------------------------------------------------------------------- what became of it


def test_the_status_of_every_run(slurm, tmp_path, capsys):
    """Of each kind one; a link to a run is no second one; nothing of main.py need be said."""
    assert call("--sweep", "seed=0,1,2,3,4,5,6") == 0
    for seed, epoch in {0: 2, 1: 1, 3: 1}.items():
        pretend(tmp_path / f"dir/seed={seed}", "--seed", str(seed), epoch=epoch)
    (tmp_path / "dir/seed=5/checkpoint.pth").write_bytes(b"\0")
    slurm.queue("70_1 RUNNING None", "70_2 PENDING Dependency")
    logs = tmp_path / "dir/submitit"
    life = "submitit INFO - Starting with JobEnvironment(...)\n"
    (logs / "70_3_0_log.out").write_text(f"{life}error: an old one\n{life}epoch 1\nsrun: error: killed\n")
    (logs / "70_3_1_log.out").write_text(f"{life}[rank 1] ValueError: not this life\n{life}[rank 1] OSError: no disk\n")
    (logs / "70_4_0_log.out").write_text(
        f"{life}error: an old one\n{life}slurmstepd-n1: error: *** CANCELLED ***\nsrun: error: out\n"
    )
    (logs / "70_6_0_log.out").write_text(f"{life}srun: error: n1: task 0: Killed\n")  # out of memory, say
    (tmp_path / "dir/link").symlink_to("seed=0")
    capsys.readouterr()
    assert run_with_submitit.main(["--job-dir", "dir", "--status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:6]] == [
        ["run", "job", "state"],
        *("seed=0 70_0 finished 2 of 2 epochs".split(), "seed=1 70_1 running 1 of 2 epochs".split()),
        "seed=2 70_2 pending 0 of 2 epochs (Dependency)".split(),
        "seed=3 70_3 failed 1 of 2 epochs".split(),
        ["[rank", "1]", "OSError:", "no", "disk"],
    ]
    assert lines[6:9] == [
        f"    log: {logs}/70_3_0_log.out",
        "seed=4  70_4  stopped   0 of 2 epochs",
        "    slurmstepd-n1: error: *** CANCELLED ***",
    ]
    assert re.match(r"seed=5 +70_5 +failed +\S*checkpoint.pth is truncated", lines[10])
    assert lines[11:13] == ["seed=6  70_6  failed    0 of 2 epochs", "    srun: error: n1: task 0: Killed"]
    assert lines[-1] == "7 runs: 1 finished, 1 running, 1 pending, 3 failed, 1 stopped"


def test_the_status_without_slurm_and_without_runs(slurm, tmp_path, capsys, monkeypatch):
    assert call("--sweep", "seed=0,1") == 0
    pretend(tmp_path / "dir/seed=0", "--seed", "0")
    monkeypatch.setenv("PATH", "/nowhere")
    capsys.readouterr()
    assert run_with_submitit.main(["--job-dir", "dir", "--status"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"seed=0 +70_0 +finished +2 of 2 epochs\nseed=1 +70_1 +unknown +0 of 2 epochs\n", text)
    assert text.endswith(
        "as the queue is unknown: no squeue on this machine; run this on a login node of the cluster\n"
    )
    assert run_with_submitit.main(["--job-dir", "nowhere", "--status"]) == 0
    assert capsys.readouterr().out == f"nothing was submitted in {tmp_path}/nowhere\n"
    assert run_with_submitit.main(["--job-dir", "dir", "--status", "csv"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "seed=0,70_0,finished,,,,2 of 2 epochs"


# ----------------------------------------------------------------------------------------------- a job at work


@pytest.fixture
def work(slurm, tmp_path, monkeypatch):
    """A job's task: ``work(code, epoch)`` calls it with a main that leaves this epoch and returns this code."""
    monkeypatch.setattr("utils.environment", lambda: {"commit": "c0ffee", "uncommitted_changes": False})
    variables = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}

    def work(code: int, epoch: int = 1, **environ: str) -> int:
        for name, value in (variables | environ).items():
            monkeypatch.setenv(name, value)
        words = ["--words"]

        def train(argv):
            assert argv == words
            pretend(tmp_path / "run", epoch=epoch)
            return code

        monkeypatch.setattr(main, "main", train)
        with pytest.raises(SystemExit) as end:
            SlurmJob(words, str(tmp_path / "run"), 2, "c0ffee")()
        return end.value.code

    return work


def test_a_finished_run_ends_its_job(work, slurm, capsys):
    assert work(0, epoch=2) == 0
    assert slurm.told == []
    assert capsys.readouterr().out == ""


def test_a_run_whose_time_is_up_is_requeued_by_rank_0(work, slurm, capsys):
    assert work(75, SLURM_PROCID="1") == 0
    assert slurm.told == []
    assert work(75) == 0
    assert slurm.told == ["-o show job 7", "requeue 7"]
    assert capsys.readouterr().out == "requeued job 7; the checkpoint is saved\n"
    assert work(75, SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="3") == 0
    assert slurm.told[-1] == "requeue 5_3"


def test_a_job_that_cannot_be_requeued_fails(work, slurm, capsys):
    slurm.script("scontrol", "echo 'Job is not requeueable' >&2; exit 1")
    assert work(75) == 75
    assert "error: cannot requeue job 7 (Job is not requeueable); run the same" in capsys.readouterr().out


def test_a_preempted_run_is_requeued_and_a_cancelled_one_is_not(work, slurm, capsys):
    """Both got SIGTERM. A job of a stopped run has not ended well: what waits for its weights must not start."""
    assert work(0) == 75
    assert slurm.told == ["-o show job 7"]
    assert "stopped after 1 of 2 epochs; run the same command" in capsys.readouterr().out
    preempted = "JobState=RUNNING PreemptTime=2026-01-01T00:00:00 Restarts=0"
    slurm.script("scontrol", f'echo "$@" >> {slurm.folder}/told; echo "{preempted}"')
    assert work(0) == 0
    assert slurm.told[1:] == ["-o show job 7", "requeue 7"]
    slurm.script("scontrol", "exit 1")
    assert work(0) == 75
    assert "cannot query the state of job 7" in capsys.readouterr().out


def test_a_job_that_is_cancelled_while_it_saves_does_not_rise_again(work, slurm, capsys):
    slurm.script("scontrol", f'echo "$@" >> {slurm.folder}/told; echo "JobState=COMPLETING PreemptTime=None"')
    assert work(75) == 75
    assert slurm.told == ["-o show job 7"]


@pytest.mark.parametrize(("rank", "preempted", "code"), [("0", True, 0), ("0", False, 75), ("1", True, 0)])
def test_a_sigterm_before_training_ends_the_job(rank, preempted, code, work, slurm, monkeypatch):
    """submitit would ignore it, and a preempted job lose what it trains in the rest of its grace time."""
    since = "2026-01-01T00:00:00" if preempted else "None"
    slurm.script("scontrol", f'echo "$@" >> {slurm.folder}/told; echo "JobState=RUNNING PreemptTime={since}"')
    monkeypatch.setattr(SlurmJob, "_report_code_changes", lambda job: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(SlurmJob, "_train", lambda job, rank: job._report_code_changes() or pytest.fail("it trains"))
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert work(0, epoch=1, SLURM_PROCID=rank) == code
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ("requeue 7" in slurm.told) == (rank == "0" and preempted)


@pytest.mark.parametrize("code", [1, 2, 130])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_failed_run_fails_its_job(code, rank, work, slurm):
    assert work(code, SLURM_PROCID=rank) == code
    assert slurm.told == []


def test_a_signal_before_training_begins_once_more():
    job = SlurmJob(["--words"], "run", 2, None)
    assert job.checkpoint().function == job
    assert (job.checkpoint().args, job.checkpoint().kwargs) == ((), {})


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"commit": "beef", "uncommitted_changes": False}, "submitted at commit c0ffee, started at beef"),
        ({"commit": "c0ffee", "uncommitted_changes": True}, "uncommitted changes on top of commit c0ffee"),
    ],
)
def test_a_job_says_which_code_it_runs(now, said, work, capsys, monkeypatch):
    monkeypatch.setattr("utils.environment", lambda: now)
    work(0, epoch=2, SLURM_PROCID="1")
    assert capsys.readouterr().out == ""
    work(0, epoch=2)
    assert said in capsys.readouterr().out


def test_a_job_imports_nothing_heavy_before_signals_are_taken():
    code = "import launch.job, sys; print(any(name in sys.modules for name in ('torch', 'timm', 'main')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# ----------------------------------------------------------------------------------------------- without Slurm


def test_a_sweep_without_slurm(tmp_path, capfd, monkeypatch):
    """Really trained, in processes of their own; a second time, nothing is left to do."""
    data = runs.write_digits(tmp_path / "data", train=5, val=2)
    words = [*runs.command(data, tmp_path), "--epochs", "1", "--warmup-epochs", "0"]
    at = words.index("--output-dir")
    words = ["--job-dir", "dir", *words[:at], *words[at + 2 :], "--local", "--ngpus", "1", "--sweep", "seed=0,1"]
    assert run_with_submitit.main([*words, "--dry-run"]) == 0
    assert capfd.readouterr().out.splitlines()[1].endswith(f"--output-dir {tmp_path}/dir/seed=1")
    assert run_with_submitit.main(words) == 0
    for seed in (0, 1):
        checkpoint = torch.load(tmp_path / f"dir/seed={seed}/checkpoint.pth", weights_only=True)
        assert (checkpoint["epoch"], checkpoint["args"]["seed"]) == (1, seed)
    assert not (tmp_path / "dir/submitit").exists()
    monkeypatch.setattr(launch_runs, "run_command", lambda command: pytest.fail(f"started {command}"))
    assert run_with_submitit.main(words) == 0
    assert "seed=1: already finished" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("gpus", "words", "processes"), [(0, (), 1), (4, (), 4), (4, ("--ngpus", "2"), 2), (0, ("--ngpus", "2"), 2)]
)
def test_as_many_processes_as_there_are_gpus(gpus, words, processes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_with_submitit, "gpu_count", lambda: gpus)
    assert call("--local", "--dry-run", *words) == 0
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    start = start if processes > 1 else [sys.executable]
    command = [*start, str(runs.ROOT / "main.py"), *TINY, "--output-dir", f"{tmp_path}/dir"]
    assert shlex.split(capsys.readouterr().out) == command


@pytest.mark.parametrize(("codes", "started", "result"), [((1, 0), 2, 1), ((2, 0), 1, 2), ((0, 0), 1, 143)])
def test_a_run_that_fails_leaves_the_others_theirs(codes, started, result, tmp_path, monkeypatch, capsys):
    """But what would end the next one, too, ends all: a mistake, or a signal that main.py met with 0."""
    commands, answers = [], iter(codes)
    monkeypatch.setattr(launch_runs, "run_command", lambda command: commands.append(command) or next(answers))
    monkeypatch.setattr(launch_runs, "epochs_done", lambda spec: 2 * (len(commands) == 2))
    assert call("--local", "--ngpus", "1", "--sweep", "seed=0,1") == result
    assert len(commands) == started
    assert f"seed=0: stopped after 0 of 2 epochs with exit code {codes[0]}" in capsys.readouterr().err


def test_a_run_that_a_job_has_is_not_trained_here_too(slurm, tmp_path, monkeypatch, capsys):
    assert call("--sweep", "seed=0,1") == 0
    slurm.queue("70_1 PENDING Resources")
    started = []
    monkeypatch.setattr(launch_runs, "run_command", lambda command: started.append(command) or 130)
    assert call("--local", "--ngpus", "1", "--sweep", "seed=0,1") == 2
    assert "seed=1: job 70_1 executes this run (pending: Resources); wait or scancel" in capsys.readouterr().err
    assert started == []
    monkeypatch.setenv("PATH", "/nowhere")
    assert call("--local", "--ngpus", "1", "--sweep", "seed=0,1") == 130
    assert "make sure that no job is training seed=0, seed=1" in capsys.readouterr().err


@pytest.fixture
def shell(monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")


@pytest.mark.parametrize(
    ("number", "told"),
    [(signal.SIGTERM, True), (signal.SIGUSR1, True), (signal.SIGUSR2, True), (signal.SIGINT, False)],
)
def test_a_signal_leaves_the_run_the_time_to_save(number, told, shell, tmp_path, monkeypatch):
    """SIGTERM, SIGUSR1 and SIGUSR2 are handed on as SIGTERM; Ctrl-C reaches a run by itself. All are remembered."""
    ready, end, started = tmp_path / "ready", tmp_path / "end", threading.Event()
    popen = subprocess.Popen

    def start(command):
        child = popen(command)
        started.set()
        return child

    monkeypatch.setattr(subprocess, "Popen", start)
    script = f"trap 'echo saved > {end}; exit 0' TERM; touch {ready}; for i in $(seq 40); do sleep 0.05; done"

    def send():
        while not ready.exists():
            time.sleep(0.01)
        started.wait()  # a Ctrl-C before that would be told to the child, which may not have existed yet
        time.sleep(0.1)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    threading.Thread(target=send).start()
    assert launch_runs.run_command(["sh", "-c", script]) == 128 + number
    assert end.exists() == told
    assert signal.getsignal(number) is before


def test_a_signal_that_comes_while_the_run_starts(shell, monkeypatch):
    popen = subprocess.Popen

    def interrupted(command):
        os.kill(os.getpid(), signal.SIGUSR1)
        return popen(command)

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    start = time.monotonic()
    assert launch_runs.run_command(["sleep", "20"]) == 128 + signal.SIGUSR1
    assert time.monotonic() - start < 10


def test_the_exit_code_of_a_launched_run(shell):
    assert launch_runs.run_command(["sh", "-c", "exit 7"]) == 7
    assert launch_runs.run_command(["sh", "-c", "kill -KILL $$"]) == 137
