"""The scripts of the tables: their rows, what they promise before anything starts, and every one of them in small."""

import fcntl
import importlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import sklearn.datasets
import timm
import torch
from helpers.checkpoints import write_checkpoint
from helpers.fake_slurm import FakeSlurm, sbatch_options

import datasets
import engine
import main
from arguments import parse_arguments
from launch import runs as launch_runs
from launch import slurm as launch_slurm
from paper import __main__ as paper_main
from paper import options, plan, tables, toy_data
from paper import report as paper_report
from paper.tables import TableRow

ROOT = Path(__file__).parents[1]
SCRIPTS = {
    "table1a": "table1a_lambda.sh",
    "table1b": "table1b_components.sh",
    "table1c": "table1c_epochs.sh",
    "table2": "table2_small_datasets.sh",
    "table3": "table3_sampling.sh",
    "table4": "table4_imagenet1k.sh",
    "table5": "table5_detection.sh",
    "table6": "table6_segmentation.sh",
    "ade20k": "ade20k_segmentation.sh",
    "table7": "table7_finetuning.sh",
    "table8": "table8_robustness.sh",
    "table9": "table9_imagenet100_hybrids.sh",
    "table10": "table10_imagenet1k_hybrids.sh",
    "table11": "table11_jaccard.sh",
    "table12": "table12_selfsupervised.sh",
    "fig1_fig4": "fig1_fig4_attention.sh",
    "fig6_fig7": "fig6_fig7_attention.sh",
    "fig3": "fig3_epochs.sh",
    "appendix_b": "appendix_b_alternatives.sh",
}
PLACES = {
    "table1a": "Table 1(a)",
    "table1b": "Table 1(b)",
    "table1c": "Table 1(c)",
    "table2": "Table 2",
    "table3": "Table 3",
    "table4": "Table 4",
    "table5": "Table 5",
    "table6": "Table 6",
    "ade20k": "ADE20K",
    "table7": "Table 7",
    "table8": "Table 8",
    "table9": "Table 9",
    "table10": "Table 10",
    "table11": "Table 11",
    "table12": "Table 12",
    "fig1_fig4": "Fig. 1 and Fig. 4",
    "fig6_fig7": "Fig. 6 and Fig. 7",
    "fig3": "Fig. 3",
    "appendix_b": "Appendix B and section 4.3",
}
DIGITS = [str(digit) for digit in range(10)]
SIZES_EPOCHS_DATA = {
    *("data_set", "input_size", "patch_size", "crop_pct", "model_kwargs"),
    *("batch_size", "total_batch", "epochs", "warmup_epochs", "cooldown_epochs", "num_workers"),
    *("local_crops_number", "out_dim", "moco_dim", "moco_mlp_dim", "probe_blocks"),
    *("longer_side", "warmup_updates", "head_kwargs"),
}

READ_SPLIT = datasets.read_split


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """In the repository's folder, with none of the variables that options have taken the place of."""
    monkeypatch.chdir(ROOT)
    for name in options.REMOVED_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def words_of(**chosen) -> list[str]:
    """Options as words: ``True`` for one without a value; what is empty or ``False`` is left out."""
    words = []
    for name, value in chosen.items():
        if value:
            values = [] if value is True else str(value).split() if name in ("seeds", "rows") else [str(value)]
            words += [f"--{name.replace('_', '-')}", *values]
    return words


def head_of(table: str) -> tuple[str, str]:
    """A table's script: its head, and what it does."""
    head, _, line = (ROOT / "scripts" / SCRIPTS[table]).read_text().partition("\nexec ")
    return head, line


@pytest.fixture
def run(monkeypatch):
    """A whole table in this process; ``start`` stands for starting a process."""

    def run(table: str, start=None, /, **chosen) -> int:
        monkeypatch.setattr(launch_runs, "run_command", start or start_nothing)
        return paper_main.main(["run", table, *words_of(**chosen)])

    return run


def start_nothing(command):
    raise AssertionError(f"nothing was to be started: {command}")


def in_this_process(command: list[str]) -> int:
    """``launch`` without a new process."""
    assert command[0] == sys.executable
    if command[1] == "-m":
        return importlib.import_module(command[2]).main(command[3:])
    assert command[1] == "main.py"
    return main.main(command[2:])


class Pretend:
    """``launch`` that only leaves a finished run's checkpoint, with what main.py would have been told.

    Or the results.json of a measurement.
    """

    def __init__(self):
        self.started = []
        self.measured = []

    def __call__(self, command: list[str]) -> int:
        if "main.py" not in command:
            self.measured.append(command[2:])
            (Path(command[-1]) / "results.json").write_text("{}")
            return 0
        args = parse_arguments(command[command.index("main.py") + 1 :])
        self.started.append(args)
        os.makedirs(args.output_dir, exist_ok=True)
        torch.save({"args": vars(args), "epoch": args.epochs}, Path(args.output_dir, "checkpoint.pth"))
        return 0


@pytest.fixture
def no_report(monkeypatch):
    monkeypatch.setattr(paper_report, "write_report", lambda folder: f"report of {folder}")


@pytest.fixture
def data_read(monkeypatch):
    """Every data set is found; these were looked for."""
    found = []
    monkeypatch.setattr(datasets, "read_split", lambda *split: found.append(split[:3]))
    return found


def rows_of(table: str, **chosen) -> list[TableRow]:
    """The rows that a table's script would run."""
    return plan.select_rows(options.read_settings([table, "--dry-run", *words_of(**chosen)]))


def runs_of(table: str, **chosen) -> list[plan.TableRun]:
    """The plan of a table's script."""
    settings = options.read_settings([table, "--dry-run", *words_of(**chosen)])
    return plan.plan_runs(settings, plan.select_rows(settings))


# ------------------------------------------------------------------------------------- scripts and data file


def test_there_is_a_script_for_every_table_here():
    there = {path.name for path in (ROOT / "scripts").glob("*.sh") if "run_table.sh" in path.read_text()}
    assert there - {"run_table.sh"} == set(SCRIPTS.values())
    assert set(SCRIPTS) == set(tables.RUNNABLE)


@pytest.mark.parametrize("table", SCRIPTS)
def test_a_script_only_names_its_table(table):
    assert head_of(table)[1] == f'bash "$(dirname "$0")/run_table.sh" {table} "$@"\n'


@pytest.mark.parametrize("table", SCRIPTS)
def test_a_script_opens_with_purpose_hardware_time_and_numbers(table):
    head, _ = head_of(table)
    assert all(line.startswith("#") for line in head.splitlines())
    assert head.splitlines()[1].startswith(f"# {PLACES[table]}: ")
    assert head.splitlines()[-1] == f"# Options: bash scripts/{SCRIPTS[table]} --help."
    assert "8 x V100 32 GB" in head
    assert "\n# Time: the dry run counts the training images; docs/reproduce.md turns them into hours.\n" in head
    values = [row["value"] for row in tables.TABLES[table]["rows"].values() if row["value"] is not None]
    missing = [value for value in values if not re.search(rf"\b{value}\b", head.partition("Expected")[2])]
    assert not missing


