"""A model and its processor as they were given, to give back where something stops half-way.

Attaching, and a trainer's constructor of three libraries, change a model in many places: classes,
submodules, parameters, hooks, settings, what trains. What each of them undoes of its own leaves out what it
was stopped in the middle of; so all that a module holds is noted first, and put back whole.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch

from ..core.layout import tokenizer_of
from .token_rows import remove_token

_HOLDS = (dict, list, set)
"""What a module keeps in its attributes that is changed in place: submodules, parameters, hooks, names."""


@contextlib.contextmanager
def as_given_on_failure(model: torch.nn.Module, processor: Any = None) -> Iterator[None]:
    """Where the block raises, an interrupt included, ``model`` and ``processor`` are as they were.

    Noted are each module's class and attributes, the parameters' tensors, ``requires_grad`` and hooks, and
    the configs: references, so it costs no memory to speak of. Values that are written into a tensor in
    place are the writer's to put back (:func:`~voco_plugin.models.token_rows.make_rows` does).
    """
    given = _Modules(model), _Processor(processor)
    try:
        yield
    except BaseException:
        for part in given:
            part.put_back()
        raise


class _Modules:
    def __init__(self, model: torch.nn.Module) -> None:
        self.modules = [(module, type(module), _attributes(module)) for module in model.modules()]
        self.parameters = [
            (parameter, parameter.data, parameter.requires_grad, dict(parameter._backward_hooks or {}))
            for parameter in model.parameters()
        ]
        names = ("config", "generation_config")
        found = [vars(module).get(name) for module in model.modules() for name in names]
        self.configs = [(config, copy.deepcopy(vars(config))) for config in _with_parts(found)]

    def put_back(self) -> None:
        for module, kind, attributes in self.modules:
            if type(module) is not kind:
                module.__class__ = kind
            _put_attributes(module, attributes)
        for parameter, data, trained, hooks in self.parameters:
            if not hasattr(parameter, "ds_id") and parameter.data.data_ptr() != data.data_ptr():
                parameter.data = data  # transformers makes a longer matrix under the same parameter
            parameter.requires_grad_(trained)
            if parameter._backward_hooks:
                _fill(parameter._backward_hooks, hooks)
        for config, content in self.configs:
            own = vars(config)
            for key in own.keys() - content.keys():
                del own[key]
            for key, value in content.items():
                if not hasattr(value, "to_dict"):  # a part's own entry in the list gives back what it holds
                    own[key] = value


def _attributes(thing: Any) -> dict[str, tuple[Any, Any]]:
    """Each attribute and, where it is changed in place, what it holds."""
    return {
        key: (value, copy.copy(value) if isinstance(value, _HOLDS) else None)
        for key, value in vars(thing).items()
    }


def _put_attributes(thing: Any, attributes: dict[str, tuple[Any, Any]]) -> None:
    own = vars(thing)
    for key in own.keys() - attributes.keys():
        del own[key]
    for key, (value, content) in attributes.items():
        own[key] = value
        if content is not None:
            _fill(value, content)


def _fill(holder: Any, content: Any) -> None:
    holder.clear()
    holder.extend(content) if isinstance(holder, list) else holder.update(content)


def _with_parts(configs: list[Any]) -> list[Any]:
    """Each config once, and those inside it."""
    seen: dict[int, Any] = {}
    while configs:
        config = configs.pop()
        if config is not None and hasattr(config, "to_dict") and id(config) not in seen:
            seen[id(config)] = config
            configs.extend(vars(config).values())
    return list(seen.values())


class _Processor:
    """A processor and its tokenizer: what they hold, and which tokens were added (a fast tokenizer is written
    in Rust: it is not copied, the new tokens are taken out of it).
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        things = [] if processor is None else [processor, tokenizer_of(processor)]
        self.attributes = [(thing, _attributes(thing)) for thing in things if hasattr(thing, "__dict__")]
        self.added = self._added()

    def put_back(self) -> None:
        new = self._added() - self.added
        for thing, attributes in self.attributes:
            _put_attributes(thing, attributes)
        for token in new:
            remove_token(self.processor, token)

    def _added(self) -> set[str]:
        get = getattr(tokenizer_of(self.processor), "get_added_vocab", None)
        return set() if get is None else set(get())
