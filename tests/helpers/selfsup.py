"""What the tests of self-supervised tasks share: initial values, and runs fed with given batches."""

import math

import pytest


class Batches(list):
    """Given batches in place of a loader and its sampler."""

    def set_epoch(self, epoch, first_update):
        pass


def compare_fresh(found, expected):
    """Initial values by name, of which ``expected`` has statistics.

    Zeros and ones exactly, deviations and bounds to 3 %, or to three times the scatter of a small sample.
    """
    for name, values in expected.items():
        weight = found[name].detach()
        assert list(weight.shape) == values["shape"]
        if values["std"] == 0:
            assert (weight == values["mean"]).all(), name
            continue
        tolerance = max(0.03, 3 / math.sqrt(weight.numel()))  # both are samples, whose deviations scatter by 1/sqrt(2n)
        assert weight.std().item() == pytest.approx(values["std"], rel=tolerance), name
        if values["max"] < 2 * values["std"]:  # uniform
            assert weight.abs().max().item() == pytest.approx(values["max"], rel=0.03), name
