"""The report: the paper's numbers, what is made of logs, and what is said of runs that are not the paper's."""

import csv
import dataclasses
import json
from pathlib import Path

import matplotlib
import matplotlib.image
import pytest
from helpers import runs

import main
from arguments import parse_arguments
from datasets import DATASETS
from paper import report
from utils import UserError

SMALL_SETS = ("cars", "clipart", "painting", "sketch")
FINE_SETS = ("cifar10", "cifar100", "flowers", "pets")


def pairs(base: str, *values: float) -> dict[str, float]:
    return dict(zip((base, f"{base}_sar"), values, strict=True))


# The paper's numbers once more, typed from the tables' text.
VALUES = {
    "table1a": {"0": 75.72, "0.001": 75.82, "0.005": 76.16, "0.01": 76.72, "0.05": 76.22, "0.1": 75.88},
    "table1b": {"A": 74.22, "B": 74.64, "C": 75.72, "D": 73.76, "E": 74.78, "F": 76.72},
    "table1c": {
        "vit_small_100": 74.22,
        "vit_small_300": 80.82,
        "vit_small_sar_100": 76.72,
        "vit_small_sar_300": 85.24,
    },
    "table2": {
        **pairs("cars_vit_small", 35.3, 64.65),
        **pairs("clipart_vit_small", 41.0, 64.95),
        **pairs("painting_vit_small", 38.4, 57.11),
        **pairs("sketch_vit_small", 37.2, 62.98),
    },
    "table3": {
        **pairs("0.25_vit_small", 21.66, 29.06),
        **pairs("0.50_vit_small", 29.86, 38.02),
        **pairs("0.75_vit_small", 35.62, 46.12),
        **pairs("1.00_vit_small", 74.22, 76.72),
    },
    "table4": {
        **pairs("vit_small", 79.8, 80.7),
        "vit_small_drloc": 80.2,
        "vit_small_sar_drloc": None,
        **pairs("vit_tiny", 72.2, 72.4),
    },
    "table5": pairs("vit_small", 77.1, 79.2),
    "table6": pairs("vit_small", 66.17, 68.68),
    "ade20k": {**pairs("pvt_small", 39.8, 41.1), "pvt_small_released": 41.9},
    "table7": {
        **dict(zip([f"no-no_{name}" for name in FINE_SETS], [98.59, 88.95, 95.07, 92.21], strict=True)),
        **dict(zip([f"yes-no_{name}" for name in FINE_SETS], [98.69, 89.19, 96.05, 92.7], strict=True)),
        **dict(zip([f"no-yes_{name}" for name in FINE_SETS], [98.72, 88.95, 95.1, 92.34], strict=True)),
        **dict(zip([f"yes-yes_{name}" for name in FINE_SETS], [98.65, 89.21, 96.1, 92.7], strict=True)),
    },
    "table8": {**pairs("in_a_vit_small", 19.2, 22.39), **pairs("in_c_vit_small", 52.8, 51.6)},
    "table9": {
        **pairs("vit_small", 74.22, 76.72),
        **pairs("t2t_vit_14", 82.42, 83.96),
        **pairs("pvt_small", 76.57, 77.78),
        **pairs("cvt_13", 83.38, 85.20),
    },
    "table10": {
        **pairs("vit_small", 79.8, 80.7),
        **pairs("t2t_vit_14", 81.5, 81.9),
        **pairs("pvt_small", 79.8, 79.84),
        **pairs("cvt_13", 81.6, 81.8),
    },
    "table11": {
        **pairs("vit_small", 19.18, 31.19),
        "vit_small_void_excluded": None,
        "vit_small_sar_void_excluded": None,
    },
    "table12": {
        **pairs("accuracy_moco_v3", 77.60, 78.88),
        **pairs("accuracy_dino", 77.42, 79.90),
        **pairs("jaccard_moco_v3", 27.40, 33.10),
        **pairs("jaccard_dino", 35.06, 35.28),
    },
    "fig3": pairs("vit_small", 79.8, 80.7),
    "appendix_b": {"dot": 76.72, "cosine": 76.25, "total_variation": None, "softmax": None},
}


