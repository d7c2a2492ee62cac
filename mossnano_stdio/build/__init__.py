"""Builds graphs from weights. Decoding needs none of it.

    random_weights -> checkpoint    config.json, safetensors   \\
    tracing -> extract*             somebody's ONNX files      /  -> model -> official (of blocks)
                                                                    model -> decode_step, encode_step (of transformers)
    mimi_random -> checkpoint  Kyutai's or Hugging Face's  ->  mimi_checkpoint -> mimi_model -> mimi_steps, mimi_whole
    encodec_random -> checkpoint  in two layouts  ->  encodec_checkpoint -> encodec_model -> encodec_steps,
                                                                                             encodec_whole
    frame_graphs    encodec-rs's graphs, taken as they are
    bundle          puts the graphs into a weights folder, after trial has run them
    attention       the graph that a runtime is tried with
    arithmetic      counts what a frame costs

Rules of this room:

- Only tools import it, and only when they run: it needs `onnx` and `safetensors`, which decoding does not.
- Whatever reads weights gives the dataclasses of `model`, and every graph is built from those.
"""
