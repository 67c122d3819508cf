"""Loading the non-expert weights and chosen experts of a checkpoint, and nothing else.

transformers does the loading (renaming, conversion, tying, buffers); this module decides which rows of experts it gets. In a checkpoint
each expert has its own tensor, or all experts of a layer share a fused one; in both cases rows that are not kept are never read from disk.
The same function loads the main function's model (keep = local experts) and the experts that the packager writes (keep = remote experts).

Some functions of transformers that it uses are not public (`get_model_conversion_mapping`, `rename_source_key`,
`convert_and_load_state_dict_in_model`, and the two steps of loading that `_partial` wraps). So the version is pinned, and
tests/model/test_loader.py loads every family in both layouts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, convert_and_load_state_dict_in_model, rename_source_key
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils.loading_report import LoadStateDictInfo
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from remoe_cli.errors import ModelError
from remoe_cli.model.adapters import by_expert
from remoe_cli.model.blocked import blocked_bytes
from remoe_cli.model.checkpoint import Checkpoint, reason
from remoe_cli.model.expert_stack import stack
from remoe_cli.model.experts import expert_layers, refuse_unservable
from remoe_cli.model.foreign_code import named_config, newer_version, read_object, refuse_foreign_code, refuse_foreign_config
from remoe_cli.model.generation import read_generation_config
from remoe_cli.model.gpu_experts import GpuExperts, gpu_experts
from remoe_cli.model.quantised import QuantisedMatrix, fold
from remoe_cli.model.stored import quantisation

# remoe shows its own progress, and reports what goes wrong as one ModelError.
disable_progress_bar()
set_verbosity_error()

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_SAFETENSORS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# keep[layer] lists, ascending, the experts of that hidden layer to load
Keep = Mapping[int, Sequence[int]]


class ExpertRows:
    """Some experts' rows of a fused tensor in a checkpoint, read when transformers asks for them.

    Each goes to `device` before the next is read.
    """

    def __init__(self, source: Any, rows: Sequence[int], device: str = "cpu") -> None:
        self.source, self.rows, self._device = source, rows, device

    def get_shape(self) -> list[int]:
        return [len(self.rows), *self.source.get_shape()[1:]]

    def get_dtype(self) -> str:
        return cast(str, self.source.get_dtype())

    def __getitem__(self, key: Any) -> torch.Tensor:
        if not self.rows:
            return cast(torch.Tensor, self.source[0:0]).clone()[key]  # without the file's pages behind it
        # Into one tensor: joining them at the end would hold them twice.
        first = self.source[self.rows[0] : self.rows[0] + 1]
        rows = torch.empty((len(self.rows), *first.shape[1:]), dtype=first.dtype, device=self._device)
        for place, row in enumerate(self.rows):
            rows[place] = first[0] if place == 0 else self.source[row : row + 1][0]
        return rows[key]


def stored_names(name: str, selected: Any) -> tuple[str, ...]:
    """Name the checkpoint's tensors behind one that `select` returned: several for a quantised matrix."""
    source = selected.source if isinstance(selected, ExpertRows) else selected
    return tuple(stored for stored, _ in source.tensors.values()) if isinstance(source, QuantisedMatrix) else (name,)


def read_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """Read the model's configuration.

    One without a dtype gets that of the weights, or bfloat16 where there are none. It says nothing of quantisation: what transformers loads
    is dequantised (model/quantised.py).

    Raises: ModelError when transformers cannot read it.
    """
    refuse_foreign_code(checkpoint)
    quantisation(checkpoint.path)  # refuses what transformers would stumble over
    try:
        config = named_config(checkpoint) or AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False, local_files_only=True)
        refuse_foreign_config(config, checkpoint)
        if config.dtype is None and config.get_text_config().dtype is None:
            config.dtype = _stored_dtype(checkpoint)
        for part in (config, config.get_text_config()):
            if getattr(part, "quantization_config", None) is not None:
                del part.quantization_config
        return config
    except ModelError:
        raise
    except Exception as error:  # every family's config class checks its own way
        raise ModelError(
            f"{checkpoint.path}/config.json cannot be used: {reason(error)}",
            newer_version(read_object(checkpoint, "config.json")) or "Use a model that this version of transformers knows.",
        ) from None


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    for file in (file for file in checkpoint.files if file.suffix == ".safetensors"):
        with _open(file) as handle:
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                if "scale" not in name and (dtype := _SAFETENSORS.get(handle.get_slice(name).get_dtype())) is not None:
                    return dtype
    return torch.bfloat16


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} is not a complete safetensors file: {reason(error)}", "Copy or download the checkpoint again.") from None


