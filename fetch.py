"""Weights by name: a file of the Hugging Face Hub, one of timm's, or any URL, fetched once and kept on this machine.

    hf-hub:OWNER/NAME[@REVISION][/FILE]       its model.safetensors or pytorch_model.bin, unless a file is named
    timm:NAME                                 timm's pretrained weights, such as timm:deit_small_patch16_224.fb_in1k
    https://HOST/PATH/FILE                    a file; as torch.hub's, its name may hold 8 or more digits of its SHA-256

Files of the Hub are in its own cache (HF_HOME), others in that of torch.hub (TORCH_HOME). Locks let one process of a
machine fetch while the others wait. What is there is taken without a look at the network.
"""

import difflib
import hashlib
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPException, InvalidURL
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

from utils import UserError, logger, processes_here

SCHEMES = ("hf-hub:", "timm:", "https://", "http://")
SECONDS_TO_ANSWER = 30.0
"""Longest wait for a server that does not answer."""
SECONDS_TO_TELL, SECONDS_TO_WAIT = 30.0, 1800.0
"""Wait for a process that fetches the same file: until a line says so, and from then on at most."""
HASH_IN_NAME = re.compile(r"-(?=[0-9]*[a-f])(?=[a-f]*[0-9])([0-9a-f]{8,})\.")
"""At least 8 hexadecimal digits, as in torch.hub's names; neither a number or a date, nor a word."""


def is_name(source: str | Path) -> bool:
    """Whether weights are given by name, and not as a file of this machine."""
    return str(source).startswith(SCHEMES)


def short_name(name: str) -> str:
    """What a model is called whose weights are given by name: without scheme, owner, host, folders and query."""
    scheme, _, place = name.partition(":")
    if scheme in ("timm", "hf-hub"):
        return place.partition("/")[2] or place
    return PurePosixPath(place.partition("?")[0]).stem


def local_file(source: str | Path, check: Callable[[Path], object] | None = None) -> Path:
    """The file of weights on this machine; what is given by name is fetched if it is not there yet.

    Args:
        source: a path, or a name as above.
        check: called with a file of a URL before it is kept; it raises a UserError for one that is no checkpoint, such
            as half a file.

    Raises:
        UserError: no such name, no network, or a wrong hash; it says which file is needed, and where it can be put.
    """
    name = str(source)
    if name.startswith("timm:"):
        return _from_timm(name, check)
    if name.startswith("hf-hub:"):
        return _from_hub(name, name.removeprefix("hf-hub:"))
    return _from_url(name, name, check) if is_name(name) else Path(source)


def input_notes(source: str | Path) -> list[str]:
    """A line to log where timm's weights were trained with images that were normalised otherwise than here."""
    if not str(source).startswith("timm:"):
        return []
    import timm
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    cfg = timm.get_pretrained_cfg(str(source).removeprefix("timm:"))
    if cfg is None or (tuple(cfg.mean), tuple(cfg.std)) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD):
        return []
    here = "this program's have ImageNet's: an evaluation is worse than timm's, and fine-tuning adapts the weights"
    return [f"its images had mean {cfg.mean} and deviation {cfg.std}, and {here}"]


def _from_timm(name: str, check: Callable[[Path], object] | None) -> Path:
    """The file of timm's pretrained weights ``timm:NAME``."""
    import timm

    model = name.removeprefix("timm:")
    try:
        cfg = timm.get_pretrained_cfg(model)
    except RuntimeError:  # no such tag
        cfg = None
    if cfg is None or not (cfg.hf_hub_id or cfg.url):
        close = difflib.get_close_matches(model, timm.list_pretrained(), n=3)
        hint = f"did you mean timm:{' or timm:'.join(close)}?" if close else "timm.list_pretrained() lists its names"
        raise UserError(f"{name}: timm has no such weights; {hint}")
    if cfg.custom_load:
        raise UserError(f"{name}: its file has the form of another program; take other weights")
    if cfg.hf_hub_id:
        return _from_hub(name, "/".join(filter(None, (cfg.hf_hub_id, cfg.hf_hub_filename))))
    return _from_url(name, str(cfg.url), check)


