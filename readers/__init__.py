"""The registry of data sets: name, reader, layout and size of each. The readers are in the modules of this package.

A reader takes the folder of ``--data-path`` and a split ("train" or "val"), and returns
``readers.images.LabelledImages``. It makes all checks that need no decoding, and raises a one-line ``UserError``.
Slow modules are imported on first use, so that a command line can list the names at once.
"""

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils import UserError

DOMAINNET_CLASSES = 345

FOLDER_LAYOUT = "train/<class>/* and val/<class>/*"
TAR_LAYOUT = "train.tar and val.tar (<class>/* in them), or train/*.tar and val/*.tar (the same, or a tar a class)"
CARS_LAYOUT = (
    "stanford_cars/ with devkit/cars_meta.mat, devkit/cars_train_annos.mat, cars_test_annos_withlabels.mat, "
    "cars_train/*.jpg and cars_test/*.jpg"
)
FLOWERS_LAYOUT = "flowers-102/ with jpg/*.jpg, imagelabels.mat and setid.mat"
PETS_LAYOUT = "oxford-iiit-pet/ with images/*.jpg, annotations/trainval.txt and annotations/test.txt"


def domain_layout(domain: str) -> str:
    """The required contents of ``--data-path`` for a domain of DomainNet."""
    return f"{domain}_train.txt, {domain}_test.txt and {domain}/<class>/*"


@dataclass(frozen=True)
class DataSet:
    """A data set of the registry.

    Attributes:
        read: ``read(data_path, split)`` returns ``readers.images.LabelledImages``.
        about: a description in one line.
        layout: required contents of ``--data-path``; empty if the set needs no path.
        defaults: defaults of main.py's arguments for this set.
        count: ``count(data_path, enough)`` is the number of training images, without decoding one; counting may stop
            at ``enough``. For a user's own set, whose defaults follow from its size.
        num_classes: required number of classes; None for any number, 0 for images without classes.
        images: split -> number of images, in the paper or as published; empty if unknown.
        cleaned_images: the same for DomainNet's later, cleaned lists.
        folder: subfolder of a common root of all data sets, without torchvision's own folder names.
        download: downloads and verifies the set, given the data path; None if not supported.
        upright: turn images as their EXIF data say. Never for published sets, whose protocols read the stored pixels,
            nor where boxes or masks lie on these.
        source: where to obtain it manually; empty if ``download`` exists or the images are the user's own.
    """

    read: Callable[[Path | None, str], Any]
    about: str
    layout: str = ""
    defaults: dict[str, Any] = field(default_factory=dict)
    count: Callable[[Path, int], int] | None = None
    num_classes: int | None = None
    images: dict[str, int] = field(default_factory=dict)
    cleaned_images: dict[str, int] = field(default_factory=dict)
    folder: str = ""
    download: Callable[[Path], Any] | None = None
    upright: bool = False
    source: str = ""

    @property
    def has_classes(self) -> bool:
        """Whether the images are labelled; without labels only self-supervised tasks train on them."""
        return self.num_classes != 0


@dataclass(frozen=True)
class Deferred:
    """A lazily imported function, given as ``module:function``; calling it imports the module."""

    place: str
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, *args: Any) -> Any:
        module, _, name = self.place.partition(":")
        return getattr(importlib.import_module(module), name)(*args, **self.options)


def _torchvision(name: str) -> Deferred:
    """The download function of a torchvision data set."""
    return Deferred(f"torchvision.datasets:{name}", {"download": True})


def _cifar(name: str, about: str, folder: str, num_classes: int) -> DataSet:
    return DataSet(
        Deferred("readers.published:read_cifar", {"reader": name}),
        about,
        f"{folder}/",
        num_classes=num_classes,
        images={"train": 50_000, "val": 10_000},
        download=_torchvision(name),
    )


def _domainnet(domain: str, images: tuple[int, int], cleaned_images: tuple[int, int]) -> DataSet:
    return DataSet(
        Deferred("readers.published:read_domainnet", {"domain": domain}),
        f"DomainNet's {domain} domain",
        domain_layout(domain),
        num_classes=DOMAINNET_CLASSES,
        images=dict(zip(("train", "val"), images, strict=True)),
        cleaned_images=dict(zip(("train", "val"), cleaned_images, strict=True)),
        folder="domainnet",
        source="https://ai.bu.edu/M3SDA/ (the paper used the original lists)",
    )


