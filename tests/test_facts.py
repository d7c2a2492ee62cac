"""tools/facts.py: the same facts for people and for programs."""

from __future__ import annotations

import json
import math

from mossnano_stdio.tools.facts import as_json, as_table


def test_json_is_strict_however_deep() -> None:
    facts = {"a": [1.5, math.nan, {"b": -math.inf}], "c": ("x", None, True), "d": {}}
    line = as_json(facts)
    assert "\n" not in line
    assert json.loads(line, parse_constant=lambda name: name) == {
        "a": [1.5, None, {"b": None}],
        "c": ["x", None, True],
        "d": {},
    }


def test_a_table_shows_every_fact() -> None:
    facts = {
        "count": 1234567,
        "ratio": 0.123456789,
        "large": 12345678.9,
        "snr_db": math.inf,
        "list": [1, 2],
        "none": [],
        "nothing": {},
        "inner": {"deeper": {"leaf": "x"}},
        "yes": True,
    }
    assert as_table(facts).splitlines() == [
        "count     1,234,567",
        "ratio     0.123457",
        "large     12,345,679",
        "snr_db    inf",
        "list      1, 2",
        "none      -",
        "nothing   -",
        "inner",
        "  deeper",
        "    leaf  x",
        "yes       yes",
    ]
    assert as_table({}) == ""


def test_a_file_name_that_is_no_text_can_be_shown() -> None:
    name = b"\xff.wav".decode("utf-8", "surrogateescape")
    assert as_table({"file": name}) == "file  \\udcff.wav"
    assert json.loads(as_json({"file": name})) == {"file": name}