def test_the_papers_numbers():
    here = {name: {row: entry["value"] for row, entry in table["rows"].items()} for name, table in report.PAPER.items()}
    assert here == VALUES


def test_each_table_says_where_it_is_from_and_what_it_measures():
    for name, table in report.PAPER.items():
        assert table["source"].startswith("first version, " if name == "ade20k" else "later version, "), name
        others = {"fig3": "Fig. 3", "appendix_b": "appendix B", "ade20k": "Table 12"}
        where = name.removeprefix("table") if name.startswith("table") else others[name]
        assert where in table["source"].replace("(", "").replace(")", "")
        assert table["title"]
        assert table["metric"].endswith("(%)")
    tiny = report.PAPER["table4"]["rows"]["vit_tiny_sar"]
    assert tiny["source"].startswith("first version")


def test_each_row_is_compared_with_the_plain_one():
    for name, table in report.PAPER.items():
        for row, entry in table["rows"].items():
            plain = row.replace("_sar", "").replace("_drloc", "")
            if row == "pvt_small_released":
                continue
            by_table = {"table1a": "0", "table1b": "A", "appendix_b": "dot", "table7": f"no-no_{row.split('_')[-1]}"}
            expected = by_table.get(name, plain)
            assert entry.get("baseline") == (None if row == expected else expected), (name, row)


def test_quoted_rows_are_those_that_the_authors_did_not_run():
    quoted = {(name, row) for name, table in report.PAPER.items() for row, e in table["rows"].items() if "quoted" in e}
    plain = {("table10", row) for row in ("vit_small", "t2t_vit_14", "pvt_small", "cvt_13")}
    small = {("table2", f"{name}_vit_small") for name in SMALL_SETS}
    plain |= {("ade20k", "pvt_small")}
    assert quoted == small | plain | {("table4", "vit_small"), ("table4", "vit_tiny"), ("fig3", "vit_small")}
    assert all(report.PAPER["table2"]["rows"][row]["quoted"] == "El-Nouby et al. (2021)" for _, row in small)


def test_the_papers_slips_are_told_and_not_followed():
    slips = {}
    for table in report.PAPER.values():
        for row, entry in table["rows"].items():
            if "printed_difference" in entry:
                difference = entry["value"] - table["rows"][entry["baseline"]]["value"]
                slips[row] = (entry["printed_difference"], round(difference, 2))
    assert slips == {
        "painting_vit_small_sar": (18.17, 18.71),
        "sketch_vit_small_sar": (30.78, 25.78),
        "jaccard_moco_v3_sar": (6.17, 5.70),
        "pvt_small_sar": (0.3, 1.3),
    }


# ------------------------------------------------------------------------------------- synthetic folders

PROTOCOL = vars(parse_arguments("--model vit_small_sar --data-set folder --data-path x --epochs 3".split()))


def write_row(
    table: Path, row: str, *seeds: list[float | None], done: dict | None = None, metric: str | None = None, **changes
) -> None:
    """A row whose ``seeds`` reached these values, an epoch each (None: not evaluated).

    ``changes`` are the runs' arguments that differ from the protocol, ``done`` what the last records say otherwise,
    ``metric`` the one that they name; None: they name none.
    """
    (table / row).mkdir(parents=True)
    (table / row / "protocol.json").write_text(json.dumps(PROTOCOL))
    for seed, accuracies in enumerate(seeds):
        run = table.parent / "runs" / f"{row}-{table.name}" / f"seed{seed}"
        run.mkdir(parents=True)
        (run / "args.json").write_text(json.dumps(PROTOCOL | {"seed": seed, "output_dir": str(run)} | changes))
        lines = []
        for epoch, accuracy in enumerate(accuracies):
            record = {"epoch": epoch, "reported": "model", "train_loss": 1.0} | ({"metric": metric} if metric else {})
            if accuracy is not None:
                name = metric or "acc1"
                record |= {f"test_{name}": accuracy, f"test_ema_{name}": accuracy - 10}
                record |= {"test_images": 360, "test_ema_images": 360, "train_images": 1437}
            lines.append(json.dumps(record | (done or {})) + "\n")
        (run / "log.txt").write_text("".join(lines))
        (table / row / f"seed{seed}").symlink_to(Path("../..") / run.relative_to(table.parent))


