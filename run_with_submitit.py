"""main.py on a SLURM cluster: the same command line, and Slurm's options beside it.

    python run_with_submitit.py --job-dir DIR --partition gpu --model vit_small_sar --data-path /data/imagenet
    python run_with_submitit.py --job-dir DIR --partition gpu --slurm-arg account=lab --slurm-arg constraint=v100 \
        @recipes/swin_in100_100.args --data-path /data/imagenet \
        --sweep sar_weight=0,0.001,0.005,0.01,0.05,0.1 --sweep seed=0,1,2 --max-parallel 4
    python run_with_submitit.py --job-dir DIR --status
    python run_with_submitit.py --job-dir DIR --local --model vit_small_sar        # the same without Slurm

A job whose time is up, or whose place another job needs, saves, goes back into the queue and goes on where it was. Any
command may be given again: what is finished or queued is left alone, the rest is submitted and goes on.

    DIR/checkpoint.pth ...          main.py's output folder, with job.json: job id, log, arguments, commit
    DIR/sar_weight=0.01,seed=0/     one for each point of a sweep
    DIR/submitit/                   logs, and what submitit keeps
"""

import argparse
import itertools
import os
import shlex
import sys
from collections import Counter
from pathlib import Path

import torch

from arguments import build_parser, parse_arguments, task_of
from build import accumulation
from cli import HelpFormatter, Parser, at_least, exit_code, expand_arguments
from launch.runs import ROOT, Point, epochs_done, finish, locked, warn_of_data_elsewhere
from launch.slurm import SIGNAL_DELAY_S, Cluster, print_submission, submit_all
from launch.status import refuse_queued, status
from utils import UserError

# Options of sbatch that have options of their own here, or that the launcher needs for itself.
NOT_FOR_SLURM_ARG = {
    "nodes": "--nodes",
    "time": "--timeout",
    "partition": "--partition",
    "gpus": "--ngpus",
    "gpus_per_node": "--ngpus",
    "ntasks": "--ngpus, one task a GPU",
    "ntasks_per_node": "--ngpus, one task a GPU",
    "array": "--sweep",
    "array_parallelism": "--max-parallel",
    "output": "--job-dir",
    "error": "--job-dir",
    "cpus_per_gpu": "--slurm-arg cpus_per_task=N",
    "chdir": "cd, before this command",
    "signal": "--slurm-arg signal_delay_s=SECONDS",
}

# Parameters of submitit that it makes no option of sbatch of.
NOT_OF_SBATCH = ("additional_parameters", "num_gpus", "setup", "srun_args", "stderr_to_stdout", "teardown", "use_srun")


# ---------------------------------------------------------------------------------------------- command line


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """What is asked of Slurm."""
    add = parser.add_argument_group("asked of Slurm for each run").add_argument
    add("--nodes", type=at_least(int, 1), default=1, help="machines")
    add("--ngpus", type=at_least(int, 0), default=None, help="GPUs a node, one task each, 10 CPUs a task (default: 8)")
    add("--timeout", type=at_least(int, 1), default=2800, metavar="MIN", help="minutes; then it is requeued")
    add("--partition", default=None, metavar="NAME", help="default: the cluster's own")
    add(
        "--slurm-arg",
        action="append",
        metavar="KEY=VALUE",
        help="any other option of sbatch: account=lab, qos=..., mem=480G, exclusive, gres=gpu:v100:8 (in place of the "
        "GPUs that --ngpus asks for); may be repeated",
    )
    add("--max-parallel", type=at_least(int, 1), default=None, help="runs of a sweep at once (default: all)")


def read_cluster(options: argparse.Namespace) -> Cluster:
    """The `add_cluster_options` as given.

    Raises:
        UserError: an option that has to be said in another way, or a time that is too short to do anything in.
    """
    slurm_args = dict(read_slurm_arg(word) for word in options.slurm_arg or [])
    delay = str(slurm_args.get("signal_delay_s", SIGNAL_DELAY_S))
    if not delay.isdecimal() or int(delay) >= 60 * options.timeout:
        raise UserError(
            f"--timeout {options.timeout}: a job is told to save {delay} s before its time is up; "
            "give it more minutes, or --slurm-arg signal_delay_s=SECONDS"
        )
    if os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2") != "USR2":
        raise UserError("SUBMITIT_PREEMPT_SIGNAL is set: unset it; a job is told by SIGUSR2 to save and come back")
    ngpus = 8 if options.ngpus is None else options.ngpus
    return Cluster(options.nodes, ngpus, options.timeout, options.partition, slurm_args, options.max_parallel)


