/**
 * mossnano-web.js: a voice for a page. Decodes codec tokens with onnxruntime-web while they sound.
 *
 *     const voice = await Mossnano.load({ weights: "weights/", ort: "ort/" });
 *     const s = voice.open();             // in or after a click: before one, browsers let nothing sound
 *     s.feed(packedFrames);               // frame_bytes each; or feedCodes([[1, 2, ...], ...]), or feedArtifact(bytes)
 *     s.finish();                         // the stream is complete
 *     s.cancel();                         // be silent, now: 5 ms fade out
 *     await s.ended;                      // everything was heard
 *
 * `weights` is a folder as `mossnano fetch` or `mossnano build` leaves it, `ort` the folder `dist` of onnxruntime-web or
 * one of its modules. Both, and these files, may lie on any static host, without special headers. Several streams may
 * be open at once, and are mixed. The other files of this folder belong beside this one.
 *
 * A chunk is as large as a measurement at load says: one frame at a time where that keeps up, more where it does not.
 * The sound has the codec's own rate; the AudioContext turns it into the sound card's.
 */
import { MossnanoError, bitsPerCode } from "./mossnano-codec.js";

export { MossnanoError };

const MAGIC = "MOSSNANO";
const HEADER_BYTES = 32;
const FIELDS = ["sample_rate", "channels", "original_samples", "quantizers", "frames", "codebook_size"];
const LEAST_BUFFERED_CHUNKS = 2; // of the largest kind: one is played while the next one comes

// --- artifacts, frames, files ---------------------------------------------------------------------------------------

/** The header's fields of a `.mossnano` file, and `codes`: a Uint16Array [frames, quantizers]. */
export function parseArtifact(bytes) {
  const data = bytes instanceof Uint8Array ? bytes : new Uint8Array(bytes);
  const fault = (message) => new MossnanoError("artifact", message);
  const start = String.fromCharCode(...data.subarray(0, MAGIC.length));
  if (start !== MAGIC) throw fault(`the first bytes are ${JSON.stringify(start)}: this is no .mossnano file`);
  if (data.length < HEADER_BYTES) throw fault(`it is cut inside its header: ${data.length} of ${HEADER_BYTES} bytes`);
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
  const artifact = {};
  FIELDS.forEach((name, index) => {
    artifact[name] = view.getUint32(MAGIC.length + 4 * index, true);
    const least = { original_samples: 0, frames: 0, codebook_size: 2 }[name] ?? 1;
    if (artifact[name] < least) throw fault(`its ${name} is ${artifact[name]}, allowed is ${least} or more`);
  });
  if (artifact.codebook_size > 65536) throw fault(`its codebook_size is ${artifact.codebook_size}, allowed is 65536`);
  const { quantizers, frames, codebook_size } = artifact;
  const bits = bitsPerCode(codebook_size);
  const due = HEADER_BYTES + Math.ceil((quantizers * frames * bits) / 8);
  if (data.length !== due) throw fault(`it has ${data.length} bytes, by its header it has ${due}`);
  const listed = unpack(data.subarray(HEADER_BYTES), bits, quantizers * frames);
  artifact.codes = new Uint16Array(quantizers * frames);
  listed.forEach((code, at) => { // one quantizer after the other in the file
    const quantizer = Math.floor(at / frames);
    const frame = at % frames;
    if (code >= codebook_size) {
      const allowed = `0 to ${codebook_size - 1} are allowed`;
      throw fault(`code ${quantizer} of frame ${frame} is ${code}, ${allowed}`);
    }
    artifact.codes[frame * quantizers + quantizer] = code;
  });
  return artifact;
}

/** Codes out of bytes, least significant bit first. */
function unpack(bytes, bits, count) {
  const codes = new Uint16Array(count);
  for (let at = 0; at < count; at++) {
    let code = 0;
    for (let bit = 0; bit < bits; bit++) {
      const place = at * bits + bit;
      code |= ((bytes[place >> 3] >> (place & 7)) & 1) << bit;
    }
    codes[at] = code;
  }
  return codes;
}