def summary(table: Path) -> dict[str, dict]:
    """The rows of the CSV that a report writes."""
    report.write_report(table)
    with open(table / "report.csv", newline="") as file:
        return {row["row"]: row for row in csv.DictReader(file)}


def test_means_deviations_and_differences(tmp_path, capsys):
    table = tmp_path / "table1b"
    write_row(table, "A", [10.0, 50.0, 40.0], [12.0, 46.0, 44.0])
    write_row(table, "F", [20.0, 60.0, 70.0])
    assert report.main([str(table)]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed == (table / "report.md").read_text().strip()
    lines = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in printed.split("\n")
        if "|" in line
    }
    assert lines["A: ViT-S/16"] == ["74.22", "42.00 ± 2.83 (n = 2)", "48.00 ± 2.83 (n = 2)", "", "", "3/3", ""]
    assert lines["F: A + SAR"] == ["76.72", "70.00 (n = 1)", "70.00 (n = 1)", "+2.50", "+28.00", "3/3", ""]
    assert lines["D: C without the MLP skip"] == ["73.76", "–", "–", "-0.46", "", "", "not run"]
    assert "later version, Table 1(b); top-1 accuracy (%)" in printed
    assert "single runs" in printed
    row = summary(table)["A"]
    assert (row["last_mean"], float(row["last_deviation"]), row["seeds"]) == ("42.0", pytest.approx(8**0.5), "2")
    assert (row["paper_difference"], row["difference"], row["not_comparable"]) == ("", "", "")
    assert list(summary(table)) == list("ABCDEF")


def test_epochs_without_evaluation_are_passed_over(tmp_path):
    write_row(tmp_path / "table1b", "A", [None, 50.0, None])
    row = summary(tmp_path / "table1b")["A"]
    assert (row["last_mean"], row["best_mean"], row["epochs_done"]) == ("50.0", "50.0", "3")


def test_the_reported_weights_count(tmp_path):
    write_row(tmp_path / "table1b", "A", [30.0, 50.0, 40.0], done={"reported": "ema"})
    row = summary(tmp_path / "table1b")["A"]
    assert (row["last_mean"], row["best_mean"]) == ("30.0", "40.0")


def test_another_metric_is_named_and_is_not_the_papers(tmp_path):
    """Logs name the metric of their task; older ones name none, and have acc1."""
    table = tmp_path / "table1b"
    write_row(table, "A", [30.0])
    write_row(table, "E", [60.0, 80.0, 70.0], metric="acc1")
    assert "| ours, last epoch | ours, best epoch |" in report.write_report(table)
    write_row(table, "F", [0.5, 0.75, 0.25], metric="macro_f1")
    assert "| ours, last epoch (macro_f1) | ours, best epoch (macro_f1) |" in report.write_report(table)
    rows = summary(table)
    assert (rows["F"]["last_mean"], rows["F"]["best_mean"], rows["F"]["ours_metric"]) == ("0.25", "0.75", "macro_f1")
    assert rows["F"]["not_comparable"] == "metric macro_f1, not acc1"
    assert (rows["E"]["last_mean"], rows["E"]["ours_metric"], rows["E"]["not_comparable"]) == ("70.0", "", "")
    assert report.draw(*report.read_table(table)).axes[0].get_ylabel() == "macro_f1"


def test_quoted_rows_and_slips_are_marked(tmp_path):
    write_row(tmp_path / "table2", "painting_vit_small", [1.0] * 3)
    text = report.write_report(tmp_path / "table2")
    assert "| ViT-S/16, Painting | 38.4 [1] |" in text
    assert "[1] Quoted by the paper from El-Nouby et al. (2021)" in text
    slip = next(line for line in text.splitlines() if "SAR, Painting" in line)
    assert "| 57.11 |" in slip
    assert "| +18.71 |" in slip
    assert "the paper prints +18.17" in slip


