"""Images in uncompressed tar files, read without extraction.

python -m readers.tars /data/train.tar        # write an index, which makes later starts fast
"""

import argparse
import io
import os
import pickle
import shlex
import tarfile
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from timm.data.readers.reader_image_in_tar import CACHE_FILENAME_SUFFIX, extract_tarinfos
from torchvision.datasets.folder import IMG_EXTENSIONS

from readers import TAR_LAYOUT
from readers.folders import check_same_classes
from readers.images import EncodedImages, one_line
from utils import UserError, logger

LARGE_TARS = 10 * 2**30  # bytes; above this size an index is recommended


class TarImages(EncodedImages):
    """Images in uncompressed tar files.

    A tar is opened for each image. Processes therefore share no file position, and a thousand tars (one per class) do
    not exceed the limit of open files.

    Args:
        tars: paths of the tar files.
        places: int64 ``(N, 3)``: index of the tar, offset and size of the image in bytes.
        names, targets, classes: see ``LabelledImages``.
    """

    def __init__(self, tars: list[str], places: np.ndarray, names: list[str], targets: list[int], classes: list[str]):
        super().__init__(names, targets, classes)
        self.tars = tars
        self.places = places

    def _open(self, index: int) -> BinaryIO:
        number, start, size = self.places[index].tolist()
        with open(self.tars[number], "rb", buffering=0) as file:
            return io.BytesIO(os.pread(file.fileno(), size, start))

    def _location(self, index: int) -> str:
        return f"{self.tars[self.places[index, 0]]}: {self.names[index]}"


def read_tar(data_path: Path, split: str) -> TarImages:
    """One split in tar files: ``<split>.tar`` with class folders, or a folder ``<split>/`` of tars, read by timm.

    A tar of tars, and a folder with one tar per class, are supported too. Labels are positions in the sorted class
    names; images are ordered by class, tar and name, as in an image folder. Every start scans the tars completely to
    find the images, unless timm's index exists (:func:`write_tar_index`).

    Raises:
        UserError: no tars, a damaged or compressed tar, no images, or different classes in the two splits.
    """
    images = _scan_tars(_tar_root(data_path, split))
    if split == "train":  # evaluation does not scan the training tars for this check
        check_same_classes(
            data_path, split, images.classes, lambda path, other: _scan_tars(_tar_root(path, other)).classes
        )
    return images


def write_tar_index(root: str) -> None:
    """Rewrite timm's index: of a tar file into its folder, of a folder of tars into that folder.

    The index, ``_*_tarinfos.pickle``, is a pickle. Unpickling untrusted files is unsafe: keep only an index that you
    have written yourself. Runs never write an index; they read an existing one unless a tar is newer.
    """
    _index_path(Path(root)).unlink(missing_ok=True)  # timm would read the old one instead
    extract_tarinfos(root, cache_tarinfo=True, extensions=set(IMG_EXTENSIONS))


def _tar_root(data_path: Path, split: str) -> Path:
    single, folder = data_path / f"{split}.tar", data_path / split
    if single.is_file():
        return single
    if any(folder.glob("*.tar")):
        return folder
    raise UserError(f"{data_path}: neither {split}.tar nor {split}/*.tar; expected {TAR_LAYOUT}")


def _index_path(root: Path) -> Path:
    """The path of timm's index of a tar, or of a folder of tars."""
    folder, name = (root.parent, root.stem) if root.is_file() else (root, root.name)
    return folder / f"_{name}{CACHE_FILENAME_SUFFIX}"


@lru_cache(maxsize=2)  # each split is scanned for reading, and again for comparing the classes
def _scan_tars(root: Path) -> TarImages:
    use_index = _has_valid_index(root, [root] if root.is_file() else list(root.glob("*.tar")))
    try:
        # with cache_tarinfo timm would also write the index, from all processes at once; runs only read data
        samples, targets, labels, _ = extract_tarinfos(
            str(root), cache_tarinfo=use_index, extensions=set(IMG_EXTENSIONS)
        )
    except (tarfile.TarError, pickle.UnpicklingError, EOFError, ValueError, AssertionError) as error:
        if use_index:
            raise UserError(f"{_index_path(root)}: damaged, or of other tars ({one_line(error)}); remove it") from error
        raise UserError(f"{root}: damaged, or without images ({one_line(error)}); expected {TAR_LAYOUT}") from error
    return _tar_images(root, samples, targets, sorted(labels, key=labels.get))


def _has_valid_index(root: Path, tars: list[Path]) -> bool:
    """Whether an index exists and is newer than all tars; logs how to write one for large tars."""
    size = sum(_checked_size(tar) for tar in tars)
    index = _index_path(root)
    command = f"python -m readers.tars {shlex.quote(str(root))}"
    if index.is_file():
        written = index.stat().st_mtime
        newer = [tar for tar in tars if tar.stat().st_mtime > written]
        if newer:
            logger.warning(f"{index}: not used, because it is older than {newer[0]}; update it with: {command}")
        return not newer
    if size > LARGE_TARS:
        logger.info(
            f"{root}: reading {size / 2**30:,.0f} GiB to find the images; "
            f"write an index to make the next start fast: {command}"
        )
    return False


def _checked_size(tar: Path) -> int:
    """Size of a tar in bytes, after checking its end of two zero blocks; readers accept a truncated tar silently."""
    size = tar.stat().st_size
    with open(tar, "rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
        file.seek(max(0, size - 1024))
        has_end = file.read() == bytes(1024)
    if is_gzip:
        raise UserError(
            f"{tar}: compressed, so its images cannot be accessed directly; decompress it: "
            f"mv {tar} {tar}.gz && gunzip {tar}.gz"
        )
    if not has_end:
        raise UserError(f"{tar}: truncated (a tar ends with 1,024 zero bytes); copy it again")
    return size


def _tar_images(root: Path, samples: np.ndarray, targets: np.ndarray, timm_classes: list[str]) -> TarImages:
    """timm's samples, sorted as in an image folder, with byte offsets instead of TarInfo objects.

    (The TarInfo objects of ImageNet take 1.5 GB, which every worker would copy.)
    """
    classes = sorted(timm_classes)  # timm's own order is natural sorting
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


def main(argv: list[str] | None = None) -> None:
    """Write the indices that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m readers.tars",
        description="Write an index of the images in tars, which makes later starts fast.",
    )
    text = "a tar, whose index is written beside it, or a folder of tars, whose index is written into it"
    parser.add_argument("tars", nargs="+", metavar="TAR", help=text)
    for place in parser.parse_args(argv).tars:
        write_tar_index(place)


if __name__ == "__main__":
    main()
