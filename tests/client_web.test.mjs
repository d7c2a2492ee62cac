/**
 * What the web client does that needs no browser. Run by test_client_web.py, which passes what numpy makes of the same
 * numbers as JSON in the file that argv names last; or `node --test` alone, which leaves those out.
 */
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

const CLIENT = new URL("../mossnano_stdio/clients/web/", import.meta.url);
const { filesOf, planOf, toPcm16 } = await import(new URL("mossnano-codec.js", CLIENT));
const { parseArtifact, toWav, whatIsMissing } = await import(new URL("mossnano-web.js", CLIENT));
const { Ring } = await import(new URL("mossnano-worklet.js", CLIENT));
const { CHUNKS, nextFrames, scheduleFrom } = await import(new URL("mossnano-worker.js", CLIENT));

const given = JSON.parse(readFileSync(process.env.MOSSNANO_WEB_CASES, "utf8"));
const bytesOf = (text) => Uint8Array.from(Buffer.from(text, "base64"));
const says = (code, words) => (error) => error.code === code && error.message.includes(words);

// --- artifacts ------------------------------------------------------------------------------------------------------

test("artifacts are parsed as Python parses them", () => {
  for (const { file, header, codes } of given.artifacts) {
    const { codes: found, ...fields } = parseArtifact(bytesOf(file));
    assert.deepEqual(fields, header);
    assert.deepEqual(Array.from(found), codes);
  }
});

test("an artifact that is cut, too long or something else is refused with the reason", () => {
  const whole = bytesOf(given.artifacts[0].file);
  for (let length = 0; length < whole.length; length++) {
    assert.throws(() => parseArtifact(whole.subarray(0, length)), { code: "artifact" });
  }
  const longer = new Uint8Array(whole.length + 1);
  longer.set(whole);
  assert.throws(() => parseArtifact(longer), says("artifact", `it has ${whole.length + 1} bytes, by its header it has`));
  assert.throws(() => parseArtifact(bytesOf("UklGRg==")), says("artifact", 'the first bytes are "RIFF"'));
  for (const [field, value, words] of [
    [0, 0, "its sample_rate is 0"], [1, 0, "its channels is 0"], [3, 0, "its quantizers is 0"],
    [5, 1, "its codebook_size is 1"], [5, 65537, "its codebook_size is 65537"],
  ]) {
    const bad = whole.slice();
    new DataView(bad.buffer).setUint32(8 + 4 * field, value, true);
    assert.throws(() => parseArtifact(bad), says("artifact", words));
  }
});

test("a code beyond its codebook is refused by its place", () => {
  const bad = bytesOf(given.beyond);
  assert.throws(() => parseArtifact(bad), says("artifact", "code 1 of frame 2 is 9, 0 to 8 are allowed"));
});

// --- sound ----------------------------------------------------------------------------------------------------------

test("floats become the same 16 bits as in Python", () => {
  const audio = new Float32Array(bytesOf(given.audio).buffer);
  const pcm = new Int16Array(bytesOf(given.pcm).buffer);
  assert.ok(audio.length > 1000);
  assert.deepEqual(toPcm16(audio), pcm);
  for (const bad of [NaN, Infinity, -Infinity]) {
    assert.throws(() => toPcm16(Float32Array.of(0, bad)), says("not_finite", "sample 1"));
  }
});

test("WAV files are those of Python", () => {
  const pcm = new Int16Array(bytesOf(given.pcm).buffer);
  assert.deepEqual(toWav(pcm, { sample_rate: 48000, channels: 2 }), bytesOf(given.wav));
});

// --- the ring -------------------------------------------------------------------------------------------------------

const FULL = 32767;
const ring = (options) => new Ring({ channels: 1, capacity: 16, ...options });
const pull = (from, samples, channels = 1) => {
  const outputs = Array.from({ length: channels }, () => new Float32Array(samples).fill(9));
  from.pull(outputs);
  return outputs.map((output) => Array.from(output, (value) => Math.round(value * FULL)));
};

test("every sample comes out once and in order, however it is pushed and pulled", () => {
  const each = ring({ channels: 2, capacity: 7 });
  const [left, right] = [[], []];
  let next = 0;
  for (let turn = 0; turn < 400; turn++) {
    const samples = Math.min(each.room, (turn * 5) % 8);
    each.push(Int16Array.from({ length: 2 * samples }, (_, at) => ((at % 2 ? -1 : 1) * (next + (at >> 1))) % 30000));
    next += samples;
    const wanted = Math.min(each.waiting, (turn * 3) % 5);
    if (!wanted) continue;
    const [one, other] = pull(each, wanted, 2);
    left.push(...one);
    right.push(...other);
  }
  assert.ok(left.length > 500);
  left.forEach((value, at) => assert.equal(value, at % 30000));
  right.forEach((value, at) => assert.equal(value, at ? -(at % 30000) : 0));
  assert.equal(each.underruns, 0);
});

test("more than there is room for is refused, and nothing is lost", () => {
  const each = ring({ capacity: 4 });
  each.push(Int16Array.of(1, 2, 3));
  assert.throws(() => each.push(Int16Array.of(4, 5)), { message: "2 samples, there is room for 1" });
  assert.deepEqual(pull(each, 3), [[1, 2, 3]]);
});

test("a stream sounds once its prebuffer is there, or all of it", () => {
  const each = ring({ prebuffer: 3 });
  each.push(Int16Array.of(1, 2));
  assert.deepEqual(pull(each, 2), [[0, 0]]);
  assert.equal(each.underruns, 0);
  each.push(Int16Array.of(3));
  assert.deepEqual(pull(each, 2), [[1, 2]]);
  const short = ring({ prebuffer: 3 });
  short.push(Int16Array.of(1));
  short.finish();
  assert.deepEqual(pull(short, 2), [[1, 0]]);
  assert.equal(short.isDone, true);
});