READ_FOLDER = Deferred("readers.folders:read_folder")

DATASETS: dict[str, DataSet] = {
    "digits": DataSet(
        Deferred("readers.published:read_digits"),
        "1,797 scanned digits that come with scikit-learn",
        defaults={  # minutes on a laptop; digits are not mirrored, nor cropped to a part
            "input_size": 20,
            "batch_size": 32,
            "total_batch": 32,
            "epochs": 5,
            "warmup_epochs": 1,
            "sched_on_updates": True,
            "lr": 8e-3,
            "model_ema": False,
            "mixup": 0.0,
            "cutmix": 0.0,
            "aa": "none",
            "hflip": 0.0,
            "reprob": 0.0,
            "crop_pct": 1.0,
            "num_workers": 0,
        },
        num_classes=10,
        images={"train": 1_437, "val": 360},
        source="scikit-learn, which is installed",
    ),
    "folder": DataSet(
        READ_FOLDER, "your own images", FOLDER_LAYOUT, count=Deferred("readers.folders:count_training"), upright=True
    ),
    "images": DataSet(
        Deferred("readers.folders:read_images"),
        "your own images without classes, for self-supervised training",
        "image files in it or anywhere below",
        num_classes=0,
        upright=True,
    ),
    "tar": DataSet(
        Deferred("readers.tars:read_tar"),
        "your own images in few large files",
        TAR_LAYOUT,
        count=Deferred("readers.tars:count_training"),
        upright=True,
    ),
    "imagenet": DataSet(
        READ_FOLDER,
        "ImageNet-1k (ILSVRC-2012)",
        FOLDER_LAYOUT,
        num_classes=1000,
        images={"train": 1_281_167, "val": 50_000},
        folder="imagenet",
        source="https://image-net.org (ILSVRC-2012, after registration)",
    ),
    "imagenet100": DataSet(
        Deferred("readers.folders:read_folder", {"class_list": "imagenet100.txt"}),
        "the 100 classes of ImageNet-1k in readers/class_lists/imagenet100.txt",
        f"{FOLDER_LAYOUT}, of all ImageNet-1k or of the 100 classes",
        num_classes=100,
        images={"train": 126_689, "val": 5_000},  # of the classes of Contrastive Multiview Coding
        folder="imagenet",
        source="https://image-net.org (ILSVRC-2012, after registration)",
    ),
    "cars": DataSet(
        Deferred("readers.published:read_cars"),
        "Stanford Cars",
        CARS_LAYOUT,
        num_classes=196,
        images={"train": 8_144, "val": 8_041},
        source="a mirror (its own site is gone; https://github.com/pytorch/vision/issues/7545 names some)",
    ),
    "clipart": _domainnet("clipart", (34_019, 14_818), (33_525, 14_604)),
    "painting": _domainnet("painting", (52_867, 22_892), (50_416, 21_850)),
    "sketch": _domainnet("sketch", (49_115, 21_271), (48_212, 20_916)),
    "flowers": DataSet(
        Deferred("readers.published:read_flowers"),
        "Oxford's 102 flowers; its train and val images are trained on, the test images evaluated",
        FLOWERS_LAYOUT,
        num_classes=102,
        images={"train": 2_040, "val": 6_149},
        download=_torchvision("Flowers102"),
    ),
    "pets": DataSet(
        Deferred("readers.published:read_pets"),
        "Oxford-IIIT pets",
        PETS_LAYOUT,
        num_classes=37,
        images={"train": 3_680, "val": 3_669},
        download=_torchvision("OxfordIIITPet"),
    ),
    "cifar10": _cifar("CIFAR10", "CIFAR-10", "cifar-10-batches-py", 10),
    "cifar100": _cifar("CIFAR100", "CIFAR-100", "cifar-100-python", 100),
}
VOC_LAYOUT = "VOCdevkit/VOC2012/ with JPEGImages/*.jpg, SegmentationClass/*.png, ImageSets/Segmentation/<split>.txt"
MASKS_LAYOUT = "classes.txt (a name a line), {train,val}/images/* and {train,val}/masks/*.png"
ADE_LAYOUT = "ADEChallengeData2016/ with {images,annotations}/{training,validation}/* and objectInfo150.txt"


