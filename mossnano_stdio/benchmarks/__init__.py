"""What `mossnano bench` measures: the graphs, the machine under them, the process, and the packing of codes.

Rules of this room:

- Sides that are compared take turns in one run, each in a process of its own; what is quoted is a median or a ratio.
- Nothing here is a test, and no test is timed.
"""
