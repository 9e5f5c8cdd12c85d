"""The batches of a loader on the device of a run, ready for the model."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from augmentation import normalise


def device_batches(loader: Iterable, device: torch.device) -> Iterator[Any]:
    """Copy each batch to the device and normalise its images: uint8 tensors with four or more axes.

    Images travel as uint8, a quarter of float32's bytes. On a GPU the next batch is copied on a stream of its own
    while the current one is used, if it is in pinned memory; the host waits for the loader alone.
    """
    if device.type != "cuda":
        for batch in loader:
            yield prepare(batch, device)
        return
    stream, ready = torch.cuda.Stream(device), None
    for batch in loader:
        with torch.cuda.stream(stream):
            following = prepare(batch, device), stream.record_event()
        if ready is not None:
            yield _use(*ready)
        ready = following
    if ready is not None:
        yield _use(*ready)


def prepare(batch: Any, device: torch.device) -> Any:
    """Copy the tensors in nested dicts, lists and tuples to the device, and normalise the images among them.

    Copies from pinned memory are asynchronous.
    """

    def to_device(part: torch.Tensor) -> torch.Tensor:
        part = part.to(device, non_blocking=device.type == "cuda")
        return normalise(part) if part.dtype == torch.uint8 and part.ndim >= 4 else part

    return tree_map_only(torch.Tensor, to_device, batch)


def _use(batch: Any, copied: torch.cuda.Event) -> Any:
    """Let the current stream wait for the copy, and keep the batch's memory until this stream has used it."""
    current = torch.cuda.current_stream()
    current.wait_event(copied)
    tree_map_only(torch.Tensor, lambda part: part.record_stream(current), batch)
    return batch
