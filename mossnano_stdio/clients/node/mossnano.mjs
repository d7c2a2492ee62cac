/**
 * mossnano.mjs: a voice for a Node program. Starts `mossnano-stdio`, feeds it codec tokens, hands out PCM.
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
 * Node reads between your calls: leave it the time, and nobody waits for the other forever. When more than
 * `bufferSeconds` of PCM wait to be pulled we stop reading, and the process waits. No call waits for the process, not
 * even for one that hangs: what its pipe has no room for waits here, up to 4 MiB (hours), past which `feed` throws
 * `queue_full`. There is no lock-free ring here, because there is only one thread.
 *
 * What is cut off, by `cancel` or by an underrun, fades out over `fadeMs`, and what follows fades in; 0 leaves every
 * sample as it came. With `prebufferMs` a stream sounds once so much of it waits, or all of it, and so again after an
 * underrun: fed in real time, with jitter, 100 to 200 are enough.
 *
 * Where nobody wants to wait for the weights, `launch` gives a voice at once: ask its `state`, or await `whenReady()`.
 * `played` says how much was heard of which stream, for barge-in; streams count from 0, and `stream` is the last one
 * that `feed` opened. With `restart: N` a process that crashes is started again, up to N times in a row.
 *
 * Tested on Linux. macOS and Windows: NOT RUN in our checks. Protocol version 1, see protocol.md.
 */
import { spawn } from "node:child_process";

const Kind = { HANDSHAKE: 0, AUDIO: 1, TOKENS: 4, ERROR: 5, END: 7, CANCEL: 8 };
const LONGEST = 1 << 20; // no message of the process is longer
const PIECE_BYTES = 1 << 16; // of what is fed in one message: CANCEL must not wait behind a long one
const HEAD_BYTES = 5; // of a message: its length and its kind
const WAITING_BYTES = 4 << 20; // of messages that may wait here for the process
const STOP_MS = 2000; // how long the process may take to end by itself
const FIRST_PAUSE_MS = 250; // before a restart; twice as long before the next one in a row,
const LONGEST_PAUSE_MS = 8000; // up to this
const LONGEST_LINE = 1 << 16; // of its stderr: what is longer comes in pieces
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

export class Mossnano {
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

  /** What the HANDSHAKE said: sample_rate, channels, quantizers, frame_bytes, ...; null before the first one. */
  format = null;
  /** Pulls that ran dry in the middle of a stream. While a prebuffer fills, none is counted. */
  underruns = 0;
  /** How often a crashed process was started again. */
  restarts = 0;

  #command;
  #bufferSeconds;
  #startSeconds;
  #prebufferMs;
  #fadeMs;
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
  #isGone = true;
  #isStopping = false;
  #fatalWasSaid = false;
  #input = Buffer.alloc(0); // of a message that is not whole
  #pcm = []; // what waits to be pulled: { pcm, stream, isCut }, where isCut is set if the rest of the stream was lost
  #pcmBytes = 0;
  #isHolding = true; // until a prebuffer is there
  #isHeard = false; // the last sample that was given out was no silence
  #last = Buffer.alloc(0); // that sample
  #tail = Buffer.alloc(0); // of a fade out, to be pulled before anything else
  #fadeIn = { done: 0, samples: 0 }; // how far what follows a fade out has come back
  #waiting = []; // messages that stdin has no room for
  #waitingBytes = 0;
  #isSounding = false; // PCM of a stream came, its END did not
  #streamIsOpen = false;
  #opened = 0; // streams
  #ended = 0; // so that is also the number of the stream whose AUDIO comes
  #cancelled = 0; // how many had been opened at the last cancel
  #played = { stream: null, samples: 0 };
  #cancels = 0; // for which no END has come back

  constructor({
    command = ["mossnano-stdio"], bufferSeconds = 10, startSeconds = 60, prebufferMs = 0, fadeMs = 5, restart = 0,
    log = null, onError = () => {},
  } = {}) {
    for (const [name, value] of Object.entries({ prebufferMs, fadeMs, restart })) {
      if (!(value >= 0)) throw new RangeError(`${name} is ${value}: 0 or more is allowed`);
    }
    this.#command = command;
    this.#bufferSeconds = bufferSeconds;
    this.#startSeconds = startSeconds;
    this.#prebufferMs = prebufferMs;
    this.#fadeMs = fadeMs;
    this.#restart = restart;
    this.#log = log;
    this.#onError = onError;
    this.#spawn();
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
    return this.format?.version ?? null;
  }

  get demo() {
    return this.format?.demo ?? null;
  }

  /** The number of the stream that `feed` opened last, from 0; null before the first. */
  get stream() {
    return this.#opened ? this.#opened - 1 : null;
  }

