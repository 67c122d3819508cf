"""Load a main server so that it keeps the receipts of what it serves, and of its own loading."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from remoe_cli.runtime.kept import Book, Ended
from remoe_cli.runtime.main_function import MainFunction
from remoe_cli.runtime.receipt import receipt_of


def keeping(load: Callable[[], MainFunction], book: Book) -> Callable[[], MainFunction]:
    """Let a main function that `load` loads keep its receipts in `book`.

    What loading was billed is kept too, also where it fails. Raises: what `load` raises.
    """

    def loaded() -> MainFunction:
        try:
            main = load()
        except Exception as error:
            if (receipt := receipt_of(error)) is not None:
                book.keep(Ended("loading", receipt))
            raise
        book.keep(Ended("loading", main.loading_receipt))
        return replace(main, keep=book.keep)

    return loaded
