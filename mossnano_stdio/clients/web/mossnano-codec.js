/**
 * mossnano-codec.js: decodes codes with onnxruntime-web, chunk after chunk as if they came at once.
 *
 * Needs neither a page nor a worker: what it needs of both, `ort` and the files, is handed in. A weights folder says
 * itself what it holds, in `mossnano.json` and in the official `codec_browser_onnx_meta.json`: nothing is assumed.
 *
 * The official graph takes its states by name. In our own graphs the keys and values of each layer are a tensor that
 * grows by one run and is cut back to what the next token can see; what else they remember are states by name, too.
 * A state moves on only when a run has succeeded: after an error the stream is where it was.
 */

export const SIDECAR = "mossnano.json";
export const METADATA = "codec_browser_onnx_meta.json";
export const MAX_RUN_FRAMES = 8; // more frames in one run cost more per frame, not less

const FULL_SCALE = 32767;
const LAZY_PART = 8; // 1/8 of a context may lie unneeded in front of a window before it is cut back: cutting copies
const ROUNDED_FRAMES = 1000; // from there on whole turns are taken off an angle before it is rounded to float32

const ARRAYS = { float32: Float32Array, int32: Int32Array, int64: BigInt64Array };

export class MossnanoError extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

// --- what a weights folder says -------------------------------------------------------------------------------------

/**
 * The graph to run and all that is known of it. `sidecar` and `metadata` are what the two files hold, null where there
 * is none; `wanted` is "fast", "official" or undefined: the fast graph where there is one.
 */
export function planOf(sidecar, metadata, wanted) {
  if (!sidecar && !metadata) {
    throw new MossnanoError("weights", `neither ${SIDECAR} nor ${METADATA} is there: this is no weights folder`);
  }
  if (sidecar && sidecar.mossnano !== 1) {
    throw new MossnanoError("weights", `${SIDECAR} is of version ${sidecar.mossnano}, 1 is what this program reads`);
  }
  if (metadata && metadata.format_version !== 2) {
    const found = `format_version is ${metadata.format_version}`;
    throw new MossnanoError("weights", `${METADATA}: ${found}, 2 is what this program reads`);
  }
  const graphs = {};
  if (metadata?.files?.decode_step) graphs.official = officialGraph(metadata);
  if (sidecar?.codec && sidecar.graphs?.decode_step) graphs.decode_step = ownGraph(sidecar.graphs.decode_step);
  if (sidecar?.graphs?.fast) graphs.fast = ownGraph(sidecar.graphs.fast);
  const name = wanted ?? ["fast", "decode_step", "official"].find((each) => graphs[each]);
  if (!graphs[name]) {
    const there = Object.keys(graphs).join(" and ") || "none that streams";
    throw new MossnanoError("weights", `there is no ${name ?? "decoder"} among the graphs, but ${there}`);
  }
  return {
    name: sidecar?.name ?? metadata?.checkpoint_path ?? "unnamed",
    demo: sidecar?.demo ?? false,
    graphName: name,
    graph: graphs[name],
    format: formatOf(sidecar, metadata),
    records: sidecar?.files ?? {},
  };
}

function formatOf(sidecar, metadata) {
  const own = sidecar?.codec;
  const config = metadata?.codec_config;
  const format = {
    sample_rate: own?.sample_rate ?? config?.sample_rate,
    channels: own?.channels ?? config?.channels,
    frame_samples: own?.frame_samples ?? config?.downsample_rate,
    quantizers: own?.quantizers ?? config?.num_quantizers,
    codebook_size: sidecar?.codebook_size ?? 1024, // official metadata does not say it; all published ones have 1,024
  };
  for (const [key, value] of Object.entries(format)) {
    if (!Number.isInteger(value) || value < 1) {
      throw new MossnanoError("weights", `${key} is ${value} in the weights' description, a whole number is needed`);
    }
  }
  format.frame_bytes = Math.ceil((format.quantizers * bitsPerCode(format.codebook_size)) / 8);
  return Object.freeze(format);
}

