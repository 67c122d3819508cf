"""Bytes as text for people."""

from __future__ import annotations

_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def size(count: float) -> str:
    """Write a number of bytes in the unit that fits, with three digits or all before the point.

    Units are powers of 1000.

    >>> size(25_769_803_776), size(1_342_100_000_000), size(1_230_000), size(83_000), size(999.7), size(0)
    ('25.8 GB', '1,342 GB', '1.23 MB', '83 kB', '1 kB', '0 bytes')
    """
    for unit, each in _UNITS:
        if (of := count / each) >= 0.9995:
            digits = f"{of:,.0f}" if of >= 99.95 else f"{of:.1f}" if of >= 9.995 else f"{of:.2f}"
            return f"{digits.rstrip('0').rstrip('.') if '.' in digits else digits} {unit}"
    return "1 byte" if count == 1 else f"{count:.0f} bytes"
