"""codecs/probe.py: whether this onnxruntime attends as the fast graph needs it, and writes in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from mossnano_stdio.build.attention import PROBE_PATH, attention_probe
from mossnano_stdio.codecs import probe


def test_this_runtime_writes_in_place() -> None:
    assert probe.attention_support() == "in place"


def test_a_runtime_that_spoils_what_it_shares_works_by_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    answers_right = probe._answers_right

    def only_apart(session: Any, rings: Any, rings_out: Any) -> bool:
        if rings[0] is rings_out[0]:
            rings[0][...] = 0
        return answers_right(session, rings, rings_out)

    monkeypatch.setattr(probe, "_answers_right", only_apart)
    assert probe.judge(probe._probe_session()) == "by copies"


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("local_window_size", 4), ("local_window_size", -1), ("rotary_interleaved", 1), ("scale", 1.0)],
)
def test_another_attention_is_found_out(
    attribute: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = onnx.load_from_string(attention_probe())
    (node,) = (node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    kept = [one for one in node.attribute if one.name != attribute]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(attribute, value)])
    onnx.save(model, tmp_path / "probe.onnx")
    monkeypatch.setattr(probe, "PROBE_PATH", tmp_path / "probe.onnx")
    assert probe.judge(probe._probe_session()) == "none"


def test_a_node_that_the_runtime_does_not_know_is_a_no(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "probe.onnx").write_bytes(attention_probe().replace(b"GroupQueryAttention", b"GroupQueryAttentiom"))
    monkeypatch.setattr(probe, "PROBE_PATH", tmp_path / "probe.onnx")
    assert probe.attention_support.__wrapped__() == "none"


def test_the_probe_is_what_the_builder_makes() -> None:
    assert PROBE_PATH.read_bytes() == attention_probe()
