"""How the tools show facts (a table for people, one JSON object for programs, a picture) and how far they are (a bar).

Rules of this room:

- Facts are a dict whose keys name their units. Table and JSON show the same facts under the same names.
- JSON is strict: infinity and NaN, which JSON cannot hold, become null.
- A picture's name is checked before anything is measured, and says the form.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from mossnano_stdio.errors import UsageError
from mossnano_stdio.files import open_output
from mossnano_stdio.frozen import how_to_get

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOT_SUFFIXES = (".png", ".svg", ".pdf")


def as_json(facts: Mapping[str, Any]) -> str:
    """One line.

    >>> as_json({"frames": 3, "snr_db": math.inf})
    '{"frames": 3, "snr_db": null}'
    """
    return json.dumps(_strict(facts), allow_nan=False)


def as_table(facts: Mapping[str, Any]) -> str:
    """One line for each fact; a dict within stands indented below its name.

    >>> print(as_table({"frames": 3, "messages": {"TOKENS": 1200, "END": 1}, "demo": False, "name": None}))
    frames    3
    messages
      TOKENS  1,200
      END     1
    demo      no
    name      -
    """
    rows = list(_rows(facts, depth=0))
    width = max((len(label) for label, _ in rows), default=0)
    return "\n".join(f"{label:<{width}}  {value}".rstrip() for label, value in rows)


@contextmanager
def progress_bar(total: float, unit: str) -> Iterator[Callable[[float], object]]:
    """Gives a function that takes each step done. A bar shows them on a terminal's stderr, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda _: None
        return
    with tqdm(total=total, unit=unit, leave=False, disable=not sys.stderr.isatty()) as bar:
        yield bar.update


def check_plot_name(path: str) -> None:
    if PurePath(path).suffix not in PLOT_SUFFIXES:
        raise UsageError(f"--plot is {path}, allowed are names that end with {', '.join(PLOT_SUFFIXES)}")


@contextmanager
def plotted(path: str, figsize: tuple[float, float]) -> Iterator[Figure]:
    """Gives an empty figure, and writes it when the block is left without an error."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError(f"--plot needs matplotlib: {how_to_get('plot')}") from None
    figure = Figure(figsize=figsize, layout="constrained")
    yield figure
    with open_output(path) as file:
        figure.savefig(file, format=PurePath(path).suffix.removeprefix("."))


def _rows(facts: Mapping[str, Any], depth: int) -> list[tuple[str, str]]:
    rows = []
    for name, value in facts.items():
        label = "  " * depth + name
        if isinstance(value, Mapping) and value:
            rows += [(label, ""), *_rows(value, depth + 1)]
        else:
            rows.append((label, _shown(value)))
    return rows


def _shown(value: Any) -> str:
    match value:
        case None | {} | []:
            return "-"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.6g}" if abs(value) < 1e6 else f"{value:,.0f}"
        case list() | tuple():
            return ", ".join(map(str, value))
        case _:
            return str(value).encode("utf-8", "backslashreplace").decode("utf-8")  # a file name may be no text


def _strict(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {name: _strict(inner) for name, inner in value.items()}
        case list() | tuple():
            return [_strict(inner) for inner in value]
        case _:
            return value
