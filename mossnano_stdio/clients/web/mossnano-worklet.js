/**
 * mossnano-worklet.js: the last piece before the sound card. PCM comes in by messages, and waits in a ring.
 *
 * Runs in an AudioWorklet; `Ring` runs anywhere. Whoever sends PCM may send as much as there is room for and no more: how
 * much was played is told as the ring empties. Messages carry each chunk over without a copy of their own, so nothing
 * here needs shared memory, and no page has to be cross-origin isolated.
 */

const FULL_SCALE = 32767;
const REPORTED_SAMPLES = 1024; // between two reports of how far it is

export class Ring {
  #channels;
  #samples; // Int16Array, interleaved: the ring
  #capacity; // in samples of all channels, as everything below
  #first = 0; // where the oldest sample lies
  #prebuffer;
  #fade; // how long what is cut off takes to be silent, and what follows to come back
  #last; // the sample that was given out last, one value for each channel
  #isHeard = false; // that one was no silence of ours
  #fadedOut; // how much of a fade out was given out
  #fadedIn;
  #tail = null; // of a cancelled stream: what fades out

  /** Samples that wait. */
  waiting = 0;
  /** Samples that were given out. */
  played = 0;
  /** Times that it ran dry in the middle of a stream. While a prebuffer fills, none is counted. */
  underruns = 0;
  isHolding = true; // until the prebuffer is there
  isFinished = false; // no more will come

  constructor({ channels, capacity, prebuffer = 0, fade = 0 }) {
    this.#channels = channels;
    this.#capacity = capacity;
    this.#samples = new Int16Array(capacity * channels);
    this.#prebuffer = Math.min(prebuffer, capacity);
    this.#fade = fade;
    this.#fadedOut = fade;
    this.#fadedIn = fade;
    this.#last = new Float32Array(channels);
  }

  get room() {
    return this.#capacity - this.waiting;
  }

  /** Everything was played, and nothing more will come. */
  get isDone() {
    return this.isFinished && this.waiting === 0 && this.#fadedOut >= this.#fade;
  }

  /** Takes interleaved PCM16. */
  push(pcm) {
    const samples = pcm.length / this.#channels;
    if (samples > this.room) throw new RangeError(`${samples} samples, there is room for ${this.room}`);
    const start = (this.#first + this.waiting) % this.#capacity;
    const before = Math.min(samples, this.#capacity - start);
    this.#samples.set(pcm.subarray(0, before * this.#channels), start * this.#channels);
    this.#samples.set(pcm.subarray(before * this.#channels), 0);
    this.waiting += samples;
  }

  finish() {
    this.isFinished = true;
  }

  /** Be silent, now: what waits is dropped but for what fades out. */
  cancel() {
    this.#beginFadeOut(this.#take(Math.min(this.waiting, this.#fade)));
    this.waiting = 0;
    this.isFinished = true;
  }

  /** Fills an array of floats for each channel; silence where there is no sound. */
  pull(outputs) {
    const wanted = outputs[0].length;
    let at = this.#giveFadeOut(outputs, 0, wanted);
    if (this.isHolding && (this.isFinished || this.waiting >= this.#prebuffer) && this.waiting) this.isHolding = false;
    if (!this.isHolding) at += this.#giveSound(outputs, at, wanted);
    if (at < wanted && !this.isHolding && !this.isFinished) {
      this.underruns += 1;
      this.isHolding = true;
      this.#beginFadeOut(null);
      at += this.#giveFadeOut(outputs, at, wanted);
    }
    for (const output of outputs) output.fill(0, at);
    if (at < wanted) this.#isHeard = false;
  }

  #giveSound(outputs, at, wanted) {
    const samples = Math.min(wanted - at, this.waiting);
    for (let sample = 0; sample < samples; sample++) {
      const gain = this.#fadedIn < this.#fade ? this.#fadedIn++ / this.#fade : 1;
      const from = ((this.#first + sample) % this.#capacity) * this.#channels;
      outputs.forEach((output, channel) => {
        // One channel is heard on both sides of a pair.
        const value = this.#samples[from + Math.min(channel, this.#channels - 1)] / FULL_SCALE;
        output[at + sample] = gain === 1 ? value : value * gain;
        if (channel < this.#channels) this.#last[channel] = output[at + sample];
      });
    }
    this.#first = (this.#first + samples) % this.#capacity;
    this.waiting -= samples;
    this.played += samples;
    if (samples) this.#isHeard = true;
    return samples;
  }

  #take(samples) {
    const taken = new Int16Array(samples * this.#channels);
    for (let at = 0; at < taken.length; at++) {
      taken[at] = this.#samples[(this.#first * this.#channels + at) % this.#samples.length];
    }
    return taken;
  }

  /** Leads from the last sample to silence: over what would have come, or over the last sample, held. */
  #beginFadeOut(coming) {
    if (!this.#isHeard || !this.#fade) return;
    this.#isHeard = false;
    // While it still fades in, what comes is louder than the last sample was made.
    this.#tail = this.#fadedIn < this.#fade ? null : coming;
    this.#fadedOut = 0;
    this.#fadedIn = 0;
  }

  #giveFadeOut(outputs, at, wanted) {
    let given = 0;
    for (; this.#fadedOut < this.#fade && at + given < wanted; given++, this.#fadedOut++) {
      const gain = 1 - (this.#fadedOut + 1) / this.#fade;
      outputs.forEach((output, channel) => {
        const own = Math.min(channel, this.#channels - 1);
        const coming = this.#tail?.[this.#fadedOut * this.#channels + own];
        output[at + given] = gain * (coming === undefined ? this.#last[own] : coming / FULL_SCALE);
      });
    }
    return given;
  }
}

// --- in an AudioWorklet ---------------------------------------------------------------------------------------------

if (typeof registerProcessor === "function") {
  registerProcessor(
    "mossnano",
    class extends AudioWorkletProcessor {
      #ring;
      #decoder; // the port to the worker
      #reportedAt = 0; // samples since the last report
      #soundsSince = null;
      #isClosed = false;

      constructor({ processorOptions }) {
        super();
        this.#ring = new Ring(processorOptions);
        this.port.onmessage = ({ data }) => {
          if (data.port) this.#connect(data.port);
          else if (data.cancel) this.#ring.cancel();
          else if (data.close) this.#isClosed = true;
          this.#report();
        };
      }

      #connect(port) {
        this.#decoder = port;
        port.onmessage = ({ data }) => {
          if (data.pcm) this.#ring.push(data.pcm);
          if (data.final) this.#ring.finish();
        };
      }

      process(inputs, [outputs]) {
        const { played, underruns } = this.#ring;
        this.#ring.pull(outputs);
        this.#reportedAt += outputs[0].length;
        if (this.#ring.played > played && this.#soundsSince === null) this.#soundsSince = currentTime;
        const isNews = this.#ring.underruns > underruns || this.#ring.isDone || this.#reportedAt >= REPORTED_SAMPLES;
        if (isNews) this.#report();
        return !this.#isClosed && !this.#ring.isDone;
      }

      #report() {
        const { waiting, played, underruns, isDone, isHolding } = this.#ring;
        this.#reportedAt = 0;
        this.port.postMessage({ waiting, played, underruns, isDone, isHolding, soundsSince: this.#soundsSince });
        this.#decoder?.postMessage({ played });
      }
    },
  );
}
