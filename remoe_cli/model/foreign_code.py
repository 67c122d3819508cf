"""What a checkpoint's settings may name, so that no code of others runs and nothing is fetched.

Some settings are names of code. transformers takes an attention such as "owner/name" as a kernel on the hub, which it downloads and runs;
`tokenizer_class` may be any class of its package; `auto_map` names Python files of the model. remoe has a list of the names that it takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from packaging.version import Version
from transformers import PreTrainedConfig
from transformers import __version__ as transformers_version
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from remoe_cli import bounded
from remoe_cli.artifacts import escaped, shown
from remoe_cli.errors import ModelError

if TYPE_CHECKING:
    from remoe_cli.model.checkpoint import Checkpoint

_ATTENTION = ("eager", "sdpa", "flex_attention")
_EXPERTS = ("eager", "grouped_mm", "batched_mm")
_DTYPES = ("bfloat16", "float16", "float32")
# By the name of a setting without underscores before it, the names that it may have, at any depth.
_ALLOWED: Mapping[str, tuple[str, ...]] = {
    "attn_implementation": _ATTENTION,
    "attn_implementation_internal": _ATTENTION,
    "experts_implementation": _EXPERTS,
    "experts_implementation_internal": _EXPERTS,
    "dtype": _DTYPES,
    "torch_dtype": _DTYPES,
    "use_kernels": (),
    "kernel_config": (),
    "attribute_map": (),  # gives settings other names
    "transformers_weights": (),  # other files of weights
}
_QUANTISED = "quantization_config"  # which stored.py refuses in words of its own
# Families that come with code of their own and are another one that transformers has, by their authors' word: config.json of Kimi-K2
# names DeepseekV3ForCausalLM.
ALIASES = {"kimi_k2": "deepseek_v3"}
_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")
_OTHER_FAMILY = "Use a model whose family transformers has."
_NO_CODE = "remoe runs no code of a model. Use a model whose family transformers has."


def refuse_foreign_code(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose settings name code that is not transformers' own.

    A file that is missing or is no JSON is left to whoever reads it.

    Raises: ModelError with the file, the setting and its value.
    """
    for name in _FILES:
        settings = read_object(checkpoint, name)
        for key, value in _settings(settings):
            if (allowed := _ALLOWED.get(key.lstrip("_"))) is not None:
                _refuse_other(f"{checkpoint.path}/{name}", key, value, allowed)
        if name != "generation_config.json":
            _refuse_tokenizer(f"{checkpoint.path}/{name}", settings.get("tokenizer_class"))
        if name == "config.json" and "model_type" in settings and str(settings["model_type"]) not in {*CONFIG_MAPPING, *ALIASES}:
            _refuse_family(f"{checkpoint.path}/{name}", settings)


def _refuse_family(file: str, settings: Mapping[str, Any]) -> None:
    """Refuse a family that transformers does not have."""
    family = f"{file} is of the family {shown(settings['model_type'], 80)},"
    if settings.get("auto_map"):
        raise ModelError(f"{family} whose code is the model's own (auto_map).", _NO_CODE)
    raise ModelError(f"{family} which transformers {transformers_version} does not have.", newer_version(settings) or _OTHER_FAMILY)


def newer_version(settings: Mapping[str, Any]) -> str | None:
    """Say that a configuration is of a newer version of transformers than this one; None where it is not."""
    try:
        wrote = Version(str(settings.get("transformers_version")))
    except ValueError:  # no version, or one of so many digits that Python reads none of them
        return None
    if wrote.release <= Version(transformers_version).release:
        return None
    return f"It was written by transformers {wrote}, which knows it: a version of remoe that has this one, or a later one, can serve it."


def refuse_foreign_config(config: PreTrainedConfig, checkpoint: Checkpoint) -> None:
    """Refuse a configuration that has such a name in the end, however its file put it.

    Raises: ModelError with the setting and its value.
    """
    for key in ("_attn_implementation", "_experts_implementation"):
        _refuse_other(f"{checkpoint.path}/config.json", key, getattr(config, key, None), _ALLOWED[key.lstrip("_")])
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            refuse_foreign_config(part, checkpoint)


def named_config(checkpoint: Checkpoint) -> PreTrainedConfig | None:
    """Read the configuration of a family that another one's code stands for; None for all others."""
    settings = read_object(checkpoint, "config.json")
    if (family := ALIASES.get(str(settings.get("model_type")))) is None:
        return None
    kept = {key: value for key, value in settings.items() if key not in ("auto_map", "model_type")}
    config: PreTrainedConfig = CONFIG_MAPPING[family].from_dict(kept)
    return config


def read_object(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """Read a settings file of a checkpoint; one that is missing or holds no JSON object counts as empty."""
    try:
        read = bounded.read_json(checkpoint.path / name, bounded.CONFIG)
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def _settings(value: Any) -> Iterator[tuple[str, Any]]:
    parts = {key: item for key, item in value.items() if key != _QUANTISED} if isinstance(value, dict) else {}
    yield from parts.items()
    for item in value if isinstance(value, list) else parts.values():  # bounded.DEEPEST ends it
        yield from _settings(item)


def _refuse_other(file: str, key: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not allowed; it may also be an object that has one for each part of the model."""
    for one in value.values() if isinstance(value, dict) and allowed else [value]:
        if one and not (isinstance(one, str) and one in allowed):
            raise ModelError(
                f"{file} sets {key!r} to {escaped(repr(one), 80)}, which remoe does not take.",
                f"It may be {', '.join(allowed[:-1])} or {allowed[-1]}." if allowed else "Remove it.",
            )


def _refuse_tokenizer(file: str, name: Any) -> None:
    if name is None:
        return
    kind = tokenizer_class_from_name(name) if isinstance(name, str) else name
    if kind is not None and not (isinstance(kind, type) and issubclass(kind, PreTrainedTokenizerBase)):
        raise ModelError(
            f"{file} sets 'tokenizer_class' to {escaped(repr(name), 80)}, which is no tokenizer.", "Give the class of its tokenizer."
        )