@pytest.mark.parametrize("table", SCRIPTS)
def test_the_commands_in_a_scripts_head_are_understood(table, tmp_path, monkeypatch):
    (tmp_path / "cached.args").write_text("--cache-images")
    for name in ("vit.pth", "sar.pth"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    commands = re.findall(rf"^#   bash scripts/{SCRIPTS[table]}(.*)", head_of(table)[0], re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        options.read_settings([table, *shlex.split(command, comments=True)])


def test_the_table_commands_of_the_other_texts_are_understood():
    texts = [(ROOT / name).read_text() for name in ("README.md", "benchmarks/tiny20.args")]
    text = "\n".join(texts).replace("\\\n#", " ")
    tables_by_script = {script: table for table, script in SCRIPTS.items()}
    commands = re.findall(r"bash scripts/(\w+\.sh)( --.*)", text)
    commands = [(script, words) for script, words in commands if script in tables_by_script and "--help" not in words]
    assert len(commands) >= 5
    for script, words in commands:
        options.read_settings([tables_by_script[script], *shlex.split(words, comments=True)])


def test_analysis_knows_nothing_of_tables_and_launchers():
    imports = re.compile(r"^ *(?:from|import) (?:paper|launch|submitit|run_with_submitit)\b", re.MULTILINE)
    assert not [path.name for path in (ROOT / "analysis").glob("*.py") if imports.search(path.read_text())]


def test_ids_and_runs_are_names_of_folders():
    for table in tables.TABLES.values():
        assert all(re.fullmatch(r"[\w.-]+", name) and name != "-" for name in table["rows"])
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", run) for run in tables.RUNS)


def test_every_run_is_of_a_table_and_what_a_table_names_is_there():
    """Rows that share a run share the paper's number for it. Other runs are those that a row depends on."""
    values = {}
    for table in tables.TABLES.values():
        for row in table["rows"].values():
            assert table["rows"].get(row.get("baseline"), row)
            values.setdefault(row.get("run"), set()).add(row["value"])
    assert all(len(found) == 1 for run, found in values.items() if run)
    needed = {run for table in SCRIPTS for row in rows_of(table) for run in row.dependencies()}
    assert values.keys() - {None} | needed == tables.RUNS.keys()
    pretrained = {path.removeprefix("run:").rpartition("/")[0] for path in tables.WEIGHTS.values()}
    pretrained |= {f"{task}_in100/{model}" for task in ("dino", "moco") for model in ("vit_small", "vit_small_sar")}
    assert needed == pretrained


def test_equal_runs_are_equal_protocols():
    """Runs of all tables have one name if, and only if, main.py is told the same."""
    protocols = {}
    for table in SCRIPTS:
        for job in runs_of(table):
            protocol = {name: value for name, value in vars(job.protocol).items() if name != "output_dir"}
            assert protocols.setdefault(job.row.run, protocol) == protocol, f"{table}: {job.row.run}"
    distinct = {json.dumps(protocol, sort_keys=True) for protocol in protocols.values()}
    assert len(distinct) == len(protocols)


def test_rows_that_are_one_experiment_are_one_run():
    run = {(table, job.row.name): job.row.run for table in SCRIPTS for job in runs_of(table)}
    full = {("table1a", "0.01"), ("table1b", "F"), ("table1c", "vit_small_sar_100")}
    full |= {("table3", "1.00_vit_small_sar"), ("appendix_b", "dot")}
    assert len({run[row] for row in full}) == 1
    assert run["table1b", "A"] == run["table1c", "vit_small_100"] == run["table3", "1.00_vit_small"]
    assert run["table1a", "0"] == run["table1b", "C"]
    assert run["fig3", "vit_small_sar"] == run["table4", "vit_small_sar"]
    in1k = {run["table4", "vit_small"], run["table4", "vit_small_sar"]}
    for table in ("table5", "table6", "table7", "table8", "table11", "fig1_fig4"):
        assert {job.row.run for job in runs_of(table) if job.row.name == "-"} == in1k
    pvt = {run["table10", "pvt_small"], run["table10", "pvt_small_sar"]}
    assert {job.row.run for job in runs_of("ade20k") if job.row.name == "-"} == pvt
    first, second = ({job.row.run for job in runs_of(table)} for table in ("table12", "fig6_fig7"))
    assert second == {run for run in first if not run.startswith("linear_in100/")}


@pytest.mark.parametrize(
    ("table", "row", "expected"),
    [
        ("table1a", "0.05", {"sar_weight": 0.05, "last_block": "sar"}),
        ("table1b", "A", {"sar_weight": 0, "last_block": "standard"}),
        ("table1b", "B", {"sar_weight": 0, "last_block": "no_msa_skip"}),
        ("table1b", "C", {"sar_weight": 0, "last_block": "sar"}),
        ("table1b", "D", {"sar_weight": 0, "last_block": "no_skips"}),
        ("table1b", "E", {"sar_weight": 0.01, "last_block": "standard"}),
        ("table1b", "F", {"sar_weight": 0.01, "last_block": "sar"}),
        ("table1c", "vit_small_300", {"epochs": 300, "sar_weight": 0, "data_set": "imagenet100"}),
        ("table2", "sketch_vit_small_sar", {"epochs": 5000, "data_set": "sketch", "sar_weight": 0.01}),
        ("table3", "0.25_vit_small", {"epochs": 100, "sampling_ratio": 0.25, "sar_weight": 0}),
        ("table4", "vit_small_drloc", {"drloc_weight": 0.1, "sar_weight": 0, "last_block": "standard"}),
        ("table4", "vit_small_sar_drloc", {"drloc_weight": 0.1, "sar_weight": 0.01, "last_block": "sar"}),
        ("table4", "vit_tiny_sar", {"model": "vit_tiny_sar", "epochs": 300, "data_set": "imagenet"}),
        ("table5", "vit_small", {"task": "detect", "last_block": "standard", "total_batch": 8, "sar_weight": 0}),
        ("table5", "vit_small_sar", {"data_set": "voc0712", "epochs": 25, "last_block": "sar", "sar_weight": 0}),
        ("table6", "vit_small_sar", {"data_set": "voc2012", "epochs": 25, "last_block": "sar", "sar_weight": 0}),
        ("ade20k", "pvt_small_released", {"total_batch": 32, "lr": 2e-4, "last_block": "standard", "epochs": 63}),
        ("ade20k", "pvt_small_sar", {"model": "pvt_small_sar", "total_batch": 16, "lr": 1e-4, "last_block": "sar"}),
        ("table7", "no-no_pets", {"data_set": "pets", "sar_weight": 0, "last_block": "standard"}),
        ("table7", "yes-no_flowers", {"data_set": "flowers", "sar_weight": 0, "last_block": "sar"}),
        ("table7", "no-yes_cifar10", {"total_batch": 512, "sar_weight": 0.01, "last_block": "standard"}),
        ("table7", "yes-yes_cifar100", {"input_size": 224, "sar_weight": 0.01, "last_block": "sar"}),
        ("table9", "vit_small_sar", {"data_set": "imagenet100", "epochs": 100, "clip_grad": 5.0}),
        ("table9", "t2t_vit_14_sar", {"total_batch": 512, "epochs": 100, "report": "ema", "patch_size": 16}),
        ("table9", "cvt_13", {"data_set": "imagenet100", "sar_weight": 0, "last_block": "standard", "patch_size": 4}),
        ("table10", "pvt_small_sar", {"repeated_aug": True, "sar_weight": 0.01, "last_block": "sar", "epochs": 300}),
        ("table10", "cvt_13_sar", {"total_batch": 2048, "lr": 2e-3, "unscale_lr": True, "sar_query": "cls"}),
        ("table12", "accuracy_moco_v3", {"task": "linear", "lr": 3, "epochs": 100, "model": "vit_small"}),
        ("table12", "accuracy_dino_sar", {"data_set": "imagenet100", "last_block": "sar", "probe_blocks": [4, 1]}),
        ("appendix_b", "cosine", {"sar_similarity": "cosine", "sar_loss": "spatial-entropy"}),
        ("appendix_b", "total_variation", {"sar_similarity": "dot", "sar_loss": "total-variation"}),
        ("appendix_b", "softmax", {"sar_similarity": "softmax", "sar_loss": "spatial-entropy"}),
    ],
)
def test_what_a_row_is(table, row, expected):
    (job,) = [job for job in runs_of(table) if job.row.name == row]
    assert {name: vars(job.protocol)[name] for name in expected} == expected


@pytest.mark.parametrize("table", SCRIPTS)
def test_smoke_changes_sizes_epochs_and_data_alone(table):
    for job in runs_of(table, smoke=True):
        here = {name for name, value in vars(job.args).items() if value != vars(job.protocol)[name]}
        assert here - {"output_dir", "data_path"} <= SIZES_EPOCHS_DATA
        assert job.args.data_set == ("digits" if job.args.task not in ("detect", "segment") else job.protocol.data_set)


# ------------------------------------------------------------------------------------------- before it starts


@pytest.mark.parametrize("table", SCRIPTS)
def test_a_dry_run_prints_all_and_does_nothing(table, run, tmp_path, capsys):
    assert run(table, dry_run=True, out=tmp_path / "out", data="/nowhere", seeds="3 5") == 0
    assert not (tmp_path / "out").exists()
    text = capsys.readouterr().out
    commands = [shlex.split(line.partition(" main.py ")[2]) for line in text.splitlines() if " main.py @" in line]
    jobs = runs_of(table, out=str(tmp_path / "out"), data="/nowhere", seeds="3 5")
    assert commands == [job.words for job in jobs]
    assert {job.seed for job in jobs} == {3, 5}
    for job in jobs:
        assert f"{job.epochs} epochs x {plan.images_per_epoch(job.args):>9,} images" in text
    total = sum(job.epochs * plan.images_per_epoch(job.args) for job in jobs)
    assert f"\ntotal: {total:,} images " in text
    page = (ROOT / "docs/reproduce.md").read_text()
    assert re.search(rf"^\| `{SCRIPTS[table]}` \|.*\| {total / 2e6:,.0f} ", page, re.MULTILINE), "for one seed"


def test_a_probe_is_planned_with_the_model_that_is_not_trained_yet():
    """With --smoke it is the smaller one, and the protocol that of the paper."""
    jobs = {job.row.name: job for job in runs_of("table12", smoke=True)}
    probe = jobs["accuracy_moco_v3_sar"]
    assert (probe.args.input_size, probe.args.model_kwargs["embed_dim"]) == (20, 24)
    assert (probe.protocol.input_size, probe.protocol.model_kwargs) == (224, {})
    assert {name: job.args.model for name, job in jobs.items() if name.startswith("accuracy")} == {
        f"accuracy_{task}{sar}": f"vit_small{sar}" for task in ("moco_v3", "dino") for sar in ("", "_sar")
    }


@pytest.mark.parametrize(("processes", "size"), [(8, 128), (2, 512), (1, 1024)])
def test_the_batch_of_a_process_follows_where_a_task_cannot_accumulate(processes, size):
    launch = "python" if processes == 1 else f"torchrun --nproc_per_node={processes}"
    sizes = {job.row.run: job.args.batch_size for job in runs_of("table12", launch=launch)}
    assert sizes["moco_in100/vit_small_sar"] == size
    assert sizes["dino_in100/vit_small_sar"] == 64


def test_a_dry_run_with_weights_has_no_pre_training(run, tmp_path, capsys):
    given = tmp_path / "given weights.pth"
    torch.save({"model": {"blocks.0.norm2.weight": torch.ones(1)}}, given)
    assert run("table7", dry_run=True, ckpt_base=given, ckpt_sar=given) == 0
    text = capsys.readouterr().out
    assert f"--finetune '{given}'" in text
    assert "\ntotal: 42,288,000 images " in text, "100 epochs of four sets, four times"


@pytest.mark.parametrize(("processes", "size"), [(1, 2), (4, 2), (8, 1), (3, 2)])
def test_the_batch_of_a_process_is_smaller_for_more_processes_than_the_papers(processes, size):
    launch = "python" if processes == 1 else f"torchrun --nproc_per_node={processes}"
    assert {job.args.batch_size for job in runs_of("table5", launch=launch) if job.row.name != "-"} == {size}


@pytest.mark.parametrize("table", ["table5", "table7", "table8", "table11", "fig1_fig4", "ade20k"])
@pytest.mark.parametrize("option", ["ckpt_base", "ckpt_sar"])
@pytest.mark.parametrize("dry_run", [False, True])
def test_weights_that_are_not_there_are_named_by_their_option(table, option, dry_run, run, capsys):
    assert run(table, dry_run=dry_run, **{option: "no where.pth"}) == 2
    told = capsys.readouterr()
    assert told == ("", f"error: argument --{option.replace('_', '-')}: no where.pth: no such file\n")


def test_a_line_is_parsed_no_more_often_than_needed(monkeypatch):
    """Fine-tuning reads its weights each time."""
    parsed = []
    monkeypatch.setattr(
        plan, "parse_arguments", lambda words, **more: parsed.append(words) or parse_arguments(words, **more)
    )
    assert len(runs_of("table1b", data="/data")) == len(parsed) == 6
    runs_of("table1b", smoke=True)
    assert len(parsed) == 6 + 12, "with and without smoke's arguments"


def test_the_images_of_an_epoch():
    assert plan.images_per_epoch(parse_arguments(["--data-path", "x", "--sampling-ratio", "0.25"])) == 320292
    assert plan.images_per_epoch(parse_arguments(["--data-set", "folder", "--data-path", "x"])) is None


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"smoke": True, "overrides": "recipes/smoke.args"}, "leave one of the two out"),
        ({"smoke": True, "data": "/data"}, "--smoke generates its own data; leave --data out"),
        ({"seeds": "0,1"}, "argument --seeds: '0,1' is not a whole number of at least 0"),
        ({"seeds": "0 -1"}, "argument --seeds: '-1' is not a whole number of at least 0"),
        ({"rows": "A G"}, "--rows: no row G; this table has A B C D E F"),
        ({"sedes": "0"}, "no option --sedes; did you mean --seeds"),
        ({"dry": True}, "no option --dry; did you mean --dry-run"),
        ({"ckpt_base": "README.md"}, "leave --ckpt-base out: table1b does not use it (table5, table6, "),
        ({"ckpt_sar": "README.md"}, "leave --ckpt-sar out: table1b does not use it"),
        ({"ckpt_options": "--num-heads 6"}, "leave --ckpt-options out: table1b does not use it"),
        ({"images": "photos"}, "leave --images out: table1b does not use it (fig1_fig4, fig6_fig7 do)"),
        ({"count": "3"}, "leave --count out: table1b does not use it (fig1_fig4, fig6_fig7 do)"),
        ({"overrides": "nowhere.args"}, "--overrides nowhere.args: argument file nowhere.args: No such file"),
        ({"launch": "no_such_launcher -n 8", "smoke": True}, "--launch: no program no_such_launcher"),
        ({"launch": "'open"}, "argument --launch: 'open: No closing quotation"),
        ({"data": "/nowhere", "launch": "no_launcher"}, "--launch: no program no_launcher"),
        ({"data": "/nowhere"}, "in100_100/vit_small, seed 0: --data-path /nowhere/imagenet: no such folder"),
        (
            {"smoke": True, "launch": "torchrun --nproc_per_node=3"},
            "in100_100/vit_small, seed 0: --batch-size 8 x 3 processes does not divide --total-batch 64",
        ),
        (
            {"smoke": True, "launch": "torchrun --nproc_per_node=3", "dry_run": True},
            "in100_100/vit_small, seed 0: --batch-size 8 x 3 processes does not divide --total-batch 64",
        ),
        (
            {"smoke": True, "launch": "submitit --nodes 3 --ngpus 1"},
            "in100_100/vit_small, seed 0: --batch-size 8 x 3 processes does not divide --total-batch 64",
        ),
        ({"launch": "submitit --partion x"}, "submitit --partion x': no option --partion; did you mean --partition"),
        ({"launch": "submitit --slurm-arg time=3"}, "submitit --slurm-arg time=3': --slurm-arg time=3: use --timeout"),
    ],
)
def test_mistakes_are_one_line_before_anything_starts(chosen, message, run, tmp_path, capsys):
    assert run("table1b", **({"out": tmp_path / "out"} | chosen)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--seed 3", "--output-dir elsewhere", "--seed=5", "--output_dir=x"])
def test_overrides_do_not_say_what_the_command_line_says(option, run, tmp_path, capsys):
    (tmp_path / "mine.args").write_text(option)
    assert run("table1b", overrides=tmp_path / "mine.args") == 2
    name = option.replace("_", "-").replace("=", " ").split()[0]
    assert f"--overrides {tmp_path}/mine.args: leave {name} out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"), [("--epocs 3", "no option --epocs"), ("--input-size 23", "--input-size 23")]
)
def test_a_mistake_in_overrides_names_the_file(words, message, run, tmp_path, capsys):
    (tmp_path / "mine.args").write_text(words)
    assert run("table1b", dry_run=True, overrides=tmp_path / "mine.args") == 2
    assert f"error: --overrides {tmp_path}/mine.args: {message}" in capsys.readouterr().err


