"""Every schedule of a run, as a pure function of the position."""

import math
from dataclasses import dataclass

LR_SCHEDULES = ("cosine", "constant")
SAR_SCHEDULES = ("constant", "warmup-cosine")
SAR_WARMUP_EPOCHS = 10
DRLOC_WARMUP_EPOCHS = 20


@dataclass(frozen=True)
class Position:
    """The position of a run: before update ``step`` of ``epoch``, both counted from 0.

    Attributes:
        updates_per_epoch: number of updates in every epoch.
        epochs: number of epochs of the run.
    """

    epoch: int
    step: int
    updates_per_epoch: int
    epochs: int

    @property
    def update(self) -> int:
        """Number of updates since the start of the run."""
        return self.epoch * self.updates_per_epoch + self.step

    @property
    def exact_epoch(self) -> float:
        """Number of epochs since the start of the run, with the fraction of the current one."""
        return self.epoch + self.step / self.updates_per_epoch


@dataclass(frozen=True)
class LearningRate:
    """The learning rate: linear warm-up, then half a cosine to ``minimum``, or constant; timm's formulas.

    Attributes:
        peak: learning rate at the end of the warm-up.
        shape: one of `LR_SCHEDULES`.
        epochs: length of the schedule, warm-up included; after it the learning rate stays at ``minimum``.
        warmup_epochs: length of the warm-up.
        warmup_start: learning rate at the start of the warm-up.
        minimum: learning rate at the end of the cosine.
        on_updates: change at every update, not only at every epoch.
    """

    peak: float
    shape: str
    epochs: int
    warmup_epochs: int
    warmup_start: float
    minimum: float
    on_updates: bool

    def at(self, position: Position) -> float:
        """The learning rate of the update at ``position``."""
        unit = position.updates_per_epoch if self.on_updates else 1
        t = position.update if self.on_updates else position.epoch
        warmup, end = self.warmup_epochs * unit, self.epochs * unit
        if t < warmup:
            return self.warmup_start + t * ((self.peak - self.warmup_start) / warmup)
        if self.shape == "constant":
            return self.peak
        if t >= end:
            return self.minimum
        return self.minimum + 0.5 * (self.peak - self.minimum) * (1 + math.cos(math.pi * t / end))


def sar_weight_schedule(name: str, weight: float, epoch: float, epochs: int) -> float:
    """The weight lambda of the loss of the similarity maps at ``epoch``, which may be fractional.

    ``constant`` is the paper's: always ``weight``. ``warmup-cosine`` is the released code's: linear from 0 at epoch 0
    to ``weight`` at epoch 9, constant until epoch 10, then half a cosine to 0 at ``epochs``. The warm-up is not
    shortened: a run of ten epochs or fewer ends within it.

    Raises:
        ValueError: ``name`` is not one of ``SAR_SCHEDULES``.
    """
    if name == "constant":
        return weight
    if name == "warmup-cosine":
        if epoch < SAR_WARMUP_EPOCHS or epochs <= SAR_WARMUP_EPOCHS:
            return weight * min(epoch / (SAR_WARMUP_EPOCHS - 1), 1.0)
        progress = min((epoch - SAR_WARMUP_EPOCHS) / (epochs - SAR_WARMUP_EPOCHS), 1.0)
        return weight * 0.5 * (1.0 + math.cos(math.pi * progress))
    raise ValueError(f"unknown schedule {name!r} of the SAR weight; known: {', '.join(SAR_SCHEDULES)}")


def drloc_weight_schedule(weight: float, epoch: float, epochs: int) -> float:
    """The weight of ``localisation_loss`` at ``epoch``, which may be fractional, as in DRLoc's own code.

    It rises linearly from 0 to ``weight`` over 20 epochs, then falls linearly to 0 at ``epochs``. A run of 20 epochs or
    fewer ends within the rise.
    """
    if epoch < DRLOC_WARMUP_EPOCHS or epochs <= DRLOC_WARMUP_EPOCHS:
        return weight * min(epoch / DRLOC_WARMUP_EPOCHS, 1.0)
    return weight * max(0.0, (epochs - epoch) / (epochs - DRLOC_WARMUP_EPOCHS))


def warmup_cosine(
    position: Position, peak: float, final: float, warmup_epochs: int = 0, warmup_start: float = 0.0
) -> float:
    """DINO's schedule of learning rate, weight decay and teacher momentum (``utils.cosine_scheduler``), by update.

    W updates of linear warm-up reach ``peak`` in the last one, W - 1, and update W has it again. Half a cosine then
    falls, or rises, towards ``final``, which would be the value of the update after the last.
    """
    t, warmup = position.update, warmup_epochs * position.updates_per_epoch
    if t < warmup:
        return warmup_start + (peak - warmup_start) * t / max(warmup - 1, 1)
    progress = (t - warmup) / (position.epochs * position.updates_per_epoch - warmup)
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * progress))


def cosine_after_warmup(
    position: Position, start: float, final: float, warmup_epochs: int = 0, warmup_start: float = 0.0
) -> float:
    """MoCo-v3's schedule of learning rate and momentum (``main_moco.py``), by the fractional epoch p.

    A linear warm-up goes from ``warmup_start`` to ``start``, which is reached at p = ``warmup_epochs``. Half a cosine
    over the rest of the run leads to ``final``, which would be the value of the update after the last.
    """
    p = position.exact_epoch
    if p < warmup_epochs:
        return warmup_start + (start - warmup_start) * p / warmup_epochs
    progress = (p - warmup_epochs) / (position.epochs - warmup_epochs)
    return final + 0.5 * (start - final) * (1 + math.cos(math.pi * progress))


def teacher_temperature(epoch: int, start: float, final: float, warmup_epochs: int) -> float:
    """DINO's temperature of the teacher: linear from ``start`` in epoch 0 to ``final`` in the last warm-up epoch."""
    if epoch >= warmup_epochs:
        return final
    return start + (final - start) * epoch / max(warmup_epochs - 1, 1)


def steps_factor(position: Position, warmup_updates: int) -> float:
    """ViTDet's factor of the learning rate (detectron2, ``mask_rcnn_vitdet_b_100ep``), by update.

    It rises linearly from .001 to 1 over the warm-up; it is .1 from 8/9 of all updates, and .01 from 26/27.
    """
    update, total = position.update, position.epochs * position.updates_per_epoch
    decayed = 0.1 ** sum(update >= round(total * share) for share in (8 / 9, 26 / 27))
    return _warmed_up(decayed, update, warmup_updates)


def poly_factor(position: Position, warmup_updates: int) -> float:
    """mmsegmentation's factor of the learning rate (mmcv's ``poly``), by update: (1 - share of the run) ** .9.

    The warm-up is that of `steps_factor`.
    """
    update, total = position.update, position.epochs * position.updates_per_epoch
    return _warmed_up((1 - update / total) ** 0.9, update, warmup_updates)


def _warmed_up(factor: float, update: int, warmup_updates: int, start: float = 0.001) -> float:
    """``factor``, in the first updates below a line from ``start`` to 1."""
    return factor if update >= warmup_updates else factor * (start + (1 - start) * update / warmup_updates)
