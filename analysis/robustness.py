"""Robustness to distribution shift: accuracy on ImageNet-A, and corruption error on ImageNet-C (Table 8).

    python -m analysis.robustness --checkpoint sar.pth --data-set imagenet-a --data-path imagenet-a --out sar_a
    python -m analysis.robustness --checkpoint sar.pth --data-set imagenet-c --data-path imagenet-c --out sar_c

ImageNet-A has the layout <wnid>/*. Its score is the accuracy over the logits of its 200 classes, with the usual
evaluation transform (256 -> 224). ImageNet-C has the layout <corruption>/<severity>/<wnid>/*, or
noise/<corruption>/... as in the published tars. Its images already have the model's input size and are not resized.
The CE of a corruption is the sum of its five errors over the sum of AlexNet's; mCE is the mean CE of 15 corruptions.
The four extra corruptions are measured if present, but are not part of mCE.

Class folders are matched with the model's classes by name. Missing parts are reported before the evaluation starts,
and a score over a part of the set is reported under another name. Each severity is saved as soon as it is measured;
the same command resumes. --out gets results.json, results.csv and results.md.
"""

import argparse
import hashlib
import json
import pkgutil
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn

from analysis.commands import add_loading_options, add_model_options
from analysis.models import TrainedModel, load_model, short_names
from augmentation import eval_transform
from build import choose_amp
from cli import Parser, at_least, exit_code
from datasets import AugmentedDataset, build_loader
from engine import evaluate
from readers.folders import class_folders, find_in_classes
from readers.images import ImageFiles, UnreadableImage
from samplers import EvalSampler
from tasks.classify import Accuracy
from utils import (
    Processes,
    UserError,
    environment,
    logger,
    pick_device,
    prepare_output_dir,
    start_logging,
    write_atomically,
    write_csv,
    write_json,
)
from weights import weights_file

IMAGENET_C = json.loads(Path(__file__).with_name("imagenet_c.json").read_text(encoding="utf-8"))
CORRUPTIONS: dict[str, dict] = IMAGENET_C["corruptions"]
"""All 19 corruptions: ``group``, and for the 15 of mCE ``alexnet_error``, AlexNet's mean error over the severities."""
MCE_CORRUPTIONS = [name for name, corruption in CORRUPTIONS.items() if "alexnet_error" in corruption]
SEVERITIES: list[int] = IMAGENET_C["severities"]

IMAGES = {"imagenet-a": 7_500, "imagenet-c": 50_000}
"""Number of images of ImageNet-A, and of each severity of each corruption of ImageNet-C."""
LAYOUTS = {"imagenet-a": "<wnid>/*", "imagenet-c": "<corruption>/<severity>/<wnid>/*, corruptions in groups or not"}
COLUMNS = "corruption severity classes missing_classes files images error spatial_entropy components".split()
"""Columns of results.csv, which are the keys of a record."""
TITLES = {"imagenet-a": "ImageNet-A", "imagenet-c": "ImageNet-C"}


@cache
def list_classes(data_set: str) -> list[str]:
    """The classes (wnids) of a set, in order."""
    if data_set == "imagenet-c":
        return ImageNetInfo("imagenet-1k").label_names()
    return pkgutil.get_data("timm.data", "_info/imagenet_a_synsets.txt").decode().split()


# ----------------------------------------------------------------------------------------------- the files


@dataclass(frozen=True)
class Part:
    """The unit of evaluation: one severity of one corruption, or all of ImageNet-A (corruption "", severity 0)."""

    corruption: str
    severity: int
    folder: Path
    classes: tuple[str, ...]
    """Names of its class folders."""

    @property
    def data_set(self) -> str:
        return "imagenet-c" if self.corruption else "imagenet-a"

    def __str__(self) -> str:
        return f"{self.corruption}, severity {self.severity}" if self.corruption else self.data_set


def find_parts(data_set: str, data_path: Path) -> list[Part]:
    """All parts of the set in the folder; image files are not listed yet.

    Raises:
        UserError: no such folder, or no part of the set in it.
    """
    if not data_path.is_dir():
        raise UserError(f"--data-path {data_path}: no such folder; {data_set} is a folder with {LAYOUTS[data_set]}")
    places = {("", 0): data_path} if data_set == "imagenet-a" else _severity_folders(data_path)
    parts = [Part(*place, folder, names) for place, folder in places.items() if (names := tuple(class_folders(folder)))]
    if not parts:
        raise UserError(
            f"--data-path {data_path}: no class folders in it; {data_set} is a folder with {LAYOUTS[data_set]}"
        )
    return parts


