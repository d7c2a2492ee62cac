"""`mossnano fetch` as a process of its own, against a stand-in of the hub on the loopback interface."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mossnano_stdio.errors import OutputError
from mossnano_stdio.weights import METADATA_NAME, FileRecord, load_bundle, published
from mossnano_stdio.weights.hub import Selection, fetch, selections
from tests.conftest import SHARED, STEP
from tests.hub import CDN_HOST, HUB_HOST, Hub, serving
from tests.tool import call_tool

huggingface_hub = pytest.importorskip("huggingface_hub", reason="the extra `fetch` is not installed")

Result = subprocess.CompletedProcess[str]

BUNDLE, BUNDLE_REVISION = "somebody/MOSS-Audio-Tokenizer-Nano-ONNX", "b" * 40
CHECKPOINT, CHECKPOINT_REVISION = "somebody/MOSS-Audio-Tokenizer-Nano", "c" * 40
SHARDED, SHARDED_REVISION = "somebody/sharded", "d" * 40
MIMI, MIMI_REVISION = "somebody/with-mimi-inside", "e" * 40
SHARED_BYTES = 300_000
# Where Windows has none, huggingface_hub finds out by itself; wine has none and says that it made one.
WITHOUT_SYMLINKS = {"HF_HUB_DISABLE_SYMLINKS": "1"} if sys.platform == "win32" else {}

# The tool itself, with other pinned facts, without waiting between attempts, and with files written in small pieces.
DRIVER = """
import json, sys, time
from dataclasses import replace
import huggingface_hub.constants
from mossnano_stdio.weights import published
from mossnano_stdio.weights import FileRecord
from mossnano_stdio.weights import load_bundle
from mossnano_stdio.cli import main
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 10_000
time.sleep = lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01))
for name, facts in json.loads(sys.argv[1]).items():
    files = {file: FileRecord(*record) for file, record in facts["files"].items()}
    setattr(published, name, published.PinnedRepository(facts["repository"], facts["revision"], files))
published.MODELS["nano"] = published.PublishedModel(published.NANO, published.CHECKPOINT, published.BUNDLE)
published.MODELS["24k"] = published.PublishedModel(published.NANO, published.SHARDED)
published.MODELS["mimi"] = replace(published.MODELS["mimi"], checkpoint=published.MIMI)
sys.exit(main(["fetch", *sys.argv[2:]]))
"""


def contents(names: list[str]) -> dict[str, bytes]:
    generator = np.random.default_rng(0)
    return {name: generator.bytes(SHARED_BYTES if name.endswith((".data", ".safetensors")) else 500) for name in names}


BUNDLE_FILES = contents(list(published.BUNDLE.files))
CHECKPOINT_FILES = contents(list(published.CHECKPOINT.files))
# A checkpoint of three shards: what only encodes lies in the first, what only decodes in the last.
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
TENSORS = ("encoder.1.a", "encoder.3.a", "quantizer.a", "decoder.0.a", "decoder.2.a")
PLACED = dict(zip(TENSORS, [SHARDS[0], SHARDS[1], SHARDS[1], SHARDS[1], SHARDS[2]], strict=True))
INDEX = "model.safetensors.index.json"
SHARDED_FILES = {**contents(["config.json", *SHARDS]), INDEX: json.dumps({"weight_map": PLACED}).encode()}
MIMI_REFERENCE = Path(__file__).parent / "reference" / "mimi"
MIMI_FILES = {name: (MIMI_REFERENCE / name).read_bytes() for name in ("mimi_config.json", "tokenizer-tiny.safetensors")}
DECODE_NAMES = selections()["decode"].file_names


@pytest.fixture
def hub() -> Iterator[Hub]:
    files = {(BUNDLE, name): content for name, content in BUNDLE_FILES.items()}
    files |= {(CHECKPOINT, name): content for name, content in CHECKPOINT_FILES.items()}
    files |= {(SHARDED, name): content for name, content in SHARDED_FILES.items()}
    files |= {(MIMI, name): content for name, content in MIMI_FILES.items()}
    revisions = {
        BUNDLE: BUNDLE_REVISION,
        CHECKPOINT: CHECKPOINT_REVISION,
        SHARDED: SHARDED_REVISION,
        MIMI: MIMI_REVISION,
    }
    with serving(Hub(revisions, files)) as running:
        yield running


@dataclass
class Place:
    """A machine's worth of folders for one test."""

    root: Path
    endpoint: str

    @property
    def hub_cache(self) -> Path:
        return self.root / "hub"

    @property
    def snapshot(self) -> Path:
        return self.hub_cache / f"models--{BUNDLE.replace('/', '--')}" / "snapshots" / BUNDLE_REVISION

    def environment(self, **more: str) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.upper().endswith("_PROXY")}
        return kept | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.root / "hf"),
            "HF_HUB_CACHE": str(self.hub_cache),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "MOSSNANO_CACHE": str(self.root / "cache"),
            **WITHOUT_SYMLINKS,
            **more,
        }

    def fetch(self, *arguments: str, **more: str) -> Result:
        """Without building graphs: what is fetched here are no graphs but noise."""
        return self.run(self.command(*arguments, "--no-build"), **more)

    def fetched(self, *arguments: str, **more: str) -> Result:
        result = self.fetch(*arguments, **more)
        assert result.returncode == 0, result.stderr
        return result

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-c", DRIVER, json.dumps(facts()), *arguments]

    def run(self, command: list[str], before: Callable[[], None] | None = None, /, **more: str) -> Result:
        environment = self.environment(**more)
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120, cwd=self.root, env=environment, preexec_fn=before
        )


