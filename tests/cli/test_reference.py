"""docs/reference/cli.md says what the commands say."""

from __future__ import annotations

from remoe_cli import errors
from remoe_cli.cli.app import EXIT_CODES
from tests.cli.reference import cli_reference


def test_the_reference_is_up_to_date() -> None:
    """An option that is added, changed or taken away is in the reference too."""
    page = cli_reference()
    assert page.PAGE.read_text(encoding="utf-8") == page.reference(), f"The commands have changed. Make the page again: {page.MAKER}"


def test_the_reference_explains_every_exit_code() -> None:
    codes = {error.exit_code for error in vars(errors).values() if isinstance(error, type) and issubclass(error, errors.RemoeError)}
    assert codes == EXIT_CODES.keys() - {0, 130, 143}