def open_weights(checkpoint: Checkpoint) -> dict[str, Any]:
    """Open every tensor of the checkpoint by name, as a slice that is read when it is indexed.

    Each slice keeps its file open.
    """
    handles = [_open(file) for file in checkpoint.weight_files]
    return {name: handle.get_slice(name) for handle in handles for name in handle.keys()}  # noqa: SIM118 (not a dict)


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model on torch's meta device, where parameters have shapes and types but no memory.

    A family that also takes pictures may have no model for text alone. Then it is the one for both, which reads text as well.

    Raises: ModelError when transformers cannot build a language model from the configuration.
    """
    pictures = type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    kind = AutoModelForImageTextToText if pictures else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            return cast(PreTrainedModel, kind.from_config(config, dtype=model_dtype(config), trust_remote_code=False))
    except Exception as error:  # every family's constructor fails its own way
        raise ModelError(
            f"transformers cannot make a causal language model of family '{config.model_type}' from this config.json: {reason(error)}",
            newer_version(vars(config)) or "Use a model that generates text, and whose config.json suits its family.",
        ) from None


def model_dtype(config: PreTrainedConfig) -> torch.dtype:
    """Return the dtype of a configuration that `read_config` returned."""
    dtype = config.dtype or config.get_text_config().dtype
    return dtype if isinstance(dtype, torch.dtype) else DTYPES[dtype]


def load(checkpoint: Checkpoint, keep: Keep | None = None, device_map: str | None = None, device: str = "cpu") -> PreTrainedModel:
    """Load the model in its own dtype, with the experts in `keep` only (None: with all).

    The expert parameters have one row for each kept expert of their layer, in the order of `keep`; a layer without kept experts has
    parameters of zero rows. They are in host memory. Everything else goes from its file to `device`, one tensor after the other.
    `device_map` is that of transformers instead: "auto" spreads the whole model over the accelerators of this machine.

    Raises: ModelError when the tensors do not fit config.json, an expert is missing, or the device cannot be used; torch.OutOfMemoryError.
    """
    if device_map is not None and find_spec("accelerate") is None:
        raise ModelError("A device map needs the package accelerate, which is not installed.", "Run 'pip install accelerate'.")
    config = read_config(checkpoint)
    probe = skeleton(config)
    refuse_unservable(probe)
    layers = expert_layers(probe)
    wanted = {x.layer: tuple(range(x.experts) if keep is None else keep.get(x.layer, ())) for x in layers}
    kind, dtype = type(probe), model_dtype(config)
    text_alone = _of_text(config, kind) is not config
    config = _of_text(config, kind)
    state = select(checkpoint, probe, wanted, stacked=True)
    try:
        model, report = _partial(kind, wanted, device).from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=dtype,
            device_map=device_map,
            output_loading_info=True,
            experts_implementation="eager",
            ignore_mismatched_sizes=True,  # reported, and refused below with the tensor's name
        )
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, AssertionError, SafetensorError) as error:  # AssertionError: torch, of a device that is not there
        raise ModelError(
            f"{checkpoint.path} cannot be loaded with device_map '{device_map}': {reason(error)}"
            if device_map
            else f"The tensors of {checkpoint.path} do not fit its config.json: {reason(error)}",
            "Use 'auto', or leave --device-map out." if device_map else "Check that the checkpoint is complete.",
        ) from None
    model.__class__ = kind
    empty = {f"{x.name}.{p}" for x in layers if not wanted[x.layer] for p in x.parameters()}
    _refuse_mismatch(checkpoint, report, empty, text_alone)
    model.generation_config = read_generation_config(checkpoint, model.generation_config)
    return cast(PreTrainedModel, model.eval())


def _of_text(config: PreTrainedConfig, kind: type[PreTrainedModel]) -> PreTrainedConfig:
    """Return the configuration that a class of models takes: of a family that also takes pictures, its text model's has a part."""
    return config if isinstance(config, kind.config_class or PreTrainedConfig) else config.get_text_config()


