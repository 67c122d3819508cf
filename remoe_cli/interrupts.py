"""SIGINT and SIGTERM as KeyboardInterrupt that is never lost.

Python raises an exception wherever the signal lands. Most often that is right: a wait ends at once. But a library may swallow what is
raised in a callback of its own. So the signal is also kept as a flag, and long work calls `check` between its steps: after each batch,
token, measurement, node or file.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_OURS = (signal.SIG_DFL, signal.default_int_handler)  # handlers that nobody has set on purpose
_received: list[int] = []  # the signal that came first


@contextmanager
def kept() -> Iterator[None]:
    """Keep interrupts until the context ends; a second one ends the process at once.

    Outside the main thread, inside another such context, and where a signal has a handler of its own, nothing changes.

    Raises: KeyboardInterrupt at the end, for an interrupt that was swallowed on the way.
    """
    ours = [number for number in _SIGNALS if signal.getsignal(number) in _OURS] if _is_main_thread() else []
    if not ours:
        yield
        return
    _received.clear()
    before = {number: signal.signal(number, _interrupted) for number in ours}
    try:
        yield
        check()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()


def check() -> None:
    """Raise KeyboardInterrupt where an interrupt has come, in any thread."""
    if _received:
        raise KeyboardInterrupt(*_received)


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """Return 128 and the number of the signal, as shells do.

    >>> exit_code(KeyboardInterrupt()), exit_code(KeyboardInterrupt(signal.SIGTERM))
    (130, 143)
    """
    return 128 + next((number for number in interrupt.args if number in _SIGNALS), signal.SIGINT)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _interrupted(number: int, frame: FrameType | None) -> None:
    if _received:
        os._exit(128 + number)
    _received.append(number)
    raise KeyboardInterrupt(number)
