"""Data sets, by programs that we did not write: they make what `tokenize` reads, and read what it writes; Ray runs it.

Behind the marker `datasets`, in an environment of its own that `.ci/run` makes: with the extra `ray`, and PyPI's
datasets, webdataset and lhotse. All of Ray listens on the loopback interface alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from mossnano_stdio.errors import ExitStatus
from mossnano_stdio.tools.datasets.ray_cluster import CLUSTERS_VARIABLE
from tests.test_datasets import contents, noise, rows_of
from tests.tool import COMMAND, call_tool

pytestmark = [
    pytest.mark.datasets,
    # Those libraries' own affairs.
    pytest.mark.filterwarnings("default"),
]

RATE = 48000
ROWS, SHARD_ROWS = 24, 5
MOST_DRIVER_BYTES = 500e6

Codes = NDArray[np.uint16]


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv(CLUSTERS_VARIABLE, "0")  # so that the nodes listen on the loopback interface only
        patch.setenv("MOSSNANO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ROWS recordings, two of them bad, and columns of all kinds."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = []
    for number in range(ROWS):
        name = f"{number:02}.wav"
        soundfile.write(folder / name, noise(6000 + 1500 * number, 1 + number % 2, number), RATE, subtype="PCM_16")
        line: dict[str, Any] = {"path": name, "id": f"utt-{number}", "text": f"téxt {number}", "snr": number / 4}
        line |= {"take": number, "good": number % 2 == 0, "words": [{"w": "a", "at": number}], "id2": None}
        lines.append(json.dumps(line))
    (folder / "03.wav").write_bytes(b"")
    (folder / "11.wav").unlink()
    (folder / "all.jsonl").write_text("\n".join(lines))
    return folder / "all.jsonl"


def tokenized(to: Path, weights: Path, *flags: object, inputs: list[Path]) -> int:
    arguments = ["tokenize", *inputs, "--to", to, "--weights", weights, "--shard-rows", SHARD_ROWS, *flags]
    return call_tool(*arguments).status


@pytest.fixture(scope="module")
def by_form(manifest: Path, built_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sets")
    for form in ("parquet", "webdataset", "npy"):
        status = tokenized(folder / form, built_bundle, "--form", form, "--workers", 2, inputs=[manifest])
        assert status == ExitStatus.CHECK_FAILED
    return {form: folder / form for form in ("parquet", "webdataset", "npy")}


@pytest.fixture(scope="module")
def expected(by_form: dict[str, Path]) -> dict[str, tuple[dict[str, Any], Codes]]:
    """What test_datasets.py holds against the library, by numpy alone."""
    rows = rows_of(by_form["npy"])
    assert len(rows) == ROWS - 2
    return rows


def check_rows(
    found: dict[str, tuple[dict[str, Any], Codes]], expected: dict[str, tuple[dict[str, Any], Codes]]
) -> None:
    assert list(found) == list(expected)
    for name, (facts, codes) in expected.items():
        assert found[name][0] == facts
        assert np.array_equal(found[name][1], codes)


# --- who reads what we write --------------------------------------------------------------------------------------


def test_pyarrow_reads_it(by_form: dict[str, Path], expected: dict[str, tuple[dict[str, Any], Codes]]) -> None:
    import pyarrow.dataset

    table = pyarrow.dataset.dataset(sorted(map(str, by_form["parquet"].glob("*.parquet")))).to_table()
    kinds = {field.name: str(field.type) for field in table.schema}
    assert kinds == {
        "id": "string", "codes": "list<element: list<element: uint16>>", "frames": "int32", "quantizers": "int32",
        "original_samples": "int64", "sample_rate": "int32", "codec": "string", "weights_sha256": "string",
        "good": "bool", "id2": "string", "snr": "double", "take": "int64", "text": "string", "words": "string",
    }  # fmt: skip
    found = {}
    for row in table.to_pylist():
        codes = np.array(row.pop("codes"), np.uint16)
        found[row["id"]] = (row | {"words": json.loads(row["words"])}, codes)
    check_rows(found, expected)


def test_datasets_reads_it(
    by_form: dict[str, Path], expected: dict[str, tuple[dict[str, Any], Codes]], tmp_path: Path
) -> None:
    import datasets

    files = sorted(map(str, by_form["parquet"].glob("*.parquet")))
    loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path), split="train")
    found = {}
    for row in loaded.with_format("numpy"):
        codes = np.stack(list(row["codes"])).astype(np.uint16)
        found[str(row["id"])] = ({"frames": int(row["frames"]), "text": str(row["text"])}, codes)
    assert loaded.features["codes"].feature.feature.dtype == "uint16"
    check_rows(
        found,
        {name: ({key: facts[key] for key in ("frames", "text")}, codes) for name, (facts, codes) in expected.items()},
    )


def test_webdataset_reads_it(by_form: dict[str, Path], expected: dict[str, tuple[dict[str, Any], Codes]]) -> None:
    import webdataset

    files = sorted(map(str, by_form["webdataset"].glob("*.tar")))
    found = {}
    for sample in webdataset.WebDataset(files, shardshuffle=False).decode():
        found[sample["json"]["id"]] = (sample["json"], sample["codes.npy"])
    check_rows(found, expected)


def test_lhotse_reads_what_was_decoded(
    by_form: dict[str, Path], expected: dict[str, tuple[dict[str, Any], Codes]], built_bundle: Path, tmp_path: Path
) -> None:
    import lhotse

    outcome = call_tool("detokenize", by_form["parquet"], "--to", tmp_path, "--weights", built_bundle, "--workers", 2)
    assert outcome.status == ExitStatus.DONE
    for name, (facts, _) in expected.items():
        recording = lhotse.Recording.from_file(tmp_path / f"{name}.flac")
        assert (recording.sampling_rate, recording.num_samples) == (RATE, facts["original_samples"])
        assert recording.load_audio().shape == (2, facts["original_samples"])


# --- what we read that they write ---------------------------------------------------------------------------------


def sounds(count: int) -> list[bytes]:
    files = []
    for number in range(count):
        file = io.BytesIO()
        soundfile.write(file, noise(5000 + 1000 * number, 1, number), 16000, format="WAV", subtype="PCM_16")
        files.append(file.getvalue())
    return files


def plain_codes(folder: Path, weights: Path, files: list[bytes]) -> list[Codes]:
    """What becomes of them as files of their own."""
    (folder / "plain").mkdir()
    for number, data in enumerate(files):
        (folder / "plain" / f"{number}.wav").write_bytes(data)
    assert tokenized(folder / "out-plain", weights, "--form", "npy", inputs=[folder / "plain"]) == ExitStatus.DONE
    return [codes for _, codes in rows_of(folder / "out-plain").values()]


def test_parquet_of_datasets(built_bundle: Path, tmp_path: Path) -> None:
    import datasets

    files = sounds(7)
    columns = {"audio": [{"bytes": data, "path": None} for data in files], "text": [f"t{n}" for n in range(7)]}
    made = datasets.Dataset.from_dict(columns).cast_column("audio", datasets.Audio(sampling_rate=16000))
    made.to_parquet(str(tmp_path / "set.parquet"), batch_size=3)
    status = tokenized(tmp_path / "out", built_bundle, "--form", "npy", inputs=[tmp_path / "set.parquet"])
    assert status == ExitStatus.DONE
    rows = rows_of(tmp_path / "out")
    assert list(rows) == [f"set/{number}" for number in range(7)]
    assert [facts["text"] for facts, _ in rows.values()] == columns["text"]
    for (_, codes), expected in zip(rows.values(), plain_codes(tmp_path, built_bundle, files), strict=True):
        assert np.array_equal(codes, expected)
    flags = ["--form", "npy", "--audio-column", "sound"]
    outcome = call_tool("tokenize", tmp_path / "set.parquet", "--to", tmp_path / "x", "--weights", built_bundle, *flags)
    assert outcome.status == ExitStatus.BAD_INPUT
    assert "has no column 'sound', but audio, text" in outcome.error_line


def test_parquet_that_is_none(built_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 this is none")
    outcome = call_tool("tokenize", tmp_path / "x.parquet", "--to", tmp_path / "x", "--weights", built_bundle)
    assert outcome.status == ExitStatus.BAD_INPUT
    assert "x.parquet: cannot be read: " in outcome.error_line


def test_tars_of_webdataset(built_bundle: Path, tmp_path: Path) -> None:
    import webdataset

    files = sounds(5)
    with webdataset.ShardWriter(f"{tmp_path}/in-%02d.tar", maxcount=3, verbose=0) as writer:
        for number, data in enumerate(files):
            writer.write({"__key__": f"k{number}", "wav": data, "json": {"speaker": f"s{number}"}, "txt": "hello"})
    status = tokenized(tmp_path / "out", built_bundle, "--form", "npy", inputs=sorted(tmp_path.glob("in-*.tar")))
    assert status == ExitStatus.DONE
    rows = rows_of(tmp_path / "out")
    assert list(rows) == ["in-00/k0", "in-00/k1", "in-00/k2", "in-01/k3", "in-01/k4"]
    assert [(facts["speaker"], facts["text"]) for facts, _ in rows.values()] == [(f"s{n}", "hello") for n in range(5)]
    for (_, codes), expected in zip(rows.values(), plain_codes(tmp_path, built_bundle, files), strict=True):
        assert np.array_equal(codes, expected)


def test_cuts_of_lhotse(built_bundle: Path, tmp_path: Path) -> None:
    """What lhotse itself loads of its cuts is what is encoded of them."""
    import lhotse

    soundfile.write(tmp_path / "long.wav", noise(3 * 16000, 2), 16000, subtype="PCM_16")
    recording = lhotse.Recording.from_file(tmp_path / "long.wav", recording_id="long")
    cuts = []
    for number in range(4):
        supervision = lhotse.SupervisionSegment(f"s{number}", "long", 0.0, 0.5, text=f"words {number}", speaker="ann")
        cuts.append(
            lhotse.MonoCut(
                f"cut-{number}", start=0.5 * number, duration=0.5, channel=number % 2, recording=recording,
                supervisions=[supervision], custom={"snr": number},
            )
        )  # fmt: skip
    lhotse.CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    status = tokenized(tmp_path / "out", built_bundle, "--form", "npy", inputs=[tmp_path / "cuts.jsonl.gz"])
    assert status == ExitStatus.DONE
    rows = rows_of(tmp_path / "out")
    files = []
    for cut in cuts:
        file = io.BytesIO()
        soundfile.write(file, cut.load_audio().T, 16000, format="WAV", subtype="PCM_16")
        files.append(file.getvalue())
    for number, expected in enumerate(plain_codes(tmp_path, built_bundle, files)):
        facts, codes = rows[f"cut-{number}"]
        assert (facts["text"], facts["speaker"], facts["snr"]) == (f"words {number}", "ann", number)
        assert np.array_equal(codes, expected)


# --- Ray ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU each, as far as Ray knows. The first has the head."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 150_000_000}
    quick = {"health_check_initial_delay_ms": 2000, "health_check_period_ms": 1000, "health_check_timeout_ms": 2000}
    head = {**node, "include_dashboard": False, "_system_config": {**quick, "health_check_failure_threshold": 3}}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(**node)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


def ray_command(manifest: Path, to: Path, weights: Path, address: str, form: str = "parquet") -> list[str]:
    return [
        *COMMAND, "tokenize", str(manifest), "--to", str(to), "--weights", str(weights), "--form", form,
        "--shard-rows", str(SHARD_ROWS), "--engine", "ray", "--address", address,
    ]  # fmt: skip


def test_ray_of_its_own_gives_the_same_bytes(
    manifest: Path, built_bundle: Path, by_form: dict[str, Path], tmp_path: Path
) -> None:
    command = [*COMMAND, "tokenize", str(manifest), "--to", str(tmp_path / "out"), "--weights", str(built_bundle)]
    command += ["--shard-rows", str(SHARD_ROWS), "--engine", "ray", "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == ExitStatus.CHECK_FAILED, done.stderr
    assert contents(tmp_path / "out") == contents(by_form["parquet"])


def test_ray_decodes_too(by_form: dict[str, Path], built_bundle: Path, tmp_path: Path, cluster: Any) -> None:
    for engine in (["--workers", 1], ["--engine", "ray", "--address", cluster.address]):
        command = [
            *COMMAND,
            "detokenize",
            by_form["npy"],
            "--to",
            tmp_path / str(len(engine)),
            "--weights",
            built_bundle,
        ]
        done = subprocess.run([*map(str, command), *map(str, engine)], capture_output=True, text=True, timeout=300)
        assert done.returncode == ExitStatus.DONE, done.stderr
    by_local, by_ray = (contents(tmp_path / name) for name in ("2", "4"))
    assert by_local == by_ray
    assert len(by_local) == ROWS - 2 + 1


@pytest.fixture(scope="module")
def long_manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So many rows that a node can be killed in the middle."""
    folder = tmp_path_factory.mktemp("long")
    soundfile.write(folder / "x.wav", noise(12 * RATE), RATE, subtype="PCM_16")
    lines = [{"path": "x.wav", "offset": number / 100, "duration": 3.0, "id": f"u{number}"} for number in range(300)]
    (folder / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "all.jsonl"


@pytest.fixture(scope="module")
def long_in_peace(
    long_manifest: Path, built_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    to = tmp_path_factory.mktemp("peace") / "out"
    assert tokenized(to, built_bundle, "--form", "npy", "--workers", 2, inputs=[long_manifest]) == ExitStatus.DONE
    return contents(to)


def wait_for_shards(folder: Path, shards: int, driver: subprocess.Popen[bytes]) -> None:
    for _ in range(3000):
        if driver.poll() is not None or len(list(folder.glob("shard-*.npy"))) >= shards:
            return
        time.sleep(0.02)


def test_a_node_that_is_killed_costs_nothing_but_time(
    long_manifest: Path, built_bundle: Path, long_in_peace: dict[str, bytes], tmp_path: Path, cluster: Any
) -> None:
    command = ray_command(long_manifest, tmp_path / "out", built_bundle, cluster.address, "npy")
    with subprocess.Popen(command, stderr=subprocess.PIPE) as driver:
        wait_for_shards(tmp_path / "out", 3, driver)
        assert driver.poll() is None, "it was done before the node was killed"
        (other,) = cluster.worker_nodes
        cluster.remove_node(other, allow_graceful=False)
        _, said = driver.communicate(timeout=300)
    assert driver.returncode == ExitStatus.DONE, said.decode()
    assert contents(tmp_path / "out") == long_in_peace


def test_a_driver_that_is_killed_goes_on_behind(
    long_manifest: Path, built_bundle: Path, long_in_peace: dict[str, bytes], tmp_path: Path, cluster: Any
) -> None:
    command = ray_command(long_manifest, tmp_path / "out", built_bundle, cluster.address, "npy")
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as driver:
        wait_for_shards(tmp_path / "out", 2, driver)
        assert driver.poll() is None
        driver.kill()
    done = len((tmp_path / "out" / "manifest.jsonl").read_bytes().splitlines())
    assert 1 <= done < 60
    last = subprocess.run(command, capture_output=True, timeout=300)
    assert last.returncode == ExitStatus.DONE, last.stderr.decode()
    assert contents(tmp_path / "out") == long_in_peace


@pytest.mark.slow
def test_kills_of_nodes_and_drivers_again_and_again(
    long_manifest: Path, built_bundle: Path, long_in_peace: dict[str, bytes], tmp_path: Path, cluster: Any
) -> None:
    chance = random.Random(20)
    command = ray_command(long_manifest, tmp_path / "out", built_bundle, cluster.address, "npy")
    kills = 0
    while kills < 20:
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as driver:
            before = len(list((tmp_path / "out").glob("shard-*.npy")))
            wait_for_shards(tmp_path / "out", before + 1, driver)
            time.sleep(chance.uniform(0, 1))
            if kills % 2:
                cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
                kills += 1
                time.sleep(chance.uniform(0, 2))
            driver.kill()
            kills += 1
        if not cluster.worker_nodes:
            cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1", object_store_memory=150_000_000)
        if len(list((tmp_path / "out").glob("shard-*.npy"))) == 60:
            for path in (tmp_path / "out").iterdir():
                path.unlink()
    last = subprocess.run(command, capture_output=True, timeout=600)
    assert last.returncode == ExitStatus.DONE, last.stderr.decode()
    assert contents(tmp_path / "out") == long_in_peace


def test_a_cluster_that_is_not_there(manifest: Path, built_bundle: Path, tmp_path: Path) -> None:
    command = ray_command(manifest, tmp_path / "out", built_bundle, "127.0.0.1:1")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == ExitStatus.NO_DEVICE
    assert "no Ray cluster is at 127.0.0.1:1: Connection refused" in done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_driver_of_many_rows_stays_small(
    engine: str, long_manifest: Path, built_bundle: Path, tmp_path: Path
) -> None:
    """10^5 rows with what a manifest says of each."""
    with (tmp_path / "many.jsonl").open("w") as file:
        for number in range(100_000):
            line = {"path": str(long_manifest.with_name("x.wav")), "offset": number % 400 / 40, "duration": 0.08}
            line |= {"id": f"utterance-{number:07}", "text": "what was said there, " * 4, "speaker": f"s{number % 97}"}
            file.write(json.dumps(line) + "\n")
    program = (
        "import re, sys; from mossnano_stdio.cli import main; status = main(sys.argv[1:]);"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]); sys.exit(status)"
    )
    arguments = ["tokenize", tmp_path / "many.jsonl", "--to", tmp_path / "out", "--weights", built_bundle]
    arguments += ["--form", "npy", "--engine", engine, "--workers", 2]
    run = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True)
    assert run.returncode == ExitStatus.DONE, run.stderr
    peak_bytes = 1024 * int(run.stdout)
    print(f"{engine}: the driver had {peak_bytes / 1e6:.0f} MB at the most")
    assert peak_bytes < MOST_DRIVER_BYTES


def test_ray_of_its_own_listens_to_this_machine_alone(manifest: Path, built_bundle: Path, tmp_path: Path) -> None:
    command = [*COMMAND, "tokenize", str(manifest), "--to", str(tmp_path / "out"), "--weights", str(built_bundle)]
    environment = {name: value for name, value in os.environ.items() if name != CLUSTERS_VARIABLE}
    heard: set[str] = set()
    with subprocess.Popen([*command, "--engine", "ray"], stderr=subprocess.DEVNULL, env=environment) as driver:
        while driver.poll() is None:
            heard |= listening_addresses(driver.pid)
            time.sleep(0.2)
    assert driver.returncode == ExitStatus.CHECK_FAILED
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert heard
    assert heard <= loopback


def listening_addresses(session: int) -> set[str]:
    """On which addresses the process and all that it started listens, as the kernel writes them."""
    sockets = set()
    for pid in {session, *descendants(session)}:
        with contextlib.suppress(OSError):
            sockets |= {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].partition(":")[0])
    return found


def descendants(pid: int) -> set[int]:
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, path.read_text().split()):
                found |= {child, *descendants(child)}
    return found
