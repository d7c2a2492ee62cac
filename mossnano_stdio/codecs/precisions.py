"""In which numbers the products of a graph are done: float32, or some of them in 8 bits.

Rules of this room:

- float32 is what runs unless int8 is asked for, and nothing else runs in the place of int8 that is not there.
- An int8 graph is called after the float32 one that it was made of, and has its contract.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

from mossnano_stdio.errors import BundleError
from mossnano_stdio.weights import Bundle

PrecisionName = Literal["float32", "int8"]

PRECISIONS: Final[tuple[str, ...]] = get_args(PrecisionName)
INT8: Final = "int8"


def int8_name(graph: str) -> str:
    """
    >>> int8_name("fast")
    'fast_int8'
    """
    return f"{graph}_{INT8}"


def check_has_int8(bundle: Bundle, graph: str) -> None:
    if not bundle.has_graph(int8_name(graph)):
        raise BundleError(
            f"{bundle.folder}: has no int8 graph; `mossnano build --precision float32,int8` makes one, "
            "and --precision float32 needs none"
        )
