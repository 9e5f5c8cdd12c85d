"""Train or evaluate a model on a task (``--task``; classification by default).

    python main.py --model vit_small_sar                                      # self-check on embedded digits
    python main.py --model vit_small_sar --data-path /data/imagenet           # one process, CPU or GPU
    torchrun --nproc_per_node=8 main.py --model vit_small_sar --data-path /data/imagenet

Where a run begins (``checkpoints.start_or_resume``), the first that applies:
1. ``checkpoint.pth`` in ``--output-dir``: the same run continues exactly where it stopped;
2. ``--resume FILE``: the run of another folder continues in this one;
3. ``--finetune FILE``: a new run starts from these weights;
4. a new run starts from random weights.
"""

from arguments import parse_arguments
from cli import Exit, leave
from utils import end_processes, start_logging, start_processes


def main(argv: list[str] | None = None) -> int:
    """Train or evaluate as the command line says; returns the exit code.

    0: finished, or saved and ended by SIGTERM or SIGUSR1. 1: the run failed. 2: the command cannot be carried out.
    75: saved and ended by SIGUSR2, to be started again. 130: ended by Ctrl-C; training has saved.
    """
    with Exit() as end:
        args = parse_arguments(argv)
        from training import evaluate_only, train  # imports torch, which takes seconds

        end.processes = processes = start_processes(args.device)
        start_logging(processes.rank)
        end.code = evaluate_only(argv, args, processes) if args.eval else train(args, processes)
    end_processes()
    return end.code


if __name__ == "__main__":
    leave(main)
