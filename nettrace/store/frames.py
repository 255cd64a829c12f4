"""The frames that the parts of a trace are made of.

A part begins with `MAGIC`. Frames follow, little-endian and without gaps:

    u32    length of the head
    u64    length of the body
    u32    CRC-32 of these lengths, begun with where the frame lies in the file
    u32    CRC-32 of the head
    head   a letter for the kind of the frame, then what that kind says
    body   large arrays, each with a checksum of its own in the head

A frame that is cut off, damaged or out of its place ends the part: what stands before it is right,
and nothing after it is believed. Bodies are passed over until somebody asks for them. All texts are
JSON; nothing is ever executed.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

#: Not ASCII, and with line ends, so that a transfer as text is noticed.
MAGIC = b"\x93NTL\r\n\x1a\n"
_LENGTHS = struct.Struct("<IQ")
_CHECKS = struct.Struct("<II")
_PREFIX = struct.Struct("<IQII")
#: How much is read at once. Longer bodies are not read at all.
_BLOCK = 2**18


class DamagedTraceError(ValueError):
    """Bytes of a trace are not those that were written."""


class Frame(NamedTuple):
    """What is known of a frame before its body is read.

    Args:
        kind: a letter.
        head: what the head says.
        at: where that lies in the file, in bytes; the body follows.
        body: the body's length.
    """

    kind: bytes
    head: bytes
    at: int
    body: int


def encode(frames: Iterable[tuple[bytes, Sequence[bytes], Sequence[bytes]]], at: int) -> bytes:
    """Frames, each of a kind, a head and a body, that will begin at byte `at` of a file."""
    pieces: list[bytes] = []
    for kind, head, body in frames:
        whole = b"".join([kind, *head])
        size = sum(map(len, body))
        lengths = _LENGTHS.pack(len(whole), size)
        checks = _CHECKS.pack(_check(lengths, at), zlib.crc32(whole))
        pieces += [lengths, checks, whole, *body]
        at += _PREFIX.size + len(whole) + size
    return b"".join(pieces)


def scan(path: Path, begin: int = len(MAGIC)) -> Iterator[Frame]:
    """The frames of a part, up to the first that is cut off, as while it is being written.

    Memory: that of the longest head.

    Args:
        path: the part.
        begin: the byte at which a frame begins, from which on they are wanted.

    Raises:
        DamagedTraceError: at the first that is damaged.
        OSError: if the file cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        at = begin
        block, start = b"", at
        while at + _PREFIX.size <= end:
            place = at - start
            if place + _PREFIX.size > len(block):
                block, start, place = os.pread(file.fileno(), _BLOCK, at), at, 0
                if len(block) < _PREFIX.size:
                    return
            length, body, *checks = _PREFIX.unpack_from(block, place)
            lengths = block[place : place + _LENGTHS.size]
            if _check(lengths, at) != checks[0] or not length:
                raise DamagedTraceError(f"{path} is damaged at byte {at}")
            head_at = at + _PREFIX.size
            if head_at + length > end:
                return
            place += _PREFIX.size
            if place + length > len(block):
                size = max(_BLOCK, length)
                block, start, place = os.pread(file.fileno(), size, head_at), head_at, 0
            head = block[place : place + length]
            if zlib.crc32(head) != checks[1]:
                raise DamagedTraceError(f"{path} is damaged at byte {head_at}")
            if head_at + length + body > end:
                return
            yield Frame(head[:1], head[1:], head_at + 1, body)
            at = head_at + length + body


def _check(lengths: bytes, at: int) -> int:
    """So that a frame is not believed where it was not written, as after a block was copied."""
    return zlib.crc32(lengths, at & 0xFFFFFFFF)