def test_data_of_all_unfinished_rows_are_read_first(run, no_report, data_read, tmp_path, capsys, monkeypatch):
    """An empty folder of a data set is not one; each set is looked through once."""
    where = {"out": tmp_path / "out", "data": data_root(tmp_path)}
    assert run("table7", Pretend(), rows="no-no_cifar10 no-yes_cifar10", **where) == 0
    imagenet, cifar = f"{tmp_path}/data/imagenet", f"{tmp_path}/data"
    assert data_read == [
        *(("imagenet", split, imagenet) for split in ("train", "val")),
        *(("cifar10", split, cifar) for split in ("train", "val")),
    ]
    monkeypatch.setattr(datasets, "read_split", READ_SPLIT)
    assert run("table7", start_nothing, rows="no-no_cifar100", **where) == 2
    assert "finetune/no-no_cifar100, seed 0: " in capsys.readouterr().err
    assert run("table1b", start_nothing, rows="A", **where) == 2
    assert f"in100_100/vit_small, seed 0: {imagenet}" in capsys.readouterr().err


def test_what_is_downloaded_need_not_be_there(run, no_report, tmp_path):
    (tmp_path / "mine.args").write_text("--data-set cifar10 --download")
    chosen = {"out": tmp_path / "out", "data": "/nowhere", "overrides": tmp_path / "mine.args"}
    assert run("table1b", Pretend(), rows="A", **chosen) == 0


@pytest.mark.parametrize("name", options.REMOVED_VARIABLES)
def test_an_old_variable_is_not_silently_ignored(name, run, monkeypatch, capsys):
    option = f"--{name.lower().replace('_', '-')}"
    monkeypatch.setenv(name, "1")
    assert run("table1b", dry_run=True) == 2
    said = f"error: the environment variable {name} is no longer read; unset it and use {option}\n"
    assert capsys.readouterr() == ("", said)
    monkeypatch.setenv(name, "")
    assert run("table1b", dry_run=True) == 0


