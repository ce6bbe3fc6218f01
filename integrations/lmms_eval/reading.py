"""Prompts → answers and likelihoods; every image is compressed once, whatever the number of questions.

image → key (pixels, model, rule, K) → in the store?  yes: its block
                                                      no:  compressed, and kept
prompt + the blocks of its images → ``vp.answer``, ``vp.log_likelihood``
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import voco_plugin as vp
from voco_plugin.data.images import open_image

from .answer_log import AnswerLog, log_key
from .messages import Prompt

Tick = Callable[[int], Any]


class Reader:
    """A model in one mode of ``voco eval``.

    Args:
        model: attached (also for ``base`` and ``blind``, which take VoCo off here).
        detach: gives the plain model of an attached one.
        cached: whether images are read from their blocks; else in one pass.
        shown: whether the model sees images.
        store: folder; ``None``: one of its own, deleted with this.
        answers: file of the answers so far.

    Attributes:
        compressed: images that were compressed here; those that the store had are not counted.
        asked: prompts that the model answered; those found in ``answers`` are not counted.
        tokens: that text sees of an image: K, ``None`` for all vision tokens, 0 for none.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        mode: str = "voco",
        cached: bool = True,
        shown: bool = True,
        detach: Callable[[Any], Any] | None = None,
        store: str | None = None,
        batch_size: int = 1,
        answers: str | None = None,
    ) -> None:
        self.processor, self.mode, self.cached, self.shown = processor, mode, cached, shown
        self.batch_size, self.compressed, self.asked = batch_size, 0, 0
        self.num_tokens = vp.attachment(model).config.num_tokens if mode not in ("base", "blind") else None
        self.tokens = self._tokens_seen(model)
        self.log = AnswerLog(answers)
        self._folder = None
        if store is None:
            self._folder = tempfile.TemporaryDirectory(prefix="voco_eval_", ignore_cleanup_errors=True)
            store = self._folder.name
        self.store: Any = vp.VoCoCacheStore.for_model(store, model)
        self.fingerprint = self.store.fingerprint
        self.model = model if detach is None else detach(model)

    def _tokens_seen(self, model: Any) -> int | None:
        if not self.shown:
            return 0
        isolated = self.num_tokens is not None and vp.attachment(model).config.isolates
        return self.num_tokens if isolated else None

    def answer(self, prompts: Sequence[Prompt], tick: Tick | None = None, **generate: Any) -> list[str]:
        """The answers, ``batch_size`` prompts at a time.

        Args:
            generate: ``max_new_tokens`` and the options of ``model.generate``.
        """
        out: list[str] = []
        for start in range(0, len(prompts), self.batch_size):
            part = list(prompts[start : start + self.batch_size])
            self._open(part)
            out += self._answered(part, generate)
            if tick is not None:
                tick(len(part))
        return out

    def _answered(self, prompts: list[Prompt], generate: dict[str, Any]) -> list[str]:
        known = [
            log_key([self.mode, self.num_tokens, self.fingerprint, prompt.messages, prompt.keys, generate])
            for prompt in prompts
        ]
        greedy = not generate.get("do_sample")
        found = {n: self.log.found[k] for n, k in enumerate(known) if greedy and k in self.log.found}
        new = [n for n in range(len(prompts)) if n not in found]
        for group in self._alike(prompts, new):
            talks = [prompts[n].messages for n in group]
            shown = self._shown([prompts[n] for n in group])
            said = vp.answer(
                self.model, self.processor, messages=talks, batch_size=self.batch_size, **shown, **generate
            )
            self.asked += len(group)
            for n, text in zip(group, said, strict=True):
                found[n] = text
                if greedy:
                    self.log.add(known[n], text, prompts[n].name)
        return [found[n] for n in range(len(prompts))]

    def likelihood(
        self, prompts: Sequence[Prompt], continuations: Sequence[Sequence[str]], tick: Tick | None = None
    ) -> list[list[Any]]:
        """Per prompt the ``Scored`` of each continuation; a prompt is read once."""
        out: list[list[Any]] = [[] for _ in prompts]
        for start in range(0, len(prompts), self.batch_size):
            part = list(prompts[start : start + self.batch_size])
            self._open(part)
            for group in self._alike(part, range(len(part))):
                shown = self._shown([part[n] for n in group])
                scores = vp.log_likelihood(
                    self.model, self.processor, [part[n].messages for n in group],
                    [continuations[start + n] for n in group], batch_size=self.batch_size, **shown,
                )  # fmt: skip
                for n, scored in zip(group, scores, strict=True):
                    out[start + n] = scored
                self.asked += len(group)
            if tick is not None:
                tick(len(part))
        return out

    # -- images

    def _open(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if not self.shown:
                prompt.drop_images()
            prompt.images = [open_image(image, prompt.name) for image in prompt.images]
            prompt.keys = tuple(self.store.key_of(image, self.num_tokens) for image in prompt.images)

    def _alike(self, prompts: Sequence[Prompt], numbers: Any) -> list[list[int]]:
        """Numbers of prompts that one batch takes: processors do not mix rows with and without images."""
        groups = ([n for n in numbers if bool(prompts[n].images) is has] for has in (True, False))
        return [group for group in groups if group]

    def _shown(self, prompts: list[Prompt]) -> dict[str, Any]:
        """``caches=`` or ``images=`` of prompts that all have images, or none; empty for none."""
        if not prompts[0].images:
            return {}
        if not self.cached:
            return {"images": [prompt.images for prompt in prompts]}
        pictures = {
            key: image for prompt in prompts for key, image in zip(prompt.keys, prompt.images, strict=True)
        }
        missing = self.store.missing(list(pictures))
        if missing:
            made = vp.compress_images(
                self.model, self.processor, [pictures[key] for key in missing], num_tokens=self.num_tokens,
                batch_size=self.batch_size,
            )  # fmt: skip
            self.store.put_many(zip(missing, made, strict=True))
            self.compressed += len(missing)
        listed = list(pictures)
        device = next(self.model.parameters()).device
        blocks = dict(zip(listed, self.store.get_many(listed, device), strict=True))
        return {"caches": [vp.VoCoCache.cat([blocks[key] for key in prompt.keys]) for prompt in prompts]}

    def close(self) -> None:
        """Close files; a store of its own is deleted."""
        self.log.close()
        self.store.close()
        if self._folder is not None:
            self._folder.cleanup()
