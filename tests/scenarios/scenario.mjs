// What test_clients.py has every client do; the same in each language. scenario MODE FOLDER RING_SECONDS COMMAND...
import { closeSync, openSync, readFileSync, writeSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";

const { Mossnano } = await import(process.env.MOSSNANO_CLIENT);
const [mode, folder, seconds, ...command] = process.argv.slice(2);
let fatalErrors = 0;

function sayError({ code, fatal, message }) {
  console.log(`error ${code} ${Number(fatal)} ${message}`);
  fatalErrors += Number(fatal);
}

const load = (name) => readFileSync(join(folder, name));
const output = (name) => openSync(join(folder, name), "w");

async function pullInto(voice, file, wanted) {
  const pcm = new Int16Array(wanted * 2).fill(0x5555);
  const samples = voice.pullInto(pcm);
  writeSync(file, new Uint8Array(pcm.buffer, 0, samples * 4));
  if (pcm.subarray(samples * 2).some(Boolean)) console.log("no silence");
  if (samples < wanted) await sleep(1);
  return samples;
}

async function play(voice, name) {
  const file = output(name);
  while (voice.isSpeaking) await pullInto(voice, file, 441);
  closeSync(file);
}

async function streams(voice) {
  voice.feed(load("first.tokens"));
  voice.finish();
  await play(voice, "first.pcm");

  voice.feed(load("second.tokens"));
  voice.finish();
  const file = output("second.pcm");
  for (let heard = 0; heard < 20000; ) heard += await pullInto(voice, file, 441);
  voice.cancel();
  closeSync(file);

  const bytes = load("third.codes");
  const codes = new Uint16Array(bytes.buffer, bytes.byteOffset, bytes.length / 2);
  const { quantizers, codebook_size } = voice.format;
  const frames = [];
  for (let at = 0; at < codes.length; at += quantizers) frames.push([...codes.subarray(at, at + quantizers)]);
  voice.feedCodes(frames);
  voice.finish();
  await play(voice, "third.pcm");
  frames[0][3] = codebook_size;
  try {
    voice.feedCodes(frames);
    console.log("bad codes taken");
  } catch (error) {
    console.log(`bad codes ${error instanceof RangeError ? "refused" : error}`);
  }
}

async function dry(voice) {
  const file = output("dry.pcm");
  await pullInto(voice, file, 441); // nothing was fed: silence, and no underrun
  console.log(`underruns ${voice.underruns}`);
  voice.feed(load("first.tokens").subarray(0, 4 * voice.format.frame_bytes));
  for (let heard = 0; heard < 4 * voice.format.frame_samples; ) heard += await pullInto(voice, file, 480);
  let before = voice.underruns;
  console.log(`silent ${Number((await pullInto(voice, file, 480)) === 0)}`);
  console.log(`counted ${voice.underruns - before}`);
  voice.finish();
  while (voice.isSpeaking) await pullInto(voice, file, 480);
  before = voice.underruns;
  await pullInto(voice, file, 480);
  console.log(`counted ${voice.underruns - before}`);
  closeSync(file);
}

async function dies(voice) {
  const frame = Buffer.alloc(voice.format.frame_bytes);
  voice.feed(frame);
  await play(voice, "dies.pcm");
  while (!fatalErrors) await sleep(1);
  console.log(`fed ${Number(voice.feed(frame))}`);
  console.log(`finished ${Number(voice.finish())}`);
}

try {
  const voice = await Mossnano.start({ command, bufferSeconds: Number(seconds), fadeMs: 0, onError: sayError });
  const f = voice.format;
  console.log(
    `format ${f.sample_rate} ${f.channels} ${f.frame_samples} ${f.quantizers} ${f.codebook_size} ${f.frame_bytes} ` +
      `${f.max_audio_bytes}`,
  );
  await { streams, dry, dies }[mode]?.(voice);
  await voice.stop();
  console.log("stopped");
} catch (error) {
  console.log(`not started ${error.message} (${error.code})`);
}
