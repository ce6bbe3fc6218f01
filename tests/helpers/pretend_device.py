"""A pretend device: an accelerator made in Python, that runs whole models on the CPU and watches what crosses
between it and the host.

    with pretend_device() as device:
        model.to(device)
        with recorded() as waits:
            model(**to(batch, device))          # raises MixedDevices where an op has tensors of both sides
        waits.reads, waits.copies               # how often the host waited, and for what

What it tells that a CPU cannot: that nothing mixes devices, and how often the host waits for the device. What
it cannot tell: speed, memory, the results of other kernels. Attention runs as `SDPBackend.MATH` does, so
results equal those of a CPU under `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` bit for bit.

A tensor of the device is a `torch.Tensor` subclass that holds a CPU tensor and says it is on `pretend:0`; a
dispatch mode does the rest. Rules are CUDA's:

| | counted as |
|---|---|
| `.item()`, `int(t)`, `bool(t)`, `.cpu()`, `.tolist()`, `torch.equal` | a read |
| `nonzero`, a boolean index, `masked_select`, `unique`, `bincount`: shapes that depend on values | a read |
| `cpu.to(device)`, `torch.tensor(list, device=device)`, a CPU tensor as an index | a copy |
| the same with `non_blocking=True` | an asynchronous copy: nobody waits |
| `x[mask] = 0`, a Python number or a CPU scalar in a pointwise op | nothing |
| any other op on both sides | `MixedDevices` |

A copy from ordinary memory makes the host wait as a read does: both are *waits*.

Once registered, the device stays for the life of the process, which few parts of torch notice while it is not
in use (`torch.accelerator.current_accelerator()` names it); `conftest.py` runs these tests last.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map

NAME = "pretend"
_HOOK = "_setup_privateuseone_for_python_backend"
_aten = torch.ops.aten


def unavailable() -> str | None:
    """Why this torch can have no pretend device, or ``None`` where it can."""
    if not hasattr(backend_registration, _HOOK):
        return f"torch {torch.__version__} has no torch.utils.backend_registration.{_HOOK}"
    taken = torch._C._get_privateuse1_backend_name()
    if taken not in ("privateuseone", NAME):
        return f"another backend, {taken!r}, has the place of the pretend device in this process"
    return None


# -- what crosses


class Frame(NamedTuple):
    """A line of code. ``file`` starts at its package: ``transformers/masking_utils.py``."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}"


class Wait(NamedTuple):
    """Something that crossed between device and host.

    Attributes:
        kind: ``read`` (device to host), ``copy`` (host to device) or ``async`` (a copy that nobody waits
            for).
        op: how: ``item``, ``cpu``, ``tolist``, ``nonzero``, ``to``, ``tensor`` …
        where: the innermost line outside torch. In a backward pass, of an op without Python code of its own:
            the line of the forward that made it, where ``recorded(forward_lines=True)`` says so.
        ours: the innermost line inside voco_plugin, ``None`` where there is none. It is ``where`` itself, or
            what called upstream's code.
        backward: whether it is one of those ops of a backward pass.
    """

    kind: str
    op: str
    where: Frame
    ours: Frame | None
    backward: bool = False

    def __str__(self) -> str:
        caller = "" if self.ours in (None, self.where) else f"  <- {self.ours}"
        return f"{self.kind} {self.op}  {'(backward) ' if self.backward else ''}{self.where}{caller}"


@dataclass
class Waits:
    """What crossed while it was recorded, in order."""

    events: list[Wait] = field(default_factory=list)

    def count(self, *kinds: str) -> int:
        return sum(event.kind in kinds for event in self.events)

    @property
    def reads(self) -> int:
        return self.count("read")

    @property
    def copies(self) -> int:
        """Copies that the host waits for."""
        return self.count("copy")

    @property
    def total(self) -> int:
        return self.count("read", "copy")

    def lines(self) -> Counter[Wait]:
        """How often each line waited."""
        return Counter(self.events)


class MixedDevices(RuntimeError):
    """An op had tensors of the device and of the host; the message names it and its line."""


_recording: list[Waits] = []
_TORCH = str(Path(torch.__file__).parent) + os.sep
_HERE = str(Path(__file__))
_PACKAGE = f"{os.sep}voco_plugin{os.sep}"
_FORWARD = re.compile(r'File "(.+)", line (\d+), in (.+)')


@cache
def _short(path: str) -> str:
    """A file's path from its package on."""
    for mark in ("site-packages", "dist-packages"):
        if mark in path:
            return path.rpartition(f"{mark}{os.sep}")[2]
    parts = Path(path).parts
    for package in ("voco_plugin", "tests", "benchmarks"):
        if package in parts:
            return str(Path(*parts[len(parts) - 1 - parts[::-1].index(package) :]))
    return Path(path).name