test("running dry is one underrun, fades out and in, and fills the prebuffer again", () => {
  const each = ring({ prebuffer: 2, fade: 4 });
  each.push(Int16Array.of(1000, 1000));
  assert.deepEqual(pull(each, 8), [[1000, 1000, 750, 500, 250, 0, 0, 0]]);
  assert.equal(each.underruns, 1);
  each.push(Int16Array.of(1000));
  assert.deepEqual(pull(each, 2), [[0, 0]]);
  assert.equal(each.underruns, 1);
  each.push(Int16Array.of(1000, 1000, 1000, 1000));
  each.finish();
  assert.deepEqual(pull(each, 6), [[0, 250, 500, 750, 1000, 0]]);
  assert.deepEqual([each.underruns, each.played, each.isDone], [1, 7, true]);
});

test("cancel drops everything but what fades out, over what would have come", () => {
  const each = ring({ fade: 4 });
  each.push(Int16Array.of(1000, 1000, 800, 800, 800, 800, 800));
  assert.deepEqual(pull(each, 2), [[1000, 1000]]);
  each.cancel();
  assert.equal(each.waiting, 0);
  assert.deepEqual(pull(each, 6), [[600, 400, 200, 0, 0, 0]]);
  assert.deepEqual([each.played, each.isDone, each.underruns], [2, true, 0]);
});

test("what was cancelled before it sounded is silent at once", () => {
  const each = ring({ fade: 4, prebuffer: 8 });
  each.push(Int16Array.of(1000, 1000));
  each.cancel();
  assert.deepEqual(pull(each, 3), [[0, 0, 0]]);
  assert.equal(each.isDone, true);
});

test("one channel is heard on both sides", () => {
  const each = ring({});
  each.push(Int16Array.of(5, 6));
  assert.deepEqual(pull(each, 2, 2), [[5, 6], [5, 6]]);
});

// --- how large chunks are -------------------------------------------------------------------------------------------

test("the least chunk is the smallest that keeps up with ease", () => {
  const frameMs = 80;
  assert.deepEqual(scheduleFrom({ 1: 20, 2: 30, 4: 50, 8: 90 }, frameMs), { leastFrames: 1, mostFrames: 8, prebufferMs: 0 });
  // Measured with the official graph on one slow core of a server.
  const slow = scheduleFrom({ 1: 169, 2: 154, 4: 188, 8: 344 }, frameMs);
  assert.deepEqual(slow, { leastFrames: 4, mostFrames: 8, prebufferMs: 108 });
  const hopeless = scheduleFrom({ 1: 1000, 2: 2000, 4: 4000, 8: 8000 }, frameMs);
  assert.equal(hopeless.leastFrames, 8);
});

test("chunks grow from one frame, wait for the least, and leave nothing at the end", () => {
  const cut = (schedule, waiting, isFinal) => {
    const chunks = [];
    let last = 0;
    for (let rest = waiting; rest > 0; rest -= last) {
      last = nextFrames(schedule, last, rest, isFinal);
      if (!last) break;
      chunks.push(last);
    }
    return chunks;
  };
  const easy = { leastFrames: 1, mostFrames: 8 };
  assert.deepEqual(cut(easy, 20, true), [1, 2, 4, 8, 5]);
  const slow = { leastFrames: 4, mostFrames: 8 };
  assert.deepEqual(cut(slow, 20, true), [1, 4, 8, 7]);
  assert.deepEqual(cut(slow, 16, false), [1, 4, 8]); // 3 wait for a fourth
  assert.equal(nextFrames(slow, 4, 3, true), 3); // or until they are urgent
  assert.deepEqual(CHUNKS, [1, 2, 4, 8]);
});

// --- weights --------------------------------------------------------------------------------------------------------

test("the states of the official graph begin as Python begins them", () => {
  const { metadata, states } = given.official;
  const plan = planOf(null, metadata);
  assert.equal(plan.graphName, "official");
  assert.deepEqual(plan.graph.states, states);
  assert.deepEqual(plan.format, given.format);
});

test("the fast graph is taken where there is one, and the official one where it is asked for", () => {
  const { sidecar, metadata } = given.built;
  assert.equal(planOf(sidecar, metadata).graphName, "fast");
  assert.deepEqual(filesOf(planOf(sidecar, metadata)), ["mossnano_fast.onnx", "mossnano_fast.data"]);
  assert.equal(planOf(sidecar, metadata, "official").graphName, "official");
  assert.throws(() => planOf(null, metadata, "fast"), says("weights", "there is no fast among the graphs, but official"));
});

test("weights that cannot be read are refused with the reason", () => {
  const { sidecar, metadata } = given.built;
  const cases = [
    [null, null, "this is no weights folder"],
    [{ ...sidecar, mossnano: 2 }, metadata, "mossnano.json is of version 2, 1 is what this program reads"],
    [sidecar, { ...metadata, format_version: 3 }, "format_version is 3, 2 is what this program reads"],
    [{ mossnano: 1, graphs: {} }, null, "there is no decoder among the graphs, but none that streams"],
    [null, { ...metadata, codec_config: {} }, "sample_rate is undefined"],
    [
      { mossnano: 1, codec: {}, graphs: { decode_step: { file: "e.onnx", facts: { first_chunk_frames: 7 } } } },
      null,
      "e.onnx is not decoded in a browser: its streams begin with 7 frames together",
    ],
  ];
  for (const [one, other, words] of cases) assert.throws(() => planOf(one, other), says("weights", words));
});

test("what a browser lacks is said", () => {
  assert.match(whatIsMissing(), /needs https, or localhost/); // node is no page
});