def load_gpu_experts(checkpoint: Checkpoint, model: PreTrainedModel, chosen: Keep, device: str) -> dict[int, GpuExperts]:
    """Load some experts of a loaded model from their files to a device, apart from its own parameters.

    Returns them by hidden layer.

    Raises: what `load` raises.
    """
    layers = {x.layer: x for x in expert_layers(model) if chosen.get(x.layer)}
    if not layers:
        return {}
    config = read_config(checkpoint)
    wanted = {x.layer: tuple(chosen.get(x.layer, ())) for x in expert_layers(model)}
    state = select(checkpoint, skeleton(config), wanted, device, experts_only=True)
    with torch.device("meta"):
        apart = _partial(type(model), wanted, device)._from_config(_of_text(config, type(model)), dtype=model_dtype(config))
    settings = LoadStateDictConfig(
        dtype=model_dtype(config), device_map={"": device}, weight_mapping=get_model_conversion_mapping(apart), ignore_mismatched_sizes=True
    )
    loaded, _ = convert_and_load_state_dict_in_model(apart, state, settings, disk_offload_index=None)
    _refuse_full(loaded)
    if loaded.conversion_errors:
        name, said = next(iter(loaded.conversion_errors.items()))
        raise ModelError(f"{checkpoint.path} cannot be loaded: {name}: {said.splitlines()[-1]}", "Check that the checkpoint is complete.")
    weights = {x.layer: {name: p.data for name, p in x.parameters().items()} for x in expert_layers(apart) if x.layer in layers}
    names = {f"{layers[layer].name}.{name}" for layer, of_layer in weights.items() for name in of_layer}
    report = loaded.to_dict()
    _refuse_mismatch(checkpoint, report | {"missing_keys": names & set(report["missing_keys"])}, set())
    return {n: gpu_experts(x.module, wanted[n], weights[n], x.experts) for n, x in layers.items()}


def select(
    checkpoint: Checkpoint, probe: PreTrainedModel, wanted: Keep, device: str = "cpu", *, experts_only: bool = False, stacked: bool = False
) -> dict[str, Any]:
    """Select the checkpoint's tensors by name, with the wanted experts only, and read none of them.

    Of a fused tensor the wanted rows come as `ExpertRows`, which are read to `device`. With `experts_only` everything else is left out,
    with `stacked` tensors of single experts come as `ExpertStack`s. `probe` is the model's skeleton.

    Raises: ModelError when the checkpoint does not hold an expert that is wanted.
    """
    layers, partial = expert_layers(probe), checkpoint.held()
    held = {x.layer: tuple(range(x.experts) if partial is None else partial.get(x.layer, ())) for x in layers}
    for layer, experts in wanted.items():
        if absent := set(experts) - set(held[layer]):
            raise ModelError(f"{checkpoint.path} does not hold expert {min(absent)} of layer {layer}.", "Ask for experts that it holds.")
    owner = {f"{x.name}.{p}": x.layer for x in layers for p in x.parameters()}
    unused = {f"{x.name}.{p}": int(getattr(x.module, "zero_expert_num", 0)) for x in layers for p in x.parameters()}
    state: dict[str, Any] = {}
    # By parameter and naming pattern of the checkpoint, the experts that have a tensor of their own.
    single: dict[tuple[str, str | None], set[int]] = defaultdict(set)
    places: dict[str, tuple[str, str]] = {}
    for key, source, target, pattern in parameters_of(checkpoint, probe):
        if target not in owner:
            if not experts_only:
                state[key] = source
            continue
        layer, number = owner[target], re.search(r"experts\.(\d+)\.", key)
        if number is None:
            _refuse_count(checkpoint, key, source.get_shape()[0], len(held[layer]), unused[target])
            state[key] = ExpertRows(source, [held[layer].index(e) for e in wanted[layer]], device)
            continue
        single[target, pattern].add(int(number[1]))
        if int(number[1]) in wanted[layer]:
            state[key], places[key] = source, (target, pattern or "")
    for (target, pattern), found in single.items():
        _refuse_count(checkpoint, f"{target} ({pattern})", max(found) + 1, max(held[owner[target]], default=-1) + 1, unused[target])
        if missing := set(wanted[owner[target]]) - found:
            raise ModelError(
                f"The checkpoint {checkpoint.path} is missing expert {min(missing)} of {target} ({pattern}).",
                "Check that the checkpoint is complete.",
            )
    return stack(state, places, probe) if stacked else state


def parameters_of(checkpoint: Checkpoint, probe: PreTrainedModel) -> Iterator[tuple[str, Any, str, str | None]]:
    """Yield each tensor or quantised matrix: its name, what reads it, its parameter, the naming pattern."""
    mapping = get_model_conversion_mapping(probe)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    meta = probe.state_dict()
    for key, source in fold(checkpoint, open_weights(checkpoint), probe.dtype).items():
        target, pattern = rename_source_key(key, renamings, converters, probe.base_model_prefix, meta)
        yield key, by_expert(probe, key, source), key if target not in meta and key in meta else target, pattern


