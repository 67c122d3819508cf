"""Which files of a checkpoint's folder are read, and which of them are refused.

Files of these names only are read, copied and sent away. A link among them must end in the folder or in the hub's cache, because copies of
a link's target go into packages, images and S3. What is no regular file, what is too large and what asks for more layers or experts than
any model has is refused before a library reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from remoe_cli import bounded
from remoe_cli.errors import ModelError

INDEX = "model.safetensors.index.json"
SHARE = "share.json"
WEIGHTS = "*.safetensors"
# What is read of a model besides weights: its config, quantisation, generation config, tokenizer and chat template.
SETTINGS = (
    "hf_quant_config.json",
    *("config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json", "tekken.json"),
    *("tokenizer*.json", "vocab*.json", "vocab*.txt", "merges.txt", "*.model", "*.tiktoken", "*.jinja"),
)
MORE_TEMPLATES = "additional_chat_templates/*.jinja"
_LIMITS = {
    INDEX: bounded.INDEX,
    SHARE: bounded.DOCUMENT,
    **dict.fromkeys(("config.json", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json"), bounded.CONFIG),
    **dict.fromkeys(("added_tokens.json", "chat_template.json", "hf_quant_config.json"), bounded.CONFIG),
}
_READ_HERE = (
    *("config.json", "hf_quant_config.json", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json"),
    *("chat_template.json", INDEX),
)
_TEMPLATE = bounded.Limit(4 * bounded.MIB)
# Numbers of things that libraries make one by one, with what no model comes near.
_COUNTS = (
    (re.compile(r"(?!.*(size|dim|len|eps|norm|theta|scale|rate|init|width)).*(layer|num_.*block|depth)", re.IGNORECASE), 512),
    (re.compile(r"(num|n)_.*(expert|head|group|label|codebook|speaker)|.*experts$", re.IGNORECASE), 16_384),
)
_MEND = "Correct the file, or download the model again."


def refuse_files(folder: Path, in_cache: bool = False) -> None:
    """Refuse a checkpoint's folder with a file that may not or cannot be read.

    `in_cache` says that the hub's library made the folder in its cache, so that its links are not checked.

    Raises: ModelError that names the first such file, and why.
    """
    for path in _known(folder):
        if (path.is_symlink() or path.parent.is_symlink()) and not in_cache:
            _refuse_link(folder, path)
        if path.is_dir() and path.name not in _LIMITS:
            continue
        try:
            with bounded.open_file(path) as file:
                if not path.match(WEIGHTS):
                    bounded.check_bytes(file.seek(0, 2), _limit(path))
            if path.name in _READ_HERE:
                content = bounded.read_json(path, _limit(path))
                if path.name == "config.json":
                    refuse_counts(path, content)
                elif path.name == INDEX:
                    _refuse_names(path, content)
        except (bounded.LimitError, bounded.TooLargeError, bounded.TooDeepError) as error:
            raise ModelError(f"{path} cannot be used: {error}.", _MEND) from None
        except (OSError, ValueError):
            continue  # said where the file is needed


def _known(folder: Path) -> Iterator[Path]:
    for pattern in (INDEX, SHARE, *SETTINGS, WEIGHTS, MORE_TEMPLATES):
        named = sorted(folder.glob(pattern)) if "*" in pattern else [folder / pattern]
        yield from (path for path in named if path.is_symlink() or path.exists())


def _limit(path: Path) -> bounded.Limit:
    return _LIMITS.get(path.name) or (_TEMPLATE if path.suffix == ".jinja" else bounded.TOKENIZER)


def _refuse_link(folder: Path, path: Path) -> None:
    """Refuse a link that ends outside of the folder, of the repository in the hub's cache that the folder is in, and of that cache."""
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise ModelError(f"{path} is a link to {path.readlink()}, which is not there.", _MEND) from None
    folder = folder.resolve()
    roots = [folder, *([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])]
    if not any(target.is_relative_to(root) for root in roots) and not target.is_relative_to(_hub_cache()):
        raise ModelError(
            f"{path} leads to {target}, outside of the model's folder and of the Hugging Face cache.",
            "Copy the file into the folder: what is linked would be copied into packages and images.",
        )


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().resolve()


def refuse_counts(path: Path, config: Any) -> None:
    """Refuse numbers of layers, experts and their like in a config.json that no model has.

    Raises: ModelError that names the field.
    """
    todo: list[tuple[str, Any]] = list(config.items()) if isinstance(config, dict) else []
    for name, value in todo:  # grows while it is walked
        if isinstance(value, dict):
            todo.extend(value.items())
        elif isinstance(value, list):
            todo.extend((name, each) for each in value if isinstance(each, dict | list | int))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            most = next((most for names, most in _COUNTS if names.match(name)), None)
            if most is not None and not -most <= value <= most:
                raise ModelError(f"{path} cannot be used: its {name} is {value:,}, and {most:,} is the most.", _MEND)


def _refuse_names(path: Path, index: Any) -> None:
    try:
        file_names(index["weight_map"].values())
    except (KeyError, TypeError, AttributeError):
        return  # said where the index is needed
    except ValueError as error:
        raise ModelError(f"{path} cannot be used: {error}.", _MEND) from None


def file_names(names: Any) -> set[str]:
    """Return the names of weight files that an index holds.

    Raises: ValueError for anything but the name of a file in the same folder.
    """
    found = set()
    for name in names:
        if not isinstance(name, str) or not name.isprintable() or "/" in name or name.startswith(".") or len(name) > 255:
            raise ValueError(f"it names {str(name)[:60]!r}, which is no file of the folder")
        found.add(name)
    return found