def _severity_folders(data_path: Path) -> dict[tuple[str, int], Path]:
    found = {}
    for name, corruption in CORRUPTIONS.items():
        places = [path for path in (data_path / name, data_path / corruption["group"] / name) if path.is_dir()]
        if len(places) > 1:
            raise UserError(f"{data_path}: {name} is found twice, in {places[0]} and {places[1]}; remove one")
        for severity in SEVERITIES if places else ():
            if (places[0] / str(severity)).is_dir():
                found[name, severity] = places[0] / str(severity)
    return found


def find_gaps(data_set: str, parts: list[Part], known: Iterable[str]) -> list[str]:
    """One line per missing part of the set, and per kind of class folder that is ignored or does not belong to it.

    Args:
        data_set: its name.
        parts: from `find_parts`.
        known: the model's classes.
    """
    # 1. missing corruptions and severities
    severities_of: dict[str, set[int]] = defaultdict(set)
    lines = []
    for part in parts:
        severities_of[part.corruption].add(part.severity)
    if data_set == "imagenet-c":
        if absent := [name for name in MCE_CORRUPTIONS if name not in severities_of]:
            lines.append(f"no folders for the corruptions {_join_some(absent)}")
        for name, severities in severities_of.items():
            if lacking := sorted(set(SEVERITIES) - severities):
                lines.append(f"{name}: no folders for the severities {_join_some(lacking)}")
    # 2. missing, ignored and foreign classes
    known, wanted = set(known), set(list_classes(data_set))
    lines += _group_by_classes(parts, lambda part: sorted(wanted - set(part.classes)), "no folders for")
    lines += _group_by_classes(
        parts, lambda part: sorted(set(part.classes) - known), "ignored, as they are not classes of the model,"
    )
    lines += _group_by_classes(
        parts, lambda part: sorted(set(part.classes) & known - wanted), "measured, but not part of the set,"
    )
    return lines


def _group_by_classes(parts: list[Part], names_in, problem: str) -> list[str]:
    """One line per distinct set of classes that ``names_in`` finds in parts, naming the parts if not all have it."""
    groups = defaultdict(list)
    for part in parts:
        groups[tuple(names_in(part))].append(part)
    return [
        f"{problem} {len(names):,} classes: {_join_some(names)}"
        + ("" if len(group) == len(parts) else f" (in {_join_some(group)})")
        for names, group in groups.items()
        if names
    ]


def _join_some(things: Iterable, limit: int = 5) -> str:
    words = [str(thing) for thing in things]
    return ", ".join(words[:limit]) + (f" and {len(words) - limit:,} more" if len(words) > limit else "")


class ImagesOfSize(ImageFiles):
    """Image files that must be so many pixels wide and high.

    Raises:
        UnreadableImage: on access, also for one of another size.
    """

    def __init__(self, side: int, *files):
        super().__init__(*files)
        self.side = side

    def __getitem__(self, index: int):
        image, target = super().__getitem__(index)
        height, width = image.shape[1:]
        if (height, width) != (self.side, self.side):
            raise UnreadableImage(
                f"{self._location(index)}: {width} x {height} px, where the model takes {self.side} x "
                f"{self.side} and corrupted images are not resized; load it at their size with --input-size"
            )
        return image, target


def read_part(part: Part, label_of: Mapping[str, int], side: int | None) -> ImageFiles:
    """The images of a part's folders.

    Args:
        label_of: class -> label; folders of other classes are ignored.
        side: required side of all images, px; None for any size.
    Raises:
        UserError: there are no images.
    """
    chosen = {name: label_of[name] for name in part.classes if name in label_of}
    names, labels, left_out = find_in_classes(part.folder, chosen)
    left_out.tell(part.folder)
    if not names:
        raise UserError(f"{part.folder}: no images in its class folders; extract the archive again")
    files = (part.folder, names, labels, list(label_of))
    return ImageFiles(*files) if side is None else ImagesOfSize(side, *files)


# --------------------------------------------------------------------------------------------- measuring