def test_every_old_variable_has_become_an_option(capsys):
    help_text = "".join(help_of(table, capsys) for table in ("table1b", "fig1_fig4"))
    assert all(f"  --{name.lower().replace('_', '-')}" in help_text for name in options.REMOVED_VARIABLES)


def help_of(table: str, capsys) -> str:
    with pytest.raises(SystemExit) as end:
        paper_main.main(["run", table, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("table", SCRIPTS)
def test_help_shows_options_and_rows(table, capsys):
    text = help_of(table, capsys)
    for name, row in tables.TABLES[table]["rows"].items():
        paper = "" if row["value"] is None else f" ({row['value']} in the paper)"
        assert re.search(rf"^  {re.escape(name)} +{re.escape(row['name'] + paper)}$", text, re.MULTILINE)
    assert "--seeds N [N ...]" in text
    given = table in ("table5", "table6", "ade20k", "table7", "table8", "table11", "fig1_fig4")
    assert [f"{option} " in text for option in ("--ckpt-base", "--ckpt-sar", "--ckpt-options")] == 3 * [given]
    assert [f"{option} " in text for option in ("--images", "--count")] == 2 * [table in ("fig1_fig4", "fig6_fig7")]


def test_the_two_commands_and_the_tables(capsys):
    for words, told in ((["--help"], "python -m paper run table1b"), (["run", "--help"], "  Components of SAR")):
        with pytest.raises(SystemExit):
            paper_main.main(words)
        assert told in capsys.readouterr().out
    for words, told in (
        ([], "the following arguments are required: command"),
        (["ru"], "invalid choice: 'ru' (choose from 'run', 'report')"),
        (["run"], "the following arguments are required: TABLE"),
        (["run", "table1"], "argument TABLE: no table table1; did you mean table1"),
        (["run", "table13"], "argument TABLE: no table table13; did you mean table"),
        (["run", "x"], "argument TABLE: no table x; there are table1a, table1b"),
        (["run", "table1b", "--seeds"], "argument --seeds: expected at least one argument"),
    ):
        assert paper_main.main(words) == 2
        error = capsys.readouterr().err
        assert told in error
        assert len(error.splitlines()) == 1


def test_paths_are_seen_from_the_callers_folder(run, no_report, tmp_path, monkeypatch, capsys):
    """Everything is then done in the repository's folder; a path in that is said as it is seen from there."""
    work = tmp_path / "work"
    data_root(work)
    (work / "mine.args").write_text("--data-set cifar10 --download --epochs 7")
    monkeypatch.chdir(work)
    launch = Pretend()
    assert run("table1b", launch, rows="A", data="data", out="../out", overrides="mine.args") == 0
    (args,) = launch.started
    assert (args.output_dir, args.epochs) == (f"{tmp_path}/out/runs/in100_100/vit_small/seed0", 7)
    assert Path.cwd() == ROOT
    assert capsys.readouterr().out.endswith(f"report of {tmp_path}/out/table1b\n")

    monkeypatch.chdir(work)
    Path("given.pth").touch()
    (row,) = rows_of("fig1_fig4", ckpt_base="given.pth", ckpt_sar="./given.pth", images="photos")
    assert [word for word in row.words if word.startswith("/")] == [*2 * [f"{work}/given.pth"], f"{work}/photos"]
    assert options.launch_words(["./launch.sh", "-x"]) == [f"{work}/launch.sh", "-x"]
    assert options.read_settings(["table1b", "--data=~/sets"]).data == Path.home() / "sets"
    monkeypatch.chdir(ROOT / "scripts")
    settings = options.read_settings(["table1b", "--data", "../sets"])
    assert (settings.data, settings.out) == (Path("sets"), Path("output")), "the default is the repository's"


@pytest.mark.parametrize("table", ["table7", "table8", "table11", "fig1_fig4"])
def test_any_path_is_one_word_of_a_row(table, tmp_path):
    path = tmp_path / """it's "Günther's" $HOME # \\ .pth"""
    path.touch()
    images = {"images": path} if table == "fig1_fig4" else {}
    rows = rows_of(table, ckpt_base=path, ckpt_sar=path, **images)
    assert [row.words.count(str(path)) for row in rows] == ([3] if images else [1] * len(rows))


@pytest.mark.parametrize("option", ["ckpt_base", "ckpt_sar"])
@pytest.mark.parametrize("words", ["--num-heads 6 --checkpoint-key ema", "--num-heads=6"])
@pytest.mark.parametrize("table", ["table7", "table8", "table11", "fig1_fig4"])
def test_options_of_given_weights_are_not_those_of_runs(table, option, words, tmp_path):
    (tmp_path / "given.pth").touch()
    expected = words.split()
    for row in rows_of(table, ckpt_options=words, **{option: tmp_path / "given.pth"}):
        places = [at + 1 for at, word in enumerate(row.words) if word == str(tmp_path / "given.pth")]
        assert all(row.words[at : at + len(expected)] == expected for at in places)
        assert row.words.count(expected[0]) == len(places)
        assert bool(places) == ("_given" in row.run)


def test_options_of_no_weights(run, capsys):
    assert run("table11", dry_run=True, ckpt_options="--num-heads 6") == 2
    assert capsys.readouterr() == (
        "",
        "error: --ckpt-options needs --ckpt-base or --ckpt-sar; give one of them, or leave it out\n",
    )


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.mark.parametrize(
    ("gpus", "text", "words", "processes"),
    [
        (0, "", [sys.executable], 1),
        (1, "", [sys.executable], 1),
        (8, "", [*TORCHRUN, "--nproc_per_node=8"], 8),
        (8, "python", [sys.executable], 1),
        (0, "torchrun --nnodes=2 --nproc-per-node 8", [*TORCHRUN, "--nnodes=2", "--nproc-per-node", "8"], 16),
        (0, "torchrun --nproc_per_node=gpu", [*TORCHRUN, "--nproc_per_node=gpu"], None),
        (0, "torchrun --nnodes 1:4 --nproc_per_node 8", [*TORCHRUN, "--nnodes", "1:4", "--nproc_per_node", "8"], None),
        (0, "srun 'my launcher' -x", ["srun", "my launcher", "-x"], None),
    ],
)
def test_the_launcher(gpus, text, words, processes, monkeypatch):
    monkeypatch.setattr(options, "gpu_count", lambda: gpus)
    assert options.launch_words(shlex.split(text)) == words
    assert options.world_size(words) == processes


@pytest.mark.parametrize(
    ("gpus", "chosen", "words"),
    [
        (0, {}, [*TORCHRUN, "--nproc_per_node=8"]),
        (1, {}, [sys.executable]),
        (2, {}, [*TORCHRUN, "--nproc_per_node=2"]),
        (0, {"launch": "python"}, [sys.executable]),
        (0, {"smoke": True}, [sys.executable]),
        (0, {"overrides": "recipes/smoke.args"}, [sys.executable]),
    ],
)
def test_the_plan_names_the_launcher(gpus, chosen, words, run, monkeypatch, capsys):
    """On a machine without GPUs it is that of the paper's hardware, but not for runs that are meant for this one."""
    monkeypatch.setattr(options, "gpu_count", lambda: gpus)
    assert run("table1b", dry_run=True, rows="F", **chosen) == 0
    text = capsys.readouterr().out
    assert f"\nlauncher: {shlex.join(words)} (change it with --launch)" in text
    assert f"\n{shlex.join(words)} main.py @recipes" in text


# --------------------------------------------------------------------------------------------- while it runs


def test_every_seed_of_every_row_is_one_run_and_a_link_in_the_table(run, no_report, data_read, tmp_path, capsys):
    launch = Pretend()
    assert run("table1b", launch, out=tmp_path, seeds="0 4", rows="A F", data=data_root(tmp_path)) == 0
    assert [(args.model, args.seed) for args in launch.started] == [
        *(("vit_small", 0), ("vit_small_sar", 0)),
        *(("vit_small", 4), ("vit_small_sar", 4)),
    ]
    assert {args.data_path for args in launch.started} == {f"{tmp_path}/data/imagenet"}
    assert sorted(path.name for path in (tmp_path / "table1b").iterdir()) == ["A", "F"]
    link = tmp_path / "table1b/F/seed4"
    assert os.readlink(link) == "../../runs/in100_100/vit_small_sar/seed4"
    assert torch.load(link / "checkpoint.pth")["args"]["seed"] == 4
    protocol = json.loads((tmp_path / "table1b/F/protocol.json").read_text())
    assert (protocol["epochs"], protocol["data_set"], protocol["sar_weight"]) == (100, "imagenet100", 0.01)
    assert capsys.readouterr().out.endswith(f"report of {tmp_path}/table1b\n")


def data_root(folder: Path) -> Path:
    """A folder with the data sets' folders, all empty."""
    for name in ("imagenet", "domainnet"):
        (folder / "data" / name).mkdir(parents=True, exist_ok=True)
    return folder / "data"


def test_finished_runs_are_not_started_again_by_any_table(run, no_report, data_read, tmp_path, capsys):
    where = {"out": tmp_path, "data": data_root(tmp_path)}
    assert run("table1b", Pretend(), **where) == 0
    assert run("table1b", start_nothing, **where) == 0
    assert "in100_100/vit_small_sar, seed 0: already finished" in capsys.readouterr().out
    launch = Pretend()
    assert run("table1a", launch, **where) == 0
    assert [args.sar_weight for args in launch.started] == [0.001, 0.005, 0.05, 0.1], "0 and 0.01 are C and F"
    assert "finished" in capsys.readouterr().out
    data_read.clear()
    assert run("table1a", start_nothing, out=tmp_path, data="/nowhere") == 0
    assert data_read == [], "what is finished needs no data"


def test_overrides_come_after_a_rows_arguments(run, no_report, data_read, tmp_path):
    (tmp_path / "mine.args").write_text("--data-set folder --epochs 7 --batch-size 32 # mine")
    launch = Pretend()
    chosen = {"out": tmp_path, "data": tmp_path, "overrides": tmp_path / "mine.args", "rows": "E"}
    assert run("table1b", launch, **chosen) == 0
    (args,) = launch.started
    assert (args.data_set, args.data_path, args.epochs, args.batch_size) == ("folder", str(tmp_path), 7, 32)
    assert args.last_block == "standard"
    protocol = json.loads((tmp_path / "table1b/E/protocol.json").read_text())
    assert (protocol["data_set"], protocol["epochs"]) == ("imagenet100", 100)


def test_a_folder_of_another_run_is_refused_before_anything_starts(run, no_report, tmp_path, capsys):
    where = {"out": tmp_path, "data": data_root(tmp_path)}
    assert run("table1b", Pretend(), smoke=True, rows="F", out=tmp_path) == 0
    assert run("table1b", start_nothing, **where) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}/runs/in100_100/vit_small_sar/seed0 holds a run with other arguments" in error
    assert "--epochs: 2 in the checkpoint, 100 now" in error
    (tmp_path / "runs/in100_100/vit_small_sar/seed0/checkpoint.pth").write_bytes(b"cut")
    assert run("table1b", start_nothing, **where) == 2
    assert (
        "checkpoint.pth cannot be read; remove it to start in100_100/vit_small_sar, seed 0" in capsys.readouterr().err
    )


@pytest.mark.parametrize(("code", "result"), [(0, 143), (2, 2), (130, 130), (137, 137)])
def test_what_would_end_the_next_run_too_ends_the_script(code, result, run, tmp_path, capsys):
    started = []

    def fail(command):
        started.append(command)
        return code

    assert run("table1b", fail, smoke=True, out=tmp_path) == result
    assert len(started) == 1
    error = capsys.readouterr().err
    assert f"stopped after 0 of 2 epochs with exit code {code}" in error
    assert ("run the same command to resume it" in error) == (code != 2)


def test_a_failed_row_leaves_the_others_theirs(run, tmp_path, capsys):
    """But for those that need its files; the report tells of the rest."""
    launch = Pretend()

    def fail_with_sar(command):
        return 1 if "in1k/vit_small_sar/" in command[-1] else launch(command)

    chosen = {"smoke": True, "out": tmp_path, "rows": "no-no_pets yes-no_pets no-yes_pets"}
    assert run("table7", fail_with_sar, **chosen) == 1
    there = [args.output_dir.removeprefix(f"{tmp_path}/runs/") for args in launch.started]
    assert there == ["in1k/vit_small/seed0", "finetune/no-no_pets/seed0", "finetune/no-yes_pets/seed0"]
    text = capsys.readouterr()
    assert "finetune/yes-no_pets, seed 0: skipped, because it depends on in1k/vit_small_sar, which failed" in text.err
    assert text.out.endswith((tmp_path / "table7/report.md").read_text() + "\n")


def test_a_stop_that_comes_when_the_run_is_done_ends_the_script(run, tmp_path):
    launch = Pretend()
    assert run("table1b", lambda command: launch(command) or 128 + signal.SIGTERM, smoke=True, out=tmp_path) == 143
    assert len(launch.started) == 1


def test_a_run_that_another_script_trains_is_waited_for(run, no_report, tmp_path, capsys):
    """The other script is a thread here: it holds the lock until the run is finished."""
    chosen = {"smoke": True, "out": tmp_path, "rows": "F"}
    other = Pretend()
    assert run("table1b", other, **chosen) == 0
    folder = tmp_path / "runs/in100_100/vit_small_sar/seed0"
    finished = (folder / "checkpoint.pth").rename(folder / "later.pth")
    waiting = threading.Event()
    block = fcntl.flock

    def flock(file, how):
        if how == fcntl.LOCK_EX:
            waiting.set()
        return block(file, how)

    def finish(file):
        waiting.wait(10)
        finished.rename(folder / "checkpoint.pth")
        file.close()

    file = (folder / "launcher.lock").open("w")
    block(file, fcntl.LOCK_EX)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", flock)
        thread = threading.Thread(target=finish, args=(file,))
        thread.start()
        assert run("table1b", start_nothing, **chosen) == 0
        thread.join()
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("another launcher is training in100_100/vit_small_sar, seed 0; waiting until it has ended")
    assert lines[at + 1] == "in100_100/vit_small_sar, seed 0: already finished"


@pytest.mark.parametrize(("table", "counts"), [("table1b", (6, 0)), ("table11", (2, 4))])
def test_a_folder_is_held_while_its_run_is_trained_or_measured(table, counts, run, no_report, tmp_path):
    launch = Pretend()

    def held(command):
        assert launch_runs.is_locked(Path(command[-1]))
        return launch(command)

    assert run(table, held, smoke=True, out=tmp_path) == 0
    assert (len(launch.started), len(launch.measured)) == counts
    assert not any(launch_runs.is_locked(path.parent) for path in tmp_path.glob("**/launcher.lock"))


def test_a_file_system_without_locks(run, no_report, tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    launch = Pretend()
    assert run("table1b", launch, smoke=True, out=tmp_path, rows="F") == 0
    assert len(launch.started) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert (
        "launcher.lock (Function not implemented); make sure that no other launcher is training in100_100/vit_small_sar"
        in lines[0]
    )


# -------------------------------------------------------------------------------------- measured when finished


@pytest.mark.parametrize("table", ["table8", "table11", "fig1_fig4"])
def test_what_is_measured_is_a_command_of_finished_runs(table, run, tmp_path, capsys):
    """Every command of a dry run is understood, and reads what the runs before write."""
    assert run(table, dry_run=True, out=tmp_path / "out", data="/data", seeds="0 2") == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if " -m analysis." in line]
    names = tables.TABLES[table]["rows"]
    assert len(commands) == 2 * len(names)
    for python, _, module, *words in commands:
        assert python == sys.executable
        values = list(itertools.pairwise(words))
        seed = words[-1].rpartition("/")[2]
        runs = {f"{tmp_path}/out/runs/in1k/{model}/{seed}/checkpoint.pth" for model in ("vit_small", "vit_small_sar")}
        assert {value for option, value in values if option == "--checkpoint"} <= runs
        assert any(value.startswith("/data/") for _, value in values)
        help_text = run_help(module, capsys)
        assert all(word in help_text for word in words if word.startswith("--"))


def run_help(module: str, capsys) -> str:
    with pytest.raises(SystemExit):
        importlib.import_module(module).main(["--help"])
    return capsys.readouterr().out


def given_weights(path: Path, classes: list[str] = DIGITS, seed: int = 0) -> Path:
    """Of a small model, not trained, for the toy data's images; its patches divide Table 11's size, too."""
    return write_checkpoint(path, classes, seed, f"--input-size {toy_data.SIDE} --patch-size {toy_data.SIDE // 4}")


def measured_data(folder: Path) -> Path:
    """Data that can be found, of all that is measured; ImageNet is only a folder."""
    toy_data.write_toy_data(folder / "data")
    return folder / "data"


def test_a_measured_row_trains_what_it_needs_and_is_recorded_with_it(run, no_report, data_read, tmp_path, capsys):
    where = {"out": tmp_path, "data": measured_data(tmp_path), "seeds": "0 4"}
    launch = Pretend()
    assert run("table8", launch, rows="in_c_vit_small_sar", **where) == 0
    assert [(args.model, args.seed) for args in launch.started] == [("vit_small_sar", 0), ("vit_small_sar", 4)]
    assert len(launch.measured) == 2
    row = tmp_path / "table8/in_c_vit_small_sar"
    assert (row / "seed4").resolve() == tmp_path / "runs/imagenet_c/vit_small_sar/seed4"
    assert (row / "seed4/results.json").exists()
    assert (row / "trained/vit_small_sar/seed4").resolve() == tmp_path / "runs/in1k/vit_small_sar/seed4"
    protocol = json.loads((row / "trained/vit_small_sar/protocol.json").read_text())
    assert (protocol["epochs"], protocol["model"]) == (300, "vit_small_sar")
    assert capsys.readouterr().out.endswith(f"report of {tmp_path}/table8\n")


def test_what_is_measured_is_not_measured_again(run, no_report, data_read, tmp_path, capsys):
    """But for another checkpoint; its data need not be there any more."""
    where = {"out": tmp_path, "rows": "vit_small vit_small_void_excluded"}
    launch = Pretend()
    assert run("table11", launch, data=measured_data(tmp_path), **where) == 0
    assert [words[words.index("--protocol") + 1] for words in launch.measured] == ["paper-code", "void-excluded"]
    assert run("table11", start_nothing, data="/nowhere", **where) == 0
    assert "jaccard/vit_small, seed 0: already measured" in capsys.readouterr().out
    os.utime(tmp_path / "runs/in1k/vit_small/seed0/checkpoint.pth", (0, 0))
    launch = Pretend()
    assert run("table11", launch, data=tmp_path / "data", **where) == 0
    assert (len(launch.started), len(launch.measured)) == (0, 2)
    (tmp_path / "runs/jaccard/vit_small/seed0/measured.json").write_text("{")
    assert run("table11", launch, data=tmp_path / "data", **where) == 0
    assert len(launch.measured) == 3
    (tmp_path / "runs/in1k/vit_small/seed0/checkpoint.pth").unlink()
    assert run("table11", launch, data=tmp_path / "data", **where) == 0
    assert (len(launch.started), len(launch.measured)) == (1, 5)


def test_what_was_begun_of_another_checkpoint_is_not_gone_on_with(run, no_report, data_read, tmp_path):
    """Nor left there as if it were this one's, should measuring this one fail."""

    def stopped(command):
        if "main.py" in command:
            return Pretend()(command)
        there.append(sorted(path.name for path in folder.iterdir()))
        (folder / "progress.json").write_text("{}")
        return 143

    where = {"out": tmp_path, "rows": "in_c_vit_small", "data": measured_data(tmp_path)}
    folder, there = tmp_path / "runs/imagenet_c/vit_small/seed0", []
    for _ in range(2):
        assert run("table8", stopped, **where) == 143
    os.utime(tmp_path / "runs/in1k/vit_small/seed0/checkpoint.pth", (0, 0))
    assert run("table8", stopped, **where) == 143
    new = ["begun.json", "launcher.lock"]
    assert there == [new, [*new, "progress.json"], new]


@pytest.mark.parametrize(
    ("table", "missing", "message"),
    [
        ("table8", "imagenet-a", "imagenet_a/vit_small, seed 0: --data-path {}/imagenet-a: no such folder"),
        ("table8", "imagenet-c", "imagenet_c/vit_small, seed 0: --data-path {}/imagenet-c: no such folder"),
        ("table11", "VOCdevkit", "jaccard/vit_small, seed 0: {}/VOCdevkit: no such folder"),
        ("fig1_fig4", "imagenet/val", "figures/vit_small, seed 0: {}/imagenet/val: no such folder"),
    ],
)
@pytest.mark.parametrize("launch", ["", "submitit"])
def test_data_to_measure_on_are_looked_for_before_training(
    table, missing, message, launch, run, slurm, data_read, tmp_path, capsys
):
    data = measured_data(tmp_path)
    (data / missing).rename(data / "elsewhere")
    assert run(table, start_nothing, out=tmp_path / "out", data=data, launch=launch) == 2
    assert message.format(data) in capsys.readouterr().err
    assert slurm.submitted == []


def test_what_covers_less_than_the_data_set_goes_on_when_more_has_come(run, no_report, data_read, tmp_path):
    def partial(command):
        code = launch(command)
        if "main.py" not in command:
            Path(command[-1], "results.json").write_text('{"instead": "mean error"}')
        return code

    launch, where = Pretend(), {"out": tmp_path, "data": measured_data(tmp_path), "rows": "in_c_vit_small"}
    assert run("table8", partial, **where) == 0
    assert run("table8", launch, **where) == 0
    assert run("table8", start_nothing, **where) == 0
    assert len(launch.measured) == 2


def test_given_weights_are_measured_and_nothing_is_trained(run, no_report, tmp_path):
    given = given_weights(tmp_path / "given weights.pth")
    launch = Pretend()
    chosen = {
        "out": tmp_path / "out",
        "seeds": "3 4",
        "ckpt_base": given,
        "ckpt_sar": given,
        "data": measured_data(tmp_path),
    }
    assert run("table8", launch, **chosen) == 0
    assert launch.started == []
    assert [words[words.index("--checkpoint") + 1] for words in launch.measured] == 4 * [str(given)], "once"
    assert (tmp_path / "out/table8/in_a_vit_small/seed3").resolve().parent.parent.name == "imagenet_a_given"
    assert not list((tmp_path / "out/table8").glob("*/trained"))


def test_given_weights_are_not_reported_as_the_trained_ones(run, data_read, tmp_path):
    """Nor trained ones as given ones, nor the seeds of the one and the other together."""

    def launch(command):
        code = pretend(command)
        if "main.py" in command:
            args = vars(pretend.started[-1])
            Path(args["output_dir"], "args.json").write_text(json.dumps(args))
        else:
            result = {"jaccard": next(values), "protocol": "paper-code", "images": 1449, "input_size": 480, "mass": 0.6}
            Path(command[-1], "results.json").write_text(json.dumps(result))
        return code

    def line(**chosen):
        assert run("table11", launch, rows="vit_small", out=tmp_path, data=tmp_path / "data", **chosen) == 0
        text = (tmp_path / "table11/report.md").read_text()
        return next(line for line in text.splitlines() if line.startswith("| ViT-S/16 |"))

    pretend, values = Pretend(), itertools.count(20.0)
    measured_data(tmp_path)
    assert line(seeds="0 1") == "| ViT-S/16 | 19.18 | 20.50 ± 0.71 (n = 2) |  |  | 0/300 | **not comparable** [1] |"
    given, other = (given_weights(tmp_path / f"{seed}.pth", seed=seed) for seed in (1, 2))
    of_given = "| ViT-S/16 | 19.18 | {} (n = 1) |  |  |  | measured on given weights |"
    assert line(ckpt_base=given, seeds="0") == of_given.format("22.00")
    assert line(ckpt_base=other, seeds="0") == of_given.format("23.00")
    assert line(ckpt_base=other, seeds="1") == of_given.format("24.00")
    assert "| 20.00 (n = 1) |  |  | 0/300" in line(seeds="0"), "a given seed 1 is not its"
    assert "20.50 ± 0.71 (n = 2) |  |  | 0/300" in line(seeds="1"), "its seed 0 has the same words"


@pytest.mark.parametrize(
    ("table", "chosen", "message"),
    [
        ("table11", {"ckpt_base": "README.md"}, "jaccard_given/vit_small, seed 0: README.md "),
        ("table8", {"ckpt_sar": "README.md"}, "imagenet_a_given/vit_small_sar, seed 0: README.md "),
        ("fig1_fig4", {"ckpt_sar": "README.md"}, "figures_given/vit_small, seed 0: README.md "),
        ("table8", {"ckpt_base": "other.pth"}, "imagenet-a: no class folder is a class of the model"),
        ("table11", {"ckpt_base": "other.pth", "ckpt_options": "--checkpoint-key ema"}, "other.pth: "),
        ("table11", {"ckpt_base": "other.pth", "ckpt_options": "--num-haeds 6"}, "no option --num-haeds"),
        ("table11", {"ckpt_base": "other.pth", "ckpt_options": "--num-heads 'six"}, "No closing quotation"),
        ("fig1_fig4", {"count": "abc"}, "argument --count: "),
        ("fig1_fig4", {"count": "1 2"}, "argument --count: "),
        ("fig1_fig4", {"images": "nowhere"}, "figures/vit_small, seed 0: nowhere: no such folder"),
    ],
)
def test_what_cannot_be_measured_is_known_before_training(table, chosen, message, run, data_read, tmp_path, capsys):
    given_weights(tmp_path / "other.pth", ["cat", "dog"])
    chosen = {name: str(value).replace("other.pth", str(tmp_path / "other.pth")) for name, value in chosen.items()}
    assert run(table, start_nothing, out=tmp_path / "out", data=measured_data(tmp_path), **chosen) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_options_of_given_weights_reach_what_measures_them(run, no_report, data_read, tmp_path, capsys):
    """A ViT of another program whose heads its file does not tell."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    chosen = {"out": tmp_path / "out", "data": measured_data(tmp_path), "rows": "vit_small"}
    chosen |= {"ckpt_base": tmp_path / "vit.pth"}
    assert run("table11", start_nothing, **chosen) == 2
    assert "give --num-heads" in capsys.readouterr().err
    launch = Pretend()
    assert run("table11", launch, ckpt_options="--num-heads 2", **chosen) == 0
    (words,) = launch.measured
    assert ("--num-heads", "2") in itertools.pairwise(words)


@pytest.mark.parametrize(("code", "result", "tried"), [(1, 1, 4), (2, 1, 4), (143, 143, 1)])
def test_a_measurement_that_fails(code, result, tried, run, no_report, tmp_path, capsys):
    """By itself, or for its input, it leaves the others theirs; what would end the next one, too, ends the script."""
    launch, commands = Pretend(), []

    def fail(command):
        if "main.py" in command:
            return launch(command)
        commands.append(command)
        return code

    assert run("table11", fail, smoke=True, out=tmp_path) == result
    assert len(commands) == tried
    assert f"jaccard/vit_small, seed 0: stopped with exit code {code}" in capsys.readouterr().err
    launch = Pretend()
    assert run("table11", launch, smoke=True, out=tmp_path) == 0
    assert len(launch.measured) == 4


def test_what_a_failed_run_was_to_be_measured_for_is_left_out(run, no_report, tmp_path, capsys):
    launch = Pretend()

    def fail_with_sar(command):
        return 1 if "main.py" in command and "in1k/vit_small_sar/" in command[-1] else launch(command)

    assert run("table8", fail_with_sar, smoke=True, out=tmp_path) == 1
    assert len(launch.measured) == 2
    assert (
        "imagenet_a/vit_small_sar, seed 0: skipped, because it depends on in1k/vit_small_sar, which failed"
        in capsys.readouterr().err
    )


# ------------------------------------------------------------------------------------------------ on a cluster


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{fake.folder}:/usr/bin:/bin")
    code = {"commit": "c0ffee", "uncommitted_changes": False}
    monkeypatch.setattr(launch_slurm, "environment", lambda: code)
    return fake


def finished(out: Path, table: str, **chosen) -> None:
    """Leave what the table's runs would leave at their end."""
    for job in runs_of(table, out=str(out), **chosen):
        Pretend()(["main.py", *job.words])


def test_a_table_is_one_job_array(run, no_report, slurm, tmp_path, capsys):
    """Recorded as usual; the same command leaves what is queued or finished alone, and in the end reports."""
    launch = "submitit --partition gpu --ngpus 2 --slurm-arg account=lab"
    chosen = {"smoke": True, "out": tmp_path / "out", "rows": "A F", "seeds": "0 1", "launch": launch}
    assert run("table1b", **chosen) == 0
    (text,) = slurm.submitted
    asked = sbatch_options(text)
    assert (asked["array"], asked["partition"], asked["account"]) == ("0-3%4", "gpu", "lab")
    assert asked["output"] == f"{tmp_path}/out/submitit/%A_%a_0_log.out"
    told = capsys.readouterr().out
    assert re.search(r"^in100_100/vit_small_sar, seed 1 +70_3 +submitted$", told, re.MULTILINE)
    assert "when all are finished, the same command prints the report" in told
    job = json.loads((tmp_path / "out/runs/in100_100/vit_small_sar/seed1/job.json").read_text())
    assert (job["job_id"], job["args"]["seed"], job["epochs"]) == ("70_3", 1, 2)
    assert os.readlink(tmp_path / "out/table1b/F/seed1") == "../../runs/in100_100/vit_small_sar/seed1"
    assert (tmp_path / "out/table1b/A/protocol.json").exists()

    finished(tmp_path / "out", "table1b", smoke=True, rows="A", seeds="0 1")
    slurm.queue("70_3 RUNNING None")
    assert run("table1b", **chosen) == 0
    assert "array" not in sbatch_options(slurm.submitted[1]), "the other seed of F is queued"
    finished(tmp_path / "out", "table1b", smoke=True, rows="F", seeds="0 1")
    assert run("table1b", **chosen) == 0
    assert len(slurm.submitted) == 2
    assert capsys.readouterr().out.endswith(f"report of {tmp_path}/out/table1b\n")


def test_fine_tuning_waits_for_the_weights_that_it_needs(run, slurm, tmp_path, capsys):
    """Those from one run wait for no other, and are taken away if it fails; a queued run is waited for as well."""
    chosen = {"smoke": True, "out": tmp_path / "out", "rows": "no-no_pets yes-no_pets no-yes_pets"}
    chosen["launch"] = "submitit"
    assert run("table7", **chosen) == 0
    first, *others = map(sbatch_options, slurm.submitted)
    assert first["array"] == "0-1%2"
    assert "dependency" not in first
    assert [(asked.get("array"), asked["dependency"]) for asked in others] == [
        ("0-1%2", "afterok:70_0"),
        (None, "afterok:70_1"),
    ]
    assert {asked["kill-on-invalid-dep"] for asked in others} == {"yes"}
    assert "submitted, after in1k/vit_small_sar, seed 0" in capsys.readouterr().out

    finished(tmp_path / "out", "table7", smoke=True, rows="no-no_pets")
    slurm.queue("70_1 RUNNING None")
    chosen["launch"] = "submitit --slurm-arg dependency=singleton"
    assert run("table7", **chosen) == 0
    assert [sbatch_options(text)["dependency"] for text in slurm.submitted[3:]] == [
        "singleton,afterok:70_1",
        "singleton",
    ], "the baseline is finished"


def test_a_dry_run_prints_what_slurm_would_get(run, slurm, tmp_path, capsys):
    chosen = {"smoke": True, "out": tmp_path / "out", "launch": "submitit --ngpus 4 --max-parallel 2"}
    assert run("table1a", dry_run=True, **chosen) == 0
    assert not (tmp_path / "out").exists()
    text = capsys.readouterr().out
    assert run("table1a", dry_run=False, **chosen) == 0
    (submitted,) = slurm.submitted
    assert submitted in text
    folder = tmp_path / "out/runs/in100_100/vit_small_sar_lambda0.1/seed0"
    words = json.loads((folder / "job.json").read_text())["words"]
    assert f"# 5: in100_100/vit_small_sar_lambda0.1, seed 0\nmain.py {shlex.join(words)}\n" in text


def test_a_run_that_a_job_has_is_not_trained_here_too(run, slurm, tmp_path, capsys):
    chosen = {"smoke": True, "out": tmp_path, "rows": "F"}
    assert run("table1b", launch="submitit", **chosen) == 0
    slurm.queue("70 RUNNING None")
    assert run("table1b", **chosen) == 2
    assert "in100_100/vit_small_sar, seed 0: job 70 executes this run (running)" in capsys.readouterr().err


def test_what_is_measured_waits_for_the_jobs_and_is_measured_here(run, no_report, slurm, data_read, tmp_path, capsys):
    chosen = {"smoke": True, "out": tmp_path / "out", "rows": "vit_small_sar", "launch": "submitit"}
    assert run("table11", start_nothing, **chosen) == 0
    assert len(slurm.submitted) == 1
    assert "when all are finished, the same command measures, on this machine, and prints the report" in (
        capsys.readouterr().out
    )
    finished(tmp_path / "out", "table11", smoke=True, rows="vit_small_sar")
    launch = Pretend()
    assert run("table11", launch, **chosen) == 0
    assert (len(launch.started), len(launch.measured), len(slurm.submitted)) == (0, 1, 1)
    assert run("table11", start_nothing, dry_run=True, **chosen) == 0
    assert " -m analysis.jaccard " in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------- in small


@pytest.fixture(scope="module")
def fewer_digits():
    """--smoke's data, cut to save the suite's time: 280 training images instead of 1,437."""
    digits = sklearn.datasets.load_digits()
    digits.images, digits.target = digits.images[:350], digits.target[:350]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sklearn.datasets, "load_digits", lambda: digits)
        yield


