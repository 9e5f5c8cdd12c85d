"""Readers of the data sets: from files, as published, to (RGB image, label).

A reader takes the folder that ``--data-path`` names and a split ("train" or "val") and gives
:class:`LabelledImages`. It has checked all that can be known without decoding an image; what is wrong is one
line in a ``UserError``. :mod:`datasets` names the readers.
"""

import io
import os
import pickle
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from timm.data.readers.reader_image_in_tar import CACHE_FILENAME_SUFFIX, extract_tarinfos
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, Flowers102, OxfordIIITPet, StanfordCars
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from utils import UserError, logger

CLASS_LISTS = Path(__file__).parent / "class_lists"
DOMAINNET_CLASSES = 345
LARGE_TARS = 10 * 2**30  # bytes; from here on an index of them is recommended

FOLDER_LAYOUT = "train/<class>/* and val/<class>/*"
TAR_LAYOUT = "train.tar and val.tar (<class>/* in them), or train/*.tar and val/*.tar (the same, or a tar a class)"
CARS_LAYOUT = (
    "stanford_cars/ with devkit/cars_meta.mat, devkit/cars_train_annos.mat, cars_test_annos_withlabels.mat, "
    "cars_train/*.jpg and cars_test/*.jpg"
)
FLOWERS_LAYOUT = "flowers-102/ with jpg/*.jpg, imagelabels.mat and setid.mat"
PETS_LAYOUT = "oxford-iiit-pet/ with images/*.jpg, annotations/trainval.txt and annotations/test.txt"


class UnreadableImage(UserError):
    """An image file that cannot be decoded; the message names it.

    A ``DataLoader`` raises a worker's exception again with the worker's whole traceback as the message. The
    last line of that is the original message, and all that is kept.
    """

    def __init__(self, message: str):
        last_line = message.strip().splitlines()[-1]
        super().__init__(last_line.removeprefix(f"{type(self).__module__}.{type(self).__qualname__}: "))


# ------------------------------------------------------------------------------------ sets of images


class LabelledImages(Dataset):
    """A set of (RGB image, label).

    ``names[i]`` says which image of the published files ``i`` is, ``targets[i]`` is its label: a position in
    ``classes``. ``in_memory``: access decodes nothing.
    """

    in_memory = False

    def __init__(self, names: Sequence, targets: list[int], classes: list[str]):
        self.names = names
        self.targets = targets
        self.classes = classes

    def __len__(self) -> int:
        return len(self.targets)


class ArrayImages(LabelledImages):
    """Images in memory, uint8 ``(N, h, w)`` grey or ``(N, h, w, 3)``; their names are their numbers."""

    in_memory = True

    def __init__(self, images: np.ndarray, targets: list[int], classes: list[str]):
        super().__init__(range(len(targets)), targets, classes)
        self.images = images

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), self.targets[index]


class EncodedImages(LabelledImages):
    """Images that are decoded when asked for; where their bytes are is ``_open``'s matter.

    Raises:
        UnreadableImage: on access: missing, truncated, or no image.
    """

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with self._image(index) as image:
            return image.convert("RGB"), self.targets[index]

    def size(self, index: int) -> tuple[int, int]:
        """Width and height in pixels, from the file's header alone."""
        with self._image(index) as image:
            return image.size

    @contextmanager
    def _image(self, index: int) -> Iterator[Image.Image]:
        try:
            with self._open(index) as file, Image.open(file) as image:
                yield image
        except Exception as error:  # Pillow's decoders raise a dozen types on broken files
            raise UnreadableImage(
                f"cannot read the image {self._where(index)!r} ({_one_line(error)}): "
                "mend or remove the file, or give --skip-unreadable"
            ) from error

    def _open(self, index: int) -> BinaryIO:
        raise NotImplementedError

    def _where(self, index: int) -> str:
        raise NotImplementedError


class ImageFiles(EncodedImages):
    """Image files; ``names`` are their paths below ``root``."""

    def __init__(self, root: Path, names: list[str], targets: list[int], classes: list[str]):
        super().__init__(names, targets, classes)
        self.root = root

    def _open(self, index: int) -> BinaryIO:
        return open(self._where(index), "rb")

    def _where(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])