def _stack() -> list[tuple[str, int, str]]:
    """The Python lines that led here, innermost first."""
    found, frame = [], sys._getframe(2)
    while frame is not None:
        found.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return found


def _made_in_forward() -> list[tuple[str, int, str]]:
    """The lines that made the autograd node that runs now, innermost first; none where they are not known."""
    node = torch._C._current_autograd_node()
    lines = [] if node is None else node.metadata.get("traceback_", [])
    made = [_FORWARD.search(line) for line in lines]
    return [(m[1], int(m[2]), m[3]) for m in reversed(made) if m]


def _tells(entry: tuple[str, int, str]) -> bool:
    """Whether a line is neither torch's nor this file's."""
    return not (entry[0].startswith((_TORCH, "<")) or entry[0] == _HERE)


def _frames() -> tuple[Frame, Frame | None, bool]:
    """Innermost line outside torch, innermost line inside voco_plugin, and whether both are the forward's."""
    stack, backward = [], False
    for entry in _stack():
        if entry[2] == "_engine_run_backward" and not stack:
            stack = [made for made in _made_in_forward() if _tells(made)]
            backward = True
            if stack:
                break
        if _tells(entry):
            stack.append(entry)
    lines = [Frame(_short(file), line, function) for file, line, function in stack]
    inside = [f for f, (file, _, _) in zip(lines, stack, strict=True) if _PACKAGE in file]
    return lines[0], inside[0] if inside else None, backward


def _crossed(kind: str, op: str, times: int = 1, size: int = 1) -> None:
    if not _recording or not size:  # nothing waits for a copy of nothing
        return
    event = Wait(kind, op, *_frames())
    for waits in _recording:
        waits.events += [event] * times


@contextlib.contextmanager
def recorded(forward_lines: bool = False) -> Iterator[Waits]:
    """Record inside the block.

    Args:
        forward_lines: keep the line of every op of a forward, so that what waits in its backward pass is
            known by it. Slow.
    """
    waits = Waits()
    _recording.append(waits)
    try:
        with contextlib.ExitStack() as stack:
            if forward_lines:
                stack.enter_context(torch.autograd.set_detect_anomaly(True, check_nan=False))
            yield waits
    finally:
        _recording.remove(waits)


# -- the tensor


class PretendTensor(torch.Tensor):
    """A CPU tensor, ``held``, that says it is on the device."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> PretendTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=torch.device(NAME, 0),
        )  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    # with these two, `Module.to` swaps what a parameter holds, so that it stays what it was: tied, for one
    def __tensor_flatten__(self):
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, outer_size, outer_stride):
        return PretendTensor(inner["held"])

    def __repr__(self) -> str:
        return f"PretendTensor({self.held!r})"

    # what torch's C++ does without the dispatcher

    def tolist(self):
        _crossed("read", "tolist", size=self.numel())
        return self.held.tolist()

    def as_subclass(self, cls):
        return _both(cls)(self.held)

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.held = value.held

    def numpy(self, *, force: bool = False):
        if force:
            return self.detach().cpu().numpy()
        raise TypeError("can't convert a tensor of the pretend device to numpy. Use Tensor.cpu() first.")

    def __array__(self, *args):
        return self.numpy()

    def new_tensor(self, data, *, dtype=None, device=None, requires_grad=False):
        made = torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device)
        return made.requires_grad_(requires_grad)

    def __getitem__(self, key):
        return super().__getitem__(_indices(key))

    def __setitem__(self, key, value):
        if isinstance(value, bool | int | float):  # CUDA's bindings keep a number on the host
            value = torch.tensor(value, dtype=self.dtype)
        super().__setitem__(_indices(key), value)


@cache
def _both(cls: type) -> type[PretendTensor]:
    """A kind of tensor, on the device."""
    return type(cls.__name__, (cls, PretendTensor), {})


def _indices(key: Any) -> Any:
    """``key`` with its lists and arrays as tensors of the device, as CUDA's bindings make them."""
    if isinstance(key, tuple):
        return tuple(_indices(k) if isinstance(k, list | np.ndarray) else k for k in key)
    return torch.tensor(key, device=NAME) if isinstance(key, list | np.ndarray) else key


def _is_here(value: Any) -> bool:
    return isinstance(value, PretendTensor)


def to(given: Any, device: Any) -> Any:
    """A tree (dicts, lists …) with its tensors on ``device``."""
    return tree_map(lambda v: v.to(device) if isinstance(v, torch.Tensor) else v, given)


def held(tree: Any) -> Any:
    """A tree with the CPU tensors that its tensors hold, for comparisons: nothing is counted."""
    return tree_map(lambda v: v.detach().held if _is_here(v) else v, tree)


