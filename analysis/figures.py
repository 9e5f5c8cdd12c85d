"""Draw the attention maps, masks and components of one or more models, and write a gallery of them.

    python -m analysis.figures --checkpoint sar.pth --images photos --out figures
    python -m analysis.figures --checkpoint vit.pth --checkpoint sar.pth --images photos --out figures
    python -m analysis.figures --checkpoint output/quickstart/best.pth --out figures

Without --images, validation images of different classes are taken from the first checkpoint's data set. For all models
side by side, --out gets

    index.html          the gallery: one self-contained page for any browser
    attention-1.png     each head's attention map (Fig. 4, 8), eight images per page
    masks-1.png         the patches that hold --mass of the attention (Fig. 1)
    components-1.png    similarity map, threshold, components, entropy (Fig. 2)
    figures.pdf         all these pages

Every model sees the whole image, resized to its square input (as in the protocol of Table 11); pictures and maps are
drawn in the image's own aspect ratio.
"""

import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_pdf import PdfPages
from PIL import Image

from analysis.attention import MASS, similarity_maps
from analysis.commands import add_checkpoint_options, add_model_options, load_models, remove_pages
from analysis.gallery import gallery_html
from analysis.images import choose_samples, squash
from analysis.models import TrainedModel
from analysis.panels import ModelMaps, attention_page, component_page, mask_page
from arguments import parse_arguments
from augmentation import as_pillow
from cli import Parser, at_least, exit_code
from datasets import AugmentedDataset, read_split
from readers.files import list_images
from readers.images import read_photograph
from tasks.settings import holdout
from utils import UserError, pick_device, prepare_output_dir, progress, readable, start_logging, write_atomically
from weights import read_checkpoint

ROWS = 8  # images on a page
DPI = 150
PAGE_PICTURE, GALLERY_PICTURE = 200, 320  # longer side of a picture on a page and in the gallery, px
BATCH = 16
KINDS = {"attention": attention_page, "masks": mask_page, "components": component_page}


@dataclass(frozen=True)
class Sample:
    """An image to analyse.

    Attributes:
        title: its caption.
        image: RGB.
        label: the name of its class or, in a folder of images, of its folder, which may be no class; None without one.
    """

    title: str
    image: Image.Image
    label: str | None = None


def main(argv: list[str] | None = None) -> int:
    """Draw the maps of the given checkpoints; returns the exit code (2: bad usage)."""
    return exit_code(lambda: run(build_parser().parse_args(argv)))


def build_parser() -> Parser:
    parser = Parser(
        prog="python -m analysis.figures",
        description=__doc__,
    )
    add = parser.add_argument
    add_checkpoint_options(parser, required=True)
    add("--images", metavar="DIR", help="folder of image files (default: the first checkpoint's validation images)")
    add("--data-path", metavar="DIR", help="folder of the first checkpoint's data set, if it has moved")
    add("--count", type=at_least(int, 1), default=16, help="number of images, evenly spaced over all")
    add("--mass", type=at_least(float, 0, 1), default=MASS, help="fraction of the attention that masks keep")
    add(
        "--input-size",
        type=at_least(int, 1, 4096),
        metavar="PX",
        help="input size of all models (default: each model's own)",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="output folder for pages and gallery")
    add_model_options(parser)
    return parser


def run(args: Namespace) -> int:
    """Read the images, compute the maps, draw them, and print the gallery's path; returns 0.

    Errors in the input are raised before a model runs.
    """
    # 1. read models and images
    start_logging(0)
    if args.images and args.data_path:
        raise UserError("give either --images or --data-path (the folder of the validation images)")
    trained = load_models(args, pick_device(args.device))
    samples = folder_samples(args) if args.images else validation_samples(args)
    prepare_output_dir(args.out, "--out")
    # 2. compute the maps
    models = [compute_maps(model.name, model, samples) for model in trained]
    # 3. draw pages and gallery
    count = write_pages(samples, models, args.mass, args.out)
    page = gallery_html(
        resize_pictures(samples, GALLERY_PICTURE), [sample.title for sample in samples], models, args.mass
    )
    write_atomically(args.out / "index.html", lambda file: file.write(page.encode()))
    beside = f"{len(samples)} images; {count} pages as PNG and PDF beside it"
    print(f"attention maps drawn: {args.out / 'index.html'} ({beside})")
    return 0


