"""Images in uncompressed tar files, read where they lie.

python -m readers.tars /data/train.tar        # write the index that makes the next start quick
"""

import io
import os
import pickle
import shlex
import sys
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

LARGE_TARS = 10 * 2**30  # bytes; from here on an index of them is recommended


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
        check_same_classes(
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
            raise UserError(f"{_index_of(root)}: damaged, or of other tars ({one_line(error)}); remove it") from error
        raise UserError(f"{root}: damaged, or without images ({one_line(error)}); expected {TAR_LAYOUT}") from error
    return _tar_images(root, samples, targets, sorted(labels, key=labels.get))


def _has_good_index(root: Path, tars: list[Path]) -> bool:
    """Whether an index lies there that is not older than a tar; says how to make one where it is missed."""
    size = sum(_checked_size(tar) for tar in tars)
    index = _index_of(root)
    command = f"python -m readers.tars {shlex.quote(str(root))}"
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


if __name__ == "__main__":
    for place in sys.argv[1:]:
        write_tar_index(place)