  /** The stream that was pulled last, and how many of its samples were given out: what fades count for nothing. */
  get played() {
    return { ...this.#played };
  }

  /**
   * Adds packed frames to the stream, and opens one where none is open. False unless the state is "ready". Takes all of
   * it or nothing: throws a MossnanoError `queue_full` where more than 4 MiB would wait for the process.
   */
  feed(packed) {
    if (this.#state !== "ready") return false;
    const frameBytes = this.format.frame_bytes;
    if (packed.length % frameBytes) {
      throw new RangeError(`${packed.length} bytes are no whole frames: feed a multiple of ${frameBytes} bytes`);
    }
    const step = Math.max(1, Math.floor(PIECE_BYTES / frameBytes)) * frameBytes;
    const pieces = Math.max(1, Math.ceil(packed.length / step)); // an empty TOKENS opens a stream that END may close
    this.#refuseTooMuch(packed.length + pieces * HEAD_BYTES);
    if (!this.#streamIsOpen) this.#opened += 1;
    this.#streamIsOpen = true;
    for (let piece = 0; piece < pieces; piece++) {
      this.#send(Kind.TOKENS, packed.subarray(piece * step, (piece + 1) * step));
    }
    return true;
  }

  /** The same for frames that are arrays of codes. */
  feedCodes(frames) {
    if (this.#state !== "ready") return false;
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

  /** The stream is complete. */
  finish() {
    if (this.#streamIsOpen) this.#send(Kind.END);
    this.#streamIsOpen = false;
    return this.#state === "ready";
  }

  /** Be silent, now: drops whatever was fed, and all that waits to be pulled but for what fades out. */
  cancel() {
    this.#streamIsOpen = false;
    this.#isSounding = false;
    this.#fadeOut(this.#pcm);
    const isAnswered = !this.#isGone && this.#state !== "starting";
    if (isAnswered) {
      this.#forgetWaiting();
      this.#cancels += 1; // what comes is dropped until as many ENDs have come back
      this.#cancelled = this.#opened;
      this.#send(Kind.CANCEL, Buffer.from(String(this.#opened)));
    }
    this.#drop();
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
    let filled = 0;
    for (let bytes = 1; bytes > 0 && filled < out.length; filled += bytes) {
      bytes = this.#giveTail(out.subarray(filled)) || this.#givePcm(out.subarray(filled));
    }
    if (filled < out.length) {
      if (this.#isSounding && !(wasHolding && this.#isHolding)) {
        this.underruns += 1;
        this.#fadeOut();
        filled += this.#giveTail(out.subarray(filled));
      }
      this.#isHolding = this.#prebufferMs > 0;
      this.#isHeard = false;
    }
    out.fill(0, filled);
    this.#throttle();
    return filled && filled / this.#sampleBytes;
  }

  /** Is something to be pulled, now or later? */
  get isSpeaking() {
    const fades = this.#tail.length > 0 && !this.#isStopping;
    return fades || this.#pcmBytes > 0 || (!this.#isGone && this.#ended < this.#opened);
  }

  /** The process, for those who watch over it. */
  get pid() {
    return this.#child.pid;
  }

  /** Resolves when the process has ended; nothing of it is left then. */
  async stop() {
    this.#isStopping = true;
    clearTimeout(this.#pause);
    if (!this.#isGone) {
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
    this.#isGone = false;
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
    if (this.#isGone) return;
    clearTimeout(this.#late);
    this.#isGone = true;
    const isRestarted = this.#mayRestart();
    const lost = this.#loseStreams();
    if (isRestarted) this.#state = "starting"; // before anybody is told
    if (isRestarted || !this.#fatalWasSaid) {
      const without = lost.length ? `, without what was fed to the streams ${lost.join(", ")}` : "";
      const and = isRestarted ? `; it is started again${without}` : "";
      this.#say("process_ended", `the process ended by itself with ${how}: its stderr says more${and}`, true, lost);
    }
    if (!isRestarted || this.#isStopping) return; // who was told may have called stop()
    const pause = Math.min(FIRST_PAUSE_MS * 2 ** this.#restartsInARow, LONGEST_PAUSE_MS);
    this.#restartsInARow += 1;
    this.#pause = setTimeout(() => {
      this.restarts += 1;
      this.#spawn();
    }, pause);
  }

  /** A process that never became ready would not do so the next time. */
  #mayRestart() {
    return this.format !== null && !this.#isStopping && this.#restartsInARow < this.#restart;
  }

  /** What has come of them can still be pulled, and then fades out. */
  #loseStreams() {
    const lost = [];
    for (let stream = Math.max(this.#ended, this.#cancelled); stream < this.#opened; stream++) lost.push(stream);
    if (this.#isSounding && this.#pcm.length) this.#pcm.at(-1).isCut = true;
    else if (this.#isSounding) this.#fadeOut();
    this.#isSounding = false;
    this.#streamIsOpen = false;
    this.#ended = this.#opened;
    this.#cancels = 0;
    this.#waiting = [];
    this.#waitingBytes = 0;
    return lost;
  }

  #tellWaiters() {
    if (this.#state === "starting") return;
    const stopped = new MossnanoError("stopped", "stop() was called before the process was ready", true);
    for (const { resolve, reject } of this.#waiters.splice(0)) {
      if (this.#state === "ready") resolve(this);
      else reject(this.#reason ?? stopped);
    }
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
    if (!this.#pcm.length || (this.#isHolding && !this.#hasPrebuffer())) return 0;
    const first = this.#pcm[0];
    const bytes = first.pcm.copy(out);
    first.pcm = first.pcm.subarray(bytes);
    this.#pcmBytes -= bytes;
    this.#isHolding = false;
    this.#isHeard = true;
    this.#raise(out.subarray(0, bytes));
    this.#last = Buffer.from(out.subarray(bytes - this.#sampleBytes, bytes));
    if (this.#played.stream !== first.stream) this.#played = { stream: first.stream, samples: 0 };
    this.#played.samples += bytes / this.#sampleBytes;
    if (!first.pcm.length) {
      this.#pcm.shift();
      if (first.isCut) this.#fadeOut();
    }
    return bytes;
  }

  /** The rest of a stream that has ended is never held back. More than is ever kept is never waited for. */
  #hasPrebuffer() {
    const wanted = Math.min(this.#prebufferMs, this.#bufferSeconds * 1000);
    return this.#pcm[0].stream < this.#ended || this.#pcmBytes >= this.#bytesIn(wanted);
  }

  /** A tail that leads from the last sample to silence: over what would have come, and past that over its end, held. */
  #fadeOut(coming = []) {
    if (!this.#isHeard) return;
    this.#isHeard = false;
    this.#tail = Buffer.alloc(this.#bytesIn(this.#fadeMs));
    const size = this.#sampleBytes;
    const isRising = this.#fadeIn.done < this.#fadeIn.samples; // then what comes is louder than the last sample was made
    const over = isRising ? [] : coming.map(({ pcm }) => pcm);
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
    if (kind === Kind.AUDIO && this.#cancels === 0 && !this.#isStopping) {
      this.#pcm.push({ pcm: payload, stream: this.#ended, isCut: false });
      this.#pcmBytes += payload.length;
      this.#isSounding = true;
      this.#throttle();
    } else if (kind === Kind.HANDSHAKE && this.#state === "starting") this.#shakeHands(JSON.parse(payload));
    else if (kind === Kind.END) this.#end(JSON.parse(payload));
    else if (kind === Kind.ERROR) {
      const { code, message, fatal } = JSON.parse(payload);
      this.#say(code, message, fatal);
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
    this.format = Object.freeze(said);
    this.#state = "ready";
    this.#tellWaiters();
  }

  #end({ cancelled, echo }) {
    this.#isSounding = false;
    if (!cancelled) {
      this.#ended += 1;
      this.#restartsInARow = 0;
    } else {
      this.#ended = Number(echo); // how many streams were open when we sent that CANCEL: all of those are over
      this.#cancels -= 1;
    }
  }

  #say(code, message, fatal, lost = []) {
    if (this.#isStopping) return;
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

  #send(kind, payload = Buffer.alloc(0)) {
    if (this.#isGone || !this.#child.stdin?.writable) return;
    const message = Buffer.alloc(HEAD_BYTES + payload.length); // a copy: the caller may use the payload's buffer again
    message.writeUInt32LE(payload.length + 1, 0);
    message[4] = kind;
    message.set(payload, HEAD_BYTES);
    this.#waiting.push(message);
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

  #refuseTooMuch(more) {
    const waiting = this.#waitingBytes + this.#child.stdin.writableLength; // what stdin holds has not left either
    if (waiting + more <= WAITING_BYTES) return;
    const found = `${waiting} bytes wait for the process to take them, and ${more} more were fed`;
    throw new MossnanoError("queue_full", `${found}: ${WAITING_BYTES} (4 MiB) are allowed, feed less or later`, false);
  }

  /** Messages that have not left never will: the CANCEL that follows would drop what they bring. */
  #forgetWaiting() {
    this.#cancels -= this.#waiting.filter((message) => message[4] === Kind.CANCEL).length; // no END will answer them
    this.#waiting = [];
    this.#waitingBytes = 0;
  }

  #throttle() {
    if (this.format === null) return;
    const most = this.#bufferSeconds * this.format.sample_rate * this.format.channels * 2;
    if (this.#pcmBytes > most && this.#cancels === 0) this.#child.stdout.pause();
    else this.#child.stdout.resume();
  }

  #drop() {
    this.#pcm = [];
    this.#pcmBytes = 0;
    this.#throttle(); // the END we wait for stands behind audio
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
