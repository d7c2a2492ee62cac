"""Rows that wait: pushed in any pieces, taken by the number, in order.

Rules of this room:

- A row is a frame of codes or a sample of audio; all pieces have rows of the same kind.
- Rows are copied only where those that are taken together were pushed apart.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Row = TypeVar("Row", bound=np.generic)


class Backlog(Generic[Row]):
    """A queue of rows.

    >>> backlog = Backlog()
    >>> backlog.push(np.array([[1], [2], [3]])); backlog.push(np.array([[4], [5]]))
    >>> backlog.take(4).ravel().tolist(), len(backlog)
    ([1, 2, 3, 4], 1)
    """

    def __init__(self) -> None:
        self._pieces: deque[NDArray[Row]] = deque()
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    def push(self, rows: NDArray[Row]) -> None:
        if len(rows):
            self._pieces.append(rows)
            self._rows += len(rows)

    def take(self, count: int) -> NDArray[Row]:
        """The first `count` rows, which must be there."""
        if not 1 <= count <= self._rows:
            raise IndexError(f"{count} rows of {self._rows}")
        self._rows -= count
        taken: list[NDArray[Any]] = []
        while count:
            piece = self._pieces.popleft()
            if len(piece) > count:
                self._pieces.appendleft(piece[count:])
                piece = piece[:count]
            taken.append(piece)
            count -= len(piece)
        return taken[0] if len(taken) == 1 else np.concatenate(taken)

    def clear(self) -> None:
        self._pieces.clear()
        self._rows = 0