@pytest.fixture(scope="module")
def smoke_out(tmp_path_factory):
    return tmp_path_factory.mktemp("smoke")


@pytest.mark.parametrize(
    ("table", "row"),
    [
        ("table1a", "0.05"),
        ("table1b", "D"),
        ("table1c", "vit_small_sar_300"),
        ("table2", "cars_vit_small_sar"),
        ("table3", "0.25_vit_small"),
        ("table4", "vit_small_sar_drloc"),
        ("fig3", "vit_small"),
        ("table9", "t2t_vit_14_sar"),
        ("table9", "pvt_small_sar"),
        ("table10", "cvt_13_sar"),
        ("appendix_b", "total_variation"),
        ("table12", "accuracy_moco_v3_sar"),
        ("table12", "accuracy_dino"),
    ],
)
def test_a_row_of_each_script(table, row, run, fewer_digits, smoke_out, capsys):
    """Row, recipe and main.py as they are, to the report; only no new process is started."""
    assert run(table, in_this_process, smoke=True, rows=row, out=smoke_out) == 0
    log = [json.loads(line) for line in (smoke_out / table / row / "seed0/log.txt").read_text().splitlines()]
    assert len(log) == 2
    report = (smoke_out / table / "report.md").read_text()
    name = tables.TABLES[table]["rows"][row]["name"]
    (line,) = [line for line in report.splitlines() if line.startswith(f"| {name} |")]
    assert f"{log[-1]['test_acc1']:.2f} (n = 1)" in line
    assert "not comparable" in line
    assert report in capsys.readouterr().out
    assert run(table, start_nothing, smoke=True, rows=row, out=smoke_out) == 0


