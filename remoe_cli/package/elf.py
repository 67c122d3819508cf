"""Remove from a shared library what only linkers and debuggers read; the loader reads only segments.

This needs no binutils, which a machine may lack, and which would have to know the other architecture.
"""

from __future__ import annotations

import struct

_HEADER = struct.Struct("<16s2HI3QI6H")
_SEGMENT = struct.Struct("<2I6Q")


def stripped(library: bytes) -> bytes:
    """Return a 64-bit little-endian ELF file without sections and symbol tables; any other file as it is.

    What lies between segments is removed in steps of their alignment, so that offsets still agree with addresses.
    """
    if library[:6] != b"\x7fELF\x02\x01":
        return library
    *head, segments_at, _, flags, header_bytes, segment_bytes, segments, _, _, _ = _HEADER.unpack_from(library)
    table = [list(_SEGMENT.unpack_from(library, segments_at + i * segment_bytes)) for i in range(segments)]
    step = max(alignment for *_, alignment in table)
    kept = sorted([(0, header_bytes), (segments_at, segments_at + segments * segment_bytes), *((s[2], s[2] + s[5]) for s in table)])
    pieces: list[tuple[int, int, int]] = []  # first and last byte of what stays, and how far it moves
    end = moved = 0
    for first, last in kept:
        moved += max(0, first - end) // step * step
        pieces.append((first, last, moved))
        end = max(end, last)
    out = bytearray(end - moved)
    for first, last, by in pieces:
        out[first - by : last - by] = library[first:last]
    at = {first: first - by for first, _, by in pieces}
    for segment in table:
        segment[2] = at[segment[2]]
    _HEADER.pack_into(out, 0, *head, at[segments_at], 0, flags, header_bytes, segment_bytes, segments, 0, 0, 0)
    for i, segment in enumerate(table):
        _SEGMENT.pack_into(out, at[segments_at] + i * segment_bytes, *segment)
    return bytes(out)