# -- the rules

_BY_VALUE = {
    _aten.nonzero: 1,
    _aten.masked_select: 1,
    _aten._unique2: 1,
    _aten.unique_dim: 1,
    _aten.unique_consecutive: 1,
    _aten.unique_dim_consecutive: 1,
    _aten.bincount: 2,  # the least and the largest
    _aten.equal: 1,
    _aten.multinomial: 1,  # its check of the probabilities
}
"""Ops whose CUDA kernels wait for a value, and how often."""
_TO_HOST = (_aten._local_scalar_dense.default, _aten.equal.default, _aten._fused_sdp_choice.default)
"""Ops that give no tensor of the device."""
_HOST_SCALARS = (
    _aten.masked_fill, _aten.masked_fill_, _aten.fill, _aten.fill_, _aten.index_fill, _aten.index_fill_,
)  # fmt: skip
"""Ops beside the pointwise ones that take a CPU tensor without dimensions."""
_INDEX = (_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_, _aten._unsafe_index,
          _aten._unsafe_index_put)  # fmt: skip


_LAZY = {_aten._conj: torch.conj_physical, _aten._neg_view: torch.neg}
"""Ops that leave a note on their tensor, which kernels called from here would not read, and what does the
work."""


def _check_one_side(func: Any, args: tuple, kwargs: dict) -> None:
    """Raise where ``func`` has tensors of both sides that CUDA would not take together."""
    leaves = _tensors(args, kwargs)
    host = [v for v in leaves if not _is_here(v)]
    if not host or len(host) == len(leaves):
        return
    packet = func.overloadpacket
    if packet in (_aten.copy_, _aten._to_copy):
        return
    if packet in _INDEX and _is_here(args[0]):  # indices, and a value without dimensions, may be the host's
        value = args[2] if len(args) > 2 else None
        if not isinstance(value, torch.Tensor) or _is_here(value) or value.dim() == 0:
            return
    written = packet.__name__.endswith("_") and not _is_here(args[0])
    if (torch.Tag.pointwise in func.tags or packet in _HOST_SCALARS) and not written:
        if all(value.dim() == 0 for value in host):
            return
    shapes = ", ".join(f"{v.device}{list(v.shape)}" for v in leaves)
    raise MixedDevices(f"{packet.__name__} on both devices: {shapes}, at {_frames()[0]}")


def _count(func: Any, args: tuple, kwargs: dict) -> None:
    """Note what ``func`` makes the host wait for; some of its tensors are on the device."""
    packet = func.overloadpacket
    name = packet.__name__
    if packet is _aten._local_scalar_dense:
        _crossed("read", "item")
    elif packet in _BY_VALUE:
        _crossed("read", name, _BY_VALUE[packet])
    elif packet is _aten.repeat_interleave and func._overloadname == "Tensor":
        if kwargs.get("output_size") is None:
            _crossed("read", name)
    elif packet is _aten.isin and len(tensors := [v for v in args if _is_here(v)]) == 2:
        elements, tests = (v.numel() for v in tensors)
        if tests >= 10 * elements**0.145:  # CUDA then sorts, by way of unique
            _crossed("read", name)
    elif packet in (_aten.masked_fill, _aten.masked_fill_, _aten.index_fill, _aten.index_fill_):
        if _is_here(args[-1]) and args[-1].dim() == 0:  # its kernel takes the value as a number
            _crossed("read", name)
    elif packet in _INDEX:
        _count_index(packet, args, kwargs)


def _count_index(packet: Any, args: tuple, kwargs: dict) -> None:
    """Indices: those of the host are copied, boolean ones are looked for; a number under one mask is filled
    in."""
    indices = [i for i in args[1] if i is not None]
    masks = [i for i in indices if i.dtype in (torch.bool, torch.uint8)]
    value = args[2] if len(args) > 2 else None
    accumulate = kwargs.get("accumulate", args[3] if len(args) > 3 else False)
    if (
        value is not None
        and value.numel() == 1
        and masks
        and len(masks) == len(indices) == 1
        and not accumulate
    ):
        if _is_here(value):
            _crossed("read", "masked_fill")
        return
    for index in indices:
        if not _is_here(index):
            _crossed("copy", "host index", size=index.numel())
        elif index.dtype in (torch.bool, torch.uint8):
            _crossed("read", "boolean index")
    if value is not None and not _is_here(value):
        _crossed("copy", "host value")


