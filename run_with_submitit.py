r"""Submit main.py to a SLURM cluster: main.py's command line plus options for Slurm.

    python run_with_submitit.py --job-dir DIR --partition gpu --model vit_small_sar --data-path /data/imagenet
    python run_with_submitit.py --job-dir DIR --partition gpu --slurm-arg account=lab --slurm-arg constraint=v100 \
        @recipes/swin_in100_100.args --data-path /data/imagenet \
        --sweep sar_weight=0,0.001,0.005,0.01,0.05,0.1 --sweep seed=0,1,2 --max-parallel 4
    python run_with_submitit.py --job-dir DIR --status          # state and results; as a file: --status csv > runs.csv
    python run_with_submitit.py --job-dir DIR --local --model vit_small_sar        # run here, without Slurm

A job that reaches its time limit or is preempted saves a checkpoint, is requeued and resumes. Every command may be
repeated: finished and queued runs are skipped, all others are submitted and resume from their checkpoints.

    DIR/checkpoint.pth ...          main.py's output folder, and job.json: job id, log, arguments, commit
    DIR/sar_weight=0.01,seed=0/     the same for each run of a sweep
    DIR/submitit/                   logs and submitit's files
"""

import argparse
import itertools
import os
import shlex
import sys
from collections import Counter
from pathlib import Path

from arguments import accumulation, build_parser, parse_arguments, task_of, undetermined
from cli import Parser, at_least, exit_code, expand_arguments
from launch.runs import ROOT, RunSpec, complete_run, epochs_done, hold_lock, warn_missing_data
from launch.slurm import SIGNAL_DELAY_S, Cluster, print_submission, submit_all
from launch.status import check_not_queued, format_status
from utils import UserError, gpu_count

# Options of sbatch that have an option here or that the launcher sets itself -> what to use instead.
RESERVED_SBATCH_OPTIONS = {
    "nodes": "--nodes",
    "time": "--timeout",
    "partition": "--partition",
    "gpus": "--ngpus",
    "gpus_per_node": "--ngpus",
    "ntasks": "--ngpus, one task per GPU",
    "ntasks_per_node": "--ngpus, one task per GPU",
    "array": "--sweep",
    "array_parallelism": "--max-parallel",
    "output": "--job-dir",
    "error": "--job-dir",
    "cpus_per_gpu": "--slurm-arg cpus_per_task=N",
    "chdir": "cd before this command",
    "signal": "--slurm-arg signal_delay_s=SECONDS",
}

# Parameters of submitit that are not options of sbatch.
SUBMITIT_ONLY = ("additional_parameters", "num_gpus", "setup", "srun_args", "stderr_to_stdout", "teardown", "use_srun")