def facts() -> dict[str, object]:
    def pinned(repository: str, revision: str, files: dict[str, bytes]) -> dict[str, object]:
        records = {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in files.items()}
        return {"repository": repository, "revision": revision, "files": records}

    return {
        "BUNDLE": pinned(BUNDLE, BUNDLE_REVISION, BUNDLE_FILES),
        "CHECKPOINT": pinned(CHECKPOINT, CHECKPOINT_REVISION, CHECKPOINT_FILES),
        "SHARDED": pinned(SHARDED, SHARDED_REVISION, SHARDED_FILES),
        "MIMI": pinned(MIMI, MIMI_REVISION, MIMI_FILES),
    }


@pytest.fixture
def place(tmp_path: Path, hub: Hub) -> Place:
    return Place(tmp_path, hub.endpoint)


def last_line(result: Result) -> str:
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if "DXGI" not in line]  # onnxruntime misses it under wine
    return lines[-1]


def found_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- what comes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("decode", {name: BUNDLE_FILES[name] for name in DECODE_NAMES}),
        ("encode", {name: BUNDLE_FILES[name] for name in BUNDLE_FILES if "_encode" in name or name.endswith(".json")}),
        ("checkpoint", CHECKPOINT_FILES),
    ],
)
def test_each_selection_arrives_whole(place: Place, what: str, expected: dict[str, bytes]) -> None:
    result = place.fetched("--what", what, "--to", "there")
    assert result.stdout == "there\n"
    assert found_in(place.root / "there") == expected
    for name, content in expected.items():
        assert f"{name}: {len(content):,} bytes, verified" in result.stderr


@pytest.mark.parametrize(("what", "shards"), [("decode", [1, 2]), ("encode", [0, 1]), ("checkpoint", [0, 1, 2])])
def test_only_the_shards_that_are_needed(place: Place, hub: Hub, what: str, shards: list[int]) -> None:
    place.fetched("--model", "24k", "--what", what, "--to", "there")
    names = ["config.json", INDEX, *(SHARDS[number] for number in shards)]
    assert found_in(place.root / "there") == {name: SHARDED_FILES[name] for name in names}
    assert {name for name in SHARDS if hub.asked("GET", name)} == {SHARDS[number] for number in shards}


def test_tensors_lie_on_the_disk_once(place: Place) -> None:
    place.fetched("--model", "24k", "--to", "there")
    linked = {name for name in found_in(place.root / "there") if (place.root / "there" / name).stat().st_nlink > 1}
    assert linked == set(SHARDS[1:])
    shutil.rmtree(place.hub_cache)
    assert found_in(place.root / "there")[SHARDS[2]] == SHARDED_FILES[SHARDS[2]]


def test_the_metadata_comes_last(place: Place, hub: Hub) -> None:
    """A folder that has it is taken for whole."""
    hub.status[STEP] = 404
    assert place.fetch("--to", "there").returncode == 66
    assert METADATA_NAME not in found_in(place.root / "there")


