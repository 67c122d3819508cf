"""The arithmetic of a family's experts, described for the expert function, and a check of it.

The expert function has no torch. A family that is not in the tables here, or whose description does not give torch's numbers, is refused
when it is packaged: such a function would change tokens.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from remoe_cli.errors import ModelError
from remoe_cli.function.codec import STORAGE
from remoe_cli.function.expert_ffn import ACTIVATIONS, Expert, FfnSpec, widen
from remoe_cli.model.experts import ExpertLayer, run_expert

# Families that override the default gate, by class name: (gate, attribute of the limit, attribute of alpha).
_GATES: dict[str, tuple[str, str | None, str | None]] = {
    "GptOssExperts": ("sigmoid", "limit", "alpha"),
    "MiniMaxM3VLExperts": ("sigmoid", "swiglu_limit", "swiglu_alpha"),
    "DeepseekV4Experts": ("clamped", "limit", None),
    "HYV4Experts": ("clamped", "swiglu_limit", None),
    "_Step3p7Experts": ("clamped after", "limit", None),
    "BeamExperts": ("wide", None, None),
}
_TORCH_ACTIVATIONS = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "silu": "silu",  # torch.nn.functional's, where a family uses the function itself
    "GELUTanh": "gelu_pytorch_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
}
# Rows that differ in the last place because sums were taken in another order; a wrong formula is off by far more.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 4e-2, "float16": 1e-2}


def describe(layer: ExpertLayer) -> FfnSpec:
    """Describe the arithmetic of the layer's experts.

    Raises: ModelError, which names what is unknown, when an expert function cannot do it.
    """
    m: Any = layer.module
    kind = type(m).__name__
    dtype = str(layer.parameters()["down_proj"].dtype).removeprefix("torch.")
    if dtype not in STORAGE:
        raise ModelError(f"Experts in {dtype} cannot run in an expert function.", f"Use a checkpoint in one of {', '.join(STORAGE)}.")
    custom = "_apply_gate" in vars(type(m)) and m._apply_gate.__func__.__name__ != "_default_apply_gate"
    if m.has_post_expert_norm or (custom and kind not in _GATES):
        raise ModelError(f"The expert functions do not know the arithmetic of {kind}.", "Keep all experts local, or report the family.")
    gate, limit, alpha = _GATES.get(kind, ("standard" if m.has_gate else "none", None, None))
    if gate == "clamped after" and math.isinf(m.limit):  # a layer without a limit
        gate, limit = "standard", None
    function = getattr(m, "act_fn", torch.nn.functional.silu)  # gates without an activation of their own never read it
    name = getattr(function, "__name__", type(function).__name__)
    if name not in _TORCH_ACTIVATIONS:
        raise ModelError(f"The expert functions do not know the activation {name} of {kind}.", f"Known are {', '.join(ACTIVATIONS)}.")
    activation = _TORCH_ACTIVATIONS[name]
    return FfnSpec(
        dtype=dtype,
        gate=gate,
        activation=activation,
        limit=float(getattr(m, limit)) if limit else 0.0,
        alpha=float(getattr(m, alpha)) if alpha else 0.0,
        interleaved=not m.is_concatenated,
        transposed=m.is_transposed,
    )


def to_storage(tensor: Tensor) -> npt.NDArray[Any]:
    """Give a CPU tensor as the array that is sent and stored: bfloat16 as its bits in uint16."""
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def from_storage(array: npt.NDArray[Any], dtype: torch.dtype) -> Tensor:
    """Undo `to_storage`. The tensor shares the array's memory if that may be written, else it is a copy."""
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    return tensor.view(dtype) if dtype == torch.bfloat16 else tensor


def prove_same(layer: ExpertLayer, row: int, spec: FfnSpec) -> None:
    """Run one expert by torch and by the function's arithmetic on random rows, and compare.

    Raises: ModelError when the numbers differ by more than another order of sums explains.
    """
    generator = torch.Generator().manual_seed(0)
    weights = {name: p[row] for name, p in layer.parameters().items()}
    x = torch.randn((4, layer.width), generator=generator).to(weights["down_proj"].dtype)
    with torch.no_grad():
        expected = run_expert(layer, row, x).float().numpy()
    got = widen(Expert.of({name: to_storage(w) for name, w in weights.items()}, spec).run(to_storage(x)), spec.dtype)
    scale = float(np.abs(expected).max()) or 1.0
    worst = float(np.abs(got - expected).max()) / scale
    if not worst <= _TOLERANCE[spec.dtype]:
        raise ModelError(
            f"The function's arithmetic for {type(layer.module).__name__} is off by {worst:.1e} from torch's ({asdict(spec)}).",
            "Keep all experts local, and report the family.",
        )