# ---------------------------------------------------------------------------------------------- command line


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the resources of each run."""
    add = parser.add_argument_group("resources requested from Slurm for each run").add_argument
    add("--nodes", type=at_least(int, 1), default=1, help="number of nodes")
    add(
        "--ngpus",
        type=at_least(int, 0),
        default=None,
        help="GPUs per node, with one task and 10 CPUs per GPU (default: 8)",
    )
    add(
        "--timeout",
        type=at_least(int, 1),
        default=2800,
        metavar="MIN",
        help="time limit in minutes; an unfinished run is then requeued",
    )
    add("--partition", default=None, metavar="NAME", help="partition (default: the cluster's default partition)")
    add(
        "--slurm-arg",
        action="append",
        metavar="KEY=VALUE",
        help="any other sbatch option: account=lab, qos=..., mem=480G, exclusive, gres=gpu:v100:8 (replaces the GPU "
        "request of --ngpus); may be repeated",
    )
    add(
        "--max-parallel",
        type=at_least(int, 1),
        default=None,
        help="number of runs of a sweep that may run at once (default: all)",
    )


def build_cluster(options: argparse.Namespace) -> Cluster:
    """The resources that the `add_cluster_options` request.

    Raises:
        UserError: a reserved sbatch option, or a time limit shorter than the time for saving.
    """
    slurm_args = dict(parse_slurm_arg(word) for word in options.slurm_arg or [])
    delay = str(slurm_args.get("signal_delay_s", SIGNAL_DELAY_S))
    if not delay.isdecimal() or int(delay) >= 60 * options.timeout:
        raise UserError(
            f"--timeout {options.timeout}: Slurm signals a job {delay} s before its time limit; "
            "increase --timeout, or reduce --slurm-arg signal_delay_s=SECONDS"
        )
    if os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2") != "USR2":
        raise UserError(
            "SUBMITIT_PREEMPT_SIGNAL is set: unset it; the launcher needs SIGUSR2 to save and requeue a job"
        )
    ngpus = 8 if options.ngpus is None else options.ngpus
    return Cluster(options.nodes, ngpus, options.timeout, options.partition, slurm_args, options.max_parallel)


def parse_slurm_arg(word: str) -> tuple[str, str | bool]:
    """``KEY=VALUE``, or ``KEY`` for an sbatch option without a value, as (key with underscores, value or True).

    Raises:
        UserError: a reserved key, or another syntax.
    """
    key, equals, value = word.lstrip("-").partition("=")
    key = key.replace("-", "_")
    if key in RESERVED_SBATCH_OPTIONS:
        raise UserError(f"--slurm-arg {word}: use {RESERVED_SBATCH_OPTIONS[key]}")
    if key in SUBMITIT_ONLY:
        raise UserError(f"--slurm-arg {word}: not an option of sbatch")
    if not key or (equals and not value):
        raise UserError(f"--slurm-arg {word!r}: expected KEY=VALUE, or KEY for an sbatch option without a value")
    return key, value if equals else True


def parse_cluster(words: list[str]) -> Cluster:
    """The resources that a list of `add_cluster_options` requests (``--launch "submitit ..."`` of a table script)."""
    parser = Parser(prog="submitit", add_help=False)
    add_cluster_options(parser)
    return build_cluster(parser.parse_args(expand_arguments(words)))


def add_launcher_options(parser: argparse.ArgumentParser) -> None:
    """Add the launcher's own options, including the `add_cluster_options`."""
    example = "run_with_submitit.py --job-dir DIR --model vit_small_sar --data-path /data --sweep seed=0,1,2"
    add = parser.add_argument_group("launcher", f"for example: {example}").add_argument
    add("--job-dir", metavar="DIR", help="output folder, on a file system that all nodes share (required)")
    add(
        "--sweep",
        action="append",
        metavar="NAME=V,V,...",
        help="start one run for each value of this option of main.py; if repeated, for each combination of values",
    )
    add(
        "--status",
        nargs="?",
        const="table",
        choices=("table", "csv"),
        help="print state and results of the runs in --job-dir, as a table or as CSV, and exit",
    )
    add("--dry-run", action="store_true", help="print what would be started and exit")
    add("--local", action="store_true", help="run on this machine, one after another, on --ngpus or all GPUs")
    add_cluster_options(parser)


