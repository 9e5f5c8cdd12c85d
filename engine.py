"""The loop of one training epoch and of one evaluation, for every task, on a CPU, one GPU or many."""

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

from batches import device_batches
from losses import SpatialEntropyLoss, TotalVariationLoss, localisation_loss
from owner import Owner
from randomness import seed_step
from samplers import TrainSampler
from schedules import Position
from tasks import Evaluator, Task
from utils import Processes, RunError, StopSignal, progress

SAR_TERMS = {
    "spatial-entropy": ("spatial_entropy", SpatialEntropyLoss()),
    "total-variation": ("total_variation", TotalVariationLoss()),
}


class NonFiniteLoss(RunError):
    """A loss is infinite or not a number; no weights from after it are saved."""


@dataclass(frozen=True)
class Plan:
    """The constants of a run: values of the command line, and what follows from them, the data and the processes."""

    output_dir: Path
    seed: int
    total_batch: int
    accumulation: int
    updates_per_epoch: int
    epochs: int
    """Number of epochs, cool-down included."""
    num_images: int
    classes: list[str]
    """Class names of the training images; empty for images without classes."""
    amp_dtype: torch.dtype | None
    amp_reason: str
    sar_loss: str
    """A key of `SAR_TERMS`: the loss of the similarity maps."""
    print_every: int
    eval_every: int
    save_every: int
    log_attention: int


@dataclass
class Run:
    """A training run: its parts and its position, ``step`` updates into ``epoch``."""

    arguments: dict[str, Any]
    """The arguments of the command line, for checkpoints and args.json; nothing is computed from them."""
    plan: Plan
    processes: Processes
    task: Task
    """The model, other trained modules and the averaged weights."""
    network: nn.Module
    """The task as the training step calls it: wrapped in DistributedDataParallel and compiled where needed."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loader: DataLoader
    sampler: TrainSampler
    """The loader's sampler: the order of the images."""
    stop: StopSignal
    epoch: int = 0
    step: int = 0
    best: dict = field(default_factory=dict)
    totals: dict = field(default_factory=dict)
    """Sums over the updates of this epoch, for its line in log.txt."""
    owner: Owner | None = None
    """Of the output folder; only on rank 0."""

    @property
    def position(self) -> Position:
        """The position in the run, for the schedules."""
        return Position(self.epoch, self.step, self.plan.updates_per_epoch, self.plan.epochs)

    def add_totals(self, **values: float) -> None:
        """Add to the sums of this epoch."""
        for name, value in values.items():
            self.totals[name] = self.totals.get(name, 0) + value


class Window:
    """The updates since the last logging step: their loss terms, kept on the device, and their times."""

    def __init__(self, run: Run):
        self.run, self.first_update = run, run.step
        self.rows: list[Tensor] = []
        self.names: tuple[str, ...] = ()
        self.data_time, self.unreadable = 0.0, torch.zeros((), device=run.processes.device)
        self.start = time.perf_counter()

    def add(self, terms: dict[str, Tensor]) -> None:
        """Keep the loss terms of one micro-batch, without a synchronisation with the device."""
        self.names = tuple(terms)
        self.rows.append(torch.stack([term.detach().float() for term in terms.values()]))

    def close(self) -> dict[str, float]:
        """Check the loss terms of all ranks and add them to the epoch's totals; returns means over the window.

        This is the only place where training waits for the device.

        Raises:
            NonFiniteLoss: on all ranks, with the first such update, its rank and its terms.
        """
        if not self.rows:
            return {}
        # 1. all ranks' terms on the host; the first that is not finite is an error
        run = self.run
        values = run.processes.gather(torch.stack(self.rows)).double()  # (ranks, micro-batches, terms)
        bad = (~values.isfinite()).any(dim=2).T.nonzero()  # the earliest micro-batch first
        if len(bad):
            micro, rank = bad[0].tolist()
            update = self.first_update + micro // run.plan.accumulation
            terms = zip(self.names, values[rank, micro].tolist(), strict=True)
            raise NonFiniteLoss(
                f"the loss is not finite at epoch {run.epoch}, update {update}, rank {rank}: "
                + ", ".join(f"{name} {value:g}" for name, value in terms)
                + "; no weights from after it are saved. Try --clip-grad or a lower --lr"
            )
        # 2. sums of the epoch
        seconds = time.perf_counter() - self.start
        updates = run.step - self.first_update
        counts = run.processes.gather(torch.stack([self.unreadable, torch.full_like(self.unreadable, self.data_time)]))
        unreadable, data_time = int(counts[:, 0].sum()), counts[:, 1].max().item()  # all wait for the slowest loader
        rows = (values.mean(dim=0) / run.plan.accumulation).tolist()
        for row in rows:  # singly: the sum must not depend on where windows end
            run.add_totals(**dict(zip(self.names, row, strict=True)))
        run.add_totals(seconds=seconds, data_time=data_time, updates=updates, unreadable=unreadable)
        # 3. means of the window
        means = dict(zip(self.names, values.mean(dim=(0, 1)).tolist(), strict=True))
        return means | {
            "images_per_second": run.plan.total_batch * updates / seconds,
            "data_share": min(100 * data_time / seconds, 100.0),  # another rank's wait may be longer than this window
            "step_time": seconds / updates,
        }


