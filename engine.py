"""One training epoch, one evaluation pass: the same loop for every task, on a CPU, one GPU or many."""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from losses import SpatialEntropyLoss, TotalVariationLoss, localisation_loss
from randomness import seed_step
from samplers import TrainSampler
from schedules import Position
from tasks import Evaluator, Task
from utils import Processes, RunError, StopSignal, progress, to_device

SAR_TERMS = {
    "spatial-entropy": ("spatial_entropy", SpatialEntropyLoss()),
    "total-variation": ("total_variation", TotalVariationLoss()),
}


class NonFiniteLoss(RunError):
    """A loss was infinite or not a number; nothing computed after it is ever saved."""


@dataclass(frozen=True)
class Plan:
    """What a run goes by: values of the command line, and what follows from them, the data and the processes."""

    output_dir: Path
    seed: int
    total_batch: int
    accumulation: int
    updates_per_epoch: int
    epochs: int
    """Including the cool-down."""
    num_images: int
    classes: list[str]
    """Names of the training images' classes; empty where they have none."""
    amp_dtype: torch.dtype | None
    amp_reason: str
    sar_loss: str
    """A key of `SAR_TERMS`: what is minimised of the similarity maps."""
    print_every: int
    eval_every: int
    save_every: int
    log_attention: int


@dataclass
class Run:
    """A training run: its parts, and where it stands (``epoch``, and ``step`` updates into it)."""

    arguments: dict[str, Any]
    """The command line's, as checkpoints and args.json keep them; nothing is computed from them."""
    plan: Plan
    processes: Processes
    task: Task
    """The model and what trains beside it: what is optimised and averaged."""
    network: nn.Module
    """The same as a step calls it: compiled, wrapped for many processes."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loader: DataLoader
    sampler: TrainSampler
    """The loader's: which images come in which order."""
    stop: StopSignal
    epoch: int = 0
    step: int = 0
    best: dict = field(default_factory=dict)
    totals: dict = field(default_factory=dict)
    """Sums over the steps of this epoch, for its line in the log."""

    @property
    def position(self) -> Position:
        """Where the run stands, for the schedules."""
        return Position(self.epoch, self.step, self.plan.updates_per_epoch, self.plan.epochs)

    def add_totals(self, **values: float) -> None:
        """Add to the sums of this epoch."""
        for name, value in values.items():
            self.totals[name] = self.totals.get(name, 0) + value


class Window:
    """The steps since the last logging step: their loss terms, still on the device, and their times."""

    def __init__(self, run: Run):
        self.run, self.begin = run, run.step
        self.rows: list[Tensor] = []
        self.names: tuple[str, ...] = ()
        self.data_time, self.unreadable = 0.0, 0
        self.start = time.perf_counter()

    def add(self, terms: dict[str, Tensor]) -> None:
        """Remember the terms of one micro-step, without waiting for the device."""
        self.names = tuple(terms)
        self.rows.append(torch.stack([term.detach().float() for term in terms.values()]))

    def close(self) -> dict[str, float]:
        """Wait for the device, check every rank's terms, add them to the epoch's totals; returns their means.

        Raises:
            NonFiniteLoss: on all ranks alike, with the first bad step, its rank and its terms.
        """
        if not self.rows:
            return {}
        run = self.run
        values = run.processes.gather(torch.stack(self.rows)).double()  # ranks, micro-steps, terms
        bad = (~values.isfinite()).any(dim=2).T.nonzero()  # the earliest micro-step first
        if len(bad):
            micro, rank = bad[0].tolist()
            step = self.begin + micro // run.plan.accumulation
            terms = zip(self.names, values[rank, micro].tolist(), strict=True)
            raise NonFiniteLoss(
                f"the loss is not finite at epoch {run.epoch}, step {step}, rank {rank}: "
                + ", ".join(f"{name} {value:g}" for name, value in terms)
                + "; no checkpoint holds weights from after it. --clip-grad or a lower --lr may help"
            )
        seconds = time.perf_counter() - self.start
        updates = run.step - self.begin
        for row in (values.mean(dim=0) / run.plan.accumulation).tolist():  # one by one: where windows end is all one
            run.add_totals(**dict(zip(self.names, row, strict=True)))
        unreadable = run.processes.gather(torch.tensor(self.unreadable, device=run.processes.device)).sum()
        run.add_totals(seconds=seconds, data_time=self.data_time, updates=updates, unreadable=int(unreadable))
        means = dict(zip(self.names, values.mean(dim=(0, 1)).tolist(), strict=True))
        return means | {
            "images_per_second": run.plan.total_batch * updates / seconds,
            "data_time": self.data_time / updates,
            "step_time": seconds / updates,
        }


