"""Golden losses: the loss terms and weights of small runs are those of before (tests/helpers/golden_losses.py)."""

import json

import pytest
from helpers import golden_losses
from helpers.golden_losses import CONFIGURATIONS, FOLDER, PROCESSES, ROOT, TOLERANCE


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_loss_terms_and_weights_are_those_of_before(name):
    expected = json.loads((FOLDER / f"{name}.json").read_text())
    start = golden_losses.start_in(ROOT) if name in PROCESSES else golden_losses.start_here
    assert golden_losses.differences(expected, golden_losses.measure(name, start)) == []


def test_a_file_is_of_the_run_that_is_done_today():
    for name, words in CONFIGURATIONS.items():
        expected = json.loads((FOLDER / f"{name}.json").read_text())
        assert expected["command"].split() == ["main.py", *(golden_losses.COMMON + words).split()]
        assert len(expected["steps"]) == 20


def test_one_bit_is_seen_on_the_same_versions_and_rounding_is_not_on_others():
    one = json.loads((FOLDER / "sar_vit.json").read_text())
    other = json.loads((FOLDER / "sar_vit.json").read_text())
    other["steps"][7]["cross_entropy"] *= 1 + 2**-23
    assert golden_losses.differences(one, other)[0].startswith("update 7: cross_entropy ")
    other["environment"]["torch"] = "another"
    assert golden_losses.differences(one, other) == []
    other["steps"][7]["cross_entropy"] *= 1 + 2 * TOLERANCE
    assert len(golden_losses.differences(one, other)) == 1
    other["log"][3]["test_ema_loss"] *= 1 + 2 * TOLERANCE
    assert golden_losses.differences(one, other)[-1].startswith("epoch 3: test_ema_loss ")


def test_a_constant_that_tensorboard_does_not_show_is_no_difference():
    one, other = (json.loads((FOLDER / "sar_vit.json").read_text()) for _ in range(2))
    for step in other["steps"]:
        del step["sar_weight"]
    assert golden_losses.differences(one, other) == []
    for step in other["steps"]:
        del step["lr"]
    assert golden_losses.differences(one, other)[0].startswith("update 0: lr None instead of ")