def test_no_difference_has_no_minus(tmp_path):
    write_row(tmp_path / "table1b", "A", [50.004] * 3)
    write_row(tmp_path / "table1b", "F", [50.0] * 3)
    assert "| +2.50 | +0.00 |" in report.write_report(tmp_path / "table1b")


# ---------------------------------------------------------------------------------- what is not comparable


def test_a_run_of_the_protocol_is_comparable_whatever_it_ran_on(tmp_path):
    write_row(tmp_path / "table1b", "A", [1.0] * 3, batch_size=64, device="cpu", eval_every=3, finetune="a.pth")
    assert summary(tmp_path / "table1b")["A"]["not_comparable"] == ""


def test_an_option_younger_than_the_run_was_at_its_default(tmp_path):
    write_row(tmp_path / "table1b", "A", [1.0] * 3)
    path = tmp_path / "table1b/A/seed0/args.json"
    path.write_text(json.dumps({name: value for name, value in PROTOCOL.items() if name != "drloc_weight"}))
    assert summary(tmp_path / "table1b")["A"]["not_comparable"] == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"epochs": 2, "cooldown_epochs": 1}, "epochs 2, not 3; cooldown epochs 1, not 0"),
        ({"data_set": "digits"}, "data set digits, not folder"),
        ({"model_kwargs": {"depth": 2, "embed_dim": 24}}, "model kwargs depth=2 embed_dim=24, not none"),
        ({"model_ema": False}, "model ema off, not on"),
        ({"scale": [0.5, 1.0]}, "scale 0.5 1.0, not 0.08 1.0"),
        ({"epochs": 5}, "epochs 5, not 3; unfinished, 3 of 5 epochs"),
        ({"cooldown_epochs": 2}, "cooldown epochs 2, not 0; unfinished, 3 of 5 epochs"),
    ],
)
def test_departures_from_the_protocol_in_words(tmp_path, changes, reason):
    write_row(tmp_path / "table1b", "A", [1.0] * 3, **changes)
    assert summary(tmp_path / "table1b")["A"]["not_comparable"] == reason
    text = (tmp_path / "table1b/report.md").read_text()
    assert "| **not comparable** [1] |" in text
    assert f"\n- [1] Not comparable with the paper: {reason}.\n" in text


def test_many_departures_are_shortened_and_the_data_comes_first(tmp_path):
    changes = {
        "drop": 0.5,
        "drop_path": 0.5,
        "mixup": 0.0,
        "cutmix": 0.0,
        "data_set": "digits",
        "lr": 1.0,
        "aa": "none",
    }
    write_row(tmp_path / "table1b", "A", [1.0] * 3, **changes)
    reasons = summary(tmp_path / "table1b")["A"]["not_comparable"].split("; ")
    assert reasons[0] == "data set digits, not folder"
    assert reasons[-1] == "2 more arguments"
    assert len(reasons) == report.MAX_REASONS + 1


def test_rows_share_their_footnotes(tmp_path):
    table = tmp_path / "table2"
    write_row(table, "cars_vit_small", [1.0] * 3, lr=1.0)
    write_row(table, "cars_vit_small_sar", [1.0] * 3, lr=1.0)
    write_row(table, "sketch_vit_small_sar", [1.0] * 3, lr=2.0)
    lines = {line.split(" | ")[0]: line for line in report.write_report(table).splitlines()}
    assert lines["| ViT-S/16, Stanford Cars"].startswith("| ViT-S/16, Stanford Cars | 35.3 [1] | 1.00")
    assert lines["| ViT-S/16, Stanford Cars"].endswith("| **not comparable** [2] |")
    assert lines["| ViT-S/16 + SAR, Stanford Cars"].endswith("| +0.00 | 3/3 | **not comparable** [2] |")
    assert "| **not comparable** [3]; the paper prints +30.78 |" in lines["| ViT-S/16 + SAR, Sketch"]
    assert [line[2:5] for line in lines if line.startswith("- [")] == ["[1]", "[2]", "[3]"]