def test_files_outlive_the_hub_cache(place: Place) -> None:
    place.fetched("--to", "there")
    copy = place.root / "there" / SHARED
    assert (copy.is_symlink(), copy.stat().st_nlink) == (False, 1)  # the onnx package refuses both kinds of links
    shutil.rmtree(place.hub_cache)
    assert found_in(place.root / "there") == {name: BUNDLE_FILES[name] for name in DECODE_NAMES}


def test_where_they_go_by_default(place: Place) -> None:
    in_cache = place.root / "cache" / "MOSS-Audio-Tokenizer-Nano-ONNX"
    assert place.fetch().stdout == f"{in_cache}\n"
    (place.root / "weights").mkdir()
    assert place.fetch().stdout == f"{Path('weights') / 'MOSS-Audio-Tokenizer-Nano-ONNX'}\n"
    assert place.fetch("--what", "checkpoint").stdout == f"{Path('weights') / 'MOSS-Audio-Tokenizer-Nano'}\n"
    assert found_in(place.root / "weights" / "MOSS-Audio-Tokenizer-Nano") == CHECKPOINT_FILES


def test_a_second_run_asks_nobody(place: Place, hub: Hub) -> None:
    place.fetched("--to", "there")
    hub.requests.clear()
    result = place.fetched("--to", "there")
    assert result.stderr.count("already there and right") == len(DECODE_NAMES)
    assert not hub.requests


def test_offline_takes_what_the_hub_cache_holds(place: Place, hub: Hub) -> None:
    place.fetched("--to", "here")
    hub.requests.clear()
    place.fetched("--to", "there", HF_HUB_OFFLINE="1")
    assert found_in(place.root / "there") == found_in(place.root / "here")
    assert not hub.requests


def test_the_token_goes_to_the_hub_and_no_further(place: Place, hub: Hub) -> None:
    place.fetched("--to", "there", HF_TOKEN="hf_secret")
    tokens = {(request.host, request.token) for request in hub.requests if "/resolve/" in request.path}
    assert tokens == {(HUB_HOST, "Bearer hf_secret"), (CDN_HOST, None)}


# --- what goes wrong on the way --------------------------------------------------------------------------------------


def test_a_cut_download_is_resumed(place: Place, hub: Hub) -> None:
    hub.cut_after[SHARED] = [100_000, 50_000]
    place.fetched("--to", "there")
    assert found_in(place.root / "there")[SHARED] == BUNDLE_FILES[SHARED]
    ranges = [request.range for request in hub.asked("GET", SHARED)]
    assert ranges == [None, "bytes=100000-", "bytes=150000-"]


def test_a_connection_that_is_always_cut_is_given_up(place: Place, hub: Hub) -> None:
    hub.cut_after[SHARED] = [0] * 50
    result = place.fetch("--to", "there")
    assert result.returncode == 69
    assert SHARED in last_line(result)
    assert hub.endpoint in last_line(result)
    assert SHARED not in found_in(place.root / "there")


@pytest.mark.parametrize(
    ("name", "fault"), [(STEP, "flipped"), (STEP, "empty"), (SHARED, "short"), (SHARED, "long"), (SHARED, "flipped")]
)
def test_wrong_bytes_are_refused_and_a_retry_works(place: Place, hub: Hub, name: str, fault: str) -> None:
    right = BUNDLE_FILES[name]
    hub.sent[name] = {
        "flipped": right[:-1] + bytes([right[-1] ^ 1]),
        "short": right[:-1],
        "long": right + b"\0",
        "empty": b"",
    }[fault]
    result = place.fetch("--to", "there")
    assert result.returncode == 66
    assert str(place.snapshot / name) in last_line(result)
    assert "SHA-256" in last_line(result) or "bytes" in last_line(result)
    assert not any(name in path.name for path in (place.root / "there").iterdir())
    del hub.sent[name]
    place.fetched("--to", "there")
    assert found_in(place.root / "there")[name] == right


