"""What a study's YAML may say, checked before anything runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ...config import nearest
from .checks import choice, flatten, from_mapping, text, whole, wholes

BOUNDS = ("upper", "lower", "blind", "base")
MODES = ("voco", "single", "base", "lower", "blind")
RESAMPLED = ("questions", "images")


@dataclasses.dataclass
class EvalSet:
    """A set of questions.

    Args:
        data: LLaVA JSON, ``datasets`` folder or hub id.
        image_folder: where the image names of a LLaVA file start.
        split: of a set that has splits.
        turns: each question is asked after the turns of its conversation before it.
        text_before: a text, or a file of one, that stands before the image.
        limit: the questions of the first so many images alone.
    """

    data: str
    image_folder: str | None = None
    split: str | None = None
    turns: bool = False
    text_before: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("data", "image_folder", "split", "text_before"):
            text(name, getattr(self, name))
        if not isinstance(self.turns, bool):
            raise ValueError(f"turns={self.turns!r} must be true or false.")
        whole("limit", self.limit)


@dataclasses.dataclass
class Method:
    """One line of the comparison: overrides of the recipe, and how what they train is read.

    Args:
        name: as the YAML calls it.
        overrides: keys of the recipe, dotted.
        bound: ``upper`` (trained with ``voco.rule: causal``, read causally), ``lower`` (the upper bound's
            checkpoint read through the isolation mask; paper, Sec. 4.2), ``base`` (the base model, on every
            vision token, untrained here), ``blind`` (the base model without the image).
        mode: of ``voco eval``; ``None`` takes ``voco``, for a bound the bound's own.
        num_tokens: K's of this method, in place of the study's.
        eval_num_tokens: K's at which one training is read (paper, Table 4), in place of the study's.
        seeds: in place of the study's.
        tuned_as: the method whose search this one takes its values from, in place of a search of its own.
        label: what tables and plots call it.
    """

    name: str
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    bound: str | None = None
    mode: str | None = None
    num_tokens: list[int] | None = None
    eval_num_tokens: list[int] | None = None
    seeds: list[int] | None = None
    tuned_as: str | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        choice("bound", self.bound, BOUNDS)
        choice("mode", self.mode, MODES)
        text("label", self.label)
        text("tuned_as", self.tuned_as)
        self.num_tokens = wholes("num_tokens", self.num_tokens)
        self.eval_num_tokens = wholes("eval_num_tokens", self.eval_num_tokens)
        self.seeds = wholes("seeds", self.seeds, 0)
        if self.bound in ("lower", "base", "blind") and self.overrides:
            raise ValueError(
                f"bound={self.bound!r} trains nothing, so it takes no override; leave out "
                f"{', '.join(self.overrides)}."
            )
        if self.bound in ("base", "blind") and (self.num_tokens or self.eval_num_tokens or self.seeds):
            raise ValueError(
                f"bound={self.bound!r} is the base model without VoCo tokens, read once: it has neither "
                "num_tokens nor seeds."
            )
        if self.tuned_as and not self.trains:
            raise ValueError(f"bound={self.bound!r} trains nothing; leave tuned_as={self.tuned_as!r} out.")
        if self.bound and self.mode:
            raise ValueError(f"bound={self.bound!r} says how it is read; leave mode={self.mode!r} out.")

    @property
    def trains(self) -> bool:
        return self.bound in (None, "upper")

    @property
    def read_as(self) -> str:
        """The mode of ``voco eval``."""
        return {"upper": "single", None: self.mode or "voco"}.get(self.bound, self.bound or "voco")

    @property
    def shown(self) -> str:
        return self.label or self.name

    @classmethod
    def parse(cls, name: str, values: Any) -> Method:
        """A method of the YAML: its own keys, next to the recipe's."""
        where = f"methods.{name}"
        values = {} if values is None else values
        if not isinstance(values, Mapping):
            raise ValueError(f"{where}={values!r} must be a section of the recipe's keys, or empty.")
        own = {f.name for f in dataclasses.fields(cls)} - {"name", "overrides"}
        more = {k: v for k, v in values.items() if k not in own and k != "overrides"}
        overrides = flatten(values.get("overrides"), f"{where}.overrides") | flatten(more, where)
        return from_mapping(
            cls, {"name": name, "overrides": overrides, **{k: values[k] for k in own if k in values}}, where
        )


@dataclasses.dataclass
class Search:
    """A small search, the same for every method that trains: the best value on validation data is used.

    Args:
        over: recipe key → values; every combination is tried.
        last: the last so many rows of the training set are for validation: no run of the study trains on
            them. Or
        data: a set of its own (with ``image_folder``).
        seed: of the runs that are tried.
        num_tokens: the K at which they are tried; ``None``: the method's first. The choice holds for every K.
        overrides: of the runs that are tried (fewer steps, say).
    """

    over: dict[str, list[Any]]
    last: int | None = None
    data: str | None = None
    image_folder: str | None = None
    seed: int = 0
    num_tokens: int | None = None
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.over, Mapping) or not self.over:
            raise ValueError(f"over={self.over!r} must name keys of the recipe, each with a list of values.")
        self.over = flatten(self.over, "over")
        for key, values in self.over.items():
            if not isinstance(values, list) or len(values) < 2:
                raise ValueError(f"over.{key}={values!r} must be a list of at least two values.")
        whole("last", self.last)
        whole("seed", self.seed, 0)
        whole("num_tokens", self.num_tokens)
        text("data", self.data)
        text("image_folder", self.image_folder)
        if (self.last is None) == (self.data is None):
            raise ValueError(
                "give one of last (rows at the end of the training set) and data (a set of its own): values "
                "are never chosen on the test set."
            )
        self.overrides = flatten(self.overrides, "overrides")


