"""The constants that an ONNX file names, read from its bytes without the onnx package.

Rules of this room:

- Only names and shapes, and only from the outermost graph. Everything else is skipped by its length.
- An ONNX file is a protocol buffer: fields of (number, wire type, content). Anything that is none is a ValueError.
"""

from __future__ import annotations

from collections.abc import Iterator

GRAPH_FIELD = 7  # of a ModelProto
INITIALIZER_FIELD = 5  # of a GraphProto
DIMENSIONS_FIELD = 1  # of a TensorProto
NAME_FIELD = 8  # of a TensorProto

VARINT, FIXED64, DELIMITED, FIXED32 = 0, 1, 2, 5  # wire types


def initializer_shapes(model: bytes | memoryview) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every initializer.

    >>> tensor = bytes([0x08, 2, 0x08, 3, 0x42, 1]) + b"w"
    >>> graph = bytes([0x2A, len(tensor)]) + tensor
    >>> initializer_shapes(bytes([0x3A, len(graph)]) + graph)
    {'w': (2, 3)}
    """
    shapes = {}
    for graph in _delimited(memoryview(model), GRAPH_FIELD):
        for tensor in _delimited(graph, INITIALIZER_FIELD):
            name = b"".join(_delimited(tensor, NAME_FIELD)).decode("utf-8")
            shapes[name] = tuple(_dimensions(tensor))
    return shapes


def _dimensions(tensor: memoryview) -> Iterator[int]:
    for number, content in _fields(tensor):
        if number != DIMENSIONS_FIELD:
            continue
        if isinstance(content, int):
            yield content
        else:  # packed: one after the other, without repeating the field's number
            position = 0
            while position < len(content):
                dimension, position = _varint(content, position)
                yield dimension


def _delimited(message: memoryview, wanted: int) -> Iterator[memoryview]:
    for number, content in _fields(message):
        if number == wanted and isinstance(content, memoryview):
            yield content


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == VARINT:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire_type == DELIMITED:
            length, position = _varint(message, position)
        elif wire_type in (FIXED64, FIXED32):
            length = 8 if wire_type == FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire_type} at byte {position}: not a protocol buffer")
        if position + length > len(message):
            raise ValueError(f"a field of {length} bytes at byte {position} of {len(message)}: cut short")
        yield number, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """The number that begins at `position`, and where it ends: seven bits a byte, the lowest first."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise ValueError(f"a number is cut short at byte {position}")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError(f"a number of more than ten bytes before byte {position}: not a protocol buffer")
