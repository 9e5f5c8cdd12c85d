"""One training epoch, one evaluation pass: the same loop for a CPU, one GPU and many."""

import contextlib
import itertools
import math
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

from drloc import PAIRS, Trainee
from losses import SpatialEntropyLoss, TotalVariationLoss, localisation_loss, spatial_entropy
from randomness import seed_sequence, seed_step
from schedules import drloc_weight_schedule, sar_weight_schedule
from utils import Processes, RunError, StopSignal, progress

SAR_TERMS = {
    "spatial-entropy": ("spatial_entropy", SpatialEntropyLoss()),
    "total-variation": ("total_variation", TotalVariationLoss()),
}


class NonFiniteLoss(RunError):
    """A loss was infinite or not a number; nothing computed after it is ever saved."""


@dataclass(frozen=True)
class Plan:
    """What follows from the arguments, the data and the processes; the arguments themselves stay as given."""

    total_batch: int
    accumulation: int
    updates_per_epoch: int
    epochs: int
    """Including the cool-down."""
    lr: float
    """The peak learning rate, scaled by the total batch."""
    num_images: int
    classes: list[str]
    amp_dtype: torch.dtype | None
    amp_reason: str


@dataclass
class Run:
    """A training run: its parts, and where it stands (``epoch``, and ``step`` updates into it)."""

    args: Namespace
    plan: Plan
    processes: Processes
    trainee: Trainee
    """The model and what trains beside it: what is optimised and averaged."""
    network: nn.Module
    """The same as a step calls it: compiled, wrapped for many processes."""
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: object
    scaler: torch.amp.GradScaler
    criterion: nn.Module
    mixup: Mixup | None
    loader: DataLoader
    stop: StopSignal
    epoch: int = 0
    step: int = 0
    best: dict = field(default_factory=dict)
    totals: dict = field(default_factory=dict)
    """Sums over the steps of this epoch, for its line in the log."""

    @property
    def model(self) -> nn.Module:
        """The bare model: what is saved and evaluated."""
        return self.trainee.model

    def set_schedules(self) -> dict[str, float]:
        """Set this step's learning rate; returns it and the regularisers' weights.

        All are pure functions of (epoch, step).
        """
        args, epochs = self.args, self.plan.epochs
        self.scheduler.step(self.epoch)
        self.scheduler.step_update(self.epoch * self.plan.updates_per_epoch + self.step)
        epoch = self.epoch + self.step / self.plan.updates_per_epoch
        schedule = {
            "lr": self.optimizer.param_groups[0]["lr"],
            "sar_weight": sar_weight_schedule(args.sar_schedule, args.sar_weight, epoch, epochs),
        }
        if args.drloc_weight > 0:
            schedule["drloc_weight"] = drloc_weight_schedule(args.drloc_weight, epoch, epochs)
        return schedule

    def add_totals(self, **values: float) -> None:
        """Add to the sums of this epoch."""
        for name, value in values.items():
            self.totals[name] = self.totals.get(name, 0) + value


class Window:
    """The steps since the last logging step: their loss terms, still on the device, and their times."""

    def __init__(self, run: Run):
        self.run, self.begin, self.rows, self.names = run, run.step, [], ()
        self.data_time, self.unreadable = 0.0, 0
        self.start = time.perf_counter()

    def add(self, terms: dict[str, torch.Tensor]) -> None:
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
    """Train from ``run.step`` to the end of ``run.epoch``; the loss is Sec. 4.1's L_ce + lambda L_se.

    Total variation (Eq. 14) may stand in for L_se, and DRLoc join them, each with its own weight.

    Args:
        run: advanced in place: weights, ``step`` and ``totals``.
        report: called at every logging step with the means since the last one.
    Returns:
        False where a signal ended it between two steps, after which the run can be saved.
    Raises:
        NonFiniteLoss: see ``Window.close``; at a logging step or the last step.
    """
    args, plan, device = run.args, run.plan, run.processes.device
    sar_term, _ = SAR_TERMS[args.sar_loss]
    run.network.train()
    run.loader.sampler.set_epoch(run.epoch, first_update=run.step)
    batches, window, going = iter(progress(run.loader, f"epoch {run.epoch}")), Window(run), True
    while going and run.step < plan.updates_per_epoch:
        schedule = run.set_schedules()
        weights = {"cross_entropy": 1.0, sar_term: schedule["sar_weight"], "drloc": schedule.get("drloc_weight")}
        for micro, draws in enumerate(_pair_draws(run)):
            waiting = time.perf_counter()
            images, targets, replaced = next(batches)
            window.data_time += time.perf_counter() - waiting
            window.unreadable += int(replaced.sum())
            images = images.to(device, non_blocking=True)
            targets = targets.to(device, non_blocking=True)
            seed_step(args.seed, run.processes.rank, _micro_step(run, micro))
            if run.mixup is not None:
                images, targets = run.mixup(images, targets)
            with _synchronised(run.network, micro == plan.accumulation - 1):
                with _autocast(device, plan.amp_dtype):
                    outputs = run.network(images, similarity=args.sar_weight > 0, draws=draws)
                    terms = loss_terms(run, outputs, targets)
                loss = sum(weights[name] * term for name, term in terms.items())
                run.scaler.scale(loss / plan.accumulation).backward()
            window.add({"loss": loss} | terms)
        update_weights(run)
        run.add_totals(**schedule)
        run.step += 1
        going = not run.stop.poll()
        if run.step % args.print_every == 0 or run.step == plan.updates_per_epoch or not going:
            report(window.close() | schedule)
            window = Window(run)
    return going