def train_one_epoch(run: Run, report: Callable[[dict], None] = lambda means: None) -> bool:
    """Train from ``run.step`` to the end of ``run.epoch``: the loss is Sec. 4.1's L_main + lambda L_se.

    Args:
        run: advanced in place: weights, ``step`` and ``totals``.
        report: called at every logging step with the means since the last one.
    Returns:
        False where a signal ended it between two steps, after which the run can be saved.
    Raises:
        NonFiniteLoss: see ``Window.close``; at a logging step or the last step.
    """
    task, plan, device = run.task, run.plan, run.processes.device
    run.network.train()
    run.sampler.set_epoch(run.epoch, first_update=run.step)
    batches, window, going = iter(progress(run.loader, f"epoch {run.epoch}")), Window(run), True
    while going and run.step < plan.updates_per_epoch:
        # 1. everything that is scheduled
        schedule = set_schedule(run)
        task.begin_update(schedule)
        for micro in range(plan.accumulation):
            # 2. a micro-batch, and the random numbers of this step
            waiting = time.perf_counter()
            batch = next(batches)
            window.data_time += time.perf_counter() - waiting
            window.unreadable += int(batch["replaced"].sum()) if "replaced" in batch else 0
            batch = to_device(batch, device)
            seed_step(plan.seed, run.processes.rank, run.position.update * plan.accumulation + micro)
            batch = task.prepare(batch)
            # 3. forward and backward; processes exchange gradients in the last micro-batch
            with _synchronised(run.network, micro == plan.accumulation - 1):
                with _autocast(device, plan.amp_dtype):
                    outputs = run.network(batch)
                    terms = task.losses(outputs, batch) | regularisers(outputs, plan.sar_loss)
                loss = cast(Tensor, sum(weight_of(name, schedule) * term for name, term in terms.items()))
                run.scaler.scale(loss / plan.accumulation).backward()
            window.add({"loss": loss} | terms)
        # 4. the update
        update_weights(run, schedule)
        run.add_totals(**schedule)
        run.step += 1
        # 5. signals and the log
        going = not run.stop.poll()
        if run.step % plan.print_every == 0 or run.step == plan.updates_per_epoch or not going:
            report(window.close() | schedule)
            window = Window(run)
    return going


def set_schedule(run: Run) -> dict[str, float]:
    """Set the optimiser's learning rate and weight decay for the run's position; returns the whole schedule."""
    schedule = run.task.schedule(run.position)
    for group in run.optimizer.param_groups:
        group["lr"] = schedule["lr"] * group.get("lr_scale", 1.0)
        if "weight_decay" in schedule and group.get("decays", group["weight_decay"] > 0):
            group["weight_decay"] = schedule["weight_decay"]
    return schedule


def regularisers(outputs: dict[str, Tensor], sar_loss: str) -> dict[str, Tensor]:
    """What is added to the main task's terms, for every task whose outputs hold maps: by name, not yet weighted.

    Each is a mean over the images, as the task's own terms are, and an image's maps count alike wherever they are
    computed: the mean of equally large micro-batches' gradients, over accumulation and processes, is the gradient of
    the whole total batch.

    Args:
        outputs: ``similarity (B, H, h, w)``, Eq. 4; for DRLoc ``distances`` and ``positions``, see `losses.Localiser`.
        sar_loss: a key of `SAR_TERMS`.
    """
    terms = {}
    if "similarity" in outputs:  # Eq. 9; or total variation in its place, Eq. 14
        name, regulariser = SAR_TERMS[sar_loss]
        terms[name] = regulariser(outputs["similarity"])
    if "distances" in outputs:  # Table 4
        terms["drloc"] = localisation_loss(outputs["distances"], outputs["positions"])
    return terms


def weight_of(term: str, schedule: dict[str, float]) -> float:
    """The scheduled weight of a term of the loss: lambda for that of the similarity maps, 1 for what has none."""
    if term in {name for name, _ in SAR_TERMS.values()}:
        return schedule["sar_weight"]
    return schedule.get(f"{term}_weight", 1.0)


def update_weights(run: Run, schedule: dict[str, float]) -> None:
    """One step of the optimiser, and of what follows the weights, from the gradients that have gathered."""
    run.scaler.unscale_(run.optimizer)
    run.task.finish_gradients(schedule)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.task.end_update(schedule)


def _autocast(device: torch.device, dtype: torch.dtype | None):
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def _synchronised(network: nn.Module, last: bool):
    """Exchange gradients between processes only on the last micro-step of an update."""
    return contextlib.nullcontext() if last or not hasattr(network, "no_sync") else network.no_sync()


@torch.inference_mode()
def evaluate(
    evaluator: Evaluator,
    model: nn.Module,
    loader: DataLoader,
    processes: Processes,
    amp_dtype: torch.dtype | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """What ``evaluator`` measures of a model over a whole set, each image once.

    Args:
        model: the bare model, so that processes may hold different numbers of batches.
        loader: this rank's share, from ``EvalSampler``.
        interrupted: asked before each batch, equally often on all ranks; a true answer on all ends the pass.
    Returns:
        The evaluator's results; None if interrupted.
    """
    model.eval()
    longest = math.ceil(math.ceil(len(cast(Sized, loader.dataset)) / processes.world_size) / loader.batch_size)
    nothing_left = [None] * (longest - len(loader))  # ranks differ by one batch at most
    for batch in itertools.chain(progress(loader, "evaluation"), nothing_left):
        if interrupted():
            return None
        if batch is None:
            continue
        batch = to_device(batch, processes.device)
        with _autocast(processes.device, amp_dtype):
            evaluator.update(model, batch)
    return evaluator.compute(processes)
