"""Which files below a folder are images. What is left out is counted, so that it can be said."""

import math
import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from utils import UserError, first_few, logger, readable

FORMATS = set("AVIF BMP DIB GIF JPEG JPEG2000 MPO PNG PPM QOI TGA TIFF WEBP".split())
"""Pillow's names of the formats that photographs and drawings are kept in."""
_MORE = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}  # what this Pillow reads
EXTENSIONS: tuple[str, ...] = (*IMG_EXTENSIONS, *sorted(_MORE - set(IMG_EXTENSIONS)))
"""Suffixes of image files, in lower case; torchvision's come first."""
KNOWN = f"{', '.join(IMG_EXTENSIONS)} and {len(EXTENSIONS) - len(IMG_EXTENSIONS)} more"
"""For messages."""
SYSTEM = set(
    "@eadir @recycle @recently-snapshot @tmp #recycle #snapshot __macosx $recycle.bin lost+found thumbs.db desktop.ini "
    "ehthumbs.db".split()
) | {"system volume information"}
"""What file servers, macOS and Windows leave in folders, in lower case. Names that begin with a dot are not listed."""


@dataclass(frozen=True)
class LeftOut:
    """What a reader found but does not use, as paths below the folder that was searched.

    Attributes:
        hidden: folders, and files with an image's suffix, whose name is hidden or the system's.
        suffixes: files whose suffix is none of :data:`EXTENSIONS`.
        links: folders that are linked a second time or in a circle; links in a tar that lead nowhere.
        beside: images outside of all class folders.
    """

    hidden: list[str] = field(default_factory=list)
    suffixes: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """One line that counts all kinds, such as ``3 hidden (.DS, ...)``; empty if nothing is left out."""
        parts = [
            f"{len(paths):,} {what} ({first_few(paths, 2)})"
            for paths, what in (
                (self.hidden, "hidden"),
                (self.links, "repeated by links, or links that lead nowhere"),
                (self.beside, "images beside the class folders"),
            )
            if paths
        ]
        if self.suffixes:
            found = Counter(suffix_of(path) or "none" for path in self.suffixes)
            counts = sorted(found.items(), key=lambda item: (-item[1], item[0]))
            listed = first_few([f"{suffix} {count:,}" for suffix, count in counts])
            parts.append(f"{len(self.suffixes):,} files whose suffix is not read ({listed})")
        return readable(", ".join(parts))

    def below(self, folder: str) -> "LeftOut":
        """The same, as paths below the parent of the folder that was searched, which has this name."""
        kinds = (self.hidden, self.suffixes, self.links, self.beside)
        return LeftOut(*([f"{folder}/{path}" for path in paths] for paths in kinds))

    def tell(self, folder: str | Path) -> None:
        """Log what is left out; nothing if that is nothing."""
        if text := str(self):
            logger.info(f"{folder}: left out {text}; python -m analysis.check lists them")


def find_images(
    root: str | Path, only: Collection[str] | None = None, enough: float = math.inf
) -> tuple[list[tuple[str, str]], LeftOut]:
    """The image files below a folder, except hidden ones; links to files and to other places are followed.

    No folder is entered twice. A link to a folder that lies in ``root``, or in which ``root`` lies, is left out:
    without it every image is found once, under its own name.

    Args:
        root: the folder.
        only: the folders in ``root`` that are entered. Default: all.
        enough: no further folder is entered once so many images are found.

    Returns:
        Pairs of a folder, as a path below ``root`` (empty: ``root`` itself), and a file name, unsorted; and the rest.

    Raises:
        OSError: a folder cannot be listed.
    """
    top, found, left_out = os.path.realpath(root), [], LeftOut()
    waiting, seen = [("", top)], {top}  # a path below root, and the same place without links
    while waiting and len(found) < enough:
        folder, place = waiting.pop()
        for entry in sorted(os.scandir(os.path.join(root, folder)), key=lambda entry: entry.name):
            path, is_image = os.path.join(folder, entry.name), suffix_of(entry.name) in EXTENSIONS
            if is_hidden(entry.name):
                if is_image or entry.is_dir():
                    left_out.hidden.append(path)
            elif entry.is_dir():
                inside = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(place, entry.name)
                if inside in seen or leads_back(entry, top):
                    left_out.links.append(path)
                elif folder or only is None or entry.name in only:
                    seen.add(inside)
                    waiting.append((path, inside))
            elif is_image:
                found.append((folder, entry.name))
            else:
                left_out.suffixes.append(path)
    return found, left_out


def leads_back(entry: os.DirEntry, top: str) -> bool:
    """Whether an entry is a link to a place in the folder ``top``, or to one in which that lies."""
    if not entry.is_symlink():
        return False
    place = os.path.realpath(entry.path)
    return os.path.commonpath([place, top]) in (place, top)


def list_images(folder: str | Path) -> list[Path]:
    """The files of `find_images`, sorted by path; what is left out is logged.

    Raises:
        UserError: no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one with images in it")
    found, left_out = find_images(folder)
    if not found:
        raise no_images(folder, left_out)
    left_out.tell(folder)
    return sorted(Path(folder, place, name) for place, name in found)


def no_images(folder: Path, left_out: LeftOut) -> UserError:
    """The error of a folder without an image."""
    rest = f"; left out: {left_out}" if str(left_out) else ""
    return UserError(f"{folder}: no image in it or below; known are {KNOWN}{rest}")


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is the system's, and no image or class of the user."""
    return name.startswith(".") or name.lower() in SYSTEM


def suffix_of(name: str) -> str:
    """The suffix of a file's name, in lower case."""
    return os.path.splitext(name)[1].lower()
