/**
 * mossnano-worker.js: gets the weights, and decodes, where neither holds the page up.
 *
 * Files with a SHA-256 in `mossnano.json` are kept in the browser's own file system under that name: what was got once
 * is not got again, what was got in part goes on from there, and nothing damaged is ever run.
 */
import { MossnanoError, METADATA, SIDECAR, filesOf, loadGraph, planOf } from "./mossnano-codec.js";

const ATTEMPTS = 4; // to get a file, each from where the last one broke off
const PAUSE_MS = 500; // before the second attempt; twice as long before each further one
const SILENCE_MS = 30_000; // so long a server may send nothing
const STORE = "mossnano";

// --- how large a chunk is -------------------------------------------------------------------------------------------

export const CHUNKS = [1, 2, 4, 8];
export const EASE = 0.7; // so much of the time that a chunk sounds may computing it take

/**
 * From the milliseconds that chunks of each size took: the least that keeps up with ease, the largest where none does,
 * and how much has to wait before a stream sounds, so that the first chunk outlasts the second one's step.
 */
export function scheduleFrom(stepMs, frameMs) {
  const least = CHUNKS.find((frames) => stepMs[frames] < EASE * frames * frameMs) ?? CHUNKS.at(-1);
  return { leastFrames: least, mostFrames: CHUNKS.at(-1), prebufferMs: Math.ceil(Math.max(0, stepMs[least] - frameMs)) };
}

/**
 * The next chunk of a stream: one frame at once, then no less than the schedule's least and no more than twice the last
 * one. Fewer are taken at the end, and where it is `urgent` because what was decoded is nearly played. 0: wait.
 */
export function nextFrames({ leastFrames, mostFrames }, lastFrames, waiting, urgent) {
  if (lastFrames === 0) return Math.min(waiting, 1);
  if (waiting < leastFrames && !urgent) return 0;
  return Math.min(waiting, Math.max(2 * lastFrames, leastFrames), mostFrames);
}

// --- files ----------------------------------------------------------------------------------------------------------