@pytest.mark.parametrize(
    ("table", "row", "metric"), [("table5", "vit_small_sar", "ap50_11point"), ("ade20k", "pvt_small", "miou")]
)
def test_a_dense_row(table, row, metric, run, fewer_digits, smoke_out):
    """From the pre-training to the report, as `test_a_row_of_each_script`, on the toy sets."""
    assert run(table, in_this_process, smoke=True, rows=row, out=smoke_out) == 0
    log = [json.loads(line) for line in (smoke_out / table / row / "seed0/log.txt").read_text().splitlines()]
    report = (smoke_out / table / "report.md").read_text()
    (line,) = [
        line for line in report.splitlines() if line.startswith(f"| {tables.TABLES[table]['rows'][row]['name']} |")
    ]
    assert f"{log[-1][f'test_{metric}']:.2f} (n = 1)" in line
    assert "20 test images, not " in report
    assert f"metric {metric}" not in report, "it is the table's own"
    (started,) = [job for job in runs_of(table, smoke=True, out=smoke_out) if job.row.name == row]
    assert torch.load(started.checkpoint, weights_only=True)["args"]["finetune"].startswith(f"{smoke_out}/runs/")


def test_the_four_ways_of_fine_tuning(run, fewer_digits, smoke_out):
    """Appendix E.4: the last block stays the pre-training's, lambda is the fine-tuning's own."""
    ways = {
        "no-no": ("standard", 0.0),
        "yes-no": ("sar", 0.0),
        "no-yes": ("standard", 0.01),
        "yes-yes": ("sar", 0.01),
    }
    rows = " ".join(f"{way}_pets" for way in ways)
    assert run("table7", in_this_process, smoke=True, rows=rows, out=smoke_out) == 0
    for way, expected in ways.items():
        folder = smoke_out / f"table7/{way}_pets/seed0"
        checkpoint = torch.load(folder / "checkpoint.pth", weights_only=True)
        args, protocol = checkpoint["args"], json.loads((folder.parent / "protocol.json").read_text())
        assert (args["last_block"], args["sar_weight"]) == expected
        assert (protocol["last_block"], protocol["sar_weight"]) == expected
        assert ("blocks.1.norm2.weight" in checkpoint["model"]) == (expected[0] == "standard")
        pretrained = "vit_small_sar" if way.startswith("yes") else "vit_small"
        assert args["finetune"] == f"{smoke_out}/runs/in1k/{pretrained}/seed0/checkpoint.pth"
    assert not (smoke_out / "table7/-").exists()
    assert sorted(path.name for path in (smoke_out / "runs/in1k").iterdir() if path.name != "vit_small_sar_drloc") == [
        "vit_small",
        "vit_small_sar",
    ]


