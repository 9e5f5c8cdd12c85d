"""Every schedule of a run, as a pure function of the position."""

import math

SAR_SCHEDULES = ("constant", "warmup-cosine")


SAR_WARMUP_EPOCHS = 10


DRLOC_WARMUP_EPOCHS = 20


def sar_weight_schedule(name: str, weight: float, epoch: float, epochs: int) -> float:
    """The weight lambda of the spatial-entropy loss at ``epoch``, which may be fractional.

    ``constant``: ``weight`` throughout (the paper). ``warmup-cosine``: the released code's; linear from 0
    at epoch 0 to ``weight`` at epoch 9, ``weight`` until epoch 10, then half a cosine to 0 at ``epochs``. A
    run of ten epochs or fewer consists of the start of the warm-up alone: the ramp is not squeezed.

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
    """The weight of ``localisation_loss`` at ``epoch``, as in DRLoc's own code.

    Linear from 0 to ``weight`` over 20 epochs, then linearly down to 0 at ``epochs``; ``epoch`` may be
    fractional. A run of 20 epochs or fewer consists of the start of the rise alone.
    """
    if epoch < DRLOC_WARMUP_EPOCHS or epochs <= DRLOC_WARMUP_EPOCHS:
        return weight * min(epoch / DRLOC_WARMUP_EPOCHS, 1.0)
    return weight * max(0.0, (epochs - epoch) / (epochs - DRLOC_WARMUP_EPOCHS))
