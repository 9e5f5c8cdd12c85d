"""The pages: their commands are understood, their links lead somewhere, their examples work, their names exist."""

import argparse
import ast
import contextlib
import importlib
import itertools
import re
import shlex
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml  # timm needs it
from helpers.checkpoints import write_checkpoint

import datasets
import main
import models
import readers
import tasks
from arguments import parse_arguments
from fetch import is_name
from paper import options
from readers import published
from run_with_submitit import build_cluster, build_specs, parse_command_line
from utils import UserError

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
TEXTS = [*PAGES, "CHANGELOG.md", "benchmarks/README.md", "benchmarks/LOG.md"]


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), flags=re.DOTALL | re.MULTILINE)


def prose(page: str) -> str:
    """The text of a page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


# ------------------------------------------------------------------------------------------------- commands


def commands(page: str) -> list[str]:
    """Every command of the page's shell blocks, without comments; ``a && b`` are two."""
    found = []
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            found += re.split(r"\s*&&\s*", re.sub(r"(^|\s)#.*", "", line).strip())
    return [command for command in found if command]


class Understood(BaseException):
    """A command line was parsed to its end; what it asks for is not done."""


def parse_only(module: str, words: list[str], monkeypatch) -> None:
    """Let the program ``python -m module`` parse these words with its own parser, and stop there."""
    program = importlib.import_module(module)
    if hasattr(program, "parse_args"):  # it checks more than argparse does
        program.parse_args(words)
        return
    original = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, args=None, namespace=None):
        original(parser, args, namespace)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    start = getattr(program, "main", None) or program.run_command_line
    with pytest.raises(Understood):
        start(words)


def parse_training(words: list[str]) -> None:
    parse_arguments(words)


def parse_launcher(words: list[str]) -> None:
    launcher, main_words = parse_command_line(words)
    if not launcher.status:
        build_cluster(launcher)
        build_specs(launcher, main_words, words)


def parse_script(path: str, words: list[str]) -> None:
    """A shell script's words, which its comment hands on to a program."""
    text = text_of(path)
    if "run_table.sh" in text and path != "scripts/run_table.sh":
        options.read_settings([*re.findall(r'run_table.sh" (\w+)', text), *words])
    elif path == "scripts/quickstart.sh":
        parse_training(["@recipes/quickstart.args", *words])
    elif path == "scripts/install.sh":
        assert all((ROOT / word).is_file() for word in words)
    else:
        assert path == "scripts/test.sh", f"no test knows how to parse {path}"
        parse_pytest(words)


def parse_pytest(words: list[str]) -> None:
    markers = " ".join(tomllib.loads(text_of("pyproject.toml"))["tool"]["pytest"]["ini_options"]["markers"])
    for option, value in itertools.pairwise(words):
        assert option != "-m" or f"{value}:" in markers
    assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))


def understand(words: list[str], monkeypatch) -> None:
    """Let the program that a command starts parse the rest of it.

    Raises:
        AssertionError: a command that this test does not know.
    """
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):  # variables of the environment
        words = words[1:]
    program, *rest = words
    if "main.py" in words:
        parse_training(words[words.index("main.py") + 1 :])
    elif program == "bash":
        parse_script(rest[0], rest[1:])
    elif program == "python" and rest[0] == "run_with_submitit.py":
        parse_launcher(rest[1:])
    elif program == "python" and rest[0].startswith("tests/helpers/"):
        parse_only(rest[0].removesuffix(".py").removeprefix("tests/").replace("/", "."), rest[1:], monkeypatch)
    elif program == "python" and rest[:2] == ["-m", "pytest"]:
        parse_pytest(rest[2:])
    elif program == "python" and rest[:3] == ["-m", "paper", "run"]:
        options.read_settings(rest[3:])
    elif program == "python" and rest[:2] == ["-m", "paper"]:
        parse_only("paper.__main__", rest[2:], monkeypatch)
    elif program == "python" and rest[:2] == ["-m", "readers.tars"]:
        assert len(rest) > 2  # it takes nothing but files
    elif program == "python" and rest[0] == "-m":
        parse_only(rest[1], rest[2:], monkeypatch)
    else:
        assert program in ("git", "cd", "source", "ruff", "mypy", "pip", "pre-commit"), (
            f"no test knows how to parse {program}"
        )