def folder_samples(args: Namespace) -> list[Sample]:
    """``--count`` evenly spaced images of the folder.

    Raises:
        UserError: no such folder, no image in it, or an unreadable one.
    """
    paths = list_images(args.images)
    chosen = np.linspace(0, len(paths) - 1, num=min(args.count, len(paths)), dtype=int)
    names = [paths[i].relative_to(args.images) for i in chosen]
    return [
        Sample(readable(str(name)), read_photograph(Path(args.images) / name), name.parent.name or None)
        for name in names
    ]


def validation_samples(args: Namespace) -> list[Sample]:
    """``--count`` validation images of different classes of the first checkpoint's data set.

    Raises:
        UserError: a checkpoint of another program, which does not name its data; or the data set is missing, or without
            classes.
    """
    path = args.checkpoint[0]
    saved = read_checkpoint(path, lazily=True).get("args")
    if not isinstance(saved, Mapping) or "data_set" not in saved:
        raise UserError(f"{path}: not written by main.py, so its validation images are unknown; give --images")
    given = ["--data-path", args.data_path] if args.data_path else []
    run_args = parse_arguments(["--eval", "--resume", str(path), *given], saved=dict(saved))
    dataset = AugmentedDataset(read_split(run_args.data_set, "val", run_args.data_path, holdout=holdout(run_args)))
    if not dataset.classes:
        raise UserError(f"{path}: its --data-set {run_args.data_set} has no classes to show; give --images")
    chosen = choose_samples(dataset, args.count)
    names = dataset.classes
    return [Sample(names[label], as_pillow(image), names[label]) for image, label in chosen]


@torch.inference_mode()
def compute_maps(name: str, trained: TrainedModel, samples: list[Sample]) -> ModelMaps:
    """A model's similarity maps of the samples, and its predictions if it has a classifier whose classes have names."""
    transform, similarity, logits = squash(trained.input_size), [], []
    for start in progress(range(0, len(samples), BATCH), name):
        images = torch.stack([transform(sample.image) for sample in samples[start : start + BATCH]])
        images = images.to(next(trained.model.parameters()).device)
        similarity.append(similarity_maps(trained.model, images).cpu())
        logits.append(trained.model(images).cpu())
    classes, scores = trained.classes, torch.cat(logits)
    if not classes or trained.model.num_classes != len(classes):  # such as a self-supervised model
        return ModelMaps(name, torch.cat(similarity))
    best = zip(*(column.tolist() for column in scores.softmax(dim=-1).max(dim=-1)), samples, strict=True)
    predictions = [describe_prediction(classes[number], p, each.label, classes) for p, number, each in best]
    return ModelMaps(name, torch.cat(similarity), predictions)


def describe_prediction(predicted: str, probability: float, label: str | None, classes: list[str]) -> str:
    """The predicted class with its probability, and whether it is true, as far as that is known."""
    if label not in classes:
        truth = ""
    else:
        truth = " ✓" if predicted == label else f" ✗ true: {label}"
    return f"{predicted} {probability:.0%}{truth}"


def resize_pictures(samples: list[Sample], side: int) -> list[np.ndarray]:
    """The samples as RGB ``(height, width, 3)`` in 0..1, resized so that the longer side has ``side`` pixels."""
    pictures = []
    for image in (sample.image for sample in samples):
        width, height = (max(1, round(length * side / max(image.size))) for length in image.size)
        pictures.append(np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)) / 255)
    return pictures


def write_pages(samples: list[Sample], models: list[ModelMaps], mass: float, out: Path) -> int:
    """Write the pages as ``<kind>-<page>.png`` and together as figures.pdf; returns the number of pages.

    Higher-numbered pages of an earlier call with more images are deleted.
    """
    pictures, titles = resize_pictures(samples, PAGE_PICTURE), [sample.title for sample in samples]
    starts = range(0, len(samples), ROWS)
    pages = [(kind, number, start) for kind in KINDS for number, start in enumerate(starts, start=1)]

    def write_pdf(file) -> None:
        # TrueType: conferences refuse Type 3 fonts
        with matplotlib.rc_context({"pdf.fonttype": 42}), PdfPages(file, metadata={"CreationDate": None}) as pdf:
            for kind, number, start in progress(pages, "pages"):
                rows = slice(start, start + ROWS)
                figure = KINDS[kind](pictures[rows], titles[rows], [model.select(rows) for model in models], mass)
                write_atomically(out / f"{kind}-{number}.png", partial(figure.savefig, format="png", dpi=DPI))
                pdf.savefig(figure)

    write_atomically(out / "figures.pdf", write_pdf)
    for kind in KINDS:
        remove_pages(out, kind, len(starts) + 1)
    return len(pages)


if __name__ == "__main__":
    sys.exit(main())
