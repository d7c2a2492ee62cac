/**
 * mossnano.mjs: voices for a Node program. Starts `mossnano-stdio`, feeds it codec tokens, hands out PCM.
 *
 * One ES module, Node 18 or later, no dependency.
 *
 *     const voice = await Mossnano.start({ command: ["mossnano-stdio"], onError: console.error });
 *     voice.feed(packedFrames);           // frame_bytes each; or feedCodes([[1, 2, ...], ...])
 *     voice.finish();                     // the stream is complete
 *     const pcm = voice.pull(480);        // exactly 480 samples of all channels, silence where there are none
 *     voice.cancel();                     // be silent, now: 5 ms fade out, the next stream may be fed at once
 *     await voice.stop();
 *
 * That one voice is the process, too. More of them speak at the same time through the same process:
 *
 *     const guard = voice.openVoice({ settings: { channels: 1 }, onMark: ({ text, sample }) => subtitle(text) });
 *     guard.mark("Halt!");                // told to onMark when the sound of what is fed next is pulled
 *     guard.feed(packedFrames);
 *     guard.gain = 0.4;                   // it goes away
 *     guard.cancel();                     // this voice only; guard.played says how much of it was heard
 *
 * Node reads between your calls: leave it the time, and nobody waits for the other forever. No call waits for the
 * process, not even for one that hangs: what its pipe has no room for waits here, up to 4 MiB (hours), past which
 * `feed` throws `queue_full`. There is no lock-free ring here, because there is only one thread.
 *
 * Of each opened voice `bufferSeconds` (2) come ahead of what is pulled, and more as it is: one that nobody pulls stops
 * alone. Of the first one come `bufferSeconds` (10), then we stop reading, and the process and all voices wait.
 *
 * What is cut off, by `cancel` or by an underrun, fades out over `fadeMs`, and what follows fades in; 0 leaves every
 * sample as it came. With `prebufferMs` a stream sounds once so much of it waits, or all of it, and so again after an
 * underrun: fed in real time, with jitter, 100 to 200 are enough.
 *
 * Where nobody wants to wait for the weights, `launch` gives a voice at once: ask its `state`, or await `whenReady()`.
 * `played` says how much was heard of which stream, for barge-in; streams count from 0 in each voice, and `stream` is
 * the last one that was opened. With `restart: N` a process that crashes is started again, up to N times in a row.
 *
 * Tested on Linux. macOS and Windows: NOT RUN in our checks. Protocol version 1, see protocol.md.
 */
import { spawn } from "node:child_process";

const Kind = { HANDSHAKE: 0, AUDIO: 1, TOKENS: 4, ERROR: 5, END: 7, CANCEL: 8, SETTINGS: 9, CREDIT: 10, MARK: 11 };
const NUMBERED = 0x80; // added to the kind of a message whose payload begins with the number of its stream
const LONGEST = 1 << 20; // no message of the process is longer
const PIECE_BYTES = 1 << 16; // of what is fed in one message: CANCEL must not wait behind a long one
const HEAD_BYTES = 5; // of a message: its length and its kind
const NUMBER_BYTES = 4;
const WAITING_BYTES = 4 << 20; // of messages that may wait here for the process
const STREAM_BYTES = 15 << 16; // of an opened voice's stream that may wait in the process, which ends it at 1 MiB
const MARK_BYTES = 1000; // of a mark's text
const MARK_COST_BYTES = 64; // what the process counts for each beside its text
const STOP_MS = 2000; // how long the process may take to end by itself
const FIRST_PAUSE_MS = 250; // before a restart; twice as long before the next one in a row,
const LONGEST_PAUSE_MS = 8000; // up to this
const LONGEST_LINE = 1 << 16; // of its stderr: what is longer comes in pieces
const REFUSALS = ["bad_settings", "too_many_streams", "late_stream"]; // of a numbered stream: it does not begin
const NUMBERS = [
  "sample_rate", "channels", "frame_samples", "quantizers", "codebook_size", "frame_bytes", "max_audio_bytes",
];

export class MossnanoError extends Error {
  /** `lost`: the streams, by number, that were fed and will not come to their end. */
  constructor(code, message, fatal, lost = []) {
    super(message);
    this.code = code;
    this.fatal = fatal;
    this.lost = lost;
  }
}

/** Something that speaks: what it is fed with is heard, one stream after the other, as it is pulled. */
export class Voice {
  /** Pulls that ran dry in the middle of a stream. While a prebuffer fills, none is counted. */
  underruns = 0;
  /** What every sample is multiplied by. A change from 0 to 1 takes `fadeMs`. */
  gain = 1;