def not_fetched(source, check):
    """`fetch.local_file` where nothing is fetched."""
    return Path("not_fetched.pth" if is_name(source) else source)


@pytest.mark.parametrize("command", sorted({command for page in PAGES for command in commands(page)}))
def test_every_command_is_understood_by_its_program(command, tmp_path, monkeypatch):
    """In a folder of the recipes and of empty files for the weights that a command names, which may be missing."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    words = shlex.split(command)
    for name in ("vit.pth", "sar.pth"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("weights.local_file", not_fetched)
    with contextlib.suppress(SystemExit):  # --help
        try:
            understand(words, monkeypatch)
        except UserError as error:
            if "no such file" not in str(error).lower():
                raise


def test_a_mistyped_option_would_be_found(monkeypatch):
    for command in (
        "torchrun --nproc_per_node=8 main.py --modle vit_small",
        "python -m analysis.figures --checkpoint sar.pth --outt figures",
        "python -m benchmarks.loss --batches 128",
        "python -m paper report --figures output/table1b",
        "bash scripts/table1b_components.sh --seed 0",
        "python run_with_submitit.py --job-dir runs --particion gpu",
    ):
        with monkeypatch.context() as patches, pytest.raises((UserError, SystemExit, pytest.fail.Exception)) as error:
            understand(shlex.split(command), patches)
        assert getattr(error.value, "code", 2) != 0


# ---------------------------------------------------------------------------------------------- links, names


def anchors(page: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        place = (ROOT / page).parent / path if path else ROOT / page
        assert place.exists(), target
        if anchor:
            assert anchor in anchors(str(place.resolve().relative_to(ROOT))), target


OWN = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}


@pytest.mark.parametrize("page", PAGES)
def test_files_and_names_in_the_text_exist(page):
    """Of code in the text: what looks like a file of the repository, or like a name in one of its modules."""
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        if re.fullmatch(r"[\w/.-]+/[\w.-]*\.(py|sh|args|toml|txt)|\w+\.py", code) and code.partition("/")[0] != "mine":
            assert (ROOT / code).exists(), code
        elif re.fullmatch(r"\w+\.sh", code):
            assert (ROOT / "scripts" / code).exists(), code
        elif re.fullmatch(r"\w+(\.\w+)+", code) and code.partition(".")[0] in OWN:
            resolve(code)


def resolve(name: str) -> None:
    """Import the modules of a dotted name, and look up the rest of it."""
    parts = name.split(".")
    found = importlib.import_module(parts[0])
    for number, part in enumerate(parts[1:], start=1):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[: number + 1]))
        found = getattr(found, part)


# -------------------------------------------------------------------------------------------------- examples


def test_readmes_python_runs():
    (block,) = blocks("README.md", "python")
    names = {}
    exec(block, names)
    assert names["similarity"].shape == (8, 6, 14, 14)
    assert names["model"].patch_embed.proj.weight.grad.abs().sum() > 0


def test_the_python_of_the_pages_runs():
    """But for the page whose examples need a trained model, see the next test."""
    for page in PAGES:
        if page.startswith("docs/") and page != "docs/train.md":
            for block in blocks(page, "python"):
                exec(block, {})


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """The examples of "Use a model elsewhere", and a folder where its command was given."""
    folder = tmp_path_factory.mktemp("elsewhere")
    write_checkpoint(folder / "best.pth", ["one", "two", "three"])
    (command,) = [words for words in commands("docs/train.md") if "--export hub" in words]
    with contextlib.chdir(folder):
        assert main.main(shlex.split(command)[2:]) == 0
    return blocks("docs/train.md", "python"), folder


def test_a_trained_model_goes_into_timm_and_torchscript(elsewhere, monkeypatch):
    (timms, *_), folder = elsewhere
    monkeypatch.chdir(folder)
    names = {}
    exec(timms, names)
    model, images = names["model"], torch.randn(3, *names["images"].shape[1:])
    weights = torch.load("best.pth", weights_only=True)["model"]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(torch.jit.load("model.pt")(images), model(images))


def test_a_trained_model_goes_into_onnx(elsewhere, monkeypatch):
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    (timms, onnx, _), folder = elsewhere
    monkeypatch.chdir(folder)
    names = {}
    exec(timms.replace("torch.jit", "# torch.jit"), names)
    exec(onnx, names)
    images = torch.randn(3, *names["images"].shape[1:])
    (logits,) = reference.ReferenceEvaluator("model.onnx").run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), names["model"](images))


def test_weights_and_biases_begins_before_the_training(elsewhere, tmp_path, monkeypatch):
    """With a module in the place of wandb, which is not installed for the tests."""
    *_, tracked = elsewhere[0]
    events = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **settings: events.append(settings)))
    monkeypatch.setattr(main, "main", lambda words: events.append(words) or 0)
    monkeypatch.setattr(sys, "argv", ["tracked.py", "--epochs", "1"])
    with pytest.raises(SystemExit, match="0"):
        exec(tracked, {})
    assert events == [{"project": "sar", "sync_tensorboard": True}, ["--epochs", "1"]]


def examples() -> dict[str, list[str]]:
    """CONTRIBUTING's examples by section: the new code, and the line that names it."""
    sections = re.split(r"^## ", text_of("CONTRIBUTING.md"), flags=re.MULTILINE)
    found = {}
    for section in sections:
        code = re.findall(r"^```python\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE)
        if code:
            found[section.splitlines()[0]] = code
    return found


def new_module(package, name: str, code: str, folder: Path, monkeypatch) -> None:
    """Make ``package.name`` of this code importable for one test."""
    (folder / f"{name}.py").write_text(code)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}", raising=False)


