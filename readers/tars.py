"""Images in uncompressed tar files, read without extraction.

python -m readers.tars /data/train.tar        # write an index, which makes later starts fast
"""

import argparse
import io
import os
import shlex
import tarfile
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from readers import TAR_LAYOUT
from readers.files import EXTENSIONS, LeftOut, is_hidden, suffix_of
from readers.folders import check_same_classes
from readers.images import EncodedImages, one_line
from utils import UserError, logger, write_atomically

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
    """One split in tar files: ``<split>.tar`` with class folders, or a folder ``<split>/`` of tars.

    A tar of tars, and a folder with one tar per class, are supported too. Labels are positions in the sorted class
    names; images are ordered by class, tar and name, as in an image folder. Every start scans the tars completely to
    find the images, unless an index exists (:func:`write_tar_index`).

    Raises:
        UserError: no tars, a damaged or compressed tar, no images, or different classes in the two splits.
    """
    images = _scan_tars(_tar_root(data_path, split))
    if split == "train":  # evaluation does not scan the training tars for this check
        check_same_classes(
            data_path, split, images.classes, lambda path, other: _scan_tars(_tar_root(path, other)).classes
        )
    return images


def count_training(data_path: Path, enough: int) -> int:
    """The number of training images; a tar without an index is read to its end, as for training itself."""
    return len(_scan_tars(_tar_root(data_path, "train")))


def _tar_root(data_path: Path, split: str) -> Path:
    single, folder = data_path / f"{split}.tar", data_path / split
    if single.is_file():
        return single
    if any(not is_hidden(path.name) for path in folder.glob("*.tar")):
        return folder
    raise UserError(f"{data_path}: neither {split}.tar nor {split}/*.tar; expected {TAR_LAYOUT}")


@lru_cache(maxsize=2)  # each split is scanned for reading, and again for comparing the classes
def _scan_tars(root: Path) -> TarImages:
    tars = _tars_in(root)
    if _has_valid_index(root, tars):
        return _read_index(root, tars)
    return _find_images(root, tars)


def _tars_in(root: Path) -> list[Path]:
    return [root] if root.is_file() else sorted(path for path in root.glob("*.tar") if not is_hidden(path.name))


# ------------------------------------------------------------------------------------------------ checks