/** A WAV file of interleaved PCM16. */
export function toWav(pcm, { sample_rate, channels }) {
  const bytes = new Uint8Array(44 + pcm.byteLength);
  const view = new DataView(bytes.buffer);
  const put = (at, text) => bytes.set(Array.from(text, (letter) => letter.charCodeAt(0)), at);
  put(0, "RIFF");
  view.setUint32(4, 36 + pcm.byteLength, true);
  put(8, "WAVEfmt ");
  view.setUint32(16, 16, true); // of the format
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, channels, true);
  view.setUint32(24, sample_rate, true);
  view.setUint32(28, sample_rate * channels * 2, true);
  view.setUint16(32, channels * 2, true);
  view.setUint16(34, 16, true); // bits of a sample
  put(36, "data");
  view.setUint32(40, pcm.byteLength, true);
  pcm.forEach((sample, at) => view.setInt16(44 + 2 * at, sample, true));
  return bytes;
}

/** What this browser lacks to play anything, in words; null where it lacks nothing. */
export function whatIsMissing() {
  // (module (func (result v128) i32.const 0 i8x16.splat)): compiles where there is SIMD
  const simd = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 8, 1, 6, 0, 65, 0, 253, 15, 11];
  if (typeof WebAssembly !== "object" || !WebAssembly.validate(new Uint8Array(simd))) {
    return "This browser has no WebAssembly SIMD, which onnxruntime-web needs: update it.";
  }
  if (!globalThis.isSecureContext) {
    return "This page needs https, or localhost: elsewhere browsers have no AudioWorklet.";
  }
  if (typeof AudioWorkletNode !== "function") return "This browser has no AudioWorklet: update it.";
  return null;
}

// --- voices ---------------------------------------------------------------------------------------------------------

export class Mossnano {
  /**
   * Resolves when the first stream could be opened; rejects with a MossnanoError where it never will.
   *
   * `graph`: "fast" or "official"; by default the fast graph, where the folder has it.
   * `provider`: "webgpu" is tried where you ask for it, and "wasm", the default, is what runs where it does not.
   * `onProgress` gets { file, bytes, total } while files come. `context`: an AudioContext of yours, of the codec's rate.
   */
  static async load({ weights, ort, graph, provider, onProgress = () => {}, context } = {}) {
    const voice = new Mossnano(onProgress, context);
    try {
      const place = globalThis.document?.baseURI ?? import.meta.url;
      const [from, runtime] = [weights, ort].map((address) => new URL(address, place).href);
      await voice.#start({ weights: from.endsWith("/") ? from : `${from}/`, ort: runtime, graph, provider });
    } catch (error) {
      voice.close();
      throw error;
    }
    return voice;
  }

  /** sample_rate, channels, frame_samples, quantizers, codebook_size, frame_bytes. */
  format;
  /** What the weights call themselves; is it the demo; which graph runs, and where. */
  name;
  demo;
  graph;
  provider;
  /** Was every file of it held against its SHA-256? */
  isVerified;
  /** What one step of 1, 2, 4 and 8 frames took, in milliseconds, and what follows from it. */
  stepMs;
  schedule;

  #worker;
  #onProgress;
  #context;
  #settle; // { resolve, reject } of load
  #streams = new Map();
  #opened = 0;
  #worklet = null; // resolves when the context knows the worklet