def parse_command_line(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's options, and the words for main.py. Argument files may hold both; they are read first.

    Raises:
        UserError: an option that neither the launcher nor main.py has.
    """
    # 1. a parser of the launcher's options alone
    parser = Parser(
        prog="run_with_submitit.py",
        description=__doc__,
        usage="run_with_submitit.py --job-dir DIR [options] [@recipe.args ...] [main.py's options]",
        epilog="All other options and @recipe.args files are passed to main.py (see python main.py --help).",
    )
    add_launcher_options(parser)
    for at, word in enumerate(argv[1:]):
        if argv[at] == "--sweep" and word.startswith("--"):
            raise UserError(f"--sweep {word}: leave the hyphens out, --sweep {word[2:]}")
    # 2. split the command line into the launcher's options and main.py's words
    words = expand_arguments(sorted(argv, key=lambda word: not word.startswith("@")))
    options, main_words = parser.parse_known_args(words)
    # 3. parse all of it with both programs' options, so that a misspelt option is compared with all of them
    full_parser = build_parser(task_of(words))
    add_launcher_options(full_parser)
    full_parser.parse_args(words)
    if not options.job_dir:
        raise UserError("--job-dir DIR is missing: give the output folder, on a file system that all nodes share")
    return options, main_words


# --------------------------------------------------------------------------------------------------- the runs


def build_specs(
    options: argparse.Namespace, words: list[str], given: list[str], processes: int | None = None
) -> list[RunSpec]:
    """The run that ``words`` describe, or one run per combination of the sweep's values (the last option fastest).

    Args:
        options: the launcher's.
        words: main.py's command line without the swept options.
        given: words typed on the command line itself. A sweep must not repeat them; it may override argument files.
        processes: of a run, for what main.py derives from them.

    Raises:
        UserError: a malformed sweep; options that main.py refuses, with the name of the run.
    """
    # 1. parse the sweeps and refuse options given twice
    job_dir = Path(options.job_dir).expanduser().absolute()
    axes = [parse_sweep(text) for text in options.sweep or []]
    swept = [axis[0].partition("=")[0] for axis in axes]
    if "%" in options.job_dir:
        raise UserError(f"--job-dir {options.job_dir}: leave % out; a run resumes in the folder where it started")
    if "--output-dir" in [word.partition("=")[0] for word in words] + swept:
        raise UserError("leave --output-dir out; --job-dir sets the output folders")
    for option in swept:
        if swept.count(option) > 1 or option in [word.partition("=")[0] for word in given]:
            raise UserError(f"--sweep over {option}, which is given a second time; remove one of the two")
    # 2. one run per combination; runs must not share a folder
    specs = [build_spec(job_dir, words, combination, processes) for combination in itertools.product(*axes)]
    for folder, number in Counter(spec.folder for spec in specs).items():
        if number > 1:
            raise UserError(f"--sweep: {number} runs would share the folder {folder.name}; give each value once")
    return specs


def parse_sweep(text: str) -> list[str]:
    """``NAME=V,V,...`` as words for main.py, one per value."""
    name, _, values = text.partition("=")
    if not name or not all(values.split(",")):
        raise UserError(f"--sweep {text}: expected NAME=VALUE,VALUE,..., for example sar_weight=0,0.01")
    return expand_arguments([f"--{name.lstrip('-')}={value}" for value in values.split(",")])


def build_spec(job_dir: Path, words: list[str], combination: tuple[str, ...], processes: int | None = None) -> RunSpec:
    """The run of one combination of swept words, which also name it and its folder ("/" becomes "_")."""
    name = ",".join(
        f"{option.removeprefix('--').replace('-', '_')}={value.replace('/', '_')}"
        for option, _, value in (word.partition("=") for word in combination)
    )
    if len(name) > 200:
        raise UserError(f"--sweep: {name[:40]}... is too long for the name of a folder; sweep over shorter values")
    words = [*words, *combination, "--output-dir", str(job_dir / name)]
    try:
        args = parse_arguments(words, processes=processes)
    except UserError as error:
        raise UserError(f"{name}: {error}" if name else str(error)) from None
    if args.eval:
        raise UserError("--eval takes minutes and needs no requeueing; give it to main.py, if need be under srun")
    return RunSpec(name or job_dir.name, words, args)


def check_runs(specs: list[RunSpec], processes: int) -> None:
    """Detect before any run starts what would stop one of them.

    Raises:
        UserError: a total batch that the processes cannot form, a folder that holds another run, or defaults that
            follow from images which are not on this machine.
    """
    for spec in specs:
        if missing := undetermined(spec.args, spec.words):
            raise UserError(
                f"--data-path {spec.args.data_path}: not here, and its images decide on defaults: submit where it is, "
                f"or give {', '.join(missing)}"
            )
        epochs_done(spec)
        accumulation(spec.args, processes)
    warn_missing_data(specs)


def run_locally(specs: list[RunSpec], processes: int) -> int:
    """Run one after another in the foreground; returns 0, or the first nonzero exit code.

    A run that fails (exit code 1) does not stop the following runs. A signal or bad usage does.
    """
    check_not_queued(specs)
    codes = [0]
    for spec in specs:
        with hold_lock(spec.folder, f"training {spec}"):
            codes.append(complete_run(spec, local_command(spec, processes)))
        if codes[-1] > 1:
            return codes[-1]
    return max(codes)


def local_command(spec: RunSpec, processes: int) -> list[str]:
    """The command line of a run without Slurm; torchrun starts several processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *(torchrun if processes > 1 else []), str(ROOT / "main.py"), *spec.words]


def run(argv: list[str]) -> int:
    """Execute the command line; returns the exit code."""
    # 1. parse; --status needs no more than the folder
    options, words = parse_command_line(argv)
    job_dir = Path(options.job_dir).expanduser().absolute()
    if options.status:
        print(format_status(job_dir, as_csv=options.status == "csv"))
        return 0
    if options.local and options.nodes > 1:
        raise UserError("--local runs on this machine alone; leave --nodes out")
    # 2. build and check all runs
    cluster = build_cluster(options)
    processes = cluster.processes
    if options.local:
        processes = max(1, gpu_count() if options.ngpus is None else options.ngpus)
    given = expand_arguments([word for word in argv if not word.startswith("@")])
    specs = build_specs(options, words, given, processes)
    check_runs(specs, processes)
    # 3. print, run or submit them
    if options.local and options.dry_run:
        print("\n".join(shlex.join(local_command(spec, processes)) for spec in specs))
    elif options.local:
        return run_locally(specs, processes)
    elif options.dry_run:
        print_submission(cluster, specs, job_dir / "submitit")
    else:
        submit_all(cluster, specs, job_dir / "submitit")
        print(f"state of the runs: python run_with_submitit.py --job-dir {shlex.quote(options.job_dir)} --status")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: done or submitted. 1: a local run failed. 2: bad usage. Above 128: 128 + the stop signal."""
    return exit_code(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