def loss_terms(run: Run, outputs: dict[str, torch.Tensor], targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """The terms of the loss, by name and not yet weighted: scalars, each a mean over the images.

    Also the spatial entropy: an image's maps count alike wherever it is computed. So the mean of equally large
    micro-batches' gradients, over accumulation and processes, is the gradient of the whole total batch.
    """
    terms = {"cross_entropy": run.criterion(outputs["logits"], targets)}
    if "similarity" in outputs:
        name, regulariser = SAR_TERMS[run.args.sar_loss]
        terms[name] = regulariser(outputs["similarity"])
    if "distances" in outputs:
        terms["drloc"] = localisation_loss(outputs["distances"], outputs["positions"])
    return terms


def _pair_draws(run: Run) -> list[torch.Tensor | None]:
    """Which pairs of patches DRLoc compares, for each micro-step's ``Trainee``; Nones where it is off.

    They go with an image's place in the total batch, so they do not depend on how that is split into processes
    and micro-steps.
    """
    if run.args.drloc_weight == 0:
        return [None] * run.plan.accumulation
    update = run.epoch * run.plan.updates_per_epoch + run.step
    generator = np.random.default_rng(seed_sequence("drloc", run.args.seed, update))
    parts = (run.plan.accumulation, run.args.batch_size, run.processes.world_size)
    draws = torch.from_numpy(generator.random((*parts, PAIRS, 2, 2), dtype=np.float32))[:, :, run.processes.rank]
    if run.processes.device.type == "cuda":
        draws = draws.pin_memory()  # a copy from other memory would wait
    return list(draws.to(run.processes.device, non_blocking=True))


def update_weights(run: Run) -> None:
    """One step of the optimiser (and of the averaged weights) from the gradients that have gathered."""
    if run.args.clip_grad is not None:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.trainee.parameters(), run.args.clip_grad)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    if run.ema is not None:
        run.ema.update(run.trainee)


def _micro_step(run: Run, micro: int) -> int:
    update = run.epoch * run.plan.updates_per_epoch + run.step
    return update * run.plan.accumulation + micro


def _autocast(device: torch.device, dtype: torch.dtype | None):
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def _synchronised(network: nn.Module, last: bool):
    """Exchange gradients between processes only on the last micro-step of an update."""
    return contextlib.nullcontext() if last or not hasattr(network, "no_sync") else network.no_sync()


METRICS = ("images", "loss", "acc1", "acc5", "spatial_entropy", "components")


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    processes: Processes,
    amp_dtype: torch.dtype | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Accuracy, cross-entropy and the state of the similarity maps over a whole set, each image once.

    Args:
        model: the bare model, so that processes may hold different numbers of batches.
        loader: this rank's share, from ``EvalSampler``; batches of (images, targets, replaced). An image
            that could not be read is left out and counted.
        interrupted: asked before each batch, equally often on all ranks; a true answer on all ends the pass.
    Returns:
        ``acc1`` and ``acc5`` (percent), ``loss``, ``spatial_entropy`` (nats, Eq. 7) and ``components`` (a
        map) as means over the images (and heads), ``images`` and ``unreadable`` as counts; None if
        interrupted.
    """
    model.eval()
    device = processes.device
    sums = [torch.zeros(len(METRICS) + 1, device=device)]
    longest = math.ceil(math.ceil(len(loader.dataset) / processes.world_size) / loader.batch_size)
    nothing_left = [None] * (longest - len(loader))  # ranks differ by one batch at most
    for batch in itertools.chain(progress(loader, "evaluation"), nothing_left):
        if interrupted():
            return None
        if batch is None:
            continue
        images, targets, replaced = batch
        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        replaced = replaced.to(device, non_blocking=True)
        with _autocast(device, amp_dtype):
            logits, similarity = model(images, return_similarity=True)
        sums.append(_batch_sums(logits.float(), targets, similarity, replaced))
    totals = processes.gather(torch.stack(sums).double().sum(dim=0)).sum(dim=0).tolist()
    count = max(totals[0], 1.0)
    means = {name: total / count for name, total in zip(METRICS[1:], totals[1:-1], strict=True)}
    for name in ("acc1", "acc5"):
        means[name] *= 100
    return means | {"images": int(totals[0]), "unreadable": int(totals[-1])}


def _batch_sums(logits, targets, similarity, replaced) -> torch.Tensor:
    """Sums over the readable images of a batch, in the order of METRICS, then the number of others."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
    entropy, components = spatial_entropy(similarity)
    columns = torch.stack(
        [
            torch.ones_like(targets, dtype=torch.float32),
            nn.functional.cross_entropy(logits, targets, reduction="none"),
            ranked[:, 0].float(),
            ranked.any(dim=1).float(),
            entropy.float().mean(dim=1),
            components.float().mean(dim=1),
        ]
    )
    readable = replaced == 0
    return torch.cat([columns.where(readable, 0).sum(dim=1), (~readable).sum()[None]])