def _voc2012(train: str, about: str, layout: str, images: dict[str, int], val: str = "val") -> DataSet:
    lists = {"train": train, "val": val}
    return DataSet(
        Deferred("readers.segmentation:read_voc2012", {"lists": lists}),
        about,
        layout,
        num_classes=21,
        images=images,
        source="http://host.robots.ox.ac.uk/pascal/VOC/voc2012",
    )


MASKED_SETS: dict[str, DataSet] = {
    "voc2012": _voc2012("train", "PASCAL VOC 2012, trained on train", VOC_LAYOUT, {"train": 1_464, "val": 1_449}),
    "voc2012_trainval": _voc2012(
        "trainval",
        "PASCAL VOC 2012, trained on trainval, which contains the evaluated val",
        VOC_LAYOUT,
        {"train": 2_913, "val": 1_449},
    ),
    "voc2012_aug": _voc2012(
        "train_aug",
        "PASCAL VOC 2012, trained on train and the images of SBD that are not in val",
        f"{VOC_LAYOUT}; and benchmark_RELEASE/dataset/ with cls/*.mat, train.txt and val.txt",
        {"train": 10_582, "val": 1_449},
    ),
    "voc2012_test": _voc2012("", "PASCAL VOC 2012, test images without labels", VOC_LAYOUT, {"val": 1_456}, val="test"),
    "ade20k": DataSet(
        Deferred("readers.segmentation:read_ade20k"),
        "ADE20K's scene parsing of 150 classes",
        ADE_LAYOUT,
        num_classes=150,
        images={"train": 20_210, "val": 2_000},
        source="http://sceneparsing.csail.mit.edu",
    ),
    "folder": DataSet(Deferred("readers.segmentation:read_masks_folder"), "your own images and masks", MASKS_LAYOUT),
}
"""Data sets of images with a class for each pixel: `readers.segmentation.SegmentationImages`."""

VOC_BOXES_LAYOUT = "VOCdevkit/VOC<year>/ with JPEGImages/*.jpg, Annotations/*.xml, ImageSets/Main/<list>.txt"
BOXES_LAYOUT = "classes.txt (a name a line), {train,val}/images/* and {train,val}/annotations/*.xml in VOC's form"


def _voc_boxes(about: str, images: tuple[int, int], train: list[tuple[int, str]], val: tuple[int, str]) -> DataSet:
    return DataSet(
        Deferred("readers.boxes:read_voc_boxes", {"lists": {"train": train, "val": [val]}}),
        about,
        VOC_BOXES_LAYOUT,
        num_classes=20,
        images=dict(zip(("train", "val"), images, strict=True)),
        source="http://host.robots.ox.ac.uk/pascal/VOC",
    )


BOXED_SETS: dict[str, DataSet] = {
    "voc0712": _voc_boxes(
        "PASCAL VOC, trained on trainval of 2007 and 2012, evaluated on test of 2007",
        (16_551, 4_952),
        [(2007, "trainval"), (2012, "trainval")],
        (2007, "test"),
    ),
    "voc2007": _voc_boxes(
        "PASCAL VOC 2007, trained on trainval, evaluated on test", (5_011, 4_952), [(2007, "trainval")], (2007, "test")
    ),
    "voc2012": _voc_boxes(
        "PASCAL VOC 2012, trained on train, evaluated on val", (5_717, 5_823), [(2012, "train")], (2012, "val")
    ),
    "folder": DataSet(Deferred("readers.boxes:read_boxes_folder"), "your own images and boxes", BOXES_LAYOUT),
}
"""Data sets of images with boxes: `readers.boxes.BoxedImages`."""

SETS_OF_TASKS: dict[str, dict[str, DataSet]] = {"segment": MASKED_SETS, "detect": BOXED_SETS}
"""The data sets of tasks that need more than a label for each image."""


def sets_of(task: str) -> dict[str, DataSet]:
    """The data sets that a task can be trained on, by name."""
    return SETS_OF_TASKS.get(task, DATASETS)


DEIT_NAMES = {"imnet": "imagenet", "cifar": "cifar100"}


def canonical_name(name: str, sets: Mapping[str, DataSet] = DATASETS) -> str:
    """The key of ``sets`` for ``name``, ignoring case; DeiT's names IMNET and CIFAR are accepted.

    Raises:
        UserError: no such set; the message suggests similar names.
    """
    key = DEIT_NAMES.get(name.lower(), name.lower())
    if key in sets:
        return key
    close = difflib.get_close_matches(key, sets)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(sets)}"
    raise UserError(f"unknown data set {name!r}: {hint}")