@pytest.mark.parametrize("then_to", ["there", "here"], ids=["in the hub's cache", "in the folder"])
def test_what_rotted_is_fetched_anew(place: Place, then_to: str) -> None:
    place.fetched("--to", "here")
    rotten = place.snapshot / STEP if then_to == "there" else place.root / "here" / STEP
    rotten.resolve().unlink()
    rotten.unlink(missing_ok=True)
    rotten.write_bytes(b"\0" * 500)
    place.fetched("--to", then_to)
    assert found_in(place.root / then_to)[STEP] == BUNDLE_FILES[STEP]


@pytest.mark.parametrize(
    ("status", "exit_status", "said"),
    [
        (404, 66, "has no such file at the pinned revision (404); is HF_ENDPOINT right?"),
        (401, 69, "refuses access (401); HF_TOKEN can name a token that has it"),
        (403, 69, "refuses access (403); HF_TOKEN can name a token that has it"),
        (500, 69, "HF_ENDPOINT can name a mirror"),
    ],
)
def test_what_the_hub_refuses(place: Place, hub: Hub, status: int, exit_status: int, said: str) -> None:
    hub.status[STEP] = status
    result = place.fetch("--to", "there")
    assert result.returncode == exit_status, result.stderr
    assert f"{BUNDLE}/{STEP}: {hub.endpoint} " in last_line(result) or "cannot be fetched" in last_line(result)
    assert said in last_line(result)


def test_no_network(tmp_path: Path) -> None:
    nobody = Place(tmp_path, f"http://{HUB_HOST}:1")  # nothing listens on port 1
    result = nobody.fetch("--to", "there")
    assert result.returncode == 69
    assert "HF_ENDPOINT can name a mirror" in last_line(result)
    assert not found_in(tmp_path / "there")


def test_offline_without_a_cache(place: Place, hub: Hub) -> None:
    result = place.fetch("--to", "there", HF_HUB_OFFLINE="1")
    assert result.returncode == 69
    assert "HF_HUB_OFFLINE forbids to fetch it" in last_line(result)
    assert not hub.requests


# --- disks -----------------------------------------------------------------------------------------------------------