  _process; // what begins with _ is between this class and the next
  #settings;
  #bufferSeconds;
  #prebufferMs;
  #fadeMs;
  #onMark;
  #onError;
  #format = null;
  #formatSaid = null; // the HANDSHAKE that it was made of
  #streams = []; // that were not pulled to their end, in the order in which they are heard
  #opened = 0; // streams
  #isOpen = false; // the last one can be fed
  #unended = new Set(); // streams for which the process has not said END
  #played = { stream: null, samples: 0 };
  #passed = []; // marks to tell
  #isHolding = true; // until a prebuffer is there
  #isHeard = false; // the last sample that was given out was no silence
  #last = Buffer.alloc(0); // that sample
  #tail = Buffer.alloc(0); // of a fade out, to be pulled before anything else
  #fadeIn = { done: 0, samples: 0 }; // how far what follows a fade out has come back
  #gainNow = 1;

  /** Made by `openVoice`. A process speaks itself too: then `process` is null. */
  constructor(process, {
    settings = {}, bufferSeconds = 2, prebufferMs = 0, fadeMs = 5, onMark = () => {}, onError = null,
  } = {}) {
    for (const [name, value] of Object.entries({ bufferSeconds, prebufferMs, fadeMs })) {
      if (!(value >= 0)) throw new RangeError(`${name} is ${value}: 0 or more is allowed`);
    }
    this._process = process ?? this;
    this.#settings = settings;
    this.#bufferSeconds = bufferSeconds;
    this.#prebufferMs = prebufferMs;
    this.#fadeMs = fadeMs;
    this.#onMark = onMark;
    this.#onError = onError;
  }