def test_unfinished_rows(tmp_path):
    write_row(tmp_path / "table1b", "A", [1.0, 2.0], [1.0], [])
    write_row(tmp_path / "table1b", "F", [1.0, 2.0, 3.0])
    rows = summary(tmp_path / "table1b")
    assert rows["A"]["not_comparable"] == "unfinished, 0-2 of 3 epochs"
    assert (rows["A"]["last_mean"], rows["A"]["seeds"]) == ("1.5", "2")
    assert (rows["A"]["epochs_done"], rows["A"]["epochs_planned"]) == ("0-2", "3")
    assert rows["F"]["not_comparable"] == ""
    assert "differently from its baseline" in rows["F"]["remarks"]


def test_a_row_that_has_begun_and_evaluated_nothing(tmp_path):
    write_row(tmp_path / "table1b", "A", [])
    text = report.write_report(tmp_path / "table1b")
    assert "| A: ViT-S/16 | 74.22 | – | – |  |  | 0/3 | **not comparable** [1] |" in text


@pytest.mark.parametrize(
    ("known", "changes", "reason"),
    [
        ({"train": 1437, "val": 360}, {}, ""),
        ({"train": 1437, "val": 5000}, {}, "360 test images, not 5,000"),
        ({"train": 2000, "val": 360}, {}, "1,437 training images, not 2,000"),
        ({"train": 2000, "val": 360}, {"sampling_ratio": 0.5}, "sampling ratio 0.5, not 1.0"),
        ({}, {}, ""),
        (
            {},
            {"data_set": "cifar10"},
            "data set cifar10, not folder; 360 test images, not 10,000; 1,437 training images, not 50,000",
        ),
    ],
)
def test_images_are_counted(tmp_path, monkeypatch, known, changes, reason):
    monkeypatch.setitem(DATASETS, "folder", dataclasses.replace(DATASETS["folder"], images=known))
    write_row(tmp_path / "table1b", "A", [1.0] * 3, **changes)
    assert summary(tmp_path / "table1b")["A"]["not_comparable"] == reason


def test_seeds_that_differ_are_told(tmp_path):
    table = tmp_path / "table1b"
    write_row(table, "A", [1.0] * 3, [1.0] * 3)
    path = table / "A/seed1/args.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lr": 1e-3}))
    row = summary(table)["A"]
    assert row["not_comparable"] == "lr 0.0005 and 0.001, not 0.0005"
    assert row["remarks"] == "its seeds differ in lr"


def test_a_difference_to_another_kind_of_baseline_is_told(tmp_path):
    table = tmp_path / "table1b"
    write_row(table, "A", [1.0] * 3, lr=1.0)
    write_row(table, "E", [2.0] * 3, lr=1.0)
    write_row(table, "F", [2.0] * 3)
    rows = summary(table)
    assert rows["E"]["remarks"] == ""
    assert rows["F"]["remarks"] == "trained differently from its baseline, so the difference is not meaningful"


# ----------------------------------------------------------------------------------- what is measured of runs


def measure_row(table: Path, row: str, *results: dict, trained: bool = True, **changes) -> None:
    """A row whose seeds were measured with these results, of runs that ``changes`` make differ from the protocol."""
    if trained:
        write_row(table / row / "trained", "vit_small", *([90.0] * 3 for _ in results), **changes)
    for seed, result in enumerate(results):
        (table / row / f"seed{seed}").mkdir(parents=True)
        (table / row / f"seed{seed}/results.json").write_text(json.dumps(result))
    (table / row / "protocol.json").write_text(json.dumps({"words": []}))