def train_one_epoch(
    run: Run, report: Callable[[dict], None] = lambda means: None, updated: Callable[[], None] = lambda: None
) -> bool:
    """Train from ``run.step`` to the end of ``run.epoch`` on the loss L_main + lambda L_se of Section 4.1.

    Args:
        run: changed in place: weights, ``step`` and ``totals``.
        report: called at every logging step with the means since the last one.
        updated: called after every update.

    Returns:
        False if a signal ended the epoch between two updates; the run can then be saved.

    Raises:
        NonFiniteLoss: at a logging step; see `Window.close`.
    """
    task, plan, device = run.task, run.plan, run.processes.device
    run.network.train()
    run.sampler.set_epoch(run.epoch, first_update=run.step)
    batches = device_batches(progress(run.loader, f"epoch {run.epoch}"), device)
    window, running = Window(run), True
    while running and run.step < plan.updates_per_epoch:
        # 1. set the learning rate and all other scheduled values
        schedule = set_schedule(run)
        task.begin_update(schedule)
        for micro in range(plan.accumulation):
            # 2. load a micro-batch, and seed the random numbers of its forward pass
            waiting = time.perf_counter()
            batch = next(batches)
            window.data_time += time.perf_counter() - waiting
            window.unreadable += batch["replaced"].sum() if "replaced" in batch else 0
            seed_step(plan.seed, run.processes.rank, run.position.update * plan.accumulation + micro)
            batch = task.prepare(batch)
            # 3. forward and backward; processes average gradients in the last micro-batch
            with _synchronised(run.network, micro == plan.accumulation - 1):
                with _autocast(device, plan.amp_dtype):
                    outputs = run.network(batch)
                    terms = task.losses(outputs, batch) | regularisers(outputs, plan.sar_loss)
                loss = cast(Tensor, sum(weight_of(name, schedule) * term for name, term in terms.items()))
                run.scaler.scale(loss / plan.accumulation).backward()
            with torch.no_grad():
                window.add({"loss": loss} | terms | task.measures(outputs, terms))
        # 4. update the weights
        update_weights(run, schedule)
        run.add_totals(**schedule)
        run.step += 1
        updated()
        # 5. look for a signal; log
        running = not run.stop.poll()
        if run.step % plan.print_every == 0 or run.step == plan.updates_per_epoch or not running:
            report(window.close() | schedule)
            window = Window(run)
    return running


def set_schedule(run: Run) -> dict[str, float]:
    """Set the optimiser's learning rate and weight decay for this position; returns all scheduled values."""
    schedule = run.task.schedule(run.position)
    for group in run.optimizer.param_groups:
        group["lr"] = schedule["lr"] * group.get("lr_scale", 1.0)
        if "weight_decay" in schedule and group.get("decays", group["weight_decay"] > 0):
            group["weight_decay"] = schedule["weight_decay"]
    return schedule


def regularisers(outputs: dict[str, Any], sar_loss: str) -> dict[str, Tensor]:
    """The regularisers' terms of the loss by name, unweighted, for every task whose outputs hold their inputs.

    Each is a mean over images, as the task's own terms are. So the mean of the gradients over micro-batches and
    processes of equal size is the gradient of the total batch.

    Args:
        outputs: ``similarity (B, H, h, w)``, Eq. 4, or a list of such maps, one for each resolution; for DRLoc
            ``distances`` and ``positions``, see `losses.Localiser`.
        sar_loss: a key of `SAR_TERMS`.
    """
    terms = {}
    if "similarity" in outputs:  # Eq. 9; or total variation in its place, Eq. 14
        name, regulariser = SAR_TERMS[sar_loss]
        maps = outputs["similarity"]
        parts = maps if isinstance(maps, list) else [maps]
        images = sum(map(len, parts))
        terms[name] = cast(Tensor, sum(len(part) / images * regulariser(part) for part in parts))
    if "distances" in outputs:  # Table 4
        terms["drloc"] = localisation_loss(outputs["distances"], outputs["positions"])
    return terms


def weight_of(term: str, schedule: dict[str, float]) -> float:
    """The weight of a loss term: lambda for the similarity maps, else the scheduled weight, or 1 without one."""
    if term in {name for name, _ in SAR_TERMS.values()}:
        return schedule["sar_weight"]
    return schedule.get(f"{term}_weight", 1.0)


def update_weights(run: Run, schedule: dict[str, float]) -> None:
    """Update the weights, and what follows them such as their average, from the accumulated gradients."""
    run.scaler.unscale_(run.optimizer)
    run.task.finish_gradients(schedule)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.task.end_update(schedule)


def _autocast(device: torch.device, dtype: torch.dtype | None):
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def _synchronised(network: nn.Module, last: bool):
    """Average gradients over processes only in the last micro-batch of an update."""
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
    """Evaluate a model on a whole data set, each image once.

    Args:
        evaluator: measures the model.
        model: without DistributedDataParallel, as processes may have different numbers of batches.
        loader: this rank's share of the images, from `samplers.EvalSampler`.
        interrupted: called before each batch, equally often on all ranks; ends the evaluation if it is true on all.

    Returns:
        The evaluator's results; None if interrupted.
    """
    model.eval()
    longest = math.ceil(math.ceil(len(cast(Sized, loader.dataset)) / processes.world_size) / loader.batch_size)
    padding = [None] * (longest - len(loader))  # ranks differ by one batch at most
    for batch in itertools.chain(device_batches(progress(loader, "evaluation"), processes.device), padding):
        if interrupted():
            return None
        if batch is None:
            continue
        with _autocast(processes.device, amp_dtype):
            evaluator.update(model, batch)
    return evaluator.compute(processes)
