"""Train or evaluate a model on a task (``--task``; classification by default).

    python main.py --model vit_small_sar                                      # self-check on embedded digits
    python main.py --model vit_small_sar --data-path /data/imagenet           # one process, CPU or GPU
    torchrun --nproc_per_node=8 main.py --model vit_small_sar --data-path /data/imagenet

Where a run begins (``checkpoints.start_or_resume``), the first that applies:
1. ``checkpoint.pth`` in ``--output-dir``: the same run goes on, exactly where it was;
2. ``--resume FILE``: another folder's run goes on in this one;
3. ``--finetune FILE``: a new run from these weights;
4. from scratch.
"""

import sys

from arguments import parse_arguments
from cli import Exit
from utils import end_processes, start_logging, start_processes


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; returns the exit code.

    0: done, or ended by SIGTERM or SIGUSR1 with everything saved. 1: the run failed. 2: the command cannot
    be carried out as it stands. 75: ended by SIGUSR2 with everything saved, to be started again. 130: ended by
    Ctrl-C (training has saved everything).
    """
    with Exit() as end:
        args = parse_arguments(argv)
        from training import evaluate_only, train  # torch and its friends take seconds: only for a good command line

        end.processes = processes = start_processes(args.device)
        start_logging(processes.rank)
        end.code = evaluate_only(argv, args, processes) if args.eval else train(args, processes)
    end_processes()
    return end.code


if __name__ == "__main__":
    sys.exit(main())