def test_what_was_measured_counts_and_lower_may_be_better(tmp_path):
    table = tmp_path / "table8"
    measure_row(table, "in_a_vit_small", {"imagenet_a_accuracy": 20.0}, {"imagenet_a_accuracy": 22.0})
    measure_row(table, "in_a_vit_small_sar", {"imagenet_a_accuracy": 25.0})
    measure_row(table, "in_c_vit_small", {"mce": 50.0})
    measure_row(table, "in_c_vit_small_sar", {"mce": 53.5})
    text = report.write_report(table)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert lines[0] == "| row | paper | ours, last epoch | paper − baseline | ours − baseline | epochs | remarks |"
    assert lines[2:] == [
        "| ViT-S/16, IN-A | 19.2 | 21.00 ± 1.41 (n = 2) |  |  | 3/3 |  |",
        "| ViT-S/16 + SAR, IN-A | 22.39 | 25.00 (n = 1) | +3.19 | +4.00 | 3/3 |  |",
        "| ViT-S/16, IN-C | 52.8 | 50.00 (n = 1) |  |  | 3/3 | mCE (%), lower is better |",
        "| ViT-S/16 + SAR, IN-C | 51.6 | 53.50 (n = 1) | -1.20 (better) | +3.50 (worse) | 3/3 "
        "| mCE (%), lower is better |",
    ]
    assert "best epoch" not in text, "the last one's weights were measured"
    rows = summary(table)
    assert [rows[row]["better"] for row in rows] == ["higher", "higher", "lower", "lower"]
    assert {row["best_mean"] for row in rows.values()} == {""}


def test_what_covers_less_is_no_value_of_the_table(tmp_path):
    table = tmp_path / "table8"
    measure_row(table, "in_c_vit_small", {"instead": "mean error 40.00 % over 2 of 15 corruptions"}, {"mce": 51.0})
    row = summary(table)["in_c_vit_small"]
    assert (row["last_mean"], row["seeds"]) == ("51.0", "1")
    assert row["not_comparable"] == "mean error 40.00 % over 2 of 15 corruptions"


def test_both_protocols_are_told_and_each_is_compared_with_its_own(tmp_path):
    table = tmp_path / "table11"
    result = {"protocol": "paper-code", "images": 1449, "input_size": 480, "mass": 0.6}
    measure_row(table, "vit_small", result | {"jaccard": 20.0})
    measure_row(table, "vit_small_sar", result | {"jaccard": 30.0})
    void = result | {"protocol": "void-excluded"}
    measure_row(table, "vit_small_void_excluded", void | {"jaccard": 22.0})
    measure_row(table, "vit_small_sar_void_excluded", void | {"jaccard": 33.0})
    text = report.write_report(table)
    assert "| ViT-S/16 + SAR | 31.19 | 30.00 (n = 1) | +12.01 | +10.00 | 3/3 |  |" in text
    assert "| ViT-S/16 + SAR, void excluded | – | 33.00 (n = 1) |  | +11.00 | 3/3 |  |" in text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"images": 97}, "images 97, not 1,449"),
        ({"protocol": "void-excluded"}, "protocol void-excluded, not paper-code"),
        ({"mass": 0.5, "input_size": 224}, "input size 224, not 480; mass 0.5, not 0.6"),
    ],
)
def test_what_was_measured_otherwise_is_not_comparable(tmp_path, changes, reason):
    result = {"jaccard": 20.0, "protocol": "paper-code", "images": 1449, "input_size": 480, "mass": 0.6}
    measure_row(tmp_path / "table11", "vit_small", result | changes)
    assert summary(tmp_path / "table11")["vit_small"]["not_comparable"] == reason


def test_how_the_measured_weights_were_trained_counts_too(tmp_path):
    table = tmp_path / "table8"
    measure_row(table, "in_a_vit_small", {"imagenet_a_accuracy": 20.0}, lr=1.0)
    measure_row(table, "in_a_vit_small_sar", {"imagenet_a_accuracy": 25.0}, trained=False)
    write_row(table / "in_c_vit_small/trained", "vit_small", [90.0, 91.0])
    (table / "in_c_vit_small/protocol.json").write_text("{}")
    rows = summary(table)
    assert rows["in_a_vit_small"]["not_comparable"] == "lr 1.0, not 0.0005"
    assert rows["in_a_vit_small_sar"]["remarks"].startswith(
        "measured on given weights; trained differently from its base"
    )
    assert rows["in_c_vit_small"]["not_comparable"] == "unfinished, 2 of 3 epochs"
    assert rows["in_c_vit_small"]["remarks"] == "not measured; mCE (%), lower is better"
    assert rows["in_c_vit_small_sar"]["remarks"] == "not run; mCE (%), lower is better"