def _refuse_count(checkpoint: Checkpoint, name: str, found: int, experts: int, unused: int) -> None:
    """Refuse another number of experts; `unused` rows more may stand for experts without weights."""
    if found not in (experts, experts + unused):
        raise ModelError(
            f"The checkpoint {checkpoint.path} has {found} experts in {name}, its config.json says {experts}.",
            "Check which of them is right.",
        )


def _partial(kind: type[PreTrainedModel], wanted: Keep, device: str) -> type[PreTrainedModel]:
    """Derive a class whose expert parameters have the wanted rows, and whose other tensors are loaded to `device`.

    Then the check of shapes in transformers passes. A device map that only the steps of loading see lets transformers place each tensor as
    it reads it; one that from_pretrained gets would also copy the experts to the device in every call, by hooks of accelerate.
    """

    class Partial(kind):  # type: ignore[misc]
        def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            for layer in expert_layers(self):
                for name, p in layer.parameters().items():
                    empty = torch.empty(len(wanted[layer.layer]), *p.shape[1:], dtype=p.dtype, device=p.device)
                    setattr(layer.module, name, nn.Parameter(empty, requires_grad=False))

        @staticmethod
        def _load_pretrained_model(model: PreTrainedModel, state: Any, files: Any, settings: LoadStateDictConfig, *rest: Any) -> Any:
            info, index = kind._load_pretrained_model(model, state, files, _placed(model, settings, device), *rest)
            _refuse_full(info)
            return info, index

        @staticmethod
        def _finalize_model_loading(model: PreTrainedModel, settings: LoadStateDictConfig, info: LoadStateDictInfo) -> Any:
            return kind._finalize_model_loading(model, _placed(model, settings, device), info)

    # The library reads these to tell its own code from custom code.
    Partial.__name__, Partial.__qualname__, Partial.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return Partial


def _placed(model: PreTrainedModel, settings: LoadStateDictConfig, device: str) -> LoadStateDictConfig:
    if device == "cpu":
        return settings
    return replace(settings, device_map={"": device} | {f"{layer.name}.": "cpu" for layer in expert_layers(model)})


def _refuse_full(info: LoadStateDictInfo) -> None:
    """Raise torch's error for a full device, which transformers notes as one of a conversion."""
    full = next((line for said in info.conversion_errors.values() for line in said.splitlines() if "out of memory" in line), None)
    if full is not None:
        raise torch.OutOfMemoryError(full)


# Parts of a checkpoint that are not of its text model, by the names that families give them.
_OF_PICTURES = re.compile(r"^(model\.)?(vision_\w+|visual|multi_modal_projector|audio_\w+)\.")


def _refuse_mismatch(checkpoint: Checkpoint, report: Mapping[str, Any], empty: set[str], text_alone: bool = False) -> None:
    unknown = [name for name in report["unexpected_keys"] if not (text_alone and _OF_PICTURES.match(name))]
    problems = (
        ("is missing", sorted(set(report["missing_keys"]) - empty)),
        ("does not know", sorted(unknown)),
        ("has in another shape", sorted(name for name, *_shapes in report["mismatched_keys"])),
    )
    for what, keys in problems:
        if keys:
            raise ModelError(
                f"The checkpoint {checkpoint.path} {what} {len(keys)} tensors, such as {keys[0]}.", "Check that the checkpoint is complete."
            )


def copy_weights(model: PreTrainedModel) -> None:
    """Copy weights that are mapped from files into this process's memory.

    A mapped file that is changed in its place changes the model that runs, and one that is cut short ends its process. What has been copied
    already, here or to another device, stays as it is.
    """
    mapped = _mapped_files()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device.type == "cpu" and any(start <= tensor.data_ptr() < end for start, end in mapped):
                tensor.data = tensor.data.clone()


def _mapped_files() -> list[tuple[int, int]]:
    """List the addresses at which this process has files in its memory; all addresses where the system does not tell."""
    try:
        lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    except OSError:
        return [(0, 1 << 64)]
    spans = [line[0].split("-") for line in lines if len(line) == 6 and line[5].startswith("/")]
    return [(int(start, 16), int(end, 16)) for start, end in spans]


def expert_bytes_held(model: PreTrainedModel) -> int:
    """Count the bytes of routed experts that this process holds, from the tensors themselves."""
    layers = expert_layers(model)
    rows = sum(p.numel() * p.element_size() for layer in layers for p in layer.parameters().values())
    return rows + sum(blocked_bytes(layer.module) for layer in layers)