def test_the_new_data_set_of_contributing_is_read(tmp_path, monkeypatch):
    function, line = examples()["Add a data set"]
    assert line.startswith("# readers/__init__.py, in DATASETS\n")
    names = dict(vars(published))
    exec(function, names)
    monkeypatch.setattr(published, "read_shapes", names["read_shapes"], raising=False)
    ((name, entry),) = eval("{" + line + "}", vars(readers)).items()
    monkeypatch.setitem(readers.DATASETS, name, entry)
    with pytest.raises(UserError, match=r"shapes\.npz"):
        datasets.read_split(name, "train", tmp_path)
    arrays = {
        f"{split}_{kind}": np.full(shape, 2, np.uint8)
        for split in ("train", "val")
        for kind, shape in (("images", (4, 28, 28)), ("labels", 4))
    }
    np.savez(tmp_path / "shapes.npz", **arrays)
    images = datasets.read_split(name, "val", tmp_path)
    assert (len(images), images.classes[images[0][1]], images[0][0].shape) == (4, "triangle", (3, 28, 28))


def test_the_new_model_of_contributing_is_built(tmp_path, monkeypatch):
    module, line = examples()["Add a model"]
    assert line.startswith("# models/__init__.py, in FAMILIES\n")
    (family,) = eval("(" + line + ")", dict(vars(models)))
    new_module(models, family.module.removeprefix("models."), module, tmp_path, monkeypatch)
    for name in ("vit_micro", "vit_micro_sar"):
        monkeypatch.setitem(models.MODELS, name, family)
        last_block = "sar" if name.endswith("_sar") else "standard"
        settings = models.ModelSettings(name, 10, input_size=32, patch_size=8, last_block=last_block)
        model, grid = models.build_model(settings, torch.device("cpu"))
        assert (grid, len(model.blocks), model.num_features) == ((4, 4), 2, 96)


def test_the_new_task_of_contributing_trains(tmp_path, monkeypatch):
    module, line = examples()["Add a task"]
    assert line.startswith("# tasks/__init__.py, in TASKS\n")
    ((name, place),) = eval("{" + line + "}").items()
    new_module(tasks, place.partition(":")[0].removeprefix("tasks."), module, tmp_path, monkeypatch)
    monkeypatch.setitem(tasks.TASKS, name, place)
    small = "--model vit_tiny_sar --input-size 8 --patch-size 2 --model-kwargs embed_dim=24 depth=1 num_heads=3"
    words = f"--task {name} {small} --data-set digits --sampling-ratio 0.05 --epochs 1 --poly-epsilon 0.5 --device cpu"
    out = tmp_path / "out"
    for mixup in ("0", "0.8"):
        assert main.main([*words.split(), "--mixup", mixup, "--output-dir", str(out / mixup)]) == 0
        assert '"train_poly"' in (out / mixup / "log.txt").read_text()


# ---------------------------------------------------------------------------------------------- the drawings