function officialGraph(metadata) {
  const file = metadata.files.decode_step;
  const streaming = metadata.streaming_decode;
  const states = streaming.transformer_offsets.map((entry) => ({
    input: entry.input_name, output: entry.output_name, shape: entry.shape, dtype: entry.dtype, initial: 0,
  }));
  for (const cache of streaming.attention_caches) {
    const shapes = {
      offset: [cache.offset_shape, cache.positions_dtype, 0],
      cached_keys: [cache.cache_shape, cache.cache_dtype, 0],
      cached_values: [cache.cache_shape, cache.cache_dtype, 0],
      cached_positions: [cache.positions_shape, cache.positions_dtype, -1], // nothing is there yet: masked
    };
    for (const [name, [shape, dtype, initial]] of Object.entries(shapes)) {
      states.push({
        input: cache[`${name}_input_name`], output: cache[`${name}_output_name`], shape, dtype, initial,
      });
    }
  }
  const without = (names, key) => names.filter((name) => !states.some((state) => state[key] === name));
  const inputs = without(metadata.onnx.decode_step_input_names, "input");
  const outputs = without(metadata.onnx.decode_step_output_names, "output");
  if (inputs.length !== 2 || outputs.length !== 2) {
    throw new MossnanoError("weights", `${METADATA}: beside its states decode_step has ${inputs} -> ${outputs}`);
  }
  return { file, data: metadata.external_data_files[file] ?? [], states, inputs, outputs, transformers: null };
}

function ownGraph({ file, data, states, facts }) {
  if (facts.first_chunk_frames > 1) {
    const why = `its streams begin with ${facts.first_chunk_frames} frames together, and chunks here may begin with one`;
    throw new MossnanoError("weights", `${file} is not decoded in a browser: ${why}; mossnano-stdio decodes it`);
  }
  return { file, data, states: states ?? [], transformers: facts.transformers };
}

/** The names of all files that running it takes, the graph first. */
export function filesOf(plan) {
  return [plan.graph.file, ...plan.graph.data];
}

// --- codes, and sound -----------------------------------------------------------------------------------------------

export function bitsPerCode(codebookSize) {
  return Math.ceil(Math.log2(codebookSize));
}

/** Planar or interleaved floats become 16 bits, to the nearest, ties to even, as mossnano-stdio makes them. */
export function toPcm16(audio) {
  const pcm = new Int16Array(audio.length);
  for (let at = 0; at < audio.length; at++) {
    const value = audio[at] * FULL_SCALE;
    if (!Number.isFinite(value)) throw new MossnanoError("not_finite", `sample ${at} of a chunk is ${audio[at]}`);
    const below = Math.floor(value);
    const rest = value - below;
    const rounded = rest > 0.5 || (rest === 0.5 && below % 2 !== 0) ? below + 1 : below;
    pcm[at] = Math.max(-FULL_SCALE, Math.min(FULL_SCALE, rounded));
  }
  return pcm;
}

// --- decoders -------------------------------------------------------------------------------------------------------

/** A loaded graph, shared by the decoders that it makes. `readFile` gives a file of the weights folder as bytes. */
export async function loadGraph(ort, plan, readFile, providers = ["wasm"]) {
  const { graph } = plan;
  const model = await readFile(graph.file);
  const externalData = [];
  for (const path of graph.data) externalData.push({ path, data: await readFile(path) });
  let session;
  try {
    session = await ort.InferenceSession.create(model, {
      executionProviders: providers,
      externalData,
      // Our own graphs are built folded and fused: little is left to do.
      graphOptimizationLevel: graph.transformers ? "basic" : "all",
    });
  } catch (error) {
    throw new MossnanoError("weights", `${graph.file} cannot be loaded: ${error.message ?? error}`);
  }
  return { ort, session, ...plan, newDecoder: () => new Decoder(ort, session, plan) };
}

/** One stream: codes in, PCM16 out. */
export class Decoder {
  #ort;
  #session;
  #plan;
  #states; // input name -> tensor
  #rings; // one for each transformer of our own graphs
  #frames = 0;

  constructor(ort, session, plan) {
    this.#ort = ort;
    this.#session = session;
    this.#plan = plan;
    this.reset();
  }

  get nextFrame() {
    return this.#frames;
  }