def read_slurm_arg(word: str) -> tuple[str, str | bool]:
    """``KEY=VALUE``, or ``KEY`` for an option of sbatch without a value; the key with underscores."""
    key, equals, value = word.lstrip("-").partition("=")
    key = key.replace("-", "_")
    if key in NOT_FOR_SLURM_ARG:
        raise UserError(f"--slurm-arg {word}: say it with {NOT_FOR_SLURM_ARG[key]}")
    if key in NOT_OF_SBATCH:
        raise UserError(f"--slurm-arg {word}: no option of sbatch")
    if not key or (equals and not value):
        raise UserError(f"--slurm-arg {word!r}: expected KEY=VALUE, or KEY for an option of sbatch without a value")
    return key, value if equals else True


def cluster_of(words: list[str]) -> Cluster:
    """The cluster that these `add_cluster_options` describe (``--launch "submitit ..."`` of a table script)."""
    parser = Parser(prog="submitit", add_help=False, allow_abbrev=False)
    add_cluster_options(parser)
    return read_cluster(parser.parse_args(expand_arguments(words)))


def add_launcher_options(parser: argparse.ArgumentParser) -> None:
    """What is done, and what is asked of Slurm."""
    example = "run_with_submitit.py --job-dir DIR --model vit_small_sar --data-path /data --sweep seed=0,1,2"
    add = parser.add_argument_group("launcher", f"for example: {example}").add_argument
    add("--job-dir", metavar="DIR", help="where everything is written; all nodes must see it (required)")
    add(
        "--sweep",
        action="append",
        metavar="NAME=V,V,...",
        help="one run for each value of this option of main.py; given again, for each combination",
    )
    add("--status", action="store_true", help="tell how far the runs in --job-dir are, and end")
    add("--dry-run", action="store_true", help="tell what would be started, and end")
    add("--local", action="store_true", help="run here, one after the other, on --ngpus or all GPUs of this machine")
    add_cluster_options(parser)