@dataclasses.dataclass
class Study:
    """A study's keys.

    Args:
        recipe: a path, or the name of a shipped recipe.
        eval_data: the test set; or several, ``name: {data:, …}``, keys of :class:`EvalSet`.
        methods: name → overrides of the recipe and keys of :class:`Method`.
        model: the base; ``None`` takes the recipe's.
        data: the training set; ``None`` takes the recipe's.
        image_folder: of ``data``, and of the sets that name none; ``None`` takes the recipe's.
        overrides: of the recipe, for every method.
        seeds: each method is trained with each.
        num_tokens: the K's (``voco.num_tokens``) that each method is trained with.
        eval_num_tokens: read each training at these K's too (paper, Table 4).
        curve: optimizer steps whose checkpoints are read as well.
        curve_images: the first so many images of the test set only, for the curve.
        search: see :class:`Search`.
        max_new_tokens: length of an answer.
        batch_size: prompts at a time while reading.
        reference: the method that the others are compared with; ``None``: the first that is not a bound.
        resample: what the bootstrap draws, ``questions`` or ``images`` with all their questions.
    """

    recipe: str
    eval_data: Any
    methods: dict[str, Method]
    model: str | None = None
    data: str | None = None
    image_folder: str | None = None
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0])
    num_tokens: list[int] = dataclasses.field(default_factory=lambda: [1])
    eval_num_tokens: list[int] | None = None
    curve: list[int] | None = None
    curve_images: int | None = None
    search: Search | None = None
    max_new_tokens: int = 16
    batch_size: int = 32
    reference: str | None = None
    resample: str = "questions"

    def __post_init__(self) -> None:
        for name in ("recipe", "model", "data", "image_folder"):
            text(name, getattr(self, name))
        self.overrides = flatten(self.overrides, "overrides")
        self.seeds = wholes("seeds", self.seeds, 0) or [0]
        self.num_tokens = wholes("num_tokens", self.num_tokens) or [1]
        self.eval_num_tokens = wholes("eval_num_tokens", self.eval_num_tokens)
        self.curve = wholes("curve", self.curve)
        self.curve = sorted(self.curve) if self.curve else None
        whole("curve_images", self.curve_images)
        whole("max_new_tokens", self.max_new_tokens)
        whole("batch_size", self.batch_size)
        choice("resample", self.resample, RESAMPLED)
        if self.search is not None and not isinstance(self.search, Search):
            self.search = from_mapping(Search, self.search, "search")
        self.eval_data = self._eval_sets(self.eval_data)
        self.methods = self._methods(self.methods)
        choice("reference", self.reference, self.methods)

    def _eval_sets(self, given: Any) -> dict[str, EvalSet]:
        named = {"test": {"data": given}} if isinstance(given, str) else given
        if not isinstance(named, Mapping) or not named:
            raise ValueError(f"eval_data={given!r} must be a set, or `name: {{data: …}}` lines.")
        return {str(k): from_mapping(EvalSet, v, f"eval_data.{k}") for k, v in named.items()}

    def _methods(self, given: Any) -> dict[str, Method]:
        if not isinstance(given, Mapping) or not given:
            raise ValueError("methods is empty: name at least one, as in `methods: {voco: {}}`.")
        methods = {str(name): Method.parse(str(name), values) for name, values in given.items()}
        uppers = [m.name for m in methods.values() if m.bound == "upper"]
        if len(uppers) > 1:
            raise ValueError(f"methods {' and '.join(uppers)} are both bound: upper; there is one.")
        for method in methods.values():
            tuned = [m.name for m in methods.values() if m.trains and m.tuned_as is None]
            if method.tuned_as is not None and method.tuned_as not in tuned:
                raise ValueError(
                    f"methods.{method.name}: tuned_as={method.tuned_as!r} is no method with a search of its "
                    f"own{nearest(method.tuned_as, tuned)}; use one of {', '.join(tuned)}."
                )
            if method.bound == "lower" and not uppers:
                raise ValueError(
                    f"methods.{method.name}: bound: lower reads the upper bound's checkpoint, and no method "
                    "is bound: upper; add one."
                )
        return methods

    @property
    def upper(self) -> Method | None:
        return next((m for m in self.methods.values() if m.bound == "upper"), None)

    @property
    def compared_with(self) -> str | None:
        """The method that differences are taken to."""
        return self.reference or next((m.name for m in self.methods.values() if m.bound is None), None)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Study:
        """The study of a YAML's values.

        Raises:
            ValueError: a key is unknown or missing, or a value is wrong; the message names it.
        """
        return from_mapping(cls, values, "study")