  /** Forget everything: the next step is the first of a stream. */
  reset() {
    const { graph } = this.#plan;
    this.#frames = 0;
    this.#states = new Map(graph.states.map((state) => [state.input, this.#firstValue(state)]));
    let firstLayer = 0;
    this.#rings = (graph.transformers ?? []).map((spec, number) => {
      const ring = new Ring(spec, number, firstLayer);
      firstLayer += spec.layers;
      return ring;
    });
  }

  /** `codes` are [frames, quantizers] in a Uint16Array. The sound is interleaved. */
  async step(codes, quantizers = this.#plan.format.quantizers) {
    const { format, graph } = this.#plan;
    const frames = codes.length / quantizers;
    const pieces = [];
    const before = [this.#states, this.#rings.map((ring) => ring.held), this.#frames];
    try {
      for (let start = 0; start < frames; start += MAX_RUN_FRAMES) {
        const some = codes.subarray(start * quantizers, (start + MAX_RUN_FRAMES) * quantizers);
        pieces.push(await (graph.transformers ? this.#runOwn(some, quantizers) : this.#runOfficial(some, quantizers)));
      }
    } catch (error) {
      let rings;
      [this.#states, rings, this.#frames] = before;
      this.#rings.forEach((ring, index) => (ring.held = rings[index]));
      throw error;
    }
    const pcm = new Int16Array(frames * format.frame_samples * format.channels);
    let at = 0;
    for (const piece of pieces) {
      pcm.set(piece, at);
      at += piece.length;
    }
    return pcm;
  }

  async #runOfficial(codes, quantizers) {
    const { format, graph } = this.#plan;
    if (quantizers !== format.quantizers) {
      const needed = `the official graph decodes ${format.quantizers} only`;
      throw new MossnanoError("tokens", `codes of ${quantizers} quantizers: ${needed}, the fast one also fewer`);
    }
    const frames = codes.length / quantizers;
    const [codesName, lengthsName] = graph.inputs;
    const [audioName] = graph.outputs;
    const found = await this.#session.run({
      [codesName]: new this.#ort.Tensor("int32", Int32Array.from(codes), [1, frames, quantizers]),
      [lengthsName]: new this.#ort.Tensor("int32", Int32Array.of(frames), [1]),
      ...Object.fromEntries(this.#states),
    });
    const planar = this.#audioOf(found[audioName], frames);
    const samples = frames * format.frame_samples;
    const audio = new Float32Array(planar.length);
    for (let channel = 0; channel < format.channels; channel++) {
      for (let at = 0; at < samples; at++) audio[at * format.channels + channel] = planar[channel * samples + at];
    }
    const pcm = toPcm16(audio);
    this.#states = new Map(graph.states.map((state) => [state.input, found[state.output]]));
    this.#frames += frames;
    return pcm;
  }

  async #runOwn(codes, quantizers) {
    const { format, graph } = this.#plan;
    const frames = codes.length / quantizers;
    const rows = new Int32Array(frames * format.quantizers).fill(format.quantizers * format.codebook_size); // of zeros
    for (let at = 0; at < codes.length; at++) {
      const quantizer = at % quantizers;
      const frame = (at - quantizer) / quantizers;
      rows[frame * format.quantizers + quantizer] = codes[at] + quantizer * format.codebook_size;
    }
    const feed = {
      rows: new this.#ort.Tensor("int32", rows, [frames, format.quantizers]),
      ...Object.fromEntries(this.#states),
    };
    for (const ring of this.#rings) ring.feed(this.#ort, feed, this.#frames, frames);
    const found = await this.#session.run(feed);
    const pcm = toPcm16(this.#audioOf(found.audio, frames));
    for (const ring of this.#rings) ring.take(found, frames);
    this.#states = new Map(graph.states.map((state) => [state.input, found[state.output]]));
    this.#frames += frames;
    return pcm;
  }

  #audioOf(tensor, frames) {
    const { format, graph } = this.#plan;
    const due = frames * format.frame_samples * format.channels;
    if (tensor.data.length !== due) {
      const found = `${frames} frames gave audio ${JSON.stringify(tensor.dims)}`;
      throw new MossnanoError("weights", `${graph.file}: ${found}, ${due} values were due`);
    }
    return tensor.data;
  }

  #firstValue({ input, shape, dtype, initial }) {
    const Values = ARRAYS[dtype];
    if (!Values) {
      throw new MossnanoError("weights", `state ${input} is of type ${dtype}: ${Object.keys(ARRAYS)} can be run`);
    }
    const values = new Values(shape.reduce((product, side) => product * side, 1));
    values.fill(dtype === "int64" ? BigInt(initial) : initial);
    return new this.#ort.Tensor(dtype, values, shape);
  }
}

/** Keys and values of one transformer's layers. What `held` is before a run, it can be set back to after it. */
class Ring {
  #spec;
  #number;
  #names;
  held; // { tokens, values: a Float32Array [heads, tokens, ring_dim] for each name }

  constructor(spec, number, firstLayer) {
    this.#spec = spec;
    this.#number = number;
    this.#names = [];
    for (let layer = firstLayer; layer < firstLayer + spec.layers; layer++) {
      this.#names.push([`keys_${layer}`, `keys_out_${layer}`], [`values_${layer}`, `values_out_${layer}`]);
    }
    this.held = { tokens: 0, values: this.#names.map(() => new Float32Array(0)) };
  }

  /** Adds to `feed` what a run over `frames` frames after `seenFrames` needs. */
  feed(ort, feed, seenFrames, frames) {
    const { heads, ring_dim: dim, tokens_per_frame: perFrame } = this.#spec;
    const { tokens: held, values } = this.held;
    const total = held + frames * perFrame;
    // A past of no tokens cannot be: one slot that no token sees stands for it, and is written over.
    const slots = Math.max(held, 1);
    this.#names.forEach(([name], index) => {
      const past = held ? values[index] : new Float32Array(heads * dim);
      feed[name] = new ort.Tensor("float32", past, [1, heads, slots, dim]);
    });
    const turns = [new Float32Array(total * (dim / 2)), new Float32Array(total * (dim / 2))];
    this.#turn(turns, held, seenFrames * perFrame, frames * perFrame);
    feed[`cosines_${this.#number}`] = new ort.Tensor("float32", turns[0], [total, dim / 2]);
    feed[`sines_${this.#number}`] = new ort.Tensor("float32", turns[1], [total, dim / 2]);
    feed[`last_${this.#number}`] = new ort.Tensor("int32", Int32Array.of(total - 1), [1]);
    feed[`total_${this.#number}`] = new ort.Tensor("int32", Int32Array.of(total), [1]);
  }

  /** Keeps of what a run has given all that later tokens can see. */
  take(found, frames) {
    const { heads, ring_dim: dim, tokens_per_frame: perFrame, context_tokens: context } = this.#spec;
    const total = this.held.tokens + frames * perFrame;
    const needed = context - 1; // a query sees its own token, and so many before it
    const unneeded = total - needed;
    const kept = unneeded > context / LAZY_PART ? needed : total;
    const values = this.#names.map(([, name]) => {
      const all = found[name].data;
      if (all.length !== heads * total * dim) {
        throw new MossnanoError("weights", `${name} has ${all.length} values, ${heads * total * dim} were due`);
      }
      if (kept === total) return all;
      const rest = new Float32Array(heads * kept * dim);
      for (let head = 0; head < heads; head++) {
        rest.set(all.subarray((head * total + total - kept) * dim, (head + 1) * total * dim), head * kept * dim);
      }
      return rest;
    });
    this.held = { tokens: kept, values };
  }

  /** By how much RoPE turns the pairs of `tokens` tokens, the first of which stands at `position` of the stream. */
  #turn([cosines, sines], held, position, tokens) {
    const { angles, tokens_per_frame: perFrame } = this.#spec;
    const takesOffTurns = position >= ROUNDED_FRAMES * perFrame;
    for (let token = 0; token < tokens; token++) {
      angles.forEach((angle, pair) => {
        let turned = (position + token) * angle;
        if (takesOffTurns) turned -= Math.round(turned / (2 * Math.PI)) * 2 * Math.PI;
        const at = (held + token) * angles.length + pair;
        cosines[at] = Math.cos(Math.fround(turned));
        sines[at] = Math.sin(Math.fround(turned));
      });
    }
  }
}