def read_command_line(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's options, and the words for main.py; argument files may hold both, and come first.

    Raises:
        UserError: an option that neither has.
    """
    parser = Parser(
        prog="run_with_submitit.py",
        description="Run main.py on a SLURM cluster; what is stopped there goes on by itself.",
        usage="run_with_submitit.py --job-dir DIR [options] [@recipe.args ...] [main.py's options]",
        epilog="Everything else is main.py's, @recipe.args files included (python main.py --help).",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add_launcher_options(parser)
    for at, word in enumerate(argv[1:]):
        if argv[at] == "--sweep" and word.startswith("--"):
            raise UserError(f"--sweep {word}: leave the hyphens out, --sweep {word[2:]}")
    words = expand_arguments(sorted(argv, key=lambda word: not word.startswith("@")))
    options, of_main = parser.parse_known_args(words)
    everything = build_parser(task_of(words))
    add_launcher_options(everything)
    everything.parse_args(words)  # to know every option that a mistyped one is near to
    if not options.job_dir:
        raise UserError("--job-dir DIR is missing: where everything is written; all nodes must see it")
    return options, of_main


# --------------------------------------------------------------------------------------------------- the runs


def build_points(options: argparse.Namespace, words: list[str], given: list[str]) -> list[Point]:
    """The run that ``words`` describe, or the combinations of the sweep's values, the first option's slowest.

    Args:
        given: what stands on the command line itself; a sweep goes over other options (an argument file's, say).
    Raises:
        UserError: options that cannot be used, with the point that they are of; a sweep that is none.
    """
    job_dir = Path(options.job_dir).expanduser().absolute()
    axes = [read_axis(text) for text in options.sweep or []]
    swept = [axis[0].partition("=")[0] for axis in axes]
    if "%" in options.job_dir:
        raise UserError(f"--job-dir {options.job_dir}: leave % out; a run goes on in the folder where it began")
    if "--output-dir" in [word.partition("=")[0] for word in words] + swept:
        raise UserError("leave --output-dir out; --job-dir says where everything is written")
    for option in swept:
        if swept.count(option) > 1 or option in [word.partition("=")[0] for word in given]:
            raise UserError(f"--sweep goes over {option}, which is given a second time; leave one of the two out")
    points = [build_point(job_dir, words, chosen) for chosen in itertools.product(*axes)]
    for folder, number in Counter(point.folder for point in points).items():
        if number > 1:
            raise UserError(f"--sweep: {number} runs would be called {folder.name}; give each value once")
    return points


def read_axis(text: str) -> list[str]:
    """``NAME=V,V,...`` as main.py's words, one a value."""
    name, _, values = text.partition("=")
    if not name or not all(values.split(",")):
        raise UserError(f"--sweep {text}: expected NAME=VALUE,VALUE,..., for example sar_weight=0,0.01")
    return expand_arguments([f"--{name.lstrip('-')}={value}" for value in values.split(",")])


def build_point(job_dir: Path, words: list[str], chosen: tuple[str, ...]) -> Point:
    """The run of one combination of swept words; it is named after them, with nothing that a file system minds."""
    name = ",".join(
        f"{option.removeprefix('--').replace('-', '_')}={value.replace('/', '_')}"
        for option, _, value in (word.partition("=") for word in chosen)
    )
    if len(name) > 200:
        raise UserError(f"--sweep: {name[:40]}... is too long for the name of a folder; sweep shorter values")
    words = [*words, *chosen, "--output-dir", str(job_dir / name)]
    try:
        args = parse_arguments(words)
    except UserError as error:
        raise UserError(f"{name}: {error}" if name else str(error)) from None
    if args.eval:
        raise UserError(
            "--eval takes minutes and needs no job that goes on; give it to main.py (srun starts that, too)"
        )
    return Point(name or job_dir.name, words, args)


def check(points: list[Point], processes: int) -> None:
    """Refuse before anything is started what would stop a later run.

    Raises:
        UserError: processes that cannot make up a total batch, or a folder of another run.
    """
    for point in points:
        epochs_done(point)
        accumulation(point.args, processes)
    warn_of_data_elsewhere(points)


def run_here(points: list[Point], processes: int) -> int:
    """One run after the other in the foreground; returns 0, or the first exit code that is not.

    A run that failed by itself leaves the others theirs. Whatever else ended one would meet the next, too.
    """
    refuse_queued(points)
    codes = [0]
    for point in points:
        with locked(point.lock, f"training {point}"):
            codes.append(finish(point, local_command(point, processes)))
        if codes[-1] > 1:
            return codes[-1]
    return max(codes)


def local_command(point: Point, processes: int) -> list[str]:
    """The command line of a run without Slurm."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *(torchrun if processes > 1 else []), str(ROOT / "main.py"), *point.words]


def run(argv: list[str]) -> int:
    """Do what the command line says; returns the exit code."""
    options, words = read_command_line(argv)
    job_dir = Path(options.job_dir).expanduser().absolute()
    if options.status:
        print(status(job_dir))
        return 0
    if options.local and options.nodes > 1:
        raise UserError("--local runs on this machine alone; leave --nodes out")
    cluster = read_cluster(options)
    points = build_points(options, words, expand_arguments([word for word in argv if not word.startswith("@")]))
    processes = cluster.processes
    if options.local:
        processes = max(1, torch.cuda.device_count() if options.ngpus is None else options.ngpus)
    check(points, processes)
    if options.local and options.dry_run:
        print("\n".join(shlex.join(local_command(point, processes)) for point in points))
    elif options.local:
        return run_here(points, processes)
    elif options.dry_run:
        print_submission(cluster, points, job_dir / "submitit")
    else:
        submit_all(cluster, points, job_dir / "submitit")
        print(f"how far they are: python run_with_submitit.py --job-dir {shlex.quote(options.job_dir)} --status")
    return 0


def main(argv: list[str] | None = None) -> int:
    """0: done or submitted. 1: a run failed here. 2: it cannot be done so. Above 128: 128 + the signal to stop."""
    return exit_code(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
