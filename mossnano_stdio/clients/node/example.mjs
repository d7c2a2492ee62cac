// example.mjs: a file of packed frames in, PCM on stdout, as a sound card would ask for it.
//
//     node example.mjs tokens.bin mossnano-stdio --weights demo > out.pcm
import { readFileSync, writeSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { Mossnano } from "./mossnano.mjs";

const [tokens, ...command] = process.argv.slice(2);
const onError = (error) => console.error(`${error.code}: ${error.message}`);
const voice = await Mossnano.start({ command, fadeMs: 0, onError }); // gaps are left out below, not heard
voice.feed(readFileSync(tokens));
voice.finish();
const pcm = new Int16Array(480 * voice.format.channels); // 10 ms of 48 kHz
while (voice.isSpeaking) {
  const samples = voice.pullInto(pcm);
  writeSync(1, new Uint8Array(pcm.buffer, 0, samples * voice.format.channels * 2));
  if (samples < 480) await sleep(1); // a sound card would play the silence that is in `pcm` now
}
await voice.stop();