class ClassSubset(nn.Module):
    """A model restricted to the logits of some classes, so that argmax and softmax run over these alone.

    Args:
        model: returns (logits ``(B, K)``, similarity).
        columns: indices of the classes to keep, in the order of the new logits.
    """

    def __init__(self, model: nn.Module, columns: list[int]):
        super().__init__()
        self.model = model
        self.register_buffer("columns", torch.tensor(columns), persistent=False)

    def forward(self, images: Tensor, return_similarity: bool = True) -> tuple[Tensor, Tensor]:
        logits, similarity = self.model(images, return_similarity=return_similarity)
        return logits[:, self.columns], similarity


@dataclass(frozen=True)
class Evaluation:
    """The evaluation that all parts share: model, classes, transform, data type, loading options and device."""

    network: nn.Module
    label_of: dict[str, int]
    transform: Callable[[Tensor], Tensor] | None
    side: int | None
    amp_dtype: torch.dtype | None
    batch_size: int
    num_workers: int
    skip_unreadable: bool
    device: torch.device

    def measure(self, part: Part, images: ImageFiles) -> dict:
        """Evaluate one part; returns its record: counts, and means over its images (error in percent)."""
        dataset = AugmentedDataset(images, self.transform, skip_unreadable=self.skip_unreadable)
        on_gpu = self.device.type == "cuda"
        loader = build_loader(dataset, EvalSampler(len(dataset)), self.batch_size, self.num_workers, pin_memory=on_gpu)
        metrics = evaluate(Accuracy(), self.network, loader, Processes(0, 1, self.device), self.amp_dtype)
        classes = {images.classes[label] for label in images.targets}
        missing = set(list_classes(part.data_set)) - classes
        counts: dict[str, float] = {"classes": len(classes), "missing_classes": len(missing)}
        counts |= {"files": len(images), "images": metrics["images"]}
        means = {name: metrics[name] for name in ("spatial_entropy", "components")}
        place = {"corruption": part.corruption, "severity": part.severity}
        return place | counts | {"error": 100 - metrics["acc1"]} | means


def build_evaluation(args: argparse.Namespace, trained: TrainedModel, parts: list[Part], device) -> Evaluation:
    """The evaluation that the arguments ask for.

    Raises:
        UserError: the model's classes have no names, or no class folder is a class of the model.
    """
    # 1. the classes that folders and model have in common
    if trained.classes is None:
        number = trained.model.num_classes
        raise UserError(
            f"{args.checkpoint}: the names of its {number:,} classes are unknown; only 1,000 are taken for ImageNet's"
        )
    there = set().union(*(part.classes for part in parts))
    common = [name for name in trained.classes if name in there]
    if not common:
        raise UserError(
            f"{args.data_path}: no class folder is a class of the model: folders {_join_some(sorted(there))}; "
            f"the model's classes {_join_some(trained.classes)}"
        )
    # 2. ImageNet-C: all logits, unresized images; ImageNet-A: the logits of its classes, the evaluation transform
    network, label_of = trained.model, {name: label for label, name in enumerate(trained.classes)}
    transform: Callable[[Tensor], Tensor] | None = None
    side: int | None = trained.input_size
    if args.data_set == "imagenet-a":
        network = ClassSubset(network, [label_of[name] for name in common]).to(device)
        label_of = {name: label for label, name in enumerate(common)}
        transform, side = eval_transform(trained.input_size, trained.crop_pct), None
    dtype, _ = choose_amp("auto", device)
    options = (args.batch_size, args.num_workers, args.skip_unreadable, device)
    return Evaluation(network, label_of, transform, side, dtype, *options)


def build_protocol(args: argparse.Namespace, trained: TrainedModel, evaluation: Evaluation) -> dict:
    """Everything a result depends on; records measured under another protocol are never mixed with these."""
    with open(weights_file(args.checkpoint), "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "data_set": args.data_set,
        "data_path": str(args.data_path.resolve()),
        "checkpoint_sha256": digest,
        "checkpoint_key": args.checkpoint_key,
        "num_heads": args.num_heads,
        "input_size": trained.input_size,
        "precision": str(evaluation.amp_dtype or torch.float32).removeprefix("torch."),
        "skip_unreadable": args.skip_unreadable,
    }