  /** What the HANDSHAKE said, with this voice's settings: sample_rate, channels, frame_bytes, ...; null before it. */
  get format() {
    const said = this._process._said;
    if (this.#formatSaid !== said) {
      const format = { ...said, ...this.#settings };
      const bits = Math.ceil(Math.log2(format.codebook_size));
      if (this.#settings.quantizers) format.frame_bytes = Math.ceil((format.quantizers * bits) / 8);
      this.#formatSaid = said;
      this.#format = Object.freeze(format);
    }
    return this.#format;
  }

  /** The number of the stream that was opened last, from 0; null before the first. */
  get stream() {
    return this.#opened ? this.#opened - 1 : null;
  }

  /** The stream that was pulled last, and how many of its samples were given out: what fades count for nothing. */
  get played() {
    return { ...this.#played };
  }

  /**
   * Adds packed frames to the stream, and opens one where none is open. False unless the state is "ready". Takes all of
   * it or nothing: throws a MossnanoError `queue_full` where too much would wait, for the process or in it.
   */
  feed(packed) {
    if (this._process.state !== "ready") return false;
    const frameBytes = this.format.frame_bytes;
    if (packed.length % frameBytes) {
      throw new RangeError(`${packed.length} bytes are no whole frames: feed a multiple of ${frameBytes} bytes`);
    }
    const step = Math.max(1, Math.floor(PIECE_BYTES / frameBytes)) * frameBytes;
    const pieces = Math.max(1, Math.ceil(packed.length / step)); // an empty TOKENS opens a stream that END may close
    const stream = this.#openStream(packed.length, pieces);
    stream.fedBytes += packed.length;
    for (let piece = 0; piece < pieces; piece++) {
      this._process._send(Kind.TOKENS, packed.subarray(piece * step, (piece + 1) * step), stream.number);
    }
    return true;
  }

  /** The same for frames that are arrays of codes. */
  feedCodes(frames) {
    if (this._process.state !== "ready") return false;
    const { quantizers, codebook_size, frame_bytes } = this.format;
    const bits = Math.ceil(Math.log2(codebook_size));
    const packed = Buffer.alloc(frames.length * frame_bytes);
    frames.forEach((codes, frame) => {
      if (codes.length !== quantizers) throw new RangeError(`a frame has ${codes.length} codes: feed ${quantizers}`);
      codes.forEach((code, quantizer) => {
        if (!Number.isInteger(code) || code < 0 || code >= codebook_size) {
          throw new RangeError(`code ${code}: whole numbers from 0 to ${codebook_size - 1} are allowed`);
        }
        for (let bit = 0; bit < bits; bit++) { // least significant first; each frame starts at a byte
          const at = quantizer * bits + bit;
          packed[frame * frame_bytes + (at >> 3)] |= ((code >> bit) & 1) << (at & 7);
        }
      });
    });
    return this.feed(packed);
  }

  /**
   * Marks the place behind what was fed: `onMark` gets { stream, sample, text } when the sound there is pulled, or the
   * end of a stream that ends there. False unless the state is "ready".
   */
  mark(text) {
    if (this._process.state !== "ready") return false;
    this._process._refuseWithoutVoices();
    const payload = Buffer.from(text);
    if (payload.length > MARK_BYTES) {
      throw new RangeError(`a mark of ${payload.length} bytes: up to ${MARK_BYTES} are allowed`);
    }
    const stream = this.#openStream(payload.length + MARK_COST_BYTES, 1);
    stream.markBytes += payload.length + MARK_COST_BYTES;
    this._process._send(Kind.MARK, payload, stream.number);
    return true;
  }

  /** The stream is complete. */
  finish() {
    if (this.#isOpen) this._process._send(Kind.END, undefined, this.#streams.at(-1).number);
    this.#isOpen = false;
    return this._process.state === "ready";
  }

  /** Be silent, now: drops whatever was fed, and all that waits to be pulled but for what fades out. */
  cancel() {
    this.#isOpen = false;
    this.#fadeOut(this.#streams.flatMap(({ pcm }) => pcm));
    const isAnswered = this._process._answers;
    if (isAnswered && this._process === this) this._process._cancelPlain(this.#opened);
    for (const { stream, number, isEnded } of this.#streams) {
      if (number !== null && !isEnded && !this._process._cancelNumbered(number)) this.#unended.delete(stream);
    }
    this.#streams = [];
    this._process._throttle(); // the END we wait for stands behind audio
    return isAnswered;
  }

  /** Exactly `samples` samples of all channels, interleaved, as an Int16Array, with silence where there are none. */
  pull(samples) {
    const pcm = new Int16Array(samples * (this.format?.channels ?? 2));
    this.pullInto(pcm);
    return pcm;
  }

  /** Fills an Int16Array in the same way, and returns how many samples of all channels are sound; silence follows. */
  pullInto(pcm) {
    const out = Buffer.from(pcm.buffer, pcm.byteOffset, pcm.byteLength);
    const wasHolding = this.#isHolding;
    if (!this.#isHeard) this.#gainNow = this.gain;
    let filled = 0;
    for (let bytes = 1; bytes > 0 && filled < out.length; filled += bytes) {
      bytes = this.#giveTail(out.subarray(filled)) || this.#givePcm(out.subarray(filled));
    }
    if (filled < out.length) {
      const isSounding = this.#streams[0]?.samples > 0 && !this.#streams[0].isEnded;
      if (isSounding && !(wasHolding && this.#isHolding)) {
        this.underruns += 1;
        this.#fadeOut();
        filled += this.#giveTail(out.subarray(filled));
      }
      this.#isHolding = this.#prebufferMs > 0;
      this.#isHeard = false;
    }
    if (filled) this.#amplify(pcm.subarray(0, filled / 2));
    out.fill(0, filled);
    this._process._throttle();
    this.#tellMarks();
    return filled && filled / this.#sampleBytes;
  }

  /** Is something to be pulled, now or later? */
  get isSpeaking() {
    const fades = this.#tail.length > 0 && !this._process._isStopping;
    return fades || this._pcmBytes > 0 || (!this._process._isGone && this.#unended.size > 0);
  }

  // --- what is fed -------------------------------------------------------------------------------------------------

  /** The stream that takes `bytes` more in so many messages, or an error if they would be too many. */
  #openStream(bytes, messages) {
    const isNumbered = this._process !== this;
    if (isNumbered) this._process._refuseWithoutVoices();
    this._process._refuseTooMuch(bytes + messages * (HEAD_BYTES + NUMBER_BYTES));
    if (this.#isOpen) {
      if (isNumbered) this.#refuseTooMuchOf(this.#streams.at(-1), bytes);
      return this.#streams.at(-1);
    }
    const stream = {
      stream: this.#opened, // its number in this voice
      number: null, // its number on the wire
      window: null, // how many samples come ahead of what is pulled
      granted: 0,
      fedBytes: 0,
      markBytes: 0, // of marks that have not come back
      pcm: [], // what waits to be pulled
      bytes: 0, // of that
      samples: 0, // that came
      pulled: 0,
      marks: [],
      isEnded: false,
      isCut: false, // its rest is lost
    };
    if (isNumbered) {
      this.#refuseTooMuchOf(stream, bytes);
      const { sample_rate, codec_sample_rate, frame_samples, chunk_frames } = this.format;
      const chunk = Math.ceil(((chunk_frames ?? 1) * frame_samples * sample_rate) / codec_sample_rate);
      const tail = sample_rate === codec_sample_rate ? 0 : Math.ceil(sample_rate / 10); // a resampler's: up to 81 ms
      stream.window = stream.granted = Math.round(this.#bufferSeconds * sample_rate) + Math.max(chunk, tail);
      stream.number = this._process._open(this, stream.stream, { ...this.#settings, window_samples: stream.window });
    }
    this.#opened += 1;
    this.#isOpen = true;
    this.#unended.add(stream.stream);
    this.#streams.push(stream);
    return stream;
  }

  #refuseTooMuchOf({ fedBytes, markBytes, samples }, more) {
    const { frame_bytes, frame_samples, sample_rate, codec_sample_rate } = this.format;
    const frames = Math.floor((samples * codec_sample_rate) / (sample_rate * frame_samples)); // that came back
    const waiting = fedBytes - frames * frame_bytes + markBytes;
    if (waiting + more <= STREAM_BYTES) return;
    const found = `${waiting} bytes of this stream wait to be decoded, and ${more} more were fed`;
    throw new MossnanoError("queue_full", `${found}: ${STREAM_BYTES} are allowed, feed less or later`, false);
  }

  /** As much more may come as was pulled: a frame at a time, but nothing is kept back from a stream that waits. */
  #grant(stream) {
    const { frame_samples, sample_rate, codec_sample_rate } = this.format;
    const granted = stream.window + stream.pulled;
    const isFrame = granted - stream.granted >= (frame_samples * sample_rate) / codec_sample_rate;
    if (stream.isEnded || !(isFrame || !stream.bytes)) return;
    stream.granted = granted;
    const payload = Buffer.alloc(8);
    payload.writeBigUInt64LE(BigInt(granted));
    this._process._send(Kind.CREDIT, payload, stream.number);
  }

  // --- what comes back ---------------------------------------------------------------------------------------------

  get _pcmBytes() {
    return this.#streams.reduce((sum, { bytes }) => sum + bytes, 0);
  }

  /** The stream that the process is at, where it has one at a time. */
  get _current() {
    return this.#unended.values().next().value;
  }

  _take(kind, number, payload) { // of a stream that was cancelled nothing is taken
    const stream = this.#streams.find((one) => one.stream === number);
    if (kind === Kind.AUDIO && stream) {
      stream.pcm.push(payload);
      stream.bytes += payload.length;
      stream.samples += payload.length / this.#sampleBytes;
    } else if (kind === Kind.MARK && stream) {
      const sample = Number(payload.readBigUInt64LE());
      stream.marks.push({ stream: number, sample, text: payload.toString("utf8", 8) });
      stream.markBytes -= payload.length - 8 + MARK_COST_BYTES;
    } else if (kind === Kind.END) {
      this.#unended.delete(number);
      if (stream) stream.isEnded = true;
      this.#retire();
      this.#tellMarks();
    }
  }

  /** Streams below this number were cancelled, and will not be heard of any more. */
  _forget(number) {
    for (const stream of this.#unended) if (stream < number) this.#unended.delete(stream);
  }

  /** Drops a stream that the process did not begin. */
  _drop(number) {
    if (this.#isOpen && this.#streams.at(-1)?.stream === number) this.#isOpen = false;
    this.#streams = this.#streams.filter(({ stream }) => stream !== number);
    this.#unended.delete(number);
  }

  /** The process is gone: what has come of the first stream can still be pulled, and then fades out. */
  _lose() {
    const lost = this.#streams.filter(({ isEnded }) => !isEnded);
    const [first] = lost;
    if (first?.samples && !first.bytes) this.#fadeOut();
    for (const stream of lost) {
      stream.isEnded = stream.isCut = true;
      stream.marks = stream.marks.filter(({ sample }) => sample < stream.samples);
    }
    this.#streams = this.#streams.filter((stream) => stream.bytes && (!stream.isCut || stream === first));
    this.#isOpen = false;
    this.#unended.clear();
    return lost.map(({ stream }) => stream);
  }

  /** Tells this voice, if it listens itself. */
  _tell(error) {
    this.#onError?.(error);
    return this.#onError !== null;
  }

  // --- what is heard -----------------------------------------------------------------------------------------------

  get #sampleBytes() {
    return 2 * this.format.channels;
  }

  #bytesIn(milliseconds) {
    return Math.round((milliseconds * this.format.sample_rate) / 1000) * this.#sampleBytes;
  }

  #giveTail(out) {
    const bytes = this.#tail.copy(out);
    this.#tail = this.#tail.subarray(bytes);
    return bytes;
  }

  #givePcm(out) {
    const [stream] = this.#streams;
    if (!stream?.bytes || (this.#isHolding && !this.#hasPrebuffer(stream))) return 0;
    const bytes = stream.pcm[0].copy(out);
    stream.pcm[0] = stream.pcm[0].subarray(bytes);
    if (!stream.pcm[0].length) stream.pcm.shift();
    stream.bytes -= bytes;
    stream.pulled += bytes / this.#sampleBytes;
    this.#isHolding = false;
    this.#isHeard = true;
    this.#raise(out.subarray(0, bytes));
    this.#last = Buffer.from(out.subarray(bytes - this.#sampleBytes, bytes));
    this.#played = { stream: stream.stream, samples: stream.pulled };
    if (stream.isCut && !stream.bytes) this.#fadeOut();
    if (stream.number !== null) this.#grant(stream);
    this.#retire();
    return bytes;
  }

  /** The rest of a stream that has ended is never held back. More than is ever kept is never waited for. */
  #hasPrebuffer({ isEnded, bytes }) {
    const wanted = Math.min(this.#prebufferMs, this.#bufferSeconds * 1000);
    return isEnded || bytes >= this.#bytesIn(wanted);
  }

  /** Passes the marks of what was pulled, and goes on to the next stream behind the end of one. */
  #retire() {
    for (let [stream] = this.#streams; stream; [stream] = this.#streams) {
      const isOver = stream.isEnded && !stream.bytes;
      while (stream.marks.length && (isOver || stream.marks[0].sample < stream.pulled)) {
        this.#passed.push(stream.marks.shift());
      }
      if (!isOver) return;
      this.#streams.shift();
    }
  }

  #tellMarks() { // who is told may call any method
    while (this.#passed.length) this.#onMark(this.#passed.shift());
  }

  /** A tail that leads from the last sample to silence: over what would have come, and past that over its end, held. */
  #fadeOut(coming = []) {
    if (!this.#isHeard) return;
    this.#isHeard = false;
    this.#tail = Buffer.alloc(this.#bytesIn(this.#fadeMs));
    const size = this.#sampleBytes;
    const isRising = this.#fadeIn.done < this.#fadeIn.samples; // then what comes is louder than the last sample was made
    const over = isRising ? [] : coming;
    const source = Buffer.concat([this.#last, ...over]).subarray(0, size + this.#tail.length);
    for (let at = 0; at < this.#tail.length; at += 2) {
      const from = Math.min(at + size, source.length - size + (at % size));
      const gain = 1 - (Math.floor(at / size) + 1) * size / this.#tail.length;
      this.#tail.writeInt16LE(Math.trunc(source.readInt16LE(from) * gain), at);
    }
    this.#fadeIn = { done: 0, samples: this.#tail.length / size };
  }

  /** The fade in, where one is due. */
  #raise(pcm) {
    for (let at = 0; at < pcm.length && this.#fadeIn.done < this.#fadeIn.samples; this.#fadeIn.done++) {
      const gain = this.#fadeIn.done / this.#fadeIn.samples;
      for (const end = at + this.#sampleBytes; at < end; at += 2) {
        pcm.writeInt16LE(Math.trunc(pcm.readInt16LE(at) * gain), at);
      }
    }
  }

  #amplify(pcm) {
    if (this.gain === 1 && this.#gainNow === 1) return;
    const { channels, sample_rate } = this.format;
    const step = this.#fadeMs ? 1000 / (this.#fadeMs * sample_rate) : Infinity;
    for (let at = 0; at < pcm.length; at++) {
      if (at % channels === 0) this.#gainNow += Math.min(step, Math.max(-step, this.gain - this.#gainNow));
      pcm[at] = Math.min(32767, Math.max(-32768, Math.round(pcm[at] * this.#gainNow)));
    }
  }
}

/** The process, and the voice that it is by itself. */
export class Mossnano extends Voice {
  /**
   * Resolves when the process is ready; rejects with a MossnanoError when it will not be.
   * `onError` gets a MossnanoError for whatever goes wrong later; after a fatal one, start anew.
   */
  static async start(options = {}) {
    const { onError = () => {} } = options;
    const voice = Mossnano.launch({ ...options, onError: (error) => voice.format && onError(error) });
    try {
      await voice.whenReady();
    } catch (error) {
      await voice.stop();
      throw error;
    }
    return voice;
  }

  /**
   * The same at once: a voice whose `state` is "starting". `onError` gets what goes wrong meanwhile, too.
   * `log` gets the lines of the process' stderr, which otherwise go to ours.
   * `restart`: how many times in a row a process that crashed is started again; a stream that comes to its end ends the
   * row. A crash is then an error that is not fatal, and what was fed until then is lost, as its `lost` says.
   */
  static launch(options = {}) {
    return new Mossnano(options);
  }

  /** How often a crashed process was started again. */
  restarts = 0;

  _said = null; // in the HANDSHAKE
  _isGone = true;
  _isStopping = false;
  #command;
  #bufferSeconds;
  #startSeconds;
  #restart;
  #log;
  #onError;
  #state = "starting";
  #reason = null;
  #waiters = []; // who awaits whenReady()
  #child;
  #closed; // resolves when the child is gone
  #late; // the timer of a start that takes too long
  #pause; // the timer of a restart
  #restartsInARow = 0;
  #fatalWasSaid = false;
  #input = Buffer.alloc(0); // of a message that is not whole
  #waiting = []; // messages that stdin has no room for
  #waitingBytes = 0;
  #cancels = 0; // of plain streams, for which no END has come back
  #numbers = new Map(); // number on the wire -> { voice, stream }, until its END
  #nextNumber = 0;

  constructor({
    command = ["mossnano-stdio"], bufferSeconds = 10, startSeconds = 60, prebufferMs = 0, fadeMs = 5, restart = 0,
    log = null, onMark, onError = () => {},
  } = {}) {
    super(null, { bufferSeconds, prebufferMs, fadeMs, onMark });
    if (!(restart >= 0)) throw new RangeError(`restart is ${restart}: 0 or more is allowed`);
    this.#command = command;
    this.#bufferSeconds = bufferSeconds;
    this.#startSeconds = startSeconds;
    this.#restart = restart;
    this.#log = log;
    this.#onError = onError;
    this.#spawn();
  }

  /**
   * Another voice of this process, which speaks beside all others, at its own pace.
   * `settings`: what SETTINGS has for its streams: channels (1: mono), sample_rate, gain_db, urgency, quantizers,
   * chunk_frames. `bufferSeconds`, `prebufferMs`, `fadeMs`, `onMark`: of this voice alone. `onError` gets what goes
   * wrong with it, and its `lost` streams when the process dies; without one, that of the process gets the former.
   * Throws a MossnanoError `no_voices` where the decoder has none; so does `feed`, where it is not ready yet.
   */
  openVoice(options = {}) {
    if (options.settings?.sample_format) throw new RangeError("sample_format is set: what is pulled is s16le, always");
    if (this.#state === "ready") this._refuseWithoutVoices();
    return new Voice(this, options);
  }

  /** "starting" (also while a crashed process is started again), "ready", "failed" or "stopped". */
  get state() {
    return this.#state;
  }

  /** The MossnanoError that made it fail, or null. */
  get reason() {
    return this.#reason;
  }

  /** Resolves with the voice when it is ready; rejects with the reason when it will not be. */
  whenReady() {
    return new Promise((resolve, reject) => {
      this.#waiters.push({ resolve, reject });
      this.#tellWaiters();
    });
  }

  /** The program's version, and whether its weights are the demo's; null before the HANDSHAKE, which `format` has. */
  get version() {
    return this._said?.version ?? null;
  }

  get demo() {
    return this._said?.demo ?? null;
  }

  /** The process, for those who watch over it. */
  get pid() {
    return this.#child.pid;
  }

  /** Resolves when the process has ended; nothing of it is left then. */
  async stop() {
    this._isStopping = true;
    clearTimeout(this.#pause);
    if (!this._isGone) {
      for (const { voice } of this.#numbers.values()) voice.cancel();
      this.cancel();
      this.#child.stdin?.end(Buffer.concat(this.#waiting.splice(0))); // which it takes as the end
      const patience = setTimeout(() => this.#kill(), STOP_MS);
      await this.#closed;
      clearTimeout(patience);
    }
    this.#state = "stopped";
    this.#tellWaiters();
  }

  // --- the process -------------------------------------------------------------------------------------------------

  #spawn() {
    const [program, ...rest] = this.#command;
    // A group of its own where there are groups: we end it, Ctrl-C does not.
    const child = spawn(program, rest, {
      stdio: ["pipe", "pipe", this.#log ? "pipe" : "inherit"],
      detached: process.platform !== "win32",
      windowsHide: true,
    });
    this.#child = child;
    this._isGone = false;
    this.#fatalWasSaid = false;
    this.#input = Buffer.alloc(0);
    this.#late = setTimeout(() => {
      this.#say("timeout", "no HANDSHAKE in time: allow more startSeconds, or look at its stderr", true);
      this.#kill();
    }, this.#startSeconds * 1000);
    this.#closed = new Promise((resolve) => {
      child.on("error", (error) => {
        const found = `${program} cannot be started (${error.code})`;
        this.#say("not_started", `${found}: is it installed and on the PATH?`, true);
        this.#bury(error.code);
        resolve();
      });
      child.on("close", (status, signal) => {
        this.#bury(signal ? `signal ${signal}` : `status ${status}`);
        resolve();
      });
    });
    child.stdin?.on("error", () => {}); // it died: "close" says so, and says more
    child.stdin?.on("drain", () => this.#write());
    child.stdout?.on("data", (data) => this.#receive(data));
    this.#readLog(child.stderr);
  }

  #readLog(stderr) {
    let line = "";
    stderr?.setEncoding("utf8").on("data", (text) => {
      const lines = (line + text).split(/\r?\n/);
      line = lines.pop();
      if (line.length > LONGEST_LINE) {
        lines.push(line);
        line = "";
      }
      for (const whole of lines) this.#log(whole);
    });
    stderr?.on("end", () => line && this.#log(line));
  }

  #bury(how) {
    if (this._isGone) return;
    clearTimeout(this.#late);
    this._isGone = true;
    const isRestarted = this.#mayRestart();
    const lost = this._lose();
    const others = new Set([...this.#numbers.values()].map(({ voice }) => voice));
    const lostByOthers = [...others].map((voice) => [voice, voice._lose()]);
    this.#numbers.clear();
    this.#cancels = 0;
    this.#waiting = [];
    this.#waitingBytes = 0;
    if (isRestarted) this.#state = "starting"; // before anybody is told
    if (isRestarted || !this.#fatalWasSaid) {
      const without = lost.length ? `, without what was fed to the streams ${lost.join(", ")}` : "";
      const and = isRestarted ? `; it is started again${without}` : "";
      this.#say("process_ended", `the process ended by itself with ${how}: its stderr says more${and}`, true, lost);
    }
    const { code, message } = this.#reason ?? { code: "process_ended", message: `the process ended with ${how}` };
    for (const [voice, streams] of lostByOthers) {
      if (streams.length) voice._tell(new MossnanoError(code, message, !isRestarted, streams));
    }
    if (!isRestarted || this._isStopping) return; // who was told may have called stop()
    const pause = Math.min(FIRST_PAUSE_MS * 2 ** this.#restartsInARow, LONGEST_PAUSE_MS);
    this.#restartsInARow += 1;
    this.#pause = setTimeout(() => {
      this.restarts += 1;
      this.#spawn();
    }, pause);
  }

  /** A process that never became ready would not do so the next time. */
  #mayRestart() {
    return this._said !== null && !this._isStopping && this.#restartsInARow < this.#restart;
  }

  #tellWaiters() {
    if (this.#state === "starting") return;
    const stopped = new MossnanoError("stopped", "stop() was called before the process was ready", true);
    for (const { resolve, reject } of this.#waiters.splice(0)) {
      if (this.#state === "ready") resolve(this);
      else reject(this.#reason ?? stopped);
    }
  }

  // --- what comes back ---------------------------------------------------------------------------------------------

  #receive(data) {
    let input = this.#input.length ? Buffer.concat([this.#input, data]) : data;
    while (input.length >= 4) {
      const length = input.readUInt32LE(0);
      if (length < 1 || length > LONGEST) {
        this.#say("framing_lost", "the program does not speak the protocol: does something print to its stdout?", true);
        this.#child.stdout.removeAllListeners("data").resume();
        this.#kill();
        return;
      }
      if (input.length < 4 + length) break;
      this.#take(input[4], input.subarray(5, 4 + length));
      input = input.subarray(4 + length);
    }
    this.#input = input;
  }

  #take(kind, payload) { // unknown kinds and keys are passed over
    if (this._isStopping) return;
    // An END behind a fatal error says what was sent, which is not all.
    if ((kind & ~NUMBERED) === Kind.END && this.#fatalWasSaid) return;
    if (kind & NUMBERED) this.#takeNumbered(kind & ~NUMBERED, payload.readUInt32LE(0), payload.subarray(NUMBER_BYTES));
    else if (kind === Kind.HANDSHAKE && this.#state === "starting") this.#shakeHands(JSON.parse(payload));
    else if (kind === Kind.ERROR) {
      const { code, message, fatal } = JSON.parse(payload);
      this.#say(code, message, fatal);
    } else if (kind === Kind.END && JSON.parse(payload).cancelled) {
      this._forget(Number(JSON.parse(payload).echo)); // how many streams had been opened when we sent that CANCEL
      this.#cancels -= 1;
    } else if (this.#cancels === 0) {
      if (kind === Kind.END) this.#restartsInARow = 0;
      this._take(kind, this._current, payload);
      this._throttle();
    }
  }

  #takeNumbered(kind, number, payload) {
    const { voice, stream } = this.#numbers.get(number) ?? {};
    if (!voice) return;
    if (kind === Kind.ERROR) {
      const { code, message } = JSON.parse(payload);
      if (REFUSALS.includes(code)) voice._drop(stream);
      if (code === "bad_settings") this._cancelNumbered(number); // it is open, and would sound otherwise than asked for
      else if (REFUSALS.includes(code)) this.#numbers.delete(number); // no END will come
      const error = new MossnanoError(code, message, false);
      if (!voice._tell(error)) this.#onError(error);
    } else if (kind !== Kind.END) voice._take(kind, stream, payload);
    else {
      this.#numbers.delete(number);
      if (!JSON.parse(payload).cancelled) this.#restartsInARow = 0;
      voice._take(kind, stream, payload);
    }
  }

  #shakeHands(said) {
    const isOurs = said.protocol === 1 && said.direction === "decode" && NUMBERS.every((name) => said[name] > 0);
    if (!isOurs) {
      this.#say("handshake", "this is no decoder of protocol 1: update mossnano.mjs, or drop --encode", true);
      this.#kill();
      return;
    }
    clearTimeout(this.#late);
    this._said = said;
    this.#state = "ready";
    this.#tellWaiters();
  }

  #say(code, message, fatal, lost = []) {
    if (this._isStopping) return;
    this.#fatalWasSaid ||= fatal;
    const error = new MossnanoError(code, message, fatal && !this.#mayRestart(), lost);
    if (error.fatal) {
      this.#state = "failed";
      this.#reason = error;
    }
    this.#onError(error);
    this.#tellWaiters();
  }

  // --- the pipes ---------------------------------------------------------------------------------------------------

  _send(kind, payload = Buffer.alloc(0), number = null) {
    if (this._isGone || !this.#child.stdin?.writable) return;
    const isNumbered = number !== null;
    const head = HEAD_BYTES + (isNumbered ? NUMBER_BYTES : 0);
    const message = Buffer.alloc(head + payload.length); // a copy: the caller may use the payload's buffer again
    message.writeUInt32LE(message.length - 4, 0);
    message[4] = isNumbered ? kind | NUMBERED : kind;
    if (isNumbered) message.writeUInt32LE(number, HEAD_BYTES);
    message.set(payload, head);
    if (kind === Kind.CANCEL) this.#waiting.unshift(message); // it overtakes
    else this.#waiting.push(message);
    this.#waitingBytes += message.length;
    this.#write();
  }

  #write() {
    const stdin = this.#child.stdin;
    let taken = 0;
    while (taken < this.#waiting.length && stdin.writable && !stdin.writableNeedDrain) {
      this.#waitingBytes -= this.#waiting[taken].length;
      stdin.write(this.#waiting[taken++]);
    }
    this.#waiting.splice(0, taken);
  }

  _refuseTooMuch(more) {
    const waiting = this.#waitingBytes + this.#child.stdin.writableLength; // what stdin holds has not left either
    if (waiting + more <= WAITING_BYTES) return;
    const found = `${waiting} bytes wait for the process to take them, and ${more} more were fed`;
    throw new MossnanoError("queue_full", `${found}: ${WAITING_BYTES} (4 MiB) are allowed, feed less or later`, false);
  }

  /** What the messages bring that have not left would be dropped by the CANCEL: so they never leave. */
  #forgetWaiting(isForgotten) {
    this.#waiting = this.#waiting.filter((message) => !isForgotten(message));
    this.#waitingBytes = this.#waiting.reduce((sum, { length }) => sum + length, 0);
  }

  _cancelPlain(opened) {
    this.#cancels -= this.#waiting.filter((message) => message[4] === Kind.CANCEL).length; // no END will answer them
    this.#forgetWaiting((message) => !(message[4] & NUMBERED));
    this.#cancels += 1; // what comes is dropped until as many ENDs have come back
    this._send(Kind.CANCEL, Buffer.from(String(opened)));
  }

  /** Will an END come? None does of a stream that the process has not heard of. */
  _cancelNumbered(number) {
    const isOfIt = (message) => message[4] & NUMBERED && message.readUInt32LE(HEAD_BYTES) === number;
    const isUnknown = this.#waiting.some((message) => isOfIt(message) && message[4] === (Kind.SETTINGS | NUMBERED));
    this.#forgetWaiting(isOfIt);
    if (isUnknown || this._isGone) this.#numbers.delete(number);
    else this._send(Kind.CANCEL, undefined, number);
    return this.#numbers.has(number);
  }

  /** Opens a numbered stream; its number. */
  _open(voice, stream, settings) {
    if (this.#numbers.size >= this._said.max_streams) {
      const found = `${this.#numbers.size} streams are not over, and max_streams allows no more`;
      throw new MossnanoError("too_many_streams", `${found}: wait, cancel one, or start it with --max-streams`, false);
    }
    const number = this.#nextNumber++;
    this.#numbers.set(number, { voice, stream });
    this._send(Kind.SETTINGS, Buffer.from(JSON.stringify(settings)), number);
    return number;
  }

  _refuseWithoutVoices() {
    if (this._said.max_streams) return;
    const found = "this decoder has one stream at a time and no marks: its HANDSHAKE says no max_streams";
    throw new MossnanoError("no_voices", `${found}, it is an older one, or was started with --max-streams 0`, false);
  }

  get _answers() {
    return !this._isGone && this.#state !== "starting";
  }

  _throttle() {
    if (this._said === null) return;
    const most = this.#bufferSeconds * this._said.sample_rate * this._said.channels * 2;
    if (this._pcmBytes > most && this.#cancels === 0) this.#child.stdout.pause();
    else this.#child.stdout.resume();
  }

  #kill() {
    try {
      if (process.platform === "win32") this.#child.kill();
      else process.kill(-this.#child.pid, "SIGKILL"); // its group: a wrapper may have children
    } catch {
      // it is gone already
    }
  }
}
