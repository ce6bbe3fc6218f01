"""How an object in memory gets methods of ours: its class is extended, nothing is put on the object itself.

    module.__class__ = type("LlavaModel", (OurMixin, LlavaModel), {})

A method found through the class is bound to whichever object it is called on, so a copy computes with its own
weights, and a pickle names the two classes it takes to make a third. What is written on an instance instead
(``module.forward = …``) is bound to the original for good: this package does that nowhere.
"""

from __future__ import annotations

import threading
from typing import Any

_ORIGIN = "_voco_extension"
_SHALLOW = "_voco_shallow_copy"
_LOCK = threading.Lock()
_CLASSES: dict[tuple[type, type], type] = {}


class Extension:
    """Base of what a class is extended by; its instances copy and pickle as those of the class they
    extend.
    """

    @classmethod
    def members(cls, base: type) -> dict[str, Any]:
        """What the extended class has besides (a ``forward`` whose signature is the base's own, say)."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        origin = vars(type(self)).get(_ORIGIN)
        if origin is None:  # a named subclass, or a class that something else made on top of ours
            return super().__reduce_ex__(protocol)
        get = getattr(super(), "__getstate__", None)  # every object has one from Python 3.11 on
        state = vars(self) if get is None else get()
        if isinstance(state, dict) and _SHALLOW in state:  # what comes of this has submodules of its own
            state = {key: value for key, value in state.items() if key != _SHALLOW}
        return _rebuild, origin, state

    def __copy__(self) -> Any:
        made: Any = type(self).__new__(type(self))
        vars(made).update(vars(self), **{_SHALLOW: True})
        return made


def extended(base: type, mixin: type[Extension]) -> type:
    """``base`` with ``mixin`` before it, under the same name (so that a checkpoint names ``base``)."""
    with _LOCK:
        made = _CLASSES.get((base, mixin))
        if made is None:
            names = {
                "__module__": base.__module__,
                "__qualname__": base.__qualname__,
                "__doc__": base.__doc__,
            }
            made = type(
                base.__name__, (mixin, base), {**names, _ORIGIN: (base, mixin), **mixin.members(base)}
            )
            _CLASSES[base, mixin] = made
    return made


def extend(thing: Any, mixin: type[Extension]) -> None:
    """Extend the class of ``thing`` by ``mixin``, where it is not yet."""
    if not isinstance(thing, mixin):
        thing.__class__ = extended(type(thing), mixin)


def is_extended(thing: Any) -> bool:
    """Whether any extension is on ``thing``, also where another library made a class on top of it."""
    return any(_ORIGIN in vars(cls) for cls in type(thing).__mro__)


def is_shallow_copy(thing: Any) -> bool:
    """Whether ``thing`` was made by ``copy.copy``: its submodules are another's too."""
    return _SHALLOW in vars(thing)


def restore(thing: Any) -> None:
    """Give ``thing`` back the class it had before :func:`extend`.

    Raises:
        ValueError: another library has made a class on top of the extension (FSDP2 does).
    """
    origin = vars(type(thing)).get(_ORIGIN)
    if origin is None and is_extended(thing):
        raise ValueError(
            f"{type(thing).__name__} was wrapped by {type(thing).__mro__[1].__module__} after voco_plugin "
            "was "
            "attached, so its class cannot be given back; unwrap it first."
        )
    while origin is not None:
        thing.__class__ = origin[0]
        origin = vars(type(thing)).get(_ORIGIN)


def _rebuild(base: type, mixin: type[Extension]) -> Any:
    made: Any = extended(base, mixin)
    return made.__new__(made)


__all__ = ["Extension", "extend", "extended", "is_extended", "is_shallow_copy", "restore"]
