"""Tensors that say they are on a GPU and compute on the CPU, to count what a real one would be asked for.

`register` makes a device "gpu" known to torch, for as long as the process lives: call it in a process of its own (tests/support/forked.py).
Inside `labelled()` a tensor moved to it becomes a LabelledTensor: real numbers in CPU memory under another device's name. An operation
on operands of both devices is refused, as torch refuses it. Copies between the devices are counted, and everything that lets the host wait.
A copy to the host that nobody has waited for has not arrived: until then the host reads what was there before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "gpu"
# Operations whose result depends on numbers that the host does not have: it waits for them.
_WAITS = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "bincount",
    "masked_select",
    "_unique2",
    "unique_dim",
    "allclose",
}
_MOVES = {"_to_copy", "to", "copy_", "_pin_memory"}


class _Backend(backend_registration._DummyBackendModule):
    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16]


def register() -> None:
    """Make the device known to torch."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Backend())


class LabelledTensor(Tensor):
    """A tensor of the device by name. `inner` holds its numbers on the CPU."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> LabelledTensor:
        made: LabelledTensor = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=torch.device(NAME, 0)
        )
        made.inner = inner
        return made

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()  # as torch does it

    def __repr__(self, **_: Any) -> str:
        return f"LabelledTensor({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} of a tensor on {NAME}, outside of labelled().")


@dataclass
class Asked:
    """What the host asked of the device: copies between the two, and what it waited for."""

    copies: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)

    def clear(self) -> None:
        self.copies.clear()
        self.waits.clear()


class _Labels(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.asked = Asked()
        self.pinned: set[int] = set()
        self.under_way: list[Callable[[], object]] = []

    def arrive(self) -> None:
        for copy in self.under_way:
            copy()
        self.under_way.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        pin = kwargs.pop("pin_memory", False)
        flat, spec = pytree.tree_flatten((args, kwargs))
        ours = [x for x in flat if isinstance(x, LabelledTensor)]
        plain = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, LabelledTensor)]
        asked = [torch.device(x).type for x in flat if isinstance(x, torch.device)]
        if name in _MOVES:
            return self._move(func, name, flat, spec, asked)
        if ours and any(x.dim() for x in plain):
            raise RuntimeError(f"Expected all tensors to be on the same device: {func} of tensors on {NAME} and on the CPU.")
        if ours and (name in _WAITS or (name == "index" and any(x.dtype in (torch.bool, torch.uint8) for x in ours[1:]))):
            self.arrive()
            self.asked.waits.append(name)
        on_device = asked[-1] == NAME if asked else bool(ours)
        out = self._run(func, flat, spec)
        if pin:
            self.pinned.add(out.untyped_storage().data_ptr())
        return self._named(out, ours) if on_device else out

    def _run(self, func: Any, flat: list[Any], spec: Any) -> Any:
        inner = [x.inner if isinstance(x, LabelledTensor) else torch.device("cpu") if isinstance(x, torch.device) else x for x in flat]
        if func is torch.ops.aten.histc.default:  # of integers torch has it on a GPU only
            inner[0] = inner[0].float()
        args, kwargs = pytree.tree_unflatten(inner, spec)
        return func(*args, **kwargs)

    @staticmethod
    def _named(out: Any, ours: list[LabelledTensor]) -> Any:
        same = {id(x.inner): x for x in ours}  # what works in place returns its operand
        return pytree.tree_map_only(Tensor, lambda x: same.get(id(x)) if id(x) in same else LabelledTensor(x), out)

    def _move(self, func: Any, name: str, flat: list[Any], spec: Any, asked: list[str]) -> Any:
        """Copy to another device, or within one."""
        tensors = [x for x in flat if isinstance(x, Tensor)]
        target, source = tensors[0], tensors[1] if name == "copy_" else tensors[0]
        was = isinstance(source, LabelledTensor)
        if name == "copy_":
            becomes = isinstance(target, LabelledTensor)
        elif len(tensors) > 1:  # .to(other)
            becomes = isinstance(tensors[1], LabelledTensor)
        else:
            becomes = asked[-1] == NAME if asked else was
        if was == becomes:
            out = self._run(func, flat, spec)
            return self._named(out, [x for x in tensors if isinstance(x, LabelledTensor)]) if becomes else out
        host = target if name == "copy_" and was else source
        args, kwargs = pytree.tree_unflatten(flat, spec)
        said = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
        late = bool(said.get("non_blocking")) and (name == "copy_" or not was) and host.untyped_storage().data_ptr() in self.pinned
        self.asked.copies.append(f"{name} {'to host' if was else 'to device'} {tuple(source.shape)}")
        if late and was:
            kept = source.inner.clone()
            self.under_way.append(lambda: target.copy_(kept))
            return target
        if not late:
            self.arrive()
            self.asked.waits.append(f"{name} {'to host' if was else 'to device'} that blocks")
        if name == "copy_":
            (target.inner if becomes else target).copy_(source.inner if was else source)
            return target
        inner = source.inner if was else source
        moved = inner.to(said.get("dtype") or inner.dtype, copy=True)
        return LabelledTensor(moved) if becomes else moved


class _Event:
    """Stands for torch.Event: waiting for it lets the copies arrive that were under way when it was recorded."""

    labels: _Labels

    def __init__(self, device: torch.device) -> None:
        assert device.type == NAME

    def record(self) -> None:
        self.recorded = list(self.labels.under_way)

    def synchronize(self) -> None:
        self.labels.asked.waits.append("event")
        for copy in self.recorded:
            copy()
        self.labels.under_way = [copy for copy in self.labels.under_way if copy not in self.recorded]


@contextmanager
def labelled() -> Iterator[Asked]:
    """Let tensors be on the device by name; yields what is asked of it."""
    labels = _Labels()
    event = type("Event", (_Event,), {"labels": labels})
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(.., device=..) makes its tensor on the CPU and copies it where this sees it
    try:
        with mock.patch("torch.Event", event), labels:
            yield labels.asked
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