  constructor(onProgress, context) {
    this.#onProgress = onProgress;
    this.#context = context ?? null;
    this.#worker = new Worker(new URL("mossnano-worker.js", import.meta.url), { type: "module" });
    this.#worker.onmessage = ({ data }) => this.#take(data);
    this.#worker.onerror = (event) => {
      event.preventDefault?.();
      this.#fail(new MossnanoError("failed", event.message ?? "mossnano-worker.js cannot be loaded"));
    };
  }

  /** Where the streams sound: made with the first one, and yours to suspend and to resume. */
  get context() {
    this.#context ??= new AudioContext({ sampleRate: this.format.sample_rate });
    return this.#context;
  }

  /**
   * A stream of its own.
   *
   * `prebufferMs`: so much waits before it sounds, and so again after an underrun; by default what the measurement at
   * load says. `bufferSeconds`: so much is decoded ahead at the most. `fadeMs`: how long what is cut off fades out.
   * `quantizers`: the first so many of each frame, where you have no more (the official graph takes all only).
   * `output`: the AudioNode to play into; null for none: then take the PCM from `onPcm`.
   * `onPcm` gets an Int16Array of every chunk, interleaved, `onProgress` a look at the stream as it plays.
   */
  open(options = {}) {
    const stream = new Stream(this, this.#opened, { ...options });
    this.#opened += 1;
    this.#streams.set(stream.number, stream);
    return stream;
  }

  /** All of an artifact's sound as PCM16, interleaved, faster than it sounds. */
  async decode(artifactBytes, { chunkFrames } = {}) {
    const pieces = [];
    const stream = this.open({ output: null, chunkFrames, onPcm: (pcm) => pieces.push(pcm) });
    stream.feedArtifact(artifactBytes);
    await stream.ended;
    const pcm = new Int16Array(pieces.reduce((sum, piece) => sum + piece.length, 0));
    pieces.reduce((at, piece) => (pcm.set(piece, at), at + piece.length), 0);
    return pcm;
  }

  /** Ends everything. Streams that are still open are cancelled. */
  close() {
    for (const stream of [...this.#streams.values()]) stream.cancel();
    this.#worker.terminate();
  }

  // --- for its streams ----------------------------------------------------------------------------------------------

  send(message, transfer = []) {
    this.#worker.postMessage(message, transfer);
  }

  forget(stream) {
    this.#streams.delete(stream.number);
  }

  async newNode(options) {
    this.#worklet ??= this.context.audioWorklet.addModule(new URL("mossnano-worklet.js", import.meta.url));
    await this.#worklet;
    return new AudioWorkletNode(this.context, "mossnano", options);
  }

  // --- the worker ---------------------------------------------------------------------------------------------------

  #start(request) {
    return new Promise((resolve, reject) => {
      this.#settle = { resolve, reject };
      this.send({ do: "load", ...request });
    });
  }

  #take(message) {
    const stream = this.#streams.get(message.stream);
    if (message.is === "progress") this.#onProgress(message);
    else if (message.is === "ready") {
      const { format, name, demo, graph, provider, isVerified, stepMs, schedule } = message;
      Object.assign(this, { format, name, demo, graph, provider, isVerified, stepMs, schedule });
      this.#settle.resolve();
    } else if (message.is === "error" && !stream) this.#fail(new MossnanoError(message.code, message.message));
    else stream?.take(message);
  }

  #fail(error) {
    this.#settle?.reject(error);
    for (const stream of [...this.#streams.values()]) stream.take({ is: "error", ...error, message: error.message });
  }
}

/** What `open` gives. */
class Stream {
  /** Resolves with `{ cancelled }` when all was heard, or it was cancelled; rejects with what went wrong. */
  ended;
  /** Samples of all channels that were heard, and that wait for it. */
  played = 0;
  buffered = 0;
  /** How often it ran dry in the middle. */
  underruns = 0;
  /** Is it heard now, or will it be? */
  isSpeaking = true;
  /** When its first sample was heard, by the context's clock; null before. */
  soundsSince = null;
  /** How long decoding took, as a part of how long it sounds: below 1 keeps up. */
  realTimeFactor = 0;

  #voice;
  #node = null;
  #settle;
  #isFinished = false;
  #quantizers;
  #onPcm;
  #onProgress;
  #hasCodes = false;
  #isSilent; // it plays nowhere
  #decoded = { frames: 0, ms: 0 };

  constructor(voice, number, options) {
    const { format, schedule } = voice;
    const { output, chunkFrames, quantizers = format.quantizers, onPcm = () => {}, onProgress = () => {} } = options;
    const { prebufferMs = schedule.prebufferMs, bufferSeconds = 2, fadeMs = 5 } = options;
    for (const [name, value] of Object.entries({ prebufferMs, bufferSeconds, fadeMs })) {
      if (!(value >= 0)) throw new RangeError(`${name} is ${value}: 0 or more is allowed`);
    }
    this.number = number;
    this.#voice = voice;
    this.#quantizers = quantizers;
    this.#onPcm = onPcm;
    this.#onProgress = onProgress;
    this.ended = new Promise((resolve, reject) => {
      this.#settle = { resolve, reject };
    });
    this.ended.catch(() => {}); // who does not wait for the end is told by nobody else
    const least = LEAST_BUFFERED_CHUNKS * (chunkFrames ?? schedule.mostFrames) * format.frame_samples;
    const capacity = Math.max(Math.round(bufferSeconds * format.sample_rate), least);
    const opened = { do: "open", stream: number, chunkFrames, capacity };
    this.#isSilent = output === null;
    if (this.#isSilent) {
      voice.send(opened);
      return;
    }
    const { port1, port2 } = new MessageChannel();
    voice.send({ ...opened, port: port1 }, [port1]);
    const samplesIn = (ms) => Math.round((ms * format.sample_rate) / 1000);
    this.#connect(output ?? voice.context.destination, port2, {
      channels: format.channels, capacity, prebuffer: samplesIn(prebufferMs), fade: samplesIn(fadeMs),
    });
  }

  /** Adds packed frames, `frame_bytes` each. */
  feed(packed) {
    const { codebook_size } = this.#voice.format;
    const bits = bitsPerCode(codebook_size);
    const frameBytes = Math.ceil((this.#quantizers * bits) / 8);
    if (packed.length % frameBytes) {
      throw new RangeError(`${packed.length} bytes are no whole frames: feed a multiple of ${frameBytes} bytes`);
    }
    const frames = packed.length / frameBytes;
    const codes = new Uint16Array(frames * this.#quantizers);
    for (let frame = 0; frame < frames; frame++) { // each begins at a byte
      const bytes = packed.subarray(frame * frameBytes, (frame + 1) * frameBytes);
      codes.set(unpack(bytes, bits, this.#quantizers), frame * this.#quantizers);
    }
    codes.forEach((code) => this.#checked(code));
    this.#feedFlat(codes);
  }

  /** Adds frames that are arrays of codes. */
  feedCodes(frames) {
    for (const codes of frames) {
      if (codes.length !== this.#quantizers) {
        throw new RangeError(`a frame has ${codes.length} codes: feed ${this.#quantizers}`);
      }
    }
    this.#feedFlat(Uint16Array.from(frames.flatMap((codes) => Array.from(codes, (code) => this.#checked(code)))));
  }

  /** Adds a whole `.mossnano` file, which is then all of the stream. */
  feedArtifact(bytes) {
    if (this.#hasCodes) throw new MossnanoError("artifact", "frames were fed to this stream before: open one for the file");
    const artifact = parseArtifact(bytes);
    const { format } = this.#voice;
    for (const name of ["sample_rate", "channels", "codebook_size"]) {
      if (artifact[name] !== format[name]) {
        const found = `the file's ${name} is ${artifact[name]}`;
        throw new MossnanoError("artifact", `${found}, these weights decode ${format[name]} only`);
      }
    }
    const most = this.#voice.graph === "official" ? format.quantizers : 1;
    if (artifact.quantizers > format.quantizers || artifact.quantizers < most) {
      const allowed = most === 1 ? `1 to ${format.quantizers}` : `${format.quantizers} only`;
      const found = `the file's quantizers are ${artifact.quantizers}`;
      throw new MossnanoError("artifact", `${found}, this graph decodes ${allowed}`);
    }
    if (artifact.original_samples > artifact.frames * format.frame_samples) {
      const found = `the file's original_samples are ${artifact.original_samples}`;
      const room = artifact.frames * format.frame_samples;
      throw new MossnanoError("artifact", `${found}, but its ${artifact.frames} frames hold ${room} only`);
    }
    this.#quantizers = artifact.quantizers;
    this.#send(artifact.codes, { isFinal: true, originalSamples: artifact.original_samples });
  }

  /** The stream is complete. */
  finish() {
    if (!this.#isFinished) this.#send(new Uint16Array(0), { isFinal: true });
  }

  /** Be silent, now: what was fed and not heard is dropped, but for what fades out. */
  cancel() {
    if (!this.isSpeaking) return;
    this.#isFinished = true;
    this.#voice.send({ do: "cancel", stream: this.number });
    this.#node?.port.postMessage({ cancel: true });
    this.#settle.resolve({ cancelled: true });
    this.#leave();
  }

  // --- for its voice ------------------------------------------------------------------------------------------------

  take(message) {
    if (message.is === "chunk") {
      this.#decoded.frames += message.frames;
      this.#decoded.ms += message.ms;
      const { frame_samples, sample_rate } = this.#voice.format;
      this.realTimeFactor = this.#decoded.ms / ((1000 * this.#decoded.frames * frame_samples) / sample_rate);
      this.#onPcm(message.pcm);
    } else if (message.is === "error") {
      this.#settle.reject(new MossnanoError(message.code, message.message));
      this.#leave();
    } else if (message.is === "ended" && this.#isSilent) {
      this.#settle.resolve({ cancelled: false });
      this.#leave();
    }
    this.#onProgress(this);
  }

  async #connect(output, port, processorOptions) {
    try {
      const { channels } = processorOptions;
      const node = await this.#voice.newNode({ numberOfInputs: 0, outputChannelCount: [channels], processorOptions });
      this.#node = node;
      node.port.onmessage = ({ data }) => this.#hear(data);
      node.onprocessorerror = () => this.take({ is: "error", code: "failed", message: "the AudioWorklet has failed" });
      node.connect(output);
      node.port.postMessage({ port }, [port]);
      if (this.#isFinished && !this.isSpeaking) node.port.postMessage({ cancel: true }); // before it was there
    } catch (error) {
      this.take({ is: "error", code: "no_sound", message: `nothing can sound here: ${error.message}` });
    }
  }

  #hear({ waiting, played, underruns, isDone, soundsSince }) {
    Object.assign(this, { buffered: waiting, played, underruns, soundsSince });
    if (isDone) {
      this.#node.disconnect();
      this.#settle.resolve({ cancelled: false }); // does nothing where it was cancelled
      this.#leave();
    }
    this.#onProgress(this);
  }

  #leave() {
    this.isSpeaking = false;
    this.#voice.forget(this);
  }

  #feedFlat(codes) {
    if (this.#isFinished) throw new MossnanoError("finished", "the stream is complete: open another one");
    this.#send(codes, {});
  }

  #send(codes, { isFinal = false, ...rest }) {
    this.#isFinished = isFinal;
    this.#hasCodes ||= codes.length > 0;
    const message = { do: "feed", stream: this.number, codes, quantizers: this.#quantizers, isFinal, ...rest };
    this.#voice.send(message, [codes.buffer]);
  }

  #checked(code) {
    const { codebook_size } = this.#voice.format;
    if (!Number.isInteger(code) || code < 0 || code >= codebook_size) {
      throw new RangeError(`code ${code}: whole numbers from 0 to ${codebook_size - 1} are allowed`);
    }
    return code;
  }
}