def read_records(path: Path, protocol: dict) -> dict[tuple[str, int], dict]:
    """The records that an interrupted command has saved, by corruption and severity; empty without a file.

    Raises:
        UserError: they were measured under another protocol, or cannot be read.
    """
    if not path.exists():
        return {}
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        different = [name for name in protocol if saved["protocol"][name] != protocol[name]]
        records = {(record["corruption"], record["severity"]): record for record in saved["records"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} cannot be read; remove it to measure everything again") from None
    if different:
        listed = "; ".join(f"{name} {saved['protocol'][name]} there, {protocol[name]} now" for name in different)
        raise UserError(
            f"{path.parent} has results under another protocol; choose another --out, or remove it ({listed})"
        )
    return records


def measure_all(evaluation: Evaluation, parts: list[Part], path: Path, protocol: dict) -> list[dict]:
    """The records of all parts. Each is saved to the file ``path`` at once, and not measured again by a later command.

    A part whose number of files has changed is measured again.

    Raises:
        UserError: see `read_records`, `read_part`; an image that cannot be read.
    """
    kept, records = read_records(path, protocol), []
    for part in parts:
        images = read_part(part, evaluation.label_of, evaluation.side)
        record = kept.get((part.corruption, part.severity))
        if record and record["files"] == len(images):
            logger.info(f"{part}: error {record['error']:.2f} %, already measured")
        else:
            record = evaluation.measure(part, images)
            logger.info(f"{part}: error {record['error']:.2f} % ({record['images']:,} images)")
        kept[part.corruption, part.severity] = record
        records.append(record)
        write_json(path, {"protocol": protocol, "records": list(kept.values())})
    return records


# ----------------------------------------------------------------------------------------------- results


def is_complete(data_set: str, record: dict) -> bool:
    """Whether the record covers all images of all classes of the set, and no others."""
    all_of_it = (len(list_classes(data_set)), 0, IMAGES[data_set])
    return (record["classes"], record["missing_classes"], record["images"]) == all_of_it


def corruption_errors(records: Iterable[dict]) -> dict[str, dict]:
    """Each corruption's mean ``error`` over its severities, and its ``ce`` if it is complete, else None; in percent.

    CE is the sum of the five errors over the sum of AlexNet's (Hendrycks and Dietterich, 2019).
    """
    groups = defaultdict(list)
    for record in records:
        groups[record["corruption"]].append(record)
    errors = {}
    for name, group in groups.items():
        error, alexnet = statistics.mean(record["error"] for record in group), CORRUPTIONS[name].get("alexnet_error")
        whole = len(group) == len(SEVERITIES) and all(is_complete("imagenet-c", record) for record in group)
        errors[name] = {"error": error, "ce": error / alexnet if whole and alexnet else None}
    return errors


def compute_score(data_set: str, records: list[dict]) -> dict:
    """The set's score in percent: ``imagenet_a_accuracy`` or ``mce``; ``instead``, a description, if incomplete."""
    # 1. ImageNet-A
    if data_set == "imagenet-a":
        accuracy = 100 - records[0]["error"]
        if is_complete(data_set, records[0]):
            return {"imagenet_a_accuracy": accuracy}
        return {"instead": f"accuracy {accuracy:.2f} % over {_format_extent(data_set, records)}"}
    # 2. ImageNet-C, complete
    counted = [record for record in records if record["corruption"] in MCE_CORRUPTIONS]
    errors = corruption_errors(counted)
    ces = [error["ce"] for error in errors.values()]
    if len(ces) == len(MCE_CORRUPTIONS) and None not in ces:
        return {"mce": statistics.mean(ces)}
    if not counted:
        return {"instead": "no mean error: none of the 15 corruptions of mCE"}
    # 3. ImageNet-C, incomplete
    mean = statistics.mean(error["error"] for error in errors.values())
    steps = f"{len(counted)} of {len(MCE_CORRUPTIONS) * len(SEVERITIES)} severities"
    covered = f"{len(errors)} of {len(MCE_CORRUPTIONS)} corruptions, {steps}, {_format_extent(data_set, counted)}"
    return {"instead": f"mean error {mean:.2f} % over {covered}"}


def _format_extent(data_set: str, records: list[dict]) -> str:
    """Numbers of measured classes and images, and the set's numbers."""
    classes, images = max(record["classes"] for record in records), sum(record["images"] for record in records)
    all_classes, all_images = len(list_classes(data_set)), IMAGES[data_set] * len(records)
    return f"{classes:,} classes and {images:,} images ({TITLES[data_set]}: {all_classes:,} and {all_images:,})"


def write_results(folder: Path, results: dict) -> str:
    """Write ``results.json``, ``results.csv`` (one line per record) and ``results.md``; returns the latter's text."""
    text = as_markdown(results)
    write_csv(folder / "results.csv", [{name: record[name] for name in COLUMNS} for record in results["records"]])
    write_atomically(folder / "results.md", lambda file: file.write(text.encode()))
    write_json(folder / "results.json", results)
    return text


def as_markdown(results: dict) -> str:
    """The score, the missing parts, and the errors of each corruption, in Markdown."""
    data_set = results["data_set"]
    lines = [
        f"# {TITLES[data_set]}: {results['checkpoint']}",
        "",
        format_score(results),
        "",
        *(f"- {gap}" for gap in results["gaps"]),
    ]
    if data_set == "imagenet-a":
        return "\n".join(lines).rstrip() + "\n"
    by_place = {(record["corruption"], record["severity"]): record["error"] for record in results["records"]}
    lines += ["", f"| error (%) at severity | {' | '.join(map(str, SEVERITIES))} | mean | CE |"]
    lines += ["|---" + "|---:" * (len(SEVERITIES) + 2) + "|"]
    for name, error in results["corruptions"].items():
        cells = [by_place.get((name, severity)) for severity in SEVERITIES] + [error["error"], error["ce"]]
        words = " | ".join("–" if cell is None else f"{cell:.2f}" for cell in cells)
        lines.append(f"| {name}{'' if name in MCE_CORRUPTIONS else ' (not in mCE)'} | {words} |")
    return "\n".join(lines) + "\n"


def format_score(results: dict) -> str:
    """The score in a sentence."""
    if "instead" in results:
        missed = "ImageNet-A's accuracy" if results["data_set"] == "imagenet-a" else "mCE"
        return f"This is not {missed}: {results['instead']}."
    if "mce" in results:
        return f"mCE (lower is better): {results['mce']:.2f} %."
    return f"Top-1 accuracy over 200 classes: {results['imagenet_a_accuracy']:.2f} %."


# --------------------------------------------------------------------------------------- the command line


def build_command_line() -> argparse.ArgumentParser:
    """The parser of this command."""
    parser = Parser(
        prog="python -m analysis.robustness",
        description=__doc__,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FILE", help="checkpoint of any supported format")
    add("--data-set", required=True, choices=tuple(IMAGES), help="which set to measure")
    add("--data-path", required=True, type=Path, metavar="DIR", help="folder of the set, in the layout above")
    add("--out", type=Path, metavar="DIR", help="output folder (default: output/<data set>/<checkpoint name>)")
    add("--input-size", type=at_least(int, 1), metavar="PX", help="input size of the model (default: the training's)")
    add(
        "--skip-unreadable",
        action="store_true",
        help="skip and count unreadable images; the set is then incomplete, without mCE",
    )
    add_model_options(parser)
    add_loading_options(parser)
    return parser


def run(argv: list[str] | None) -> int:
    """Execute the command line; returns 0."""
    # 1. parse, and find the data
    args = build_command_line().parse_args(argv)
    args.out = args.out or Path("output", args.data_set, short_names([args.checkpoint])[0])
    start_logging(rank=0)
    parts = find_parts(args.data_set, args.data_path)
    # 2. load the model, and report what is missing
    device = pick_device(args.device)
    trained = load_model(args.checkpoint, device, args.checkpoint_key, args.num_heads, args.input_size)
    evaluation = build_evaluation(args, trained, parts, device)
    missing = find_gaps(args.data_set, parts, trained.classes or [])
    for line in missing:
        logger.warning(f"{args.data_set}: {line}")
    prepare_output_dir(args.out, "--out")
    # 3. measure, and write the results
    protocol = build_protocol(args, trained, evaluation)
    records = measure_all(evaluation, parts, args.out / "progress.json", protocol)
    results = compute_score(args.data_set, records) | protocol
    results |= {"checkpoint": str(args.checkpoint), "gaps": missing, "records": records}
    results |= {"corruptions": corruption_errors(records) if args.data_set == "imagenet-c" else {}}
    print(write_results(args.out, results | {"environment": environment()}))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: measured. 1: a file cannot be written. 2: bad usage."""
    return exit_code(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