async function sha256(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Where files are kept, by their SHA-256; null where the browser has no such place. */
async function openStore() {
  try {
    const root = await navigator.storage.getDirectory();
    return await root.getDirectoryHandle(STORE, { create: true });
  } catch {
    return null;
  }
}

class Files {
  #base;
  #records;
  #store;
  #say;
  #received = new Map(); // name -> bytes

  constructor(base, records, store, say) {
    this.#base = base;
    this.#records = records;
    this.#store = store;
    this.#say = say;
  }

  /** A small JSON file, or null where there is none. */
  static async maybeJson(base, name) {
    const url = new URL(name, base);
    let answer;
    try {
      answer = await fetch(url);
    } catch (error) {
      throw new MossnanoError("connection", `${url} cannot be reached (${error.message}): is the server running?`);
    }
    if (answer.status === 404) return null;
    if (!answer.ok) throw new MossnanoError("connection", `${url}: the server answers ${answer.status}`);
    const text = await answer.text();
    try {
      return { value: JSON.parse(text), bytes: new TextEncoder().encode(text) };
    } catch {
      throw new MossnanoError("weights", `${url}: is no JSON`);
    }
  }

  async check(name, bytes) {
    const record = this.#records[name];
    if (!record) return;
    const found = await sha256(bytes);
    if (bytes.byteLength !== record.bytes || found !== record.sha256) {
      const is = `has ${bytes.byteLength} bytes and SHA-256 ${found}`;
      const due = `${record.bytes} bytes and ${record.sha256} are due`;
      throw new MossnanoError("wrong_hash", `${name}: ${is}, ${due}; it was damaged or changed on the server`);
    }
  }

  async read(name) {
    const record = this.#records[name];
    const kept = record && this.#store ? await Kept.open(this.#store, record) : null;
    try {
      if (kept?.isWhole) {
        const bytes = kept.bytes();
        try {
          await this.check(name, bytes);
          this.#progress(name, bytes.byteLength, bytes.byteLength);
          return bytes;
        } catch {
          kept.clear(); // the disk has changed it: once more
        }
      }
      const bytes = await this.#get(name, kept);
      try {
        await this.check(name, bytes);
      } catch (error) {
        kept?.clear();
        throw error;
      }
      return bytes;
    } finally {
      kept?.close();
    }
  }

  async #get(name, kept) {
    const url = new URL(name, this.#base);
    const pieces = kept?.size ? [kept.bytes()] : [];
    let size = kept?.size ?? 0;
    for (let attempt = 1; ; attempt++) {
      try {
        const answer = await fetchPatiently(url, size);
        if (answer.status === 404) {
          throw new MossnanoError("weights", `${url}: is not there; copy all files of the weights folder`);
        }
        if (answer.status === 416 || (size && answer.status === 200)) { // it cannot go on in the middle
          pieces.length = size = 0;
          kept?.clear();
          if (answer.status === 416) continue;
        } else if (!answer.ok) {
          throw new MossnanoError("connection", `${url}: the server answers ${answer.status}`);
        }
        const total = this.#records[name]?.bytes ?? size + Number(answer.headers.get("Content-Length") ?? 0);
        for await (const piece of piecesOf(answer)) {
          pieces.push(piece);
          kept?.append(piece);
          size += piece.byteLength;
          if (size > total && this.#records[name]) break; // not our file: the check says so
          this.#progress(name, size, total);
        }
        if (size < total) throw new TypeError("the connection was closed early");
        break;
      } catch (error) {
        if (error instanceof MossnanoError) throw error;
        if (attempt === ATTEMPTS) {
          const found = `${url}: lost the connection after ${size} bytes (${error.message})`;
          throw new MossnanoError("connection", `${found}; reload to go on from there`);
        }
        await new Promise((resolve) => setTimeout(resolve, PAUSE_MS * 2 ** (attempt - 1)));
      }
    }
    const whole = new Uint8Array(size);
    let at = 0;
    for (const piece of pieces) {
      whole.set(piece, at);
      at += piece.byteLength;
    }
    return whole;
  }

  #progress(name, bytes, total) {
    this.#received.set(name, bytes);
    this.#say({ is: "progress", file: name, bytes, total });
  }
}

/** A file that is kept, whole or in part. Only one page at a time holds it; to the others it is as if there were none. */
class Kept {
  static async open(store, record) {
    try {
      const file = await store.getFileHandle(record.sha256, { create: true });
      const handle = await file.createSyncAccessHandle();
      const kept = new Kept(handle, record);
      if (kept.size > record.bytes) kept.clear();
      return kept;
    } catch {
      return null;
    }
  }

  #handle;
  #record;

  constructor(handle, record) {
    this.#handle = handle;
    this.#record = record;
  }

  get size() {
    return this.#handle.getSize();
  }

  get isWhole() {
    return this.size === this.#record.bytes;
  }

  bytes() {
    const bytes = new Uint8Array(this.size);
    this.#handle.read(bytes, { at: 0 });
    return bytes;
  }

  append(piece) {
    try {
      this.#handle.write(piece, { at: this.size });
    } catch {
      this.clear(); // no room: then it is not kept
    }
  }

  clear() {
    this.#handle.truncate(0);
  }

  close() {
    this.#handle.flush();
    this.#handle.close();
  }
}

async function fetchPatiently(url, start) {
  const abort = new AbortController();
  const timer = setTimeout(() => abort.abort(new TypeError("the server did not answer")), SILENCE_MS);
  try {
    return await fetch(url, { headers: start ? { Range: `bytes=${start}-` } : {}, signal: abort.signal });
  } finally {
    clearTimeout(timer);
  }
}

async function* piecesOf(answer) {
  const reader = answer.body.getReader();
  for (;;) {
    let timer;
    const silence = new Promise((_, reject) => {
      timer = setTimeout(() => reject(new TypeError("the server sends nothing any more")), SILENCE_MS);
    });
    try {
      const { done, value } = await Promise.race([reader.read(), silence]);
      if (done) return;
      yield value;
    } finally {
      clearTimeout(timer);
    }
  }
}

// --- streams --------------------------------------------------------------------------------------------------------

/** Codes on their way through a decoder. */
class Stream {
  constructor(number, decoder, pace, { port, capacity, format, chunkFrames }) {
    this.number = number;
    this.decoder = decoder;
    this.port = port; // to where it sounds; null: the PCM goes to the page alone
    this.capacity = port ? capacity : Infinity; // samples that may wait there
    this.played = 0; // of them, as far as we were told
    this.quantizers = format.quantizers; // until it is fed
    this.format = format;
    this.stepMs = pace.stepMs;
    this.schedule = chunkFrames ? { leastFrames: chunkFrames, mostFrames: chunkFrames } : pace.schedule;
    this.isFixed = chunkFrames !== undefined;
    this.lastFrames = chunkFrames ?? 0;
    this.waiting = []; // Uint16Arrays of whole frames
    this.waitingFrames = 0;
    this.isFinal = false;
    this.samplesLeft = Infinity; // to the end that an artifact names
    this.samples = 0;
    this.frames = 0;
    this.busyMs = 0;
  }

  push(codes, quantizers) {
    this.quantizers = quantizers;
    this.waiting.push(codes);
    this.waitingFrames += codes.length / this.quantizers;
  }

  /** How long it sounds on without another chunk. */
  get bufferedMs() {
    return (1000 * (this.samples - this.played)) / this.format.sample_rate;
  }

  /** How many frames can be decoded now. */
  get due() {
    const stepMs = this.stepMs[CHUNKS.find((frames) => frames >= this.waitingFrames) ?? CHUNKS.at(-1)];
    const isUrgent = !this.isFixed && this.bufferedMs < 2 * stepMs;
    const frames = nextFrames(this.schedule, this.lastFrames, this.waitingFrames, this.isFinal || isUrgent);
    const room = this.capacity - (this.samples - this.played);
    return frames * this.format.frame_samples <= room ? frames : 0;
  }

  get isOver() {
    return this.isFinal && this.waitingFrames === 0;
  }

  take(frames) {
    const taken = new Uint16Array(frames * this.quantizers);
    let at = 0;
    while (at < taken.length) {
      const first = this.waiting[0];
      const some = first.subarray(0, taken.length - at);
      taken.set(some, at);
      at += some.length;
      if (some.length === first.length) this.waiting.shift();
      else this.waiting[0] = first.subarray(some.length);
    }
    this.waitingFrames -= frames;
    return taken;
  }
}

class DecodingWorker {
  #say; // to the page
  #graph;
  #pace; // { stepMs, schedule }
  #streams = new Map();
  #isBusy = false;

  constructor(say) {
    this.#say = say;
  }

  async handle(message) {
    try {
      await this[message.do](message);
    } catch (error) {
      const { code = "failed" } = error;
      this.#say({ is: "error", stream: message.stream ?? null, code, message: error.message });
    }
  }

  async load({ weights, ort, graph, provider = "wasm" }) {
    const [sidecar, metadata] = await Promise.all([SIDECAR, METADATA].map((name) => Files.maybeJson(weights, name)));
    const plan = planOf(sidecar?.value ?? null, metadata?.value ?? null, graph);
    const files = new Files(weights, plan.records, await openStore(), this.#say);
    if (metadata) await files.check(METADATA, metadata.bytes);
    const readFile = (name) => files.read(name);
    this.#graph = provider === "webgpu" ? await maybeGpuGraph(ort, plan, readFile) : null;
    const used = this.#graph ? provider : "wasm";
    this.#graph ??= await loadGraph(await loadRuntime(ort, "wasm"), plan, readFile, ["wasm"]);
    const stepMs = await this.#measure();
    const frameMs = (1000 * plan.format.frame_samples) / plan.format.sample_rate;
    this.#pace = { stepMs, schedule: scheduleFrom(stepMs, frameMs) };
    this.#say({
      is: "ready",
      format: plan.format,
      name: plan.name,
      demo: plan.demo,
      graph: plan.graphName,
      provider: used,
      isVerified: filesOf(plan).every((name) => plan.records[name]),
      ...this.#pace,
    });
  }

  /** Every size twice: the first run of a size lays out its memory. */
  async #measure() {
    const { format } = this.#graph;
    const decoder = this.#graph.newDecoder();
    const stepMs = {};
    for (const frames of CHUNKS) {
      const codes = new Uint16Array(frames * format.quantizers);
      await decoder.step(codes);
      const started = performance.now();
      await decoder.step(codes);
      stepMs[frames] = performance.now() - started;
    }
    return stepMs;
  }

  open({ stream, port = null, ...options }) {
    const { format } = this.#graph;
    const opened = new Stream(stream, this.#graph.newDecoder(), this.#pace, { port, format, ...options });
    this.#streams.set(stream, opened);
    if (port) {
      port.onmessage = ({ data }) => {
        opened.played = data.played;
        this.#decode();
      };
    }
  }

  feed({ stream, codes, quantizers, isFinal, originalSamples = Infinity }) {
    const fed = this.#streams.get(stream);
    if (!fed) return null; // it failed, and the page was told
    fed.push(codes, quantizers);
    fed.isFinal = isFinal;
    fed.samplesLeft = originalSamples;
    return this.#decode();
  }

  cancel({ stream }) {
    this.#streams.get(stream)?.port?.close();
    this.#streams.delete(stream); // a chunk that is being computed finds its stream gone
    this.#say({ is: "ended", stream, cancelled: true });
  }

  /** Chunk after chunk, of whichever stream has the least time left, until nothing is due. */
  async #decode() {
    if (this.#isBusy) return; // it will look again
    this.#isBusy = true;
    try {
      for (;;) {
        for (const stream of [...this.#streams.values()].filter((each) => each.isOver)) this.#end(stream);
        const due = [...this.#streams.values()].filter((each) => each.due);
        if (!due.length) return;
        await this.#decodeChunk(due.reduce((one, other) => (other.bufferedMs < one.bufferedMs ? other : one)));
      }
    } finally {
      this.#isBusy = false;
    }
  }

  async #decodeChunk(stream) {
    const frames = stream.due;
    const codes = stream.take(frames);
    const started = performance.now();
    let pcm;
    try {
      pcm = await stream.decoder.step(codes, stream.quantizers);
    } catch (error) {
      this.#streams.delete(stream.number);
      stream.port?.postMessage({ final: true });
      const { code = "failed" } = error;
      this.#say({ is: "error", stream: stream.number, code, message: error.message });
      return;
    }
    if (!this.#streams.has(stream.number)) return; // cancelled meanwhile
    const ms = performance.now() - started;
    stream.busyMs += ms;
    stream.lastFrames = frames;
    stream.frames += frames;
    const { channels } = stream.format;
    const kept = Math.min(pcm.length / channels, stream.samplesLeft);
    stream.samplesLeft -= kept;
    stream.samples += kept;
    if (kept * channels < pcm.length) pcm = pcm.slice(0, kept * channels);
    const shown = stream.port ? pcm.slice() : pcm; // the page draws it
    stream.port?.postMessage({ pcm }, [pcm.buffer]);
    this.#say({ is: "chunk", stream: stream.number, pcm: shown, frames, ms }, [shown.buffer]);
  }

  #end(stream) {
    this.#streams.delete(stream.number);
    stream.port?.postMessage({ final: true });
    const { number, frames, samples, busyMs } = stream;
    this.#say({ is: "ended", stream: number, cancelled: false, frames, samples, busyMs });
  }
}

/** Null where there is no GPU, or onnxruntime-web cannot run this graph there. */
async function maybeGpuGraph(ort, plan, readFile) {
  if (!(await navigator.gpu?.requestAdapter())) return null;
  try {
    return await loadGraph(await loadRuntime(ort, "webgpu"), plan, readFile, ["webgpu", "wasm"]);
  } catch (error) {
    console.warn(`WebGPU does not run this graph, the CPU does: ${error.message}`);
    return null;
  }
}

/** onnxruntime-web, by the address of its module or of the folder that holds it. */
async function loadRuntime(address, provider) {
  const module = address.endsWith("/") ? new URL(`ort.${provider}.min.mjs`, address).href : address;
  let ort;
  try {
    ort = await import(module);
  } catch (error) {
    const way = "`npm install onnxruntime-web` brings it, in node_modules/onnxruntime-web/dist";
    throw new MossnanoError("no_runtime", `${module} cannot be loaded (${error.message}): ${way}`);
  }
  ort.env.wasm.numThreads = 1; // more need a page that is cross-origin isolated
  ort.env.wasm.wasmPaths = new URL(".", module).href;
  return ort;
}

if (typeof DedicatedWorkerGlobalScope === "function" && globalThis instanceof DedicatedWorkerGlobalScope) {
  const worker = new DecodingWorker((message, transfer = []) => postMessage(message, transfer));
  onmessage = ({ data }) => worker.handle(data);
}
