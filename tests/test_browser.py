"""The web client in a headless Chromium: what is decoded, what is heard, and what the page says.

Needs Debian's chromium, and onnxruntime-web in the folder that $MOSSNANO_ORT_WEB names; `.ci/run` brings both.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from numpy.typing import NDArray

from mossnano_stdio import codecs
from mossnano_stdio.pcm import to_pcm16
from mossnano_stdio.tokens import Artifact, build_artifact
from mossnano_stdio.weights import DEMO, find_weights, load_bundle
from tests.chromium import Browser, Page
from tests.test_web import serving

ORT = os.environ.get("MOSSNANO_ORT_WEB", "")
pytestmark = pytest.mark.skipif(not ORT, reason="onnxruntime-web is not set up: $MOSSNANO_ORT_WEB names no folder")

FRAMES = 200  # 16 s, past every context of the tiny stand-ins
LOAD = """
    const { Mossnano } = await import('/mossnano-web.js');
    window.voice = await Mossnano.load({ weights: 'weights/', ort: 'ort/'"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One that lets pages sound without a click; what a page needs of one is tested apart."""
    with Browser(tmp_path_factory.mktemp("profile"), "--autoplay-policy=no-user-gesture-required") as chromium:
        yield chromium


@pytest.fixture(scope="module")
def demo(browser: Browser) -> Iterator[Page]:
    """A page with a voice of the demo weights in `voice`."""
    with serving("--weights", DEMO, "--ort", ORT) as address:
        yield voice_at(browser, address)


def voice_at(browser: Browser, address: str, options: str = "") -> Page:
    page = browser.open(f"{address}mossnano-web.js")  # of the right origin, and loads nothing by itself
    page.evaluate(f"(async () => {{ {LOAD} {options} }}); }})()")
    return page


def artifact_of(
    folder: Path, frames: int = FRAMES, quantizers: int | None = None, cut: int = 100
) -> tuple[bytes, bytes]:
    """An artifact of seeded codes, and its PCM."""
    runtime = codecs.load_runtime(load_bundle(folder), threads=1)
    form = runtime.format
    shape = (frames, quantizers or form.quantizers)
    codes = np.random.default_rng(8).integers(0, form.codebook_size, shape).astype(np.uint16)
    samples = frames * form.frame_samples - cut  # the last frame is not whole
    pcm = to_pcm16(runtime.new_decoder().step(codes)[:samples])
    artifact = Artifact(form.sample_rate, form.channels, samples, shape[1], frames, form.codebook_size, codes)
    return build_artifact(artifact), pcm


def steps(pcm: bytes) -> NDArray[np.int64]:
    return np.frombuffer(pcm, "<i2").astype(np.int64)


GIVE = """
    const bytes = Uint8Array.from(atob('{artifact}'), (letter) => letter.charCodeAt(0));
    const give = (array) => {{
      let text = '';
      const all = new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
      for (let at = 0; at < all.length; at += 8192) text += String.fromCharCode(...all.subarray(at, at + 8192));
      return btoa(text);
    }};
"""


def with_artifact(page: Page, artifact: bytes, script: str) -> Any:
    """What a script returns that finds `bytes` and `give`."""
    given = GIVE.format(artifact=base64.b64encode(artifact).decode())
    return page.evaluate(f"(async () => {{ {given} {script} }})()")


def decoded(page: Page, artifact: bytes, chunk_frames: int) -> NDArray[np.int64]:
    script = f"return give(await voice.decode(bytes, {{ chunkFrames: {chunk_frames} }}));"
    return steps(base64.b64decode(with_artifact(page, artifact, script)))


# --- what is decoded ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("graph", "sizes"), [("fast", (1, 3, 8)), ("official", (4, 8))])
def test_the_samples_are_those_of_decode(
    browser: Browser, built_bundle: Path, graph: str, sizes: tuple[int, ...]
) -> None:
    artifact, expected = artifact_of(built_bundle)
    with serving("--weights", built_bundle, "--ort", ORT) as address:
        page = voice_at(browser, address, f", graph: '{graph}'")
        assert page.evaluate("[voice.graph, voice.isVerified]") == [graph, True]
        found = [decoded(page, artifact, size) for size in sizes]
    for pcm in found:
        assert np.abs(pcm - steps(expected)).max() <= 1
        assert np.abs(pcm - found[0]).max() <= 1
    assert steps(expected).std() > 500


def test_fewer_codebooks_decode_too(browser: Browser, built_bundle: Path) -> None:
    artifact, expected = artifact_of(built_bundle, 30, quantizers=5)
    with serving("--weights", built_bundle, "--ort", ORT) as address:
        page = voice_at(browser, address)
        assert np.abs(decoded(page, artifact, 8) - steps(expected)).max() <= 1


def test_mimi_is_decoded_with_its_states(browser: Browser, tmp_path: Path) -> None:
    from mossnano_stdio.build.bundle import build_standin

    build_standin(tmp_path, "tiny", model="mimi", seed=3, trial=False)
    artifact, expected = artifact_of(tmp_path, 60)
    with serving("--weights", tmp_path, "--ort", ORT) as address:
        page = voice_at(browser, address)
        assert page.evaluate("voice.format.sample_rate") == 24_000
        for size in (1, 5):
            assert np.abs(decoded(page, artifact, size) - steps(expected)).max() <= 1


def test_webgpu_is_tried_where_it_is_asked_for(browser: Browser) -> None:
    """This browser has none, and the CPU decodes instead."""
    artifact, expected = artifact_of(find_weights(DEMO), 12)
    with serving("--weights", DEMO, "--ort", ORT) as address:
        page = voice_at(browser, address, ", provider: 'webgpu'")
        assert page.evaluate("voice.provider") == "wasm"
        assert np.abs(decoded(page, artifact, 8) - steps(expected)).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("graph", ["fast", "official"])
def test_the_samples_are_those_of_decode_at_the_true_size(browser: Browser, nano_bundle: Path, graph: str) -> None:
    artifact, expected = artifact_of(nano_bundle)
    with serving("--weights", nano_bundle, "--ort", ORT) as address:
        page = voice_at(browser, address, f", graph: '{graph}'")
        print("\nmilliseconds a step:", page.evaluate("voice.stepMs"), page.evaluate("voice.schedule"))
        assert np.abs(decoded(page, artifact, 8) - steps(expected)).max() <= 1


# --- what is heard -----------------------------------------------------------------------------------------------

RECORDER = """
    registerProcessor('recorder', class extends AudioWorkletProcessor {
      process([inputs]) {
        this.port.postMessage({ time: currentTime, blocks: inputs.map((block) => block.slice()) });
        return true;
      }
    });
"""
RECORD = f"""
    const source = URL.createObjectURL(new Blob([{json.dumps(RECORDER)}], {{ type: 'text/javascript' }}));
    await voice.context.audioWorklet.addModule(source);
    const recorder = new AudioWorkletNode(voice.context, 'recorder', {{
      channelCount: 2, channelCountMode: 'explicit',
    }});
    const heard = [];
    recorder.port.onmessage = ({{ data }}) => heard.push(data);
    recorder.connect(voice.context.destination);
    const isSound = ({{ blocks }}) => blocks.some((block) => block.some((value) => value !== 0));
"""


def test_every_sample_is_heard_once_and_in_order(demo: Page) -> None:
    artifact, expected = artifact_of(find_weights(DEMO), 40)
    found = with_artifact(
        demo,
        artifact,
        RECORD
        + """
        const stream = voice.open({ output: recorder, fadeMs: 0 });
        stream.feedArtifact(bytes);
        await stream.ended;
        await new Promise((resolve) => setTimeout(resolve, 200));
        const blocks = heard.filter(({ blocks }) => blocks.length).flatMap(({ blocks: [left, right] }) => {
          const pairs = new Float32Array(2 * left.length);
          left.forEach((value, at) => { pairs[2 * at] = value; pairs[2 * at + 1] = right[at]; });
          return Array.from(pairs);
        });
        return [stream.underruns, stream.played, give(Float32Array.from(blocks))];
        """,
    )
    underruns, played, sound = found
    heard = np.rint(np.frombuffer(base64.b64decode(sound), "<f4").astype(np.float64) * 32_767).astype(np.int64)
    samples = steps(expected)
    assert (underruns, played) == (0, len(samples) // 2)
    start = int(np.flatnonzero(heard)[0]) - int(np.flatnonzero(samples)[0])
    assert np.abs(heard[start : start + len(samples)] - samples).max() <= 1
    assert not heard[start + len(samples) :].any()


def test_sound_begins_at_once(demo: Page) -> None:
    """Within 300 ms of when its first chunk can be decoded. The best of five: what else a machine does is not ours."""
    artifact, _ = artifact_of(find_weights(DEMO), 10)
    script = """
        const waits = [];
        for (let turn = 0; turn < 5; turn++) {
          const started = performance.now();
          await new Promise((resolve) => {
            const stream = voice.open({ onProgress: ({ played }) => played && (resolve(), stream.cancel()) });
            stream.feedArtifact(bytes);
          });
          waits.push(performance.now() - started);
        }
        return waits;
    """
    assert min(with_artifact(demo, artifact, script)) < 300


def test_cancel_is_silent_within_50_ms(demo: Page) -> None:
    artifact, _ = artifact_of(find_weights(DEMO), 100)
    script = (
        RECORD
        + """
        const stream = voice.open({ output: recorder });
        stream.feedArtifact(bytes);
        await new Promise((resolve) => setTimeout(resolve, 700));
        const cancelled = voice.context.currentTime;
        stream.cancel();
        const outcome = await stream.ended;
        await new Promise((resolve) => setTimeout(resolve, 300));
        const last = heard.filter(isSound).at(-1).time;
        return [outcome.cancelled, last - cancelled, heard.at(-1).time - cancelled, stream.played];
        """
    )
    attempts = [with_artifact(demo, artifact, script) for _ in range(3)]
    for was_cancelled, _, watched, played in attempts:
        assert was_cancelled
        assert watched > 0.1  # the recorder listened on
        assert 0 < played < 100 * 3_840
    assert min(silent_after for _, silent_after, _, _ in attempts) < 0.05


def test_a_page_that_is_busy_holds_nothing_up(demo: Page) -> None:
    """PCM goes from the worker to the AudioWorklet, and not through the page."""
    artifact, expected = artifact_of(find_weights(DEMO), 60)
    script = """
        const stream = voice.open();
        stream.feedArtifact(bytes);
        await new Promise((resolve) => setTimeout(resolve, 500));
        for (const started = performance.now(); performance.now() - started < 3000; );
        await stream.ended;
        return [stream.underruns, stream.played];
    """
    assert with_artifact(demo, artifact, script) == [0, len(expected) // 4]


def test_two_streams_sound_at_once(demo: Page) -> None:
    artifact, _ = artifact_of(find_weights(DEMO), 30)
    script = """
        const streams = [voice.open({ fadeMs: 0 }), voice.open({ fadeMs: 0 })];
        const started = voice.context.currentTime;
        for (const stream of streams) stream.feedArtifact(bytes);
        await Promise.all(streams.map((stream) => stream.ended));
        return [streams.map(({ played }) => played), voice.context.currentTime - started];
    """
    played, seconds = with_artifact(demo, artifact, script)
    assert played == [30 * 3_840 - 100] * 2
    assert seconds < 1.8 * 30 * 0.08  # one after the other would take twice as long as one


def test_half_a_minute_live_without_an_underrun(demo: Page) -> None:
    """One frame every 80 ms, as a language model says them."""
    artifact, expected = artifact_of(find_weights(DEMO), 375, cut=0)
    script = """
        const { parseArtifact } = await import('/mossnano-web.js');
        const { codes, frames, quantizers } = parseArtifact(bytes);
        const stream = voice.open({ prebufferMs: 240 });
        const started = performance.now();
        for (let frame = 0; frame < frames; frame++) {
          const wait = started + 80 * frame - performance.now();
          if (wait > 0) await new Promise((resolve) => setTimeout(resolve, wait));
          stream.feedCodes([Array.from(codes.subarray(frame * quantizers, (frame + 1) * quantizers))]);
        }
        stream.finish();
        await stream.ended;
        return [stream.underruns, stream.played];
    """
    assert with_artifact(demo, artifact, script) == [0, len(expected) // 4]


def test_what_is_fed_wrongly_is_said_and_the_next_stream_is_right(demo: Page) -> None:
    artifact, expected = artifact_of(find_weights(DEMO), 12)
    script = """
        const said = [];
        const attempt = (wrong) => {
          const stream = voice.open({ output: null });
          try { wrong(stream); } catch (error) { said.push(error.message); }
          stream.cancel();
        };
        attempt((stream) => stream.feed(new Uint8Array(21)));
        attempt((stream) => stream.feedCodes([[1, 2]]));
        attempt((stream) => stream.feedCodes([Array(16).fill(1024)]));
        attempt((stream) => { stream.finish(); stream.feedCodes([Array(16).fill(0)]); });
        attempt(() => voice.open({ prebufferMs: -1 }));
        said.push(give(await voice.decode(bytes, { chunkFrames: 4 })));
        return said;
    """
    *said, pcm = with_artifact(demo, artifact, script)
    assert said == [
        "21 bytes are no whole frames: feed a multiple of 20 bytes",
        "a frame has 2 codes: feed 16",
        "code 1024: whole numbers from 0 to 1023 are allowed",
        "the stream is complete: open another one",
        "prebufferMs is -1: 0 or more is allowed",
    ]
    assert np.abs(steps(base64.b64decode(pcm)) - steps(expected)).max() <= 1


# --- files -------------------------------------------------------------------------------------------------------


class Relay:
    """A server in front of `mossnano web` that counts what is asked for, and cuts answers short where told to."""

    def __init__(self, address: str) -> None:
        self.behind = urlsplit(address).port or 0
        self.asked: list[str] = []
        self.ranges: list[str] = []  # from where on
        self.cut_after: Callable[[str], int | None] = lambda path: None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        """One request and its answer."""
        with client, socket.create_connection(("127.0.0.1", self.behind)) as server:
            request = b""
            while b"\r\n\r\n" not in request:
                piece = client.recv(65_536)
                if not piece:
                    return
                request += piece
            first, _, rest = request.partition(b"\r\n")
            path = first.split()[1].decode()
            self.asked.append(path)
            self.ranges += re.findall(r"(?i)\r\nrange: (\S+)", request.decode())
            server.sendall(first + b"\r\nConnection: close\r\n" + rest.replace(b"Connection: keep-alive\r\n", b""))
            limit = self.cut_after(path)
            sent = 0
            while piece := server.recv(65_536):
                if limit is not None and sent + len(piece) > limit:
                    client.sendall(piece[: limit - sent])
                    time.sleep(0.3)  # until the page has it: what is under way when a connection breaks is lost
                    return
                client.sendall(piece)
                sent += len(piece)


@pytest.fixture
def relay(built_bundle: Path) -> Iterator[Relay]:
    with serving("--weights", built_bundle, "--ort", ORT) as address:
        between = Relay(address)
        yield between
        between.close()


DATA = "/weights/mossnano_fast.data"


def test_weights_are_got_once_and_kept(relay: Relay, tmp_path: Path) -> None:
    with Browser(tmp_path / "profile") as chromium:
        voice_at(chromium, relay.address)
        assert relay.asked.count(DATA) == 1
        page = voice_at(chromium, relay.address)
        assert page.evaluate("voice.isVerified")
        assert relay.asked.count(DATA) == 1


def test_what_was_kept_and_damaged_is_got_again(relay: Relay, tmp_path: Path) -> None:
    with Browser(tmp_path / "profile") as chromium:
        page = voice_at(chromium, relay.address)
        page.evaluate("""(async () => {
            voice.close();
            const folder = await (await navigator.storage.getDirectory()).getDirectoryHandle('mossnano');
            for await (const file of folder.values()) {
              const writable = await file.createWritable({ keepExistingData: true });
              await writable.write({ type: 'write', position: 10, data: new Uint8Array([1, 2, 3, 4]) });
              await writable.close();
            }
        })()""")
        voice_at(chromium, relay.address)
        assert relay.asked.count(DATA) == 2


def test_a_lost_connection_is_taken_up_where_it_broke(relay: Relay, built_bundle: Path, tmp_path: Path) -> None:
    relay.cut_after = lambda path: 50_000 if path == DATA and relay.asked.count(DATA) <= 2 else None
    artifact, expected = artifact_of(built_bundle, 20)
    with Browser(tmp_path / "profile") as chromium:
        page = voice_at(chromium, relay.address)
        assert relay.asked.count(DATA) == 3
        assert np.abs(decoded(page, artifact, 8) - steps(expected)).max() <= 1


def test_the_next_visit_goes_on_where_this_one_broke_off(relay: Relay, tmp_path: Path) -> None:
    relay.cut_after = lambda path: 60_000 if path == DATA else None
    with Browser(tmp_path / "profile") as chromium:
        page = chromium.open(f"{relay.address}mossnano-web.js")
        script = f"(async () => {{ {LOAD} }}); }})().catch((error) => error.message)"
        assert "lost the connection after " in page.evaluate(script)
        relay.cut_after = lambda path: None
        before = len(relay.ranges)
        page = voice_at(chromium, relay.address)
        assert page.evaluate("voice.isVerified")
    (start,) = relay.ranges[before:]
    assert int(start.removeprefix("bytes=").removesuffix("-")) > 60_000  # more than the first attempt brought


# --- the page ----------------------------------------------------------------------------------------------------


def state_of(page: Page) -> tuple[str, str]:
    page.until("document.body.dataset.state !== 'loading'")
    state, message = page.evaluate("[document.body.dataset.state, document.getElementById('message').textContent]")
    return state, message


def test_a_connection_that_stays_lost_is_a_sentence(relay: Relay, tmp_path: Path) -> None:
    relay.cut_after = lambda path: 400 if path == DATA else None
    with Browser(tmp_path / "profile") as chromium:
        state, message = state_of(chromium.open(relay.address))
        assert state == "failed"
        assert "lost the connection after " in message
        assert message.endswith("; reload to go on from there.")


def test_a_wrong_hash_is_a_sentence(browser: Browser, built_bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(built_bundle, tmp_path / "weights")
    damaged = bytearray((folder / "mossnano_fast.data").read_bytes())
    damaged[1_000] ^= 1
    (folder / "mossnano_fast.data").write_bytes(damaged)
    with serving("--weights", folder, "--ort", ORT) as address:
        state, message = state_of(browser.open(address))
    assert state == "failed"
    assert message.startswith("No voice: mossnano_fast.data: has ")
    assert message.endswith("it was damaged or changed on the server.")


def test_missing_weights_are_a_sentence(browser: Browser) -> None:
    with serving("--weights", DEMO, "--ort", ORT) as address:
        state, message = state_of(browser.open(f"{address}?weights=elsewhere/"))
        assert (state, message) == (
            "failed",
            "No voice: neither mossnano.json nor codec_browser_onnx_meta.json is there: this is no weights folder.",
        )


def test_a_missing_runtime_says_the_command_that_brings_it(browser: Browser) -> None:
    with serving("--weights", DEMO) as address:
        state, message = state_of(browser.open(address))
    assert state == "failed"
    assert "`npm install onnxruntime-web` brings it" in message


@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        ("WebAssembly.validate = () => false", "no WebAssembly SIMD"),
        ("delete globalThis.AudioWorkletNode", "no AudioWorklet"),
    ],
)
def test_what_the_browser_lacks_is_a_sentence(browser: Browser, lacking: str, words: str) -> None:
    with serving("--weights", DEMO, "--ort", ORT) as address:
        page = browser.open("about:blank")
        page.call("Page.addScriptToEvaluateOnNewDocument", {"source": lacking})
        page.call("Page.navigate", {"url": address})
        page.until("location.href !== 'about:blank' && document.readyState === 'complete'")
        state, message = state_of(page)
    assert state == "failed"
    assert words in message


def test_the_page_plays_after_a_click_and_shows_it(tmp_path: Path) -> None:
    """In a browser as users have it, which lets nothing sound before one."""
    with serving("--weights", DEMO, "--ort", ORT) as address, Browser(tmp_path / "profile") as chromium:
        page = chromium.open(address)
        state, message = state_of(page)
        assert state == "ready"
        assert "The weights are the built-in demo" in message
        pictures = {"ready": page.screenshot()}
        page.click("#melody")
        page.until("document.getElementById('position').textContent >= '0.5'")
        pictures["playing"] = page.screenshot()
        assert page.evaluate("document.body.dataset.state") == "playing"
        assert drawn(page) > 500
        page.click("#stop")
        page.until("document.body.dataset.state === 'ready'")
        assert page.evaluate("document.getElementById('message').textContent") == "Stopped: the melody."
        pictures["stopped"] = page.screenshot()
        page.evaluate("(() => { document.getElementById('melody').focus(); })()")
        page.press("Enter", 13)  # from the keyboard, too
        page.until("document.getElementById('message').textContent === 'Played: the melody.'")
        assert page.evaluate("document.getElementById('position').textContent") == "7.25 s of 7.25 s"
        assert page.evaluate("document.getElementById('underruns').textContent") == "0"
        assert not page.evaluate("document.getElementById('save').disabled")
        pictures["played"] = page.screenshot()
    assert len(set(pictures.values())) == len(pictures)
    assert all(picture.startswith(b"\x89PNG") and len(picture) > 5_000 for picture in pictures.values())


def drawn(page: Page) -> int:
    """How many points of the waveform are painted."""
    return int(
        page.evaluate("""(() => {
            const wave = document.getElementById('wave');
            const { data } = wave.getContext('2d').getImageData(0, 0, wave.width, wave.height);
            let painted = 0;
            for (let at = 3; at < data.length; at += 4) painted += data[at] > 0;
            return painted;
        })()""")
    )


def test_a_bad_file_is_a_sentence_and_the_next_one_plays(tmp_path: Path) -> None:
    (tmp_path / "bad.mossnano").write_bytes(b"RIFFnothing of ours")
    (tmp_path / "good.mossnano").write_bytes(artifact_of(find_weights(DEMO), 5)[0])
    with serving("--weights", DEMO, "--ort", ORT) as address, Browser(tmp_path / "profile") as chromium:
        page = chromium.open(address)
        state_of(page)
        choose(page, tmp_path / "bad.mossnano")
        page.until("document.body.dataset.state === 'failed'")
        message = page.evaluate("document.getElementById('message').textContent")
        assert message == 'bad.mossnano: the first bytes are "RIFFnoth": this is no .mossnano file.'
        choose(page, tmp_path / "good.mossnano")
        page.until("document.getElementById('message').textContent === 'Played: good.mossnano.'")


def choose(page: Page, path: Path) -> None:
    page.click("body")  # a user was here
    document = page.call("DOM.getDocument")["root"]["nodeId"]
    node = page.call("DOM.querySelector", {"nodeId": document, "selector": "#file"})["nodeId"]
    page.call("DOM.setFileInputFiles", {"files": [str(path)], "nodeId": node})


def test_a_screen_reader_is_told_everything(browser: Browser) -> None:
    with serving("--weights", DEMO, "--ort", ORT) as address:
        page = browser.open(address)
        state_of(page)
        page.call("Accessibility.enable")
        nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    told = {(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if "role" in node}
    assert {("button", "Play the melody"), ("button", "Stop"), ("button", "Save as WAV")} <= told
    assert ("image", "the waveform of what is played") in told
    assert any(role == "status" for role, _ in told)
    assert any(role == "button" and ".mossnano" in name for role, name in told)


def test_any_static_host_will_do(browser: Browser, tmp_path: Path, tiny_bundle: Path) -> None:
    """The page as `mossnano clients web` copies it, weights and onnxruntime-web, behind a server that knows nothing."""
    from functools import partial
    from http.server import SimpleHTTPRequestHandler

    from tests.tool import call_tool

    assert call_tool("clients", "web", tmp_path).status == 0
    shutil.copytree(tiny_bundle, tmp_path / "weights")
    place = Path(ORT) if (Path(ORT) / "ort.wasm.min.mjs").exists() else Path(ORT) / "dist"
    (tmp_path / "ort").symlink_to(place)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = browser.open(f"http://127.0.0.1:{server.server_port}/")
        state, _ = state_of(page)
        weights = page.evaluate("document.getElementById('weights').textContent")
        server.shutdown()
    assert state == "ready"
    assert "graph official" in weights
