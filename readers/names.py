"""Millions of file names without Python objects, which loader workers would copy one page after another."""

import os
from collections.abc import Iterator, Sequence

import numpy as np


class Names(Sequence):
    """Strings in one array of bytes.

    A list of strings is copied into every forked worker, as reading an object changes the reference count beside it
    (pytorch#13246). Any file name is kept, even if it is no UTF-8.
    """

    def __init__(self, names: Sequence[str]):
        encoded = [os.fsencode(name) for name in names]
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([0, *(len(name) for name in encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]  # negative indices, and the error of a list
        return os.fsdecode(self._bytes[self._ends[number] : self._ends[number + 1]].tobytes())

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]