def test_a_file_that_may_not_grow(place: Place) -> None:
    resource = pytest.importorskip("resource")
    limit = (SHARED_BYTES // 2, SHARED_BYTES // 2)
    result = place.run(place.command("--to", "there"), lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert result.returncode == 74
    assert "(EFBIG); HF_HUB_CACHE can name another place" in last_line(result)


@pytest.mark.parametrize("full", ["hub", "there"])
def test_a_full_disk(place: Place, full: str) -> None:
    """A disk of 100 kB, in a mount namespace of the process's own."""
    (place.root / full).mkdir()
    mount = 'mount -t tmpfs -o size=100k none "$0" && exec "$@"'
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, str(place.root / full)]
    if shutil.which("unshare") is None or place.run([*inside, "true"]).returncode:
        pytest.skip("needs a kernel that lets us mount a small disk in a namespace of our own")
    result = place.run([*inside, *place.command("--to", "there")])
    assert result.returncode == 74
    assert "No space left on device (ENOSPC)" in last_line(result)
    assert "Warning" not in result.stderr
    place.fetched("--to", "there")  # once the disk has room


def test_what_the_disk_has_no_room_for_is_not_begun(place: Place, hub: Hub) -> None:
    driver = DRIVER.replace("sys.exit(", "shutil.disk_usage = lambda path: Usage(900_000, 0, 899_999)\nsys.exit(")
    driver = (
        "import shutil\nfrom collections import namedtuple\nUsage = namedtuple('Usage', 'total used free')\n" + driver
    )
    wants = ["fetch", "--model", "24k", "--what", "checkpoint", "--to", "there", "--no-build"]
    result = place.run([sys.executable, "-c", driver, json.dumps(facts()), *wants[1:]])
    assert result.returncode == 74, result.stderr
    assert "900,000 bytes of somebody/sharded are still to come, and 899,999 are free" in last_line(result)
    assert not [name for name in SHARDS if hub.asked("GET", name)]


def test_a_folder_that_cannot_be_made(place: Place) -> None:
    (place.root / "file").touch()
    result = place.fetch("--to", "file/there")
    assert result.returncode == 74
    reason = "File already exists (EEXIST)" if sys.platform == "win32" else "Not a directory (ENOTDIR)"
    assert last_line(result).endswith(f"{Path('file/there')}: cannot be written: {reason}")


def test_hf_xet_says_its_errno_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise RuntimeError(f"IO Error: No space left on device (os error {errno.ENOSPC})")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(OutputError, match=r"\(ENOSPC\)"):
        fetch(Selection(published.BUNDLE, "any", (METADATA_NAME,)), tmp_path, report=lambda line: None)


# --- graphs of our own -----------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_place(hub: Hub, place: Place, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A hub that publishes graphs."""
    monkeypatch.setattr(sys.modules[__name__], "BUNDLE_FILES", {})
    for name in published.BUNDLE.files:
        BUNDLE_FILES[name] = hub.files[BUNDLE, name] = (tiny_bundle / name).read_bytes()
    return place


def test_graphs_are_built_of_a_checkpoint_without_official_ones(
    hub: Hub, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx", reason="the extra `build` is not installed")
    from safetensors.numpy import load_file, save

    reference = Path(__file__).parent / "reference" / "moss-v2"
    tensors = load_file(reference / "model.safetensors")
    shard_of = {"encoder": SHARDS[0], "quantizer": SHARDS[1], "decoder": SHARDS[2]}
    placed = {name: shard_of[name.partition(".")[0]] for name in tensors}
    files = {shard: save({name: tensors[name] for name in tensors if placed[name] == shard}) for shard in SHARDS}
    files |= {"config.json": (reference / "config.json").read_bytes()}
    files |= {INDEX: json.dumps({"weight_map": placed}).encode()}
    monkeypatch.setattr(sys.modules[__name__], "SHARDED_FILES", files)
    hub.files.update({(SHARDED, name): content for name, content in files.items()})

    there = place.root / "there"
    done = place.run(place.command("--model", "24k", "--to", "there"))
    assert (done.returncode, last_line(done)) == (0, "mossnano fetch: building graphs"), done.stderr
    assert set(load_bundle(there).graphs) == {"fast"}
    assert "building" not in place.run(place.command("--model", "24k", "--to", "there")).stderr
    assert place.run(place.command("--model", "24k", "--what", "encode", "--to", "there")).returncode == 0
    assert set(load_bundle(there).graphs) == {"fast", "encode_step"}


def test_mimi_is_one_file_of_which_all_graphs_are_built(place: Place) -> None:
    pytest.importorskip("onnx", reason="the extra `build` is not installed")
    done = place.run(place.command("--model", "mimi"))
    assert (done.returncode, last_line(done)) == (0, "mossnano fetch: building graphs"), done.stderr
    assert "mossnano fetch: Mimi is by Kyutai, licensed under CC-BY 4.0" in done.stderr.splitlines()
    folder = place.root / "cache" / "mimi"
    assert done.stdout == f"{folder}\n"
    assert set(load_bundle(folder).graphs) == {"decode_step", "encode_step", "decode_full", "encode"}
    assert "building" not in place.run(place.command("--model", "mimi", "--what", "encode")).stderr
    checked = json.loads(place.run([sys.executable, "-m", "mossnano_stdio.cli", "check", "mimi", "--json"]).stdout)
    assert (checked["name"], checked["passed"]) == ("mimi, tokenizer-tiny", True)


def test_our_own_graphs_are_built_beside_the_official_files(tiny_place: Place) -> None:
    pytest.importorskip("onnx", reason="the extra `build` is not installed")
    result = tiny_place.run(tiny_place.command("--to", "there"))
    assert result.returncode == 0, result.stderr
    assert result.stdout == "there\n"
    assert last_line(result) == "mossnano fetch: building our own graphs"
    there = tiny_place.root / "there"
    assert {name: (there / name).read_bytes() for name in DECODE_NAMES} == {
        name: BUNDLE_FILES[name] for name in DECODE_NAMES
    }
    fast = load_bundle(there).graph("fast")
    assert all(file.origin == "recorded" for file in fast.files)
    built = fast.path.stat().st_mtime_ns
    assert "building" not in tiny_place.run(tiny_place.command("--to", "there")).stderr
    assert fast.path.stat().st_mtime_ns == built
    encoder_too = tiny_place.run(tiny_place.command("--what", "encode", "--to", "there"))
    assert last_line(encoder_too) == "mossnano fetch: building our own graphs"


def test_an_int8_graph_is_built_where_it_is_asked_for(tiny_place: Place) -> None:
    result = tiny_place.run(tiny_place.command("--to", "there", "--precision", "float32,int8", "--int8-db", "40"))
    assert (result.returncode, last_line(result)) == (0, "mossnano fetch: building our own graphs"), result.stderr
    there = load_bundle(tiny_place.root / "there")
    assert there.graph("fast_int8").facts["int8"]["bar_db"] == 40
    tiny_place.run(tiny_place.command("--what", "encode", "--to", "there"))
    assert load_bundle(there.folder).has_graph("encode_step")
    assert load_bundle(there.folder).graph("fast_int8").facts == there.graphs["fast_int8"].facts, (
        "it is of the same weights"
    )


def test_float32_is_built_alone_where_int8_cannot_keep_its_bar(tiny_place: Place) -> None:
    result = tiny_place.run(tiny_place.command("--to", "there", "--precision", "float32,int8", "--int8-db", "150"))
    assert result.returncode == 0, result.stderr
    assert "int8 is left out: no part of this graph can be in 8 bits at 150 dB" in result.stderr
    assert {"fast", "fast_int8"} & set(load_bundle(tiny_place.root / "there").graphs) == {"fast"}


def test_an_encoder_alone_is_fetched_without_graphs_of_our_own(tiny_place: Place) -> None:
    result = tiny_place.run(tiny_place.command("--what", "encode", "--to", "there"))
    assert (result.returncode, "building" in result.stderr) == (0, False)


def test_graphs_that_cannot_be_built_are_left_out(place: Place) -> None:
    """What came is whole, so it is no failure of the fetching; what is wrong with it is said."""
    result = place.run(place.command("--to", "there"))
    assert result.returncode == 0
    assert "our own graphs are left out: " in last_line(result)
    assert set(found_in(place.root / "there")) == set(DECODE_NAMES)


def test_without_the_extra_to_build(tiny_place: Place) -> None:
    program, driver, *rest = tiny_place.command("--to", "there")[1:]
    command = [sys.executable, program, "import sys; sys.modules['onnx'] = None\n" + driver, *rest]
    result = tiny_place.run(command)
    assert result.returncode == 0
    assert "pip install 'mossnano-stdio[build]', then mossnano build --from-bundle there there" in last_line(result)


# --- the command -----------------------------------------------------------------------------------------------------


def test_help_names_the_variables() -> None:
    assert b"HF_ENDPOINT" in call_tool("fetch", "--help").out


def test_selections_cover_every_pinned_file() -> None:
    chosen = selections()
    assert {*chosen["decode"].file_names, *chosen["encode"].file_names} == set(published.BUNDLE.files)
    assert set(chosen["checkpoint"].file_names) == set(published.CHECKPOINT.files)
    assert len(DECODE_NAMES) == 4


# --- weights/ --------------------------------------------------------------------------------------------------------

WEIGHTS = Path(__file__).parent.parent / "weights"


PINNED = [
    (pinned, model.licence)
    for model in published.MODELS.values()
    for pinned in (model.maybe_bundle, model.checkpoint)
    if pinned
]


@pytest.mark.parametrize(("repository", "licence"), PINNED, ids=[pinned.name for pinned, _ in PINNED])
def test_the_page_on_weights_has_the_pinned_facts(repository: published.PinnedRepository, licence: str) -> None:
    page = (WEIGHTS / "README.md").read_text("utf-8")
    _, section = page.split(f"## {repository.repository}\n")
    section = section.split("\n## ")[0]
    assert f"Revision {repository.revision}, licence {licence}," in section
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    written = {name: FileRecord(int(size), sha256) for name, size, sha256, _ in rows}
    assert written == repository.files


@pytest.mark.skipif(
    shutil.which("git") is None or not (WEIGHTS.parent / ".git").exists(), reason="needs a git checkout"
)
def test_no_weights_are_committed_by_accident() -> None:
    names = ["MOSS-Audio-Tokenizer-Nano-ONNX/anything.onnx", "any.data", "README.md", ".gitignore"]
    asked = subprocess.run(["git", "check-ignore", "--no-index", *names], cwd=WEIGHTS, capture_output=True, text=True)
    assert asked.stdout.split() == names[:2]
