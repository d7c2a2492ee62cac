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
 * Tested on Linux. macOS and Windows: NOT RUN in our checks. Protocol version 1, see protocol.md.
 */
import { spawn } from "node:child_process";

const Kind = { HANDSHAKE: 0, AUDIO: 1, TOKENS: 4, ERROR: 5, END: 7, CANCEL: 8 };
const LONGEST = 1 << 20; // no message of the process is longer
const PIECE_BYTES = 1 << 16; // of what is fed in one message: CANCEL must not wait behind a long one
const HEAD_BYTES = 5; // of a message: its length and its kind
const WAITING_BYTES = 4 << 20; // of messages that may wait here for the process
const STOP_MS = 2000; // how long the process may take to end by itself
const NUMBERS = [
  "sample_rate", "channels", "frame_samples", "quantizers", "codebook_size", "frame_bytes", "max_audio_bytes",
];

export class MossnanoError extends Error {
  constructor(code, message, fatal) {
    super(message);
    this.code = code;
    this.fatal = fatal;
  }
}

export class Mossnano {
  /**
   * Resolves when the process is ready; rejects with a MossnanoError when it will not be.
   * `onError` gets a MossnanoError for whatever goes wrong later; after a fatal one, start anew.
   */
  static async start({
    command = ["mossnano-stdio"], bufferSeconds = 10, startSeconds = 60, prebufferMs = 0, fadeMs = 5, onError = () => {},
  } = {}) {
    const voice = new Mossnano(command, { bufferSeconds, prebufferMs, fadeMs, onError });
    const late = setTimeout(() => {
      voice.#say("timeout", "no HANDSHAKE in time: allow more startSeconds, or look at its stderr", true);
    }, startSeconds * 1000);
    try {
      await new Promise((resolve, reject) => (voice.#starting = { resolve, reject }));
    } catch (error) {
      await voice.stop();
      throw error;
    } finally {
      clearTimeout(late);
    }
    return voice;
  }

  /** What the HANDSHAKE said: sample_rate, channels, quantizers, frame_bytes, ... */
  format = null;
  /** Pulls that ran dry in the middle of a stream. While a prebuffer fills, none is counted. */
  underruns = 0;

  #child;
  #closed;
  #onError;
  #bufferSeconds;
  #prebufferMs;
  #fadeMs;
  #starting = null;
  #isGone = false;
  #isStopping = false;
  #fatalWasSaid = false;
  #input = Buffer.alloc(0); // of a message that is not whole
  #pcm = []; // buffers that wait to be pulled
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
  #ended = 0;
  #cancels = 0; // for which no END has come back

  constructor(command, { bufferSeconds, prebufferMs, fadeMs, onError }) {
    this.#bufferSeconds = bufferSeconds;
    this.#prebufferMs = prebufferMs;
    this.#fadeMs = fadeMs;
    this.#onError = onError;
    // Its stderr is ours. A group of its own where there are groups: we end it, Ctrl-C does not.
    this.#child = spawn(command[0], command.slice(1), {
      stdio: ["pipe", "pipe", "inherit"],
      detached: process.platform !== "win32",
      windowsHide: true,
    });
    this.#closed = new Promise((resolve) => {
      this.#child.on("error", (error) => {
        this.#say("not_started", `${command[0]} cannot be started (${error.code}): is it installed and on the PATH?`, true);
        this.#isGone = true;
        resolve();
      });
      this.#child.on("close", (status, signal) => {
        this.#isGone = true;
        this.#isSounding = false;
        const how = signal ? `signal ${signal}` : `status ${status}`;
        if (!this.#fatalWasSaid) this.#say("process_ended", `the process ended by itself with ${how}: its stderr says more`, true);
        resolve();
      });
    });
    this.#child.stdin?.on("error", () => {}); // it died: "close" says so, and says more
    this.#child.stdin?.on("drain", () => this.#write());
    this.#child.stdout?.on("data", (data) => this.#receive(data));
  }

  /**
   * Adds packed frames to the stream, and opens one where none is open. False when the process is gone. Takes all of
   * it or nothing: throws a MossnanoError `queue_full` where more than 4 MiB would wait for the process.
   */
  feed(packed) {
    const frameBytes = this.format.frame_bytes;
    if (packed.length % frameBytes) {
      throw new RangeError(`${packed.length} bytes are no whole frames: feed a multiple of ${frameBytes} bytes`);
    }
    if (this.#isGone) return false;
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
    return !this.#isGone;
  }

  /** Be silent, now: drops whatever was fed, and all that waits to be pulled. */
  cancel() {
    this.#streamIsOpen = false;
    this.#forgetWaiting();
    this.#cancels += 1; // what comes is dropped until as many ENDs have come back
    this.#isSounding = false;
    this.#fadeOut(this.#pcm);
    this.#drop();
    this.#send(Kind.CANCEL, Buffer.from(String(this.#opened)));
    return !this.#isGone;
  }

  /** Exactly `samples` samples of all channels, interleaved, as an Int16Array, with silence where there are none. */
  pull(samples) {
    const pcm = new Int16Array(samples * this.format.channels);
    this.pullInto(pcm);
    return pcm;
  }

  /** Fills an Int16Array in the same way, and returns how many samples of all channels are sound; silence follows. */
  pullInto(pcm) {
    const out = Buffer.from(pcm.buffer, pcm.byteOffset, pcm.byteLength);
    const wasHolding = this.#isHolding;
    let filled = this.#giveTail(out);
    filled += this.#givePcm(out.subarray(filled));
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
    return filled / this.#sampleBytes;
  }

  /** Is something to be pulled, now or later? */
  get isSpeaking() {
    return this.#tail.length > 0 || this.#pcmBytes > 0 || (!this.#isGone && this.#ended < this.#opened);
  }

  /** The process, for those who watch over it. */
  get pid() {
    return this.#child.pid;
  }

  /** Resolves when the process has ended; nothing of it is left then. */
  async stop() {
    if (this.#isGone) return;
    this.#isStopping = true;
    this.cancel();
    this.#child.stdin?.end(Buffer.concat(this.#waiting.splice(0))); // which it takes as the end
    const patience = setTimeout(() => this.#kill(), STOP_MS);
    await this.#closed;
    clearTimeout(patience);
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
    if (this.#isHolding && !this.#hasPrebuffer()) return 0;
    let filled = 0;
    while (filled < out.length && this.#pcm.length) {
      const first = this.#pcm[0];
      const bytes = first.copy(out, filled);
      filled += bytes;
      if (bytes === first.length) this.#pcm.shift();
      else this.#pcm[0] = first.subarray(bytes);
    }
    if (filled === 0) return 0;
    this.#pcmBytes -= filled;
    this.#isHolding = false;
    this.#raise(out.subarray(0, filled));
    this.#last = Buffer.from(out.subarray(filled - this.#sampleBytes, filled));
    this.#isHeard = true;
    return filled;
  }

  /** The rest of a stream that has ended is never held back. More than is ever kept is never waited for. */
  #hasPrebuffer() {
    const wanted = Math.min(this.#prebufferMs, this.#bufferSeconds * 1000);
    return !this.#isSounding || this.#pcmBytes >= this.#bytesIn(wanted);
  }

  /** A tail that leads from the last sample to silence: over what would have come, and past that over its end, held. */
  #fadeOut(coming = []) {
    if (!this.#isHeard) return;
    this.#isHeard = false;
    this.#tail = Buffer.alloc(this.#bytesIn(this.#fadeMs));
    const size = this.#sampleBytes;
    const source = Buffer.concat([this.#last, ...coming]).subarray(0, size + this.#tail.length);
    for (let at = 0; at < this.#tail.length; at += 2) {
      const from = Math.min(at + size, source.length - size + (at % size));
      const gain = 1 - (Math.floor(at / size) + 1) * size / this.#tail.length;
      this.#tail.writeInt16LE(Math.round(source.readInt16LE(from) * gain), at);
    }
    this.#fadeIn = { done: 0, samples: this.#tail.length / size };
  }

  /** The fade in, where one is due. */
  #raise(pcm) {
    for (let at = 0; at < pcm.length && this.#fadeIn.done < this.#fadeIn.samples; this.#fadeIn.done++) {
      const gain = this.#fadeIn.done / this.#fadeIn.samples;
      for (const end = at + this.#sampleBytes; at < end; at += 2) {
        pcm.writeInt16LE(Math.round(pcm.readInt16LE(at) * gain), at);
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
      this.#pcm.push(payload);
      this.#pcmBytes += payload.length;
      this.#isSounding = true;
      this.#throttle();
    } else if (kind === Kind.HANDSHAKE && this.format === null) this.#shakeHands(JSON.parse(payload));
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
      return;
    }
    this.format = Object.freeze(said);
    this.#starting?.resolve();
    this.#starting = null;
  }

  #end({ cancelled, echo }) {
    this.#isSounding = false;
    if (!cancelled) this.#ended += 1;
    else {
      this.#ended = Number(echo); // how many streams were open when we sent that CANCEL: all of those are over
      this.#cancels -= 1;
    }
  }

  #say(code, message, fatal) {
    if (this.#isStopping) return;
    this.#fatalWasSaid ||= fatal;
    const error = new MossnanoError(code, message, fatal);
    if (this.#starting === null) this.#onError(error);
    else if (fatal) this.#starting.reject(error);
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