class TarImages(EncodedImages):
    """Images in uncompressed tar files; ``places`` int64 ``(N, 3)``: number of the tar, first byte, bytes.

    A tar is opened anew for each image, so processes share no file position, and a thousand tars (one a
    class) do not meet the limit of open files.
    """

    def __init__(self, tars: list[str], places: np.ndarray, names: list[str], targets: list[int], classes: list[str]):
        super().__init__(names, targets, classes)
        self.tars = tars
        self.places = places

    def _open(self, index: int) -> BinaryIO:
        number, start, size = self.places[index].tolist()
        with open(self.tars[number], "rb", buffering=0) as file:
            return io.BytesIO(os.pread(file.fileno(), size, start))

    def _where(self, index: int) -> str:
        return f"{self.tars[self.places[index, 0]]}: {self.names[index]}"


class SubsetOf(LabelledImages):
    """The images of another set at these indices."""

    def __init__(self, images: LabelledImages, indices: list[int]):
        super().__init__(
            [images.names[index] for index in indices], [images.targets[index] for index in indices], images.classes
        )
        self.in_memory = images.in_memory
        self._images = images
        self._indices = indices

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self._images[self._indices[index]]

    def size(self, index: int) -> tuple[int, int]:
        return self._images.size(self._indices[index])


# ---------------------------------------------------------------------------------- folders of classes


def read_folder(data_path: Path, split: str, class_list: str | None = None) -> ImageFiles:
    """One split of ``train/<class>/*`` and ``val/<class>/*``; labels are the sorted class names.

    Args:
        class_list: file of :data:`CLASS_LISTS` with the classes to keep; without it all are kept, and the two
            splits must have the same ones.

    Raises:
        UserError: a split is missing, flat or empty, a class empty or missing, or the splits differ.
    """
    found = _class_folders(data_path, split)
    if class_list is None:
        _check_other_split(data_path, split, found, _class_folders)
        return _read_classes(data_path, split, found)
    wanted = _read_class_list(class_list)
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise UserError(
            f"{data_path / split}: no folders for the classes {_some(missing)}; "
            f"--data-path must hold all of class_lists/{class_list}"
        )
    return _read_classes(data_path, split, wanted)


def _read_classes(data_path: Path, split: str, classes: list[str]) -> ImageFiles:
    labels = {name: label for label, name in enumerate(classes)}
    root = data_path / split
    samples = make_dataset(root, labels, IMG_EXTENSIONS, allow_empty=True)
    targets = [label for _, label in samples]
    filled = set(targets)
    empty = [name for label, name in enumerate(classes) if label not in filled]
    if empty:
        raise UserError(
            f"{root}: no images in the class folders {_some(empty)}; "
            f"remove them or fill them with images ({' '.join(IMG_EXTENSIONS)})"
        )
    below = len(os.path.join(root, ""))
    return ImageFiles(data_path, [f"{split}/{path[below:]}" for path, _ in samples], targets, classes)


def _class_folders(data_path: Path, split: str) -> list[str]:
    root = data_path / split
    if not root.is_dir():
        raise UserError(f"{data_path}: no folder {split}/; expected {FOLDER_LAYOUT}")
    entries = list(os.scandir(root))
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    if classes:
        return classes
    if any(entry.name.lower().endswith(IMG_EXTENSIONS) for entry in entries):
        raise UserError(
            f"{root}: images lie directly in it; sort them into one folder a class, {split}/<class>/* "
            "(for ILSVRC-2012's validation images, extract_ILSVRC.sh of PyTorch's ImageNet example does so)"
        )
    raise UserError(f"{root}: no images; expected {FOLDER_LAYOUT}")


def _check_other_split(data_path: Path, split: str, classes: list[str], classes_of) -> None:
    """Labels are positions among the class names: one that a split lacks would shift all after it."""
    other = "val" if split == "train" else "train"
    if not (data_path / other).is_dir() and not (data_path / f"{other}.tar").is_file():
        return  # evaluation needs no training images; a training run builds the other split, too
    difference = {split: set(classes), other: set(classes_of(data_path, other))}
    only = [
        f"only in {name}/: {_some(sorted(difference[name] - difference[against]))}"
        for name, against in ((split, other), (other, split))
        if difference[name] - difference[against]
    ]
    if only:
        raise UserError(f"{data_path}: train/ and val/ must have the same class folders; {'; '.join(only)}")