OTHER_ARCHIVES = {
    b"\x1f\x8b": ("gzip", "mv {0} {0}.gz && gunzip {0}.gz"),
    b"\xfd7zXZ\0": ("xz", "mv {0} {0}.xz && unxz {0}.xz"),
    b"BZh": ("bzip2", "mv {0} {0}.bz2 && bunzip2 {0}.bz2"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd {0} -o {0}.new && mv {0}.new {0}"),
    b"\x04\x22\x4d\x18": ("lz4", "unlz4 {0} {0}.new && mv {0}.new {0}"),
}
"""How compressed files begin: their program, and commands that make the file ``{0}`` a tar."""
UNPACKED = {b"PK": "a zip archive", b"7z\xbc\xaf": "a 7z archive", b"Rar!": "a rar archive"}
"""How archives that are no compressed tar begin."""


def _checked_size(tar: Path) -> int:
    """Size of a tar in bytes, after checking that it is one, and whole: readers accept a truncated tar silently.

    A tar begins with the header of its first file and ends with two zero blocks of 512 bytes.

    Raises:
        UserError: it is compressed, something else, or truncated.
    """
    size = tar.stat().st_size
    with open(tar, "rb") as file:
        start = file.read(tarfile.BLOCKSIZE)
        file.seek(max(0, size - 1024))
        has_end = file.read() == bytes(1024)
    for magic, (program, commands) in OTHER_ARCHIVES.items():
        if start.startswith(magic):
            raise UserError(
                f"{tar}: compressed by {program}, so its images cannot be accessed directly; decompress it: "
                + commands.format(shlex.quote(str(tar)))
            )
    for magic, what in UNPACKED.items():
        if start.startswith(magic):
            raise UserError(f"{tar}: {what}, not a tar; unpack it, and read the files with --data-set folder")
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
    except tarfile.InvalidHeaderError:  # type: ignore[attr-defined]  # not in the stubs
        raise UserError(f"{tar}: not a tar; it begins with {start[:16]!r}. Fetch the tar itself") from None
    except tarfile.HeaderError:
        pass  # an empty or truncated one
    if not has_end:
        raise UserError(f"{tar}: truncated (a tar ends with 1,024 zero bytes); copy it again")
    return size


# -------------------------------------------------------------------------------------------------- scan


def _find_images(root: Path, tars: list[Path]) -> TarImages:
    """Read tars to their ends; ``root`` is the tar, or the folder of them.

    Raises:
        UserError: damaged, no image, or an image without a class.
    """
    rows: list[tuple[str, str, int, int, int]] = []  # class, name, number of the tar, offset, size
    left_out = LeftOut()
    try:
        for number, tar in enumerate(tars):
            with tarfile.open(tar, "r|") as file:  # from start to end, which suits shared disks
                folder, prefix = ("", "") if tar == root else (tar.stem, f"{tar.name}/")
                rows += [(*row[:2], number, *row[2:]) for row in _images_in(file, folder, prefix, 0, left_out)]
                _check_end(tar, file.offset)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(f"{tar}: damaged ({one_line(error)}); expected {TAR_LAYOUT}") from error
    if not rows:
        rest = f" (left out: {left_out})" if str(left_out) else ""
        raise UserError(f"{root}: damaged, or without images{rest}; expected {TAR_LAYOUT}")
    rows.sort()
    if rows[0][0] == "":
        raise UserError(f"{root}: images lie directly in it, without a class folder; expected {TAR_LAYOUT}")
    classes = sorted({row[0] for row in rows})
    label_of = {name: label for label, name in enumerate(classes)}
    places = np.array([row[2:] for row in rows], np.int64)
    names, targets = [row[1] for row in rows], [label_of[row[0]] for row in rows]
    images = TarImages([str(tar) for tar in tars], places, names, targets, classes)
    images.left_out = left_out
    return images


def _check_end(tar: Path, end: int) -> None:
    """Refuse a tar with more than zeros behind its end: of tars that were joined by ``cat``, tools read the first."""
    with open(tar, "rb") as file:
        file.seek(end)
        while block := file.read(2**20):
            if block.strip(b"\0"):
                raise UserError(
                    f"{tar}: another tar behind its end, which no reader finds; extract it with --ignore-zeros, and "
                    "pack it again"
                )


def _images_in(
    tar: tarfile.TarFile, folder: str, prefix: str, start: int, left_out: LeftOut
) -> Iterator[tuple[str, str, int, int]]:
    """Class, name, offset and size of each image in a tar, and in the tars inside it.

    A link is an image where it leads to one in the same tar. Of two files of one name the later one counts, as when the
    tar is extracted.

    Args:
        tar: opened for reading as a stream.
        folder: where the tar's files lie, for the class of those without a folder.
        prefix: of the names.
        start: offset of this tar in the file, in bytes.
        left_out: gets what is not used.
    """
    # 1. files and links
    places: dict[str, tuple[int, int]] = {}
    links = {}
    for member in tar:
        name = os.path.normpath(member.name)
        if member.isfile() and suffix_of(name) == ".tar" and not _hidden_place(name):
            with tarfile.open(fileobj=tar.extractfile(member), mode="r|") as inner:
                inside = os.path.join(folder, os.path.splitext(name)[0])
                yield from _images_in(inner, inside, f"{prefix}{name}/", start + member.offset_data, left_out)
        elif member.isfile():
            places[name] = start + member.offset_data, member.size
        elif member.islnk():
            links[name] = os.path.normpath(member.linkname)
        elif member.issym():
            links[name] = os.path.normpath(os.path.join(os.path.dirname(name), member.linkname))
    # 2. links, which may lead to other links
    for name in links:
        target, steps = name, 0
        while target in links and steps < len(links):
            target, steps = links[target], steps + 1
        if target in places:
            places[name] = places[target]
        elif not _hidden_place(name):
            left_out.links.append(prefix + name)
    # 3. images among them
    for name, place in places.items():
        if _hidden_place(name):
            if suffix_of(name) in EXTENSIONS:
                left_out.hidden.append(prefix + name)
        elif suffix_of(name) in EXTENSIONS:
            yield os.path.basename(os.path.join(folder, os.path.dirname(name)).rstrip("/")), prefix + name, *place
        else:
            left_out.suffixes.append(prefix + name)


def _hidden_place(name: str) -> bool:
    return any(is_hidden(part) for part in name.split("/"))


# ------------------------------------------------------------------------------------------------- index


def write_tar_index(root: str) -> None:
    """Rewrite the index of a tar file, into its folder, or of a folder of tars, into that folder.

    The index, ``_*_images.npz``, holds plain arrays. Runs never write one; they read an existing one unless a tar is
    newer.
    """
    path, tars = Path(root), _tars_in(Path(root))
    for tar in tars:
        _checked_size(tar)
    images = _find_images(path, tars)
    texts = {"tars": [tar.name for tar in tars], "classes": images.classes, "names": images.names}
    texts |= {name: getattr(images.left_out, name) for name in ("hidden", "suffixes", "links")}
    arrays: dict[str, np.ndarray] = {
        name: np.frombuffer(b"\0".join(map(os.fsencode, lines)), np.uint8) for name, lines in texts.items()
    }
    arrays |= {"places": images.places, "targets": images.targets}
    write_atomically(_index_path(path), lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]


def _read_index(root: Path, tars: list[Path]) -> TarImages:
    """The images that an index lists; raises UserError if it is damaged, or of other tars."""
    path = _index_path(root)
    try:
        with np.load(path) as arrays:
            numbers = {name: arrays[name] for name in ("places", "targets")}
            texts = {
                name: [os.fsdecode(line) for line in arrays[name].tobytes().split(b"\0") if line]
                for name in ("tars", "classes", "names", "hidden", "suffixes", "links")
            }
        if texts["tars"] != [tar.name for tar in tars]:
            raise ValueError(f"it has {len(texts['tars'])} tars, of other names")
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged, or of other tars ({one_line(error)}); remove it") from error
    files = [str(tar) for tar in tars]
    images = TarImages(files, numbers["places"], texts["names"], numbers["targets"].tolist(), texts["classes"])
    images.left_out = LeftOut(texts["hidden"], texts["suffixes"], texts["links"])
    return images


def _index_path(root: Path) -> Path:
    """The path of the index of a tar, or of a folder of tars."""
    folder, name = (root.parent, root.stem) if root.is_file() else (root, root.name)
    return folder / f"_{name}_images.npz"


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


def main(argv: list[str] | None = None) -> None:
    """Write the indices that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m readers.tars",
        description="Write an index of the images in tars, which makes later starts fast.\n\n"
        "    python -m readers.tars /data/train.tar",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    text = "a tar, whose index is written beside it, or a folder of tars, whose index is written into it"
    parser.add_argument("tars", nargs="+", metavar="TAR", help=text)
    for place in parser.parse_args(argv).tars:
        write_tar_index(place)


if __name__ == "__main__":
    main()