def drawing(heading: str) -> list[str]:
    """The lines of the first text block below a heading of the architecture's page."""
    below = text_of("docs/architecture.md").partition(f"\n## {heading}\n")[2]
    return re.search(r"^```text\n(.*?)^```", below, flags=re.DOTALL | re.MULTILINE)[1].splitlines()


def test_the_tree_is_the_repositorys():
    lines = [line.split()[0].rstrip("/") for line in drawing("The tree")]
    drawn = set(lines)
    assert len(drawn) == len(lines), "each once"
    assert not [name for name in drawn if not ((ROOT / name).exists())]
    assert drawn >= {f"{name}.py" if (ROOT / f"{name}.py").exists() else name for name in OWN}


def test_imports_point_downwards():
    """Each module imports only what stands below it in the drawing, or the other modules of its own package."""
    rows = [re.split(r" {3,}", line)[0].split() for line in drawing("Imports") if line.strip() != "|"]
    height = {name: -number for number, row in enumerate(rows) for name in row}
    assert set(height) == OWN
    wrong = []
    for name in height:
        files = [ROOT / f"{name}.py"] if (ROOT / f"{name}.py").exists() else sorted((ROOT / name).glob("*.py"))
        for path in files:
            above = {imported for imported in imports_of(path) if imported != name and height[imported] >= height[name]}
            wrong += [f"{path.relative_to(ROOT)} imports {imported}" for imported in sorted(above)]
    assert not wrong


def imports_of(path: Path) -> set[str]:
    """The program's own modules and packages that a file imports when it is imported itself."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.partition(".")[0] for name in names} & OWN


# ----------------------------------------------------------------------------------------------- other files


def test_readme_is_short():
    assert len(text_of("README.md").splitlines()) <= 170


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_lines_have_at_most_120_characters(page):
    assert not [line for line in text_of(page).splitlines() if len(line) > 120]


def test_every_table_script_is_in_the_readme_and_on_its_page():
    scripts = {path.name for path in (ROOT / "scripts").glob("*.sh") if "run_table.sh" in path.read_text()}
    for page in ("README.md", "docs/reproduce.md"):
        assert not [name for name in scripts - {"run_table.sh"} if f"`{name}`" not in text_of(page)]


def test_the_hours_of_the_reproduction_page_follow_from_a_measured_rate():
    page, measured = text_of("docs/reproduce.md"), text_of("benchmarks/README.md")
    (rule,) = re.findall(r"([\d,]+) / \(3,600 x ([\d,]+)\) = ([\d.]+) hours", page)
    images, rate = (int(number.replace(",", "")) for number in rule[:2])
    assert f"{images / 3600 / rate:.1f}" == rule[2]
    assert re.search(rf"\| step \| vit_small \|.* {rule[1]} \|", measured)


def test_every_data_set_and_model_is_on_its_page():
    for name in readers.DATASETS:
        assert f"`{name}`" in text_of("docs/data.md")
    for name in models.MODELS:
        assert f"`{name.removesuffix('_sar')}`" in text_of("README.md")
        assert f"`{name.removesuffix('_sar')}`" in text_of("docs/train.md")


def test_torch_hub_loads_a_model():
    small = {"num_classes": 10, "img_size": 8, "patch_size": 2, "embed_dim": 24, "depth": 2, "num_heads": 3}
    model = torch.hub.load(str(ROOT), "vit_tiny_sar", source="local", **small)
    logits, similarity = model(torch.randn(2, 3, 8, 8), return_similarity=True)
    assert (logits.shape, similarity.shape) == ((2, 10), (2, 3, 4, 4))


def test_torch_hub_knows_every_registered_model_and_nothing_else():
    import hubconf

    public = {name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")}
    assert public == set(models.MODELS)
    assert all(f"``{name}``" in getattr(hubconf, name).__doc__ for name in public)


def test_the_citation_and_the_hooks_are_yaml():
    citation = yaml.safe_load(text_of("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == tomllib.loads(text_of("pyproject.toml"))["project"]["version"]
    paper = citation["preferred-citation"]
    names = ["Peruzzo", "Sangineto", "Liu", "De Nadai", "Bi", "Lepri", "Sebe"]
    assert [author["family-names"] for author in paper["authors"]] == names
    for repository in yaml.safe_load(text_of(".pre-commit-config.yaml"))["repos"]:
        assert repository["repo"] == "local"
        assert all(hook["language"] == "system" for hook in repository["hooks"])
