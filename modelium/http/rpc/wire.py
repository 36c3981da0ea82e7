"""Reads one text out of a protobuf message without parsing the rest.

Wire format: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def text_field(message: bytes, number: int) -> str:
    """The text in field `number` of the message itself; empty where it is not set. `ValueError` when it is no message.

    All fields are gone through: of two with one number the last counts, as for every parser, so that nobody can have a
    call let in for one model and answered by another.
    """
    at, end = 0, len(message)
    found = ""
    while at < end:
        key, at = _varint(message, at)
        kind = key & 7
        if kind == _LENGTH:
            size, at = _varint(message, at)
            if at + size > end:
                raise ValueError("a field is cut off")
            if key >> 3 == number:
                found = message[at : at + size].decode()
            at += size
        elif kind == _VARINT:
            _, at = _varint(message, at)
        elif kind == _FIXED64:
            at += 8
        elif kind == _FIXED32:
            at += 4
        else:
            raise ValueError(f"wire type {kind} is none")
    return found


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message) or shift > 63:
            raise ValueError("a number is cut off")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
