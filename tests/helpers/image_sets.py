"""Small copies of the data sets in their published layouts, for the tests: real photographs, few of each class."""

import contextlib
import functools
import hashlib
import io
import logging
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.datasets import CIFAR10, CIFAR100, Flowers102


def picture(number=0, size=(40, 30), mode="RGB"):
    """A smooth random picture, another one for every number."""
    pixels = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode)


@functools.cache
def _photographs():
    return [Image.fromarray(image) for image in load_sample_images().images]


def photograph(number=0):
    """A part of one of scikit-learn's two photographs; part and size differ by number."""
    whole = _photographs()[number % 2]
    left, top = 37 * number % 500, 23 * number % 300
    return whole.crop((left, top, left + 60 + number % 9, top + 45 + number % 7))


def write_folder(root, classes, per_class=2, splits=("train", "val"), suffix=".jpg"):
    """An image folder; returns ``root``."""
    for split in splits:
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for number in range(per_class):
                picture(10 * label + number).save(root / split / name / f"{number}{suffix}")
    return root


def truncate(path, keep=0.5):
    """Cut a file off after this share of it."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


class _Notes(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(f"{record.levelname}: {record.getMessage()}")


@contextlib.contextmanager
def log_messages():
    """The program's log messages within the block, as ``LEVEL: text``."""
    logger, notes = logging.getLogger("sar"), _Notes()
    level = logger.level
    logger.addHandler(notes)
    logger.setLevel(logging.INFO)
    try:
        yield notes.messages
    finally:
        logger.removeHandler(notes)
        logger.setLevel(level)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------------- CIFAR


def write_cifar(monkeypatch, reader, root, files, label_key, meta):
    """Tiny batches in the published format, and their checksums in place of the published ones."""
    folder = root / reader.base_folder
    folder.mkdir()
    generator = np.random.default_rng(0)
    checksums = {}
    for name in files:
        data = generator.integers(0, 256, (4, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, label_key: [3, 1, 2, 0]}))
        checksums[name] = md5(folder / name)
    content = pickle.dumps({meta["key"]: [f"class {label}" for label in range(meta["classes"])]})
    (folder / meta["filename"]).write_bytes(content)
    train = [[name, checksums[name]] for name in files[:-1]]
    monkeypatch.setattr(reader, "train_list", train)
    monkeypatch.setattr(reader, "test_list", [[files[-1], checksums[files[-1]]]])
    monkeypatch.setattr(reader, "meta", {**meta, "md5": hashlib.md5(content).hexdigest()})


def write_cifar10(monkeypatch, root):
    files = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    meta = {"filename": "batches.meta", "key": "label_names", "classes": 10}
    write_cifar(monkeypatch, CIFAR10, root, files, "labels", meta)


def write_cifar100(monkeypatch, root):
    meta = {"filename": "meta", "key": "fine_label_names", "classes": 100}
    write_cifar(monkeypatch, CIFAR100, root, ["train", "test"], "fine_labels", meta)


# ------------------------------------------------------------------- sets with annotation files or lists


def _write_images(folder: Path, names, first=0):
    """A few photographs under all these names (the same file under many of them: quick)."""
    originals = []
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(originals) < 20:
            photograph(first + number).save(path)
            originals.append(path)
        else:
            os.link(originals[number % 20], path)


def write_cars_annotations(path, names, labels):
    """A struct array ``annotations`` of 1 x N as the published files have it, labels counted from 1."""
    fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"]
    annotations = np.empty((1, len(names)), dtype=[(field, object) for field in fields])
    for column, (name, label) in enumerate(zip(names, labels, strict=True)):
        annotations[0, column] = (np.uint8(1), np.uint8(2), np.uint8(50), np.uint8(40), np.uint8(label), name)
    scipy.io.savemat(path, {"annotations": annotations})


def write_cars(root):
    """196 classes; 197 training images (class 3 twice) and 196 test images. Returns ``root``."""
    cars = root / "stanford_cars"
    (cars / "devkit").mkdir(parents=True)
    names = np.array([f"Make Model {label} 2012" for label in range(196)], dtype=object)
    scipy.io.savemat(cars / "devkit" / "cars_meta.mat", {"class_names": names[None]})
    labels = [*range(1, 197), 3]
    files = [f"{number:05d}.jpg" for number in range(1, 198)]
    _write_images(cars / "cars_train", files)
    _write_images(cars / "cars_test", files[:196], first=100)
    write_cars_annotations(cars / "devkit" / "cars_train_annos.mat", files, labels)
    write_cars_annotations(cars / "cars_test_annos_withlabels.mat", files[:196], labels[:196])
    return root