def test_fine_tuning_from_given_weights_is_another_run(run, no_report, tmp_path, capsys):
    def first_run(**chosen):
        launch = Pretend()
        assert run("table7", launch, out=tmp_path, smoke=True, **chosen) == 0
        return launch.started

    given = tmp_path / "given weights.pth"
    torch.save({"model": {"blocks.0.norm2.weight": torch.ones(1)}}, given)
    own = first_run(rows="no-no_pets")
    assert [args.output_dir.removeprefix(f"{tmp_path}/runs/") for args in own] == [
        "in1k/vit_small/seed0",
        "finetune/no-no_pets/seed0",
    ]
    (args,) = first_run(rows="no-no_pets", ckpt_base=given)
    assert args.output_dir == f"{tmp_path}/runs/finetune_given/no-no_pets/seed0"
    assert args.finetune == str(given)
    assert os.readlink(tmp_path / "table7/no-no_pets/seed0") == "../../runs/finetune_given/no-no_pets/seed0"
    other = given.rename(tmp_path / "other.pth")
    assert run("table7", start_nothing, out=tmp_path, smoke=True, rows="no-no_pets", ckpt_base=other) == 2
    assert f"--finetune: {given} in the checkpoint, {other} now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("table", "row", "told"),
    [
        ("table8", "in_a_vit_small", "accuracy [0-9.]+ % over 10 classes and 20 images"),
        ("table8", "in_c_vit_small", "mean error [0-9.]+ % over 2 of 15 corruptions, 4 of 75 severities"),
        ("table11", "vit_small", "images 20, not 1,449; input size 40, not 480"),
        ("table12", "jaccard_dino", "images 20, not 1,449; input size 40, not 480"),
    ],
)
def test_a_measured_row_of_each_script(table, row, told, run, fewer_digits, smoke_out, capsys):
    """Scripts, runs and measurements as they are, to the report; none of it passes for the paper's."""
    assert run(table, in_this_process, smoke=True, rows=row, out=smoke_out) == 0
    report = (smoke_out / table / "report.md").read_text()
    assert report in capsys.readouterr().out
    result = json.loads((smoke_out / table / row / "seed0/results.json").read_text())
    ours = f"{result['jaccard']:.2f} (n = 1)" if "jaccard" in result else "–"
    paper = tables.TABLES[table]["rows"][row]
    cells = re.escape(f"| {paper['name']} | {paper['value']} | {ours} |")
    assert re.search(rf"^{cells}( –)?[ |]* 2/2 \| \*\*not comparable\*\*", report, re.MULTILINE)
    assert re.search(rf"Not comparable with the paper: .*{told}.*data set digits, not imagenet(100)?", report)


