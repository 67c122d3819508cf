"""Prompts of a dataset on the Hugging Face hub, streamed."""

from __future__ import annotations

import re

from remoe_cli.errors import RemoeError, UsageError
from remoe_cli.profile.prompts.files import Rows, Select, first_line

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_TIMEOUT_S = 10.0


def hub_rows(source: str, select: Select) -> Rows:
    """Stream the rows of the first split, at the revision that the hub names at the start.

    Raises: UsageError for a dataset that is not there, cannot be reached or cannot be decoded.
    """
    from datasets import load_dataset

    revision = _revision(source)
    try:
        stream = next(iter(load_dataset(source, streaming=True, revision=revision).values()))
        if stream.column_names is not None:
            stream = stream.select_columns(list(select(stream.column_names)))
        yield from enumerate(stream, 1)
    except RemoeError:
        raise
    except Exception as error:  # the client, the network and every file format raise classes of their own
        message = f"{source} cannot be read from the Hugging Face hub: {first_line(error)}."
        raise UsageError(message, "Download one of its files, and give that file.") from None


def _revision(source: str) -> str | None:
    """Ask the hub for the dataset's commit, once. Without a network load_dataset alone would try for 23 s."""
    from huggingface_hub import HfApi, errors

    try:
        return HfApi().dataset_info(source, timeout=_TIMEOUT_S).sha
    except errors.GatedRepoError:
        message, hint = f"{source} is a gated dataset, and you have no access.", "Ask for access on its page, then run 'hf auth login'."
    except errors.RepositoryNotFoundError:
        message = f"{source} is neither a file here nor a dataset on the Hugging Face hub that you may see."
        hint = "Check the name; for a private dataset run 'hf auth login'."
    except errors.OfflineModeIsEnabled:
        message = f"{source} is not a file here, and HF_HUB_OFFLINE is set, so the Hugging Face hub is not asked."
        hint = "Give a local file, or unset HF_HUB_OFFLINE."
    except Exception as error:  # the HTTP client raises classes of its own, and huggingface_hub has changed its client before
        message = f"{source} is not a file here, and the Hugging Face hub cannot be reached ({first_line(error)})."
        hint = "Give a local file, or check the network and try again."
    raise UsageError(message, hint)