def write_flowers_labels(monkeypatch, folder, labels):
    """``imagelabels.mat`` with labels counted from 1, and its checksum in place of the published one."""
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": np.array(labels, dtype=np.uint8)[None]})
    files = Flowers102._file_dict | {"label": ("imagelabels.mat", md5(folder / "imagelabels.mat"))}
    monkeypatch.setattr(Flowers102, "_file_dict", files)


def write_flowers(monkeypatch, root):
    """Six images: 2 and 5 are ``trnid``, 1 is ``valid``, the rest ``tstid``. Returns ``root``."""
    folder = root / "flowers-102"
    _write_images(folder / "jpg", [f"image_{number:05d}.jpg" for number in range(1, 7)])
    sets = {"trnid": [2, 5], "valid": [1, 6], "tstid": [3, 4]}
    scipy.io.savemat(folder / "setid.mat", {name: np.array(ids, dtype=np.uint16)[None] for name, ids in sets.items()})
    files = Flowers102._file_dict | {"setid": ("setid.mat", md5(folder / "setid.mat"))}
    monkeypatch.setattr(Flowers102, "_file_dict", files)
    write_flowers_labels(monkeypatch, folder, [77, 1, 102, 5, 5, 9])
    return root


BREEDS = [f"Cat_breed_{number}" if number % 3 else f"dog_breed_{number}" for number in range(37)]


def write_pets(root):
    """37 breeds, two training images and one test image each. Returns ``root``."""
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    for split, numbers in (("trainval", (1, 2)), ("test", (3,))):
        lines = [
            f"{breed}_{number} {label} {1 if breed[0] == 'C' else 2} 1"
            for label, breed in enumerate(BREEDS, 1)
            for number in numbers
        ]
        (folder / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")
        _write_images(folder / "images", [f"{line.split()[0]}.jpg" for line in lines])
    return root


def write_domainnet(root, domain="clipart", train=2, test=1):
    """345 classes with so many training and test images each, and their lists. Returns ``root``."""
    lines = {"train": [], "test": []}
    for label in range(345):
        for number in range(train + test):
            part = "train" if number < train else "test"
            lines[part].append(f"{domain}/class_{label:03d}/{domain}_{label:03d}_{number:06d}.jpg {label}")
    for part in lines:
        (root / f"{domain}_{part}.txt").write_text("\n".join(lines[part]) + "\n")
    _write_images(root, [line.split()[0] for part in lines.values() for line in part])
    return root


# -------------------------------------------------------------------------------------------- tar files


def write_tar(path, members):
    """An uncompressed tar of ``{name: bytes}``."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def tar_members(root):
    """``{name: bytes}`` of the files below a folder, not sorted."""
    paths = sorted((path for path in root.rglob("*") if path.is_file()), key=lambda path: md5(path))
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def write_tars(folder, root, layout):
    """An image folder's two splits as tars in one of the layouts; returns ``root``.

    ``one``: train.tar with class folders; ``shards``: train/0.tar, train/1.tar with class folders; ``classes``:
    train/<class>.tar; ``nested``: train.tar of <class>.tar.
    """
    root.mkdir()
    for split in ("train", "val"):
        members = tar_members(folder / split)
        by_class = {name: {} for name in sorted(os.listdir(folder / split))}
        for name, content in members.items():
            by_class[name.split("/")[0]][name.split("/")[1]] = content
        if layout == "one":
            write_tar(root / f"{split}.tar", members)
            continue
        (root / split).mkdir()
        if layout == "shards":
            for shard in (0, 1):
                write_tar(root / split / f"{shard}.tar", dict(list(members.items())[shard::2]))
            continue
        for name, images in by_class.items():
            write_tar(root / split / f"{name}.tar", images)
        if layout == "nested":
            write_tar(root / f"{split}.tar", tar_members(root / split))
            shutil.rmtree(root / split)
    return root