def test_a_table_tells_its_models_apart(run, fewer_digits, smoke_out, capsys):
    assert run("table11", in_this_process, smoke=True, out=smoke_out) == 0
    text = capsys.readouterr().out + (smoke_out / "table11/vit_small_sar/seed0/results.json").read_text()
    assert '"model": "ViT-S/16 + SAR"' in text
    assert "| seed0 |" not in text


def test_a_checkpoint_that_changes_is_measured_anew(run, fewer_digits, smoke_out, tmp_path):
    """Also where the measurement itself would refuse to go on, with another one's severities."""
    chosen = {"smoke": True, "rows": "in_c_vit_small", "out": tmp_path, "ckpt_base": tmp_path / "given.pth"}
    results = []
    for seed in (0, 1):
        given_weights(tmp_path / "given.pth", seed=seed)
        assert run("table8", in_this_process, **chosen) == 0
        results.append(json.loads((tmp_path / "table8/in_c_vit_small/seed0/results.json").read_text()))
    first, second = (result["checkpoint_sha256"] for result in results)
    assert first != second


def test_figures_of_both_models(run, fewer_digits, smoke_out, capsys):
    assert run("fig1_fig4", in_this_process, smoke=True, out=smoke_out, count=2) == 0
    assert capsys.readouterr().out.endswith(f"results: {smoke_out}/fig1_fig4\n")
    assert "ViT-S/16 + SAR" in (smoke_out / "fig1_fig4/maps/seed0/index.html").read_text()


def terminated_after(number: int, function):
    """``function`` that sends this process SIGTERM at its ``number``-th call."""
    calls = itertools.count(1)

    def wrapped(*args):
        function(*args)
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)

    return wrapped


def test_an_interrupted_row_goes_on(run, fewer_digits, tmp_path, capsys, monkeypatch):
    chosen = {"smoke": True, "rows": "E", "out": tmp_path}
    with monkeypatch.context() as patch:
        patch.setattr(engine, "update_weights", terminated_after(6, engine.update_weights))
        assert run("table1b", in_this_process, **chosen) == 143
    assert "stopped after 1 of 2 epochs with exit code 0; run the same command to resume it" in capsys.readouterr().err
    assert run("table1b", in_this_process, **chosen) == 0
    text = capsys.readouterr().out
    assert "epoch 1 of 2" in text
    assert "epoch 1, update 2" in text


def test_a_row_through_bash_and_processes_of_its_own(tmp_path):
    """Nothing replaced, and typed in another folder, which has a module of a name that is used here."""
    (tmp_path / "utils.py").write_text("raise RuntimeError")
    command = [ROOT / "scripts/appendix_b_alternatives.sh", "--smoke", "--rows", "softmax", "--out", "out"]
    environ = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(["bash", *command], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "out/appendix_b/report.md").read_text()
    assert done.stdout.endswith(report + "\n")
    assert "2/2" in report
