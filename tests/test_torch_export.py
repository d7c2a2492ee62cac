"""What is to hold for the published files, on files that torch wrote in their shape (torch_export.py)."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from mossnano_stdio.build.bundle import build_from_bundle
from mossnano_stdio.build.checkpoint import load_checkpoint
from mossnano_stdio.build.extract import extract_weights
from mossnano_stdio.weights import DECODE_DATA, ENCODE_DATA, load_bundle, published
from tests.test_build_extract import assert_same

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("torch") is None, reason="needs torch: pip install torch")]


@pytest.fixture(scope="module")
def exported(nano_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.torch_export import export_bundle

    folder = tmp_path_factory.mktemp("exported")
    export_bundle(nano_bundle / "checkpoint", folder)
    return folder


def test_data_files_are_as_long_as_the_published_ones(exported: Path) -> None:
    for name in (DECODE_DATA, ENCODE_DATA):
        assert (exported / name).stat().st_size == published.BUNDLE.files[name].size_bytes


def test_weights_come_out_as_they_went_in(exported: Path, nano_bundle: Path) -> None:
    assert_same(extract_weights(load_bundle(exported)), load_checkpoint(nano_bundle / "checkpoint"))


def test_our_graphs_sound_like_it(exported: Path, tmp_path: Path) -> None:
    """Building keeps them only if they do: over 15 s of codes, and 5 s of recording."""
    build_from_bundle(exported, tmp_path)
    graphs = json.loads((tmp_path / "mossnano.json").read_text("utf-8"))["graphs"]
    assert graphs.keys() == {"fast", "encode_step"}