def test_measured_rows_have_no_curve(tmp_path):
    measure_row(tmp_path / "table8", "in_c_vit_small", {"mce": 50.0})
    figure = report.draw(*report.read_table(tmp_path / "table8"))
    assert [axis.lines[:] for axis in figure.axes] == [[]]


# ------------------------------------------------------------------------------------------------- errors


def no_table(folder):
    return folder / "nothing"


def unknown_table(folder):
    (folder / "table99/A").mkdir(parents=True)
    return folder / "table99"


def empty_table(folder):
    (folder / "table1b/notes").mkdir(parents=True)
    return folder / "table1b"


def unknown_row(folder):
    write_row(folder / "table1b", "A", [1.0])
    write_row(folder / "table1b", "G", [1.0])
    return folder / "table1b"


def broken_result(content: str):
    def make(folder):
        measure_row(folder / "table8", "in_a_vit_small", {})
        (folder / "table8/in_a_vit_small/seed0/results.json").write_text(content)
        return folder / "table8"

    return make


def broken(name: str, content: bytes | None):
    def make(folder):
        write_row(folder / "table1b", "A", [1.0])
        path = folder / "table1b/A" / name
        path.unlink() if content is None else path.write_bytes(content)
        return folder / "table1b"

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_table, "nothing: no such folder"),
        (unknown_table, "table99 is not a table of the paper; known are table1a, table1b"),
        (empty_table, "no row in it has a protocol.json; its rows are A, B"),
        (unknown_row, "no row G in this table; its rows are A, B"),
        (
            broken("seed0/log.txt", b'{"epoch": 0, "reported": "model"}\n{"epoch": 1, "rep'),
            "seed0/log.txt, line 2: not written by",
        ),
        (broken("seed0/log.txt", b"3\n"), "seed0/log.txt, line 1: not written by main.py"),
        (
            broken("seed0/log.txt", b'{"epoch": 0, "reported": "model", "test_acc1": "high", "test_images": 1}'),
            "line 1",
        ),
        (broken("seed0/args.json", None), "seed0/args.json: No such file"),
        (broken("seed0/args.json", b"[]"), "seed0/args.json: not the arguments of main.py"),
        (broken("seed0/args.json", b"{}"), "seed0/args.json: not the arguments of main.py"),
        (broken("seed0/log.txt", b"\xff\n"), "seed0/log.txt: 'utf-8' codec"),
        (broken("protocol.json", b"{"), "A/protocol.json: Expecting"),
        (broken_result("{"), "seed0/results.json: Expecting"),
        (broken_result("3"), "seed0/results.json: not the results of a measurement"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, capsys, make, message):
    assert report.main([str(make(tmp_path))]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_unknown_options_are_one_line_and_help_explains(capsys):
    assert report.main(["OUT/table1b", "--figur"]) == 2
    assert "no option --figur; did you mean --figure?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        report.main(["--help"])
    text = capsys.readouterr().out
    assert "python -m paper report OUT/table1b --figure curves.png" in text
    assert "report.csv" in text


# -------------------------------------------------------------------------------------------------- curves


def test_the_curve_is_over_epochs_that_all_seeds_reached(tmp_path):
    write_row(tmp_path / "fig3", "vit_small", [1.0, None, 3.0], [2.0, 4.0, 6.0], [])
    _, rows = report.read_table(tmp_path / "fig3")
    epochs, values = report.common_curve(rows["vit_small"])
    assert epochs.tolist() == [1, 3]
    assert values.tolist() == [[1.0, 3.0], [2.0, 6.0]]


def test_fig3_is_drawn_with_bands_and_the_papers_stars(tmp_path):
    table = tmp_path / "fig3"
    write_row(table, "vit_small", [1.0, 2.0, 3.0], [2.0, 4.0, 7.0])
    write_row(table, "vit_small_sar", [5.0, 6.0, 8.0], lr=1.0)
    text = report.write_report(table)
    assert "![accuracy against epochs](fig3.png)" in text
    assert matplotlib.image.imread(table / "fig3.png").std() > 0.05
    figure = report.draw(*report.read_table(table))
    assert figure.get_suptitle().endswith("not the paper's protocol")
    (axis,) = figure.axes  # two of three epochs would be the same once more
    lines = {line.get_label(): line.get_ydata().tolist() for line in axis.lines if len(line.get_xdata()) > 1}
    assert lines == {"ViT-S/16 (2 seeds)": [1.5, 3.0, 5.0], "ViT-S/16 + SAR (1 seed)": [5.0, 6.0, 8.0]}
    (band,) = axis.collections  # one row has one seed
    assert {tuple(point) for point in band.get_paths()[0].vertices} == {(1, 1), (1, 2), (2, 2), (2, 4), (3, 3), (3, 7)}
    stars = [line.get_xydata().tolist() for line in axis.lines if line.get_marker() == "*" and len(line.get_xdata())]
    assert stars == [[[3.0, 79.8]]], "none for the row that is not the protocol's"
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("epochs", "top-1 accuracy (%)")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == [*lines, "the paper's last epoch"]


def test_the_second_half_is_drawn_larger(tmp_path):
    write_row(tmp_path / "fig3", "vit_small", list(range(10)))
    figure = report.draw(*report.read_table(tmp_path / "fig3"))
    assert [axis.lines[0].get_xdata()[0] for axis in figure.axes] == [1, 5]
    assert [axis.get_title() for axis in figure.axes] == ["All epochs", "From epoch 5 on"]
    assert {axis.get_ylabel() for axis in figure.axes} == {"top-1 accuracy (%)"}
    assert {axis.get_xlabel() for axis in figure.axes} == {"epochs"}


def test_nothing_evaluated_draws_no_line(tmp_path):
    write_row(tmp_path / "fig3", "vit_small", [])
    report.write_report(tmp_path / "fig3")
    assert [axis.lines[:] for axis in report.draw(*report.read_table(tmp_path / "fig3")).axes] == [[]]


def test_any_table_is_drawn_on_request(tmp_path, capsys):
    table = tmp_path / "table1b"
    write_row(table, "A", [1.0] * 3)
    assert report.main([str(table)]) == 0
    assert not list(tmp_path.rglob("*.png"))
    assert report.main([str(table), "--figure", str(tmp_path / "curves.png")]) == 0
    assert "(../curves.png)" in capsys.readouterr().out
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    for name in ("missing/curves.png", "curves.unknown"):
        with pytest.raises(UserError, match="--figure"):
            report.write_report(table, tmp_path / name)


# -------------------------------------------------------------------------------------------- the real thing


def test_the_logs_of_main(tmp_path):
    """What main.py writes is what the report reads, for plain and averaged weights."""
    data, table = runs.write_digits(tmp_path / "digits"), tmp_path / "table1b"
    for row, more in (("A", []), ("F", ["--report", "ema", "--eval-every", "2"])):
        output = table / row / "seed0"
        argv = runs.command(data, output, "--epochs", "2", "--warmup-epochs", "0", "--lr", "0.2", *more)
        assert main.main(argv) == 0
        protocol = vars(parse_arguments([*argv, "--epochs", "100"]))
        (table / row / "protocol.json").write_text(json.dumps(protocol))
    rows = summary(table)
    for row, key in (("A", "test_acc1"), ("F", "test_ema_acc1")):
        record = json.loads((table / row / "seed0/log.txt").read_text().splitlines()[-1])
        assert float(rows[row]["last_mean"]) == record[key]
        assert rows[row]["not_comparable"] == "epochs 2, not 100"
    assert record["test_acc1"] != record["test_ema_acc1"], "or nothing tells which was taken"
