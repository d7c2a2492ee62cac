"""From weights to graphs, for who builds. Whoever decodes needs none of it.

    config, checkpoint              a checkpoint           \\
    tracing, places, extract*       somebody's ONNX files   } -> weights -> official, contract   the official contract
    standin                         random numbers         /            -> fast, encode_step    our own (both on stack)
    assemble                        puts a bundle together, trial tries it before it is kept
    notes, demo, probe              the built-in demo weights, and what a runtime is tried with

Rules of this room:

- Only tools import it, and only when they run: it needs `onnx` and `safetensors`, which decoding does not.
- Every way to weights ends in the same dataclasses, every graph begins with them.
"""