def _from_hub(name: str, place: str) -> Path:
    """The file at ``OWNER/NAME[@REVISION][/FILE]`` of the Hugging Face Hub; ``name`` is for messages."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils.logging import get_verbosity, set_verbosity, set_verbosity_error
    from timm.models import _hub

    # 1. which file
    owner, _, rest = place.partition("/")
    model, _, file = rest.partition("/")
    if not owner or not model:
        raise UserError(f"{name}: not a name of the Hub; give hf-hub:OWNER/NAME")
    repository, revision = _hub.hf_split(f"{owner}/{model}")
    files = [file] if file else [_hub.HF_SAFE_WEIGHTS_NAME, _hub.HF_WEIGHTS_NAME]
    # 2. here, else from there; the Hub's own lines about retries would hide the one that follows
    rank, _, _ = processes_here()
    verbosity = get_verbosity()
    set_verbosity_error()
    try:
        for local in (True, False):
            if not local and rank == 0:
                print(f"fetching {name} from the Hugging Face Hub", file=sys.stderr, flush=True)
            for wanted in files:
                try:
                    return Path(
                        _hub.hf_hub_download(repository, wanted, revision=revision or None, local_files_only=local)
                    )
                except LocalEntryNotFoundError:  # also where there is no network
                    if not local:
                        raise
                except EntryNotFoundError:
                    continue
    except LocalEntryNotFoundError as error:
        page = f"https://huggingface.co/{repository}"
        raise UserError(
            f"{name}: {files[0]} is not on this machine, and the Hub cannot be reached; give the command once where it "
            f"can, or get the file from {page} and name its path"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: cannot be fetched from the Hub ({reason}); check the name") from error
    finally:
        set_verbosity(verbosity)
    raise UserError(f"{name}: has no file {' or '.join(files)}; name one: hf-hub:{repository}/FILE")


def _from_url(name: str, url: str, check: Callable[[Path], object] | None) -> Path:
    """The file of a URL; ``name`` is for messages. Its folder has a number of its own, as many files have one name."""
    import torch

    try:
        # 1. is it here?
        file = os.path.basename(urlparse(url).path)
        digits = HASH_IN_NAME.search(file)
        folder = Path(torch.hub.get_dir(), "checkpoints")
        if not digits:
            folder /= hashlib.sha256(url.encode()).hexdigest()[:12]
        kept = folder / file
        if not file:
            raise UserError(f"{name}: the URL names no file")
        if kept.exists():
            return kept
        # 2. one process fetches and checks it
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(name, f"{kept}.lock"), _patience():
            if not kept.exists():
                arrived = kept.with_name(f"{kept.name}.arrived")
                print(f"fetching {url}", file=sys.stderr, flush=True)
                _download(name, url, arrived, digits and digits[1])
                _check_arrived(name, arrived, check)
                os.replace(arrived, kept)
    except (OSError, HTTPException) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{name}: cannot be fetched ({reason}); give the command where there is a network, or put it at {kept}"
        ) from error
    except ValueError as error:  # such as a host that cannot be one
        raise UserError(f"{name}: cannot be fetched ({' '.join(str(error).split())}); check the URL") from error
    return kept


def _download(name: str, url: str, path: Path, digits: str | None) -> None:
    """Fetch a file, whose SHA-256 begins with ``digits`` if given."""
    import torch

    try:
        torch.hub.download_url_to_file(url, str(path), digits)
    except InvalidURL as error:  # such as one with a blank
        raise ValueError(error) from error
    except RuntimeError as error:  # of torch.hub: another hash
        raise UserError(
            f"{name}: the file that arrived is not the one of its name, as its SHA-256 does not begin with {digits}; "
            "ask where the URL is from, or get the file yourself and name its path"
        ) from error


def _check_arrived(name: str, path: Path, check: Callable[[Path], object] | None) -> None:
    """Remove a file that ``check`` refuses, and say so."""
    try:
        if check is not None:
            check(path)
    except UserError as error:
        path.unlink(missing_ok=True)
        raise UserError(f"{name}: what arrived{str(error).removeprefix(str(path))}; is the URL right?") from error


@contextmanager
def _alone(name: str, lock: str) -> Iterator[None]:
    """Hold a lock file; a wait for another process is told, and ends after SECONDS_TO_WAIT.

    A process that was killed can leave its lock behind, where a file system has no locks of its own.
    """
    from huggingface_hub.utils import WeakFileLock  # also for such file systems

    with ExitStack() as held:
        try:
            held.enter_context(WeakFileLock(lock, timeout=SECONDS_TO_TELL))
        except TimeoutError:
            logger.warning(f"{name}: waiting for another process that fetches it; if there is none, remove {lock}")
            try:
                held.enter_context(WeakFileLock(lock, timeout=SECONDS_TO_WAIT))
            except TimeoutError as error:
                minutes = f"{SECONDS_TO_WAIT / 60:.0f} min"
                raise UserError(
                    f"{name}: another process has not fetched it in {minutes}; if there is none, remove {lock}"
                ) from error
        yield


@contextmanager
def _patience() -> Iterator[None]:
    """Wait for servers for SECONDS_TO_ANSWER, and not for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS_TO_ANSWER)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