def _tensors(args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """The tensors among an op's arguments."""
    found = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [v for v in value if isinstance(v, torch.Tensor)]
    return found


def _on_host(value: Any) -> Any:
    """What the CPU runs instead of ``value``."""
    if _is_here(value):
        return value.held
    if isinstance(value, list | tuple):
        return type(value)(_on_host(v) for v in value)
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return value


def _wrapped(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_wrapped(v) for v in value)
    return PretendTensor(value) if isinstance(value, torch.Tensor) and not _is_here(value) else value


@cache
def _aliases(func: Any) -> bool:
    """Whether an op gives a view of its arguments, or writes to them."""
    return any(value.alias_info is not None for value in (*func._schema.arguments, *func._schema.returns))


def _run(func: Any, args: tuple, kwargs: dict) -> Any:
    """One op: on the CPU, its results on the device where its tensors or its ``device`` are."""
    here = any(_is_here(v) for v in _tensors(args, kwargs))
    device = kwargs.get("device")
    goes = here if device is None else device.type == NAME
    packet = func.overloadpacket
    if packet is _aten._pin_memory:  # there is no such memory here
        return args[0].clone()
    if not here and not goes:
        return func(*args, **kwargs)
    if here:
        _check_one_side(func, args, kwargs)
        _count(func, args, kwargs)
    if packet is _aten._to_copy:
        _count_copy(args[0], goes, kwargs.get("non_blocking", False))
    elif packet is _aten.copy_:
        _count_copy(args[1], _is_here(args[0]), kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
    elif packet in _LAZY:
        return PretendTensor(_LAZY[packet](args[0].held))
    out = func(*_on_host(args), **{name: _on_host(value) for name, value in kwargs.items()})
    if packet is _aten.copy_:
        return args[0]
    if func in _TO_HOST or not goes:
        return out
    out = _wrapped(out)
    return return_and_correct_aliasing(func, args, kwargs, out) if here and _aliases(func) else out


def _count_copy(source: torch.Tensor, to_device: bool, non_blocking: bool) -> None:
    """Note a copy of ``source`` where it crosses; one to the host is waited for whoever asks for it."""
    if _is_here(source) == to_device:
        return
    kind = "read" if not to_device else "async" if non_blocking else "copy"
    _crossed(kind, "to device" if to_device else "to host", size=source.numel())


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


# -- the device


class _Module:
    """``torch.pretend``. It is available inside :func:`pretend_device` only, so that nothing else uses it."""

    used = 0
    __name__ = f"torch.{NAME}"  # as a module has: transformers' continuous batching asks for it

    def is_available(self) -> bool:
        return self.used > 0

    def is_initialized(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1 if self.used else 0

    def device(self, index: Any) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    # random numbers are the CPU's

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.zeros(0, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        pass


@cache
def _register() -> _Module:
    module = _Module()
    getattr(backend_registration, _HOOK)(NAME, backend_module=module)
    return module


def _made_from_data(stock: Any) -> Any:
    """``torch.tensor`` and its like: torch fills them below the dispatcher."""

    def make(data: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(data, torch.Tensor):
            return stock(data, *args, **kwargs)
        data = tree_map(lambda v: v.item() if _is_here(v) else v, data)
        device = kwargs.get("device")
        if device is None or torch.device(device).type != NAME:
            return stock(data, *args, **kwargs)
        grad = kwargs.pop("requires_grad", False)
        made = PretendTensor(stock(data, *args, **{**kwargs, "device": "cpu"}))
        _crossed("copy", stock.__name__, size=made.numel())
        return made.requires_grad_(grad)

    return make


@contextlib.contextmanager
def _patched() -> Iterator[None]:
    """What goes past the dispatcher, for the time of a block."""
    with contextlib.ExitStack() as stack:
        for name in ("tensor", "as_tensor", "asarray"):
            stack.callback(setattr, torch, name, getattr(torch, name))
            setattr(torch, name, _made_from_data(getattr(torch, name)))
        # weak references to a parameter mean the parameter on its new device too, as they do where CUDA moves
        # one; `torch.utils.swap_tensors` asks for them only to refuse
        stack.callback(setattr, torch.utils, "weakref", torch.utils.weakref)
        torch.utils.weakref = types.SimpleNamespace(getweakrefs=lambda tensor: [])
        yield


@contextlib.contextmanager
def pretend_device() -> Iterator[torch.device]:
    """The device, in use inside the block; its tensors live on, and run wherever they are.

    Raises:
        RuntimeError: this torch cannot have one.
    """
    why = unavailable()
    if why is not None:
        raise RuntimeError(why)
    module = _register()
    module.used += 1
    try:
        # device threads of autograd are as many as there were devices when the first backward pass ran, and
        # Python's stack would not show who called it
        with torch.autograd.set_multithreading_enabled(False), _Mode(), _patched():
            yield torch.device(NAME, 0)
    finally:
        module.used -= 1
