"""The fuzzer's corpus, replayed, and a short run of it; fuzz_readers.py says how to make a long one."""

from __future__ import annotations

import random

import pytest

from tests import fuzz_readers
from tests.fuzz_readers import TARGETS, corpus_of, fuzz, mutated

EXECUTIONS = {"artifact": 10_000, "ecdc": 10_000, "protocol": 10_000, "session": 500, "segments": 200}


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_is_read_without_an_error_of_ours(target: str) -> None:
    inputs = corpus_of(target)
    assert len(inputs) >= 9
    assert len({TARGETS[target](data) for data in inputs}) >= 5


@pytest.mark.parametrize("target", TARGETS)
def test_a_short_run(target: str) -> None:
    assert fuzz(target, EXECUTIONS[target], seed=1) > len(corpus_of(target))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_long_run(target: str) -> None:
    fuzz(target, 50 * EXECUTIONS[target], seed=2)


def test_the_fuzzer_finds_what_is_planted(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(data: bytes) -> str:
        assert data[8:12] != b"\0\0\0\x80", "planted"
        return "read"

    kept: list[bytes] = []
    monkeypatch.setitem(TARGETS, "artifact", read)
    monkeypatch.setattr(fuzz_readers, "keep", lambda target, data, prefix: kept.append(data))
    with pytest.raises(AssertionError, match="planted"):
        fuzz("artifact", 100_000, seed=0)
    assert [data[8:12] for data in kept] == [b"\0\0\0\x80"]


def test_a_run_can_be_repeated() -> None:
    pool = corpus_of("artifact")
    assert [mutated(pool[0], pool, random.Random(seed)) for seed in range(200)] == [
        mutated(pool[0], pool, random.Random(seed)) for seed in range(200)
    ]