def _read_class_list(name: str) -> list[str]:
    lines = (CLASS_LISTS / name).read_text().splitlines()
    return sorted(line for line in lines if line and not line.startswith("#"))


# ------------------------------------------------------------------------------------------ tar files


def read_tar(data_path: Path, split: str) -> TarImages:
    """``train.tar`` and ``val.tar`` with class folders, or folders of tars, as timm's reader understands them.

    A tar of tars, or a folder of one tar a class, is understood too. Labels are the sorted class names, and
    images are ordered by class, tar and name, as in an image folder. To find the images, the tars are read to their
    end at every start, unless timm's index lies beside them: :func:`write_tar_index` makes one.

    Raises:
        UserError: no tars, a damaged or compressed one, none with images, or other classes in the other split.
    """
    images = _scan_tars(_tar_root(data_path, split))
    if split == "train":  # an evaluation does not read the training tars for this
        _check_other_split(
            data_path, split, images.classes, lambda path, other: _scan_tars(_tar_root(path, other)).classes
        )
    return images


def write_tar_index(root: str) -> None:
    """Let timm write the index of a tar file beside it, or of a folder of tars into it, anew.

    The index, ``_*_tarinfos.pickle``, is a pickle. No run writes one; one that lies there is read, as long as no tar is
    younger. So leave one there only where you made it yourself.
    """
    _index_of(Path(root)).unlink(missing_ok=True)  # timm would read it
    extract_tarinfos(root, cache_tarinfo=True, extensions=set(IMG_EXTENSIONS))


def _tar_root(data_path: Path, split: str) -> Path:
    single, folder = data_path / f"{split}.tar", data_path / split
    if single.is_file():
        return single
    if any(folder.glob("*.tar")):
        return folder
    raise UserError(f"{data_path}: neither {split}.tar nor {split}/*.tar; expected {TAR_LAYOUT}")


def _index_of(root: Path) -> Path:
    """Where timm has the index of a tar, or of a folder of tars."""
    folder, name = (root.parent, root.stem) if root.is_file() else (root, root.name)
    return folder / f"_{name}{CACHE_FILENAME_SUFFIX}"


@lru_cache(maxsize=2)  # both splits' classes are compared, and both splits are read
def _scan_tars(root: Path) -> TarImages:
    use_index = _has_good_index(root, [root] if root.is_file() else list(root.glob("*.tar")))
    try:
        # timm would write the index by itself, from every process at once; a data folder is only read here
        samples, targets, labels, _ = extract_tarinfos(
            str(root), cache_tarinfo=use_index, extensions=set(IMG_EXTENSIONS)
        )
    except (tarfile.TarError, pickle.UnpicklingError, EOFError, ValueError, AssertionError) as error:
        if use_index:
            raise UserError(f"{_index_of(root)}: damaged, or of other tars ({_one_line(error)}); remove it") from error
        raise UserError(f"{root}: damaged, or without images ({_one_line(error)}); expected {TAR_LAYOUT}") from error
    return _tar_images(root, samples, targets, sorted(labels, key=labels.get))


def _has_good_index(root: Path, tars: list[Path]) -> bool:
    """Whether an index lies there that is not older than a tar; says how to make one where it is missed."""
    size = sum(_checked_size(tar) for tar in tars)
    index = _index_of(root)
    command = f"python -c \"import readers; readers.write_tar_index('{root}')\""
    if index.is_file():
        written = index.stat().st_mtime
        younger = [tar for tar in tars if tar.stat().st_mtime > written]
        if younger:
            logger.warning(f"{index}: not used, as it is older than {younger[0]}; renew it by {command}")
        return not younger
    if size > LARGE_TARS:
        logger.info(
            f"{root}: reading {size / 2**30:,.0f} GiB to find the images; "
            f"an index makes the next start quick: {command}"
        )
    return False


