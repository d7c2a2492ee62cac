/**
 * page.js: what index.html does. `?weights=ADDRESS` and `?ort=ADDRESS` name other places than weights/ and ort/ beside
 * this page, `?graph=official` the other graph, `?provider=webgpu` has that tried.
 */
import { Mossnano, parseArtifact, toWav, whatIsMissing } from "./mossnano-web.js";

const $ = (id) => document.getElementById(id);
const asked = new URLSearchParams(location.search);
const MELODY = "melody.mossnano";

let voice = null;
let stream = null;
let pieces = []; // PCM of what plays, or has played
let total = 0; // samples it will have

function show(state, message) {
  document.body.dataset.state = state;
  $("message").textContent = message;
  const isIdle = state === "ready" || (state === "failed" && voice !== null);
  for (const id of ["melody", "file"]) $(id).disabled = !isIdle;
  $("stop").disabled = state !== "playing";
  $("save").disabled = state === "playing" || pieces.length === 0;
}

async function load() {
  const missing = whatIsMissing();
  if (missing) return show("failed", missing);
  const seen = new Map();
  try {
    voice = await Mossnano.load({
      weights: asked.get("weights") ?? "weights/",
      ort: asked.get("ort") ?? "ort/",
      graph: asked.get("graph") ?? undefined,
      provider: asked.get("provider") ?? undefined,
      onProgress: ({ file, bytes, total: due }) => {
        seen.set(file, { bytes, due });
        const sum = (key) => [...seen.values()].reduce((all, each) => all + each[key], 0);
        $("progress").value = sum("bytes") / sum("due");
        $("message").textContent = `Getting ${file}: ${megabytes(bytes)} of ${megabytes(due)}.`;
      },
    });
  } catch (error) {
    return show("failed", `No voice: ${error.message}.`);
  }
  const { name, graph, isVerified, stepMs, format, demo } = voice;
  const frameMs = (1000 * format.frame_samples) / format.sample_rate;
  const check = isVerified ? "verified" : "NOT verified: no SHA-256 is known of them";
  $("weights").textContent = `${name}, graph ${graph}, ${check}`;
  $("factor").textContent = factors(stepMs, frameMs);
  const what = demo ? "The weights are the built-in demo: a small synthesiser, not the codec. " : "";
  return show("ready", `${what}Ready. Browsers let nothing sound before you press something.`);
}

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;
const seconds = (samples) => `${(samples / voice.format.sample_rate).toFixed(2)} s`;
const factors = (stepMs, frameMs) =>
  Object.entries(stepMs).map(([frames, ms]) => `${(ms / (frames * frameMs)).toFixed(2)} in chunks of ${frames}`).join(", ");

async function play(bytes, name) {
  pieces = [];
  show("playing", `Playing ${name}.`);
  draw();
  try {
    total = parseArtifact(bytes).original_samples;
    await voice.context.resume();
    stream = voice.open({ onPcm: (pcm) => pieces.push(pcm), onProgress: look });
    stream.feedArtifact(bytes);
    const { cancelled } = await stream.ended;
    show("ready", `${cancelled ? "Stopped" : "Played"}: ${name}.`);
  } catch (error) {
    stream?.cancel();
    show("failed", `${name}: ${error.message}.`);
  }
  draw();
}

function look({ played, buffered, underruns, realTimeFactor }) {
  $("position").textContent = `${seconds(played)} of ${seconds(total)}`;
  $("buffer").textContent = seconds(buffered);
  $("underruns").textContent = String(underruns);
  $("factor").textContent = realTimeFactor.toFixed(2);
  draw(played);
}

/** The peaks of what was decoded, and where it is. */
function draw(played = 0) {
  const { width, height } = $("wave");
  const pen = $("wave").getContext("2d");
  pen.clearRect(0, 0, width, height);
  const channels = voice?.format.channels ?? 1;
  pen.fillStyle = "#3a7";
  let at = 0;
  for (const pcm of pieces) {
    const samples = pcm.length / channels;
    const left = Math.floor((at / total) * width);
    const right = Math.max(left + 1, Math.floor(((at + samples) / total) * width));
    for (let x = left; x < right; x++) {
      const start = Math.floor(((x - left) / (right - left)) * pcm.length);
      const end = Math.floor(((x + 1 - left) / (right - left)) * pcm.length);
      let peak = 0;
      for (let each = start; each < end; each++) peak = Math.max(peak, Math.abs(pcm[each]));
      const half = Math.max(1, (peak / 32767) * (height / 2));
      pen.fillRect(x, height / 2 - half, 1, 2 * half);
    }
    at += samples;
  }
  if (played) {
    pen.fillStyle = "#c33";
    pen.fillRect(Math.floor((played / total) * width), 0, 2, height);
  }
}

$("melody").addEventListener("click", async () => {
  const answer = await fetch(MELODY).catch(() => null);
  if (!answer?.ok) return show("failed", `${MELODY} is not beside this page: copy it there, or choose a file.`);
  return play(new Uint8Array(await answer.arrayBuffer()), "the melody");
});

$("file").addEventListener("change", async ({ target }) => {
  const [file] = target.files;
  if (file) await play(new Uint8Array(await file.arrayBuffer()), file.name);
  target.value = ""; // so that the same file can be chosen again
});

$("stop").addEventListener("click", () => stream?.cancel());

$("save").addEventListener("click", () => {
  const pcm = new Int16Array(pieces.reduce((sum, piece) => sum + piece.length, 0));
  pieces.reduce((at, piece) => (pcm.set(piece, at), at + piece.length), 0);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([toWav(pcm, voice.format)], { type: "audio/wav" }));
  link.download = "mossnano.wav";
  link.click();
  URL.revokeObjectURL(link.href);
});

load();
