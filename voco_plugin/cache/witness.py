"""A few values of every weight, read together: whether any was written to without a word.

``tensor.data.copy_(…)`` moves no version counter; swaps of averaged weights, PEFT's ``hotswap_adapter`` and
``merge_adapter`` write so. A witness holds 32 values of each tensor, spread over it (all of a small
one), and all is the same as long as these are. One pass over 7B's 700 tensors gathers 40 kB.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_VALUES, _WHOLE = 32, 256
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_AT_ADDRESS = getattr(torch._C, "_construct_storage_from_data_pointer", None)


class Witness:
    """Of ``tensors`` as they read now. It keeps none of them in memory.

    A view a tensor would hold on to the memory that the tensor had, and building 700 of them anew takes
    longer than reading them. So on CPU and CUDA a view is made of the address alone; it is read only while
    the tensor is still there and still has that address.

    Args:
        tensors: weights; those without values (on ``meta``, empty) are left out, and so are those whose
            values lie in other tensors (torchao's quantized ones, and FSDP2's, of which all processes would
            have to find the same).
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.read = [number for number, tensor in enumerate(tensors) if _is_read(tensor)]
        self.places = self._places(tensors)
        self.views: dict[tuple, list[torch.Tensor]] = {}
        self.others: list[int] = []
        for number in self.read:
            view = _view_at_address(tensors[number])
            if view is None:
                self.others.append(number)
            else:
                self.views.setdefault((view.device, view.dtype), []).append(view)
        self.values = self._gathered(tensors)

    def same(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether ``tensors``, the same ones, hold what they held; one wait for each device and size of
        value.
        """
        if self._places(tensors) != self.places:
            return False  # moved: the addresses of the views are no longer theirs
        found = self._gathered(tensors)
        return all(torch.equal(now, known) for now, known in zip(found, self.values, strict=True))

    def _places(self, tensors: Sequence[torch.Tensor]) -> list[int]:
        return [tensors[number].data_ptr() for number in self.read]

    def _gathered(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        others: dict[tuple, list[torch.Tensor]] = {}
        for number in self.others:
            view = _view(tensors[number])
            others.setdefault((view.device, view.dtype), []).append(view)
        return [torch.cat(group) for group in (*self.views.values(), *others.values())]


def _is_read(tensor: torch.Tensor) -> bool:
    return tensor.numel() > 0 and not (tensor.is_meta or is_traceable_wrapper_subclass(tensor))


def _sample(tensor: torch.Tensor) -> tuple[int, int]:
    """How many values of a contiguous tensor, and how far apart: an odd step meets every column."""
    step = 1 if tensor.numel() <= _WHOLE else (tensor.numel() // _VALUES) | 1
    return (tensor.numel() - 1) // step + 1, step


def _view(tensor: torch.Tensor) -> torch.Tensor:
    """Its sampled values, as whole numbers of their size: values that are not finite compare, too."""
    flat = tensor.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    count, step = _sample(flat)
    return flat.view(_BITS[flat.element_size()])[::step][:count]


def _view_at_address(tensor: torch.Tensor) -> torch.Tensor | None:
    """:func:`_view` of a tensor's address; ``None`` where there is no such way to its values."""
    plain = tensor.is_contiguous() and type(tensor.data) is torch.Tensor and not tensor.is_complex()
    if not plain or _AT_ADDRESS is None or tensor.device.type not in ("cpu", "cuda"):
        return None
    count, step = _sample(tensor)
    size = tensor.numel() * tensor.element_size()
    storage = _AT_ADDRESS(tensor.data_ptr(), tensor.device, size)
    empty = torch.empty(0, dtype=_BITS[tensor.element_size()], device=tensor.device)
    return empty.set_(storage, 0, (count,), (step,))