def _checked_size(tar: Path) -> int:
    """Bytes of a tar that has its end: two empty blocks, without which a reader stops silently, too."""
    size = tar.stat().st_size
    with open(tar, "rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
        file.seek(max(0, size - 1024))
        has_end = file.read() == bytes(1024)
    if is_gzip:
        raise UserError(
            f"{tar}: compressed, so its images cannot be read one by one; unpack it: "
            f"mv {tar} {tar}.gz && gunzip {tar}.gz"
        )
    if not has_end:
        raise UserError(f"{tar}: not whole (a tar ends with 1,024 zero bytes); copy it again")
    return size


def _tar_images(root: Path, samples: np.ndarray, targets: np.ndarray, timm_classes: list[str]) -> TarImages:
    """timm's samples in the order of an image folder, with byte positions in place of its TarInfo objects.

    (Those are 1.5 GB for ImageNet, which every worker would copy.)
    """
    classes = sorted(timm_classes)  # timm sorts numbers in names by value
    label_of = {name: label for label, name in enumerate(classes)}
    if "" in label_of:
        raise UserError(f"{root}: images lie directly in it, without a class folder; expected {TAR_LAYOUT}")
    tars = {str(root / tar if tar else root): None for _, tar, _ in samples}
    number_of = {tar: number for number, tar in enumerate(tars)}
    rows = []
    for (member, tar, inner), target in zip(samples, targets, strict=True):
        start = member.offset_data + (inner.offset_data if inner else 0)
        name = "/".join(part for part in (tar, inner and inner.name, member.name) if part)
        rows.append(
            (label_of[timm_classes[target]], name, number_of[str(root / tar if tar else root)], start, member.size)
        )
    rows.sort()
    return TarImages(
        list(tars),
        np.array([row[2:] for row in rows], dtype=np.int64),
        [row[1] for row in rows],
        [row[0] for row in rows],
        classes,
    )


# ---------------------------------------------------------------------------- sets with lists of files


def _listed(root: Path, names: list[str], targets: list[int], classes: list[str], source: Path) -> ImageFiles:
    """The image files that ``source`` lists, checked with one listing a folder instead of a look at each file.

    Raises:
        UserError: a label out of range, or a file that is not there.
    """
    wrong = [label for label in targets if not 0 <= label < len(classes)]
    if wrong:
        raise UserError(f"{source}: label {wrong[0]} is not in 0..{len(classes) - 1}; fetch the file again")
    files = defaultdict(set)
    for folder in {os.path.dirname(name) for name in names}:
        if os.path.isdir(root / folder):
            files[folder] = set(os.listdir(root / folder))
    missing = [name for name in names if os.path.basename(name) not in files[os.path.dirname(name)]]
    if missing:
        raise UserError(
            f"{source} names {len(missing):,} files that are not in {root}, {missing[0]} first; extract the images anew"
        )
    return ImageFiles(root, names, targets, classes)


@contextmanager
def _explaining(root: Path, layout: str) -> Iterator[None]:
    """Whatever torchvision and scipy raise on missing or broken files, as one line."""
    try:
        yield
    except Exception as error:  # a dozen types
        reason = "files missing or damaged" if isinstance(error, RuntimeError) else _one_line(error)
        raise UserError(f"{root}: {reason}; expected {layout}") from error


def read_cars(data_path: Path, split: str) -> ImageFiles:
    """Stanford Cars, annotations as torchvision reads them.

    Raises:
        UserError: files missing or damaged, a label out of range.
    """
    part = "train" if split == "train" else "test"
    with _explaining(data_path, CARS_LAYOUT):
        cars = StanfordCars(data_path, part)
        folder = f"stanford_cars/cars_{part}"
        names = [f"{folder}/{os.path.basename(path)}" for path, _ in cars._samples]
        targets = [int(label) for _, label in cars._samples]
    return _listed(data_path, names, targets, cars.classes, cars._annotations_mat_path)


def read_flowers(data_path: Path, split: str) -> ImageFiles:
    """Oxford's 102 flowers through torchvision; ``train`` is its train and validation images, ``val`` the test's.

    Raises:
        UserError: files missing or damaged.
    """
    with _explaining(data_path, FLOWERS_LAYOUT):
        parts = [Flowers102(data_path, part) for part in (("train", "val") if split == "train" else ("test",))]
    names = [str(path.relative_to(data_path)) for part in parts for path in part._image_files]
    targets = [label for part in parts for label in part._labels]
    source = data_path / "flowers-102" / "imagelabels.mat"
    return _listed(data_path, names, targets, Flowers102.classes, source)


def read_pets(data_path: Path, split: str) -> ImageFiles:
    """Oxford-IIIT pets, 37 breeds, lists as torchvision reads them; ``val`` is the test split.

    Raises:
        UserError: files missing or damaged.
    """
    part = "trainval" if split == "train" else "test"
    with _explaining(data_path, PETS_LAYOUT):
        pets = OxfordIIITPet(data_path, part)
    names = [str(path.relative_to(data_path)) for path in pets._images]
    return _listed(data_path, names, pets._labels, pets.classes, pets._anns_folder / f"{part}.txt")


def read_domainnet(domain: str, data_path: Path, split: str) -> ImageFiles:
    """One domain of DomainNet by its published lists, original or cleaned; ``val`` is the test list.

    Both lists are read, as they name the classes.

    Raises:
        UserError: a list is missing, empty or no text, a line of it not understood, a label out of range or with two
            names or without images, or a file that is not there.
    """
    lists = {part: data_path / f"{domain}_{part}.txt" for part in ("train", "test")}
    samples = {part: _read_list(path, domain) for part, path in lists.items()}
    folders = {}
    for part, path in lists.items():
        for name, label in samples[part]:
            folder = name.split("/")[1]
            if folders.setdefault(label, folder) != folder:
                raise UserError(f"{path}: label {label} is {folder} here and {folders[label]} before; fetch both lists")
    absent = [str(label) for label in range(DOMAINNET_CLASSES) if label not in folders]
    if absent:
        raise UserError(
            f"{lists['train']}: no images of the labels {_some(absent)}; the published lists have "
            f"{DOMAINNET_CLASSES} classes"
        )
    classes = [folders[label] for label in range(DOMAINNET_CLASSES)]
    part = "train" if split == "train" else "test"
    names, targets = (list(column) for column in zip(*samples[part], strict=True))
    return _listed(data_path, names, targets, classes, lists[part])


def _read_list(path: Path, domain: str) -> list[tuple[str, int]]:
    """Lines like ``clipart/aircraft_carrier/clipart_001_000018.jpg 0``."""
    if not path.is_file():
        raise UserError(f"{path}: no such list; expected {domain_layout(domain)}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: no UTF-8 text ({error}); fetch the list again") from error
    if not lines:
        raise UserError(f"{path}: an empty list; fetch it again")
    samples = []
    for number, line in enumerate(lines, 1):
        name, _, label = line.rpartition(" ")
        if name.count("/") != 2 or not label.isdecimal():
            raise UserError(f"{path}, line {number}: {line!r} is not '{domain}/<class>/<file> <label>'")
        if int(label) >= DOMAINNET_CLASSES:
            raise UserError(f"{path}, line {number}: label {label} is not in 0..{DOMAINNET_CLASSES - 1}")
        samples.append((name, int(label)))
    return samples


def domain_layout(domain: str) -> str:
    """What ``--data-path`` holds for a domain of DomainNet, in words."""
    return f"{domain}_train.txt, {domain}_test.txt and {domain}/<class>/*"


# --------------------------------------------------------------------------------------- sets in memory


def read_cifar(reader: type[CIFAR10], data_path: Path, split: str) -> ArrayImages:
    """CIFAR's python batches, as torchvision reads (and checksums) them.

    Raises:
        UserError: files missing or damaged.
    """
    try:
        cifar = reader(data_path, train=split == "train")
    except RuntimeError as error:
        raise UserError(
            f"{data_path / reader.base_folder}: files missing or damaged; give --download, or extract "
            f"{reader.filename} (from https://www.cs.toronto.edu/~kriz/cifar.html) in {data_path}"
        ) from error
    return ArrayImages(cifar.data, cifar.targets, cifar.classes)


def read_digits(data_path: Path | None, split: str) -> ArrayImages:
    """scikit-learn's 1,797 scanned 8 x 8 digits; numbers 0, 5, 10, ... (360) are ``val``, the rest ``train``.

    Consecutive digits are one writer's, so ``val`` has the same writers: an easy set.
    """
    from sklearn.datasets import load_digits  # a second to import, for this set only

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    in_val = np.arange(len(images)) % 5 == 0
    chosen = in_val if split == "val" else ~in_val
    return ArrayImages(images[chosen], digits.target[chosen].tolist(), [str(name) for name in digits.target_names])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _some(names: list[str], limit: int = 5) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
