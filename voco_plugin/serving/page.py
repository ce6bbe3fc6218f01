"""The Gradio page: drop an image or a short video, ask, see what the cache saves.

page = build_page(model, processor, plain=load_plain, examples=[("a.png", "What is at b2?")])
page.launch()

Each browser has a conversation of its own (:class:`~voco_plugin.serving.picture_chat.PictureChat`); the model
is shared and works for one at a time. Nothing of a conversation is kept on disk but the images that Gradio
itself stores for its page.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from ..data.images import open_image
from .page_words import added_line, costs_table, read_table
from .picture_chat import Answered, PictureChat

_KEEP_SECONDS = 3600
"""A browser's conversation, and the files it gave, are forgotten after so long without it."""
USER_ERRORS = (ValueError, OSError, ImportError)


def _as_file(image: gr.Image) -> gr.Image:
    """Its image as the file that was dropped: it is opened by the package's own opener, which says in words
    what is wrong with a broken one. Gradio would open it first, and fail without a word. On the instance, as
    Gradio writes a stub file beside the module of every subclass.
    """
    vars(image)["preprocess"] = lambda payload: None if payload is None else payload.path
    return image


@dataclass
class _Talk:
    """One browser's conversation.

    Attributes:
        chat: what the model knows of it.
        log: what the page shows of it.
        turns: how many answers are in the log.
    """

    chat: PictureChat
    log: list[dict[str, Any]] = field(default_factory=list)
    turns: int = 0


class _Page:
    """The handlers of one page: each takes and gives what its components hold.

    Args:
        plain: gives the model without VoCo; ``None``: there is nothing to compare with.
    """

    def __init__(
        self, model: Any, processor: Any, plain: Callable[[], Any] | None, max_new_tokens: int
    ) -> None:
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        self.lock = threading.Lock()
        self._make_plain = plain
        self._plain: Any = None

    def _talk(self, num_tokens: int) -> _Talk:
        chat = PictureChat(
            self.model, self.processor, num_tokens=int(num_tokens), max_new_tokens=self.max_new_tokens,
            lock=self.lock,
        )  # fmt: skip
        return _Talk(chat)

    def _shown(self, talk: _Talk) -> tuple[Any, ...]:
        """What a conversation looks like now."""
        chat = talk.chat
        costs = costs_table(chat.added, chat.last)
        return talk, list(talk.log), costs, self._mask(chat), read_table(chat.read_by_answer())

    def plain(self) -> Any:
        """The uncompressed model, made when it is first wanted."""
        if self._plain is None:
            assert self._make_plain is not None
            self._plain = self._make_plain()
        return self._plain

    def show(self, path: str | None, keep: bool, num_tokens: int, talk: _Talk | None) -> tuple[Any, ...]:
        if path is None:
            return talk, *[gr.skip()] * 4  # the image was taken away: the conversation goes on
        if talk is None or not keep or talk.chat.session.num_images == 0:
            talk = self._talk(num_tokens)
        talk.chat.num_tokens = int(num_tokens)
        with _in_words(path):
            added = talk.chat.show(open_image(path))
        talk.log.append({"role": "user", "content": {"path": path}})
        talk.log.append({"role": "assistant", "content": added_line(added)})
        return self._shown(talk)

    def change_tokens(
        self, path: str | None, keep: bool, num_tokens: int, talk: _Talk | None
    ) -> tuple[Any, ...]:
        """The image again with another K, in a conversation that begins anew; where earlier images are kept,
        K is the next one's."""
        return (talk, *[gr.skip()] * 4) if keep else self.show(path, keep, num_tokens, talk)

    def watch(self, path: str | None, frames: int, num_tokens: int) -> tuple[Any, ...]:
        if path is None:
            raise gr.Error("Drop a video first.")
        talk = self._talk(num_tokens)
        with _in_words(path):
            added = talk.chat.watch(path, frames=int(frames), name=Path(path).name)
        talk.log.append({"role": "assistant", "content": added_line(added)})
        return self._shown(talk)

    def ask(self, question: str, talk: _Talk | None) -> Iterator[tuple[Any, ...]]:
        if talk is None or not talk.chat.added:
            raise gr.Error("Drop an image or a video first.")
        chat, asked = talk.chat, {"role": "user", "content": question}
        with _in_words():
            answer = chat.ask(question)
            try:
                for text in answer:
                    growing = [*talk.log, asked, {"role": "assistant", "content": text}]
                    yield _working(), talk, growing, gr.skip(), gr.skip(), gr.skip()
            finally:  # a stopped answer too: what was said stays in the conversation
                answer.close()
                if chat.last is not None and len(chat.turns) > talk.turns:
                    talk.turns = len(chat.turns)
                    text = chat.last.text or "(empty)"
                    talk.log += [asked, {"role": "assistant", "content": text}]
            yield _ready(), *self._shown(talk)

    def stop(self, talk: _Talk | None) -> tuple[Any, ...]:
        return (_ready(), talk, *[gr.skip()] * 4) if talk is None else (_ready(), *self._shown(talk))

    def compare(self, talk: _Talk | None) -> Iterator[str]:
        if talk is None or talk.chat.last is None:
            raise gr.Error("Ask a question first.")
        chat = talk.chat
        if self._make_plain is None:
            raise gr.Error("This page was started without the uncompressed model.")
        with _in_words():
            for found in chat.uncompressed(self.plain):
                if isinstance(found, Answered):
                    yield costs_table(chat.added, chat.last, found)
                else:
                    yield costs_table(chat.added, chat.last) + f"\n\nuncompressed: {found} …"

    def clear(self) -> tuple[Any, ...]:
        return None, [], "", None, "", None

    def _mask(self, chat: PictureChat) -> Any:
        from PIL import Image

        with tempfile.TemporaryDirectory() as folder:
            drawn = chat.draw_mask(Path(folder) / "mask.png")
            return None if drawn is None else Image.open(drawn).copy()


def _working() -> Any:
    """The question's box while an answer comes; anew each time, since Gradio takes what it is given apart."""
    return gr.update(value="", submit_btn=False, stop_btn=True)


def _ready() -> Any:
    return gr.update(submit_btn=True, stop_btn=False)


@contextlib.contextmanager
def _in_words(path: str | None = None) -> Iterator[None]:
    """What the user got wrong is one line on the page; where a file lies on this machine is not in it."""
    try:
        yield
    except gr.Error:
        raise
    except USER_ERRORS as problem:
        text = " ".join(str(problem).split())
        raise gr.Error(text if path is None else text.replace(path, Path(path).name)) from problem


def build_page(
    model: Any,
    processor: Any,
    *,
    name: str = "this model",
    num_tokens: Sequence[int] | None = None,
    plain: Callable[[], Any] | None = None,
    plain_name: str = "the same weights without VoCo",
    examples: Sequence[tuple[str, str]] = (),
    video: bool = True,
    max_new_tokens: int = 64,
) -> gr.Blocks:
    """The page for an attached model.

    Args:
        processor: the model's, with a chat template.
        name: of the model, for the heading.
        num_tokens: the K to choose from, the first preset; ``None``: the model's own.
        plain: gives the model without VoCo, to compare with; called once, when it is first wanted.
        plain_name: what it is, in words.
        examples: image files and a question about each.
        video: whether the page takes videos.
        max_new_tokens: of an answer at most.
    """
    from ..core.attachment import attachment

    choices = [int(k) for k in num_tokens or [attachment(model).config.num_tokens]]
    page = _Page(model, processor, plain, max_new_tokens)
    with gr.Blocks(title="VoCo", analytics_enabled=False, delete_cache=(600, _KEEP_SECONDS)) as blocks:
        talk = gr.State(None, time_to_live=_KEEP_SECONDS)
        gr.Markdown(
            f"## VoCo: {name}\nAn image is read once and kept as the keys and values of a few VoCo tokens. "
            "Every question is answered from those; the image is not opened again."
        )
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                with gr.Tabs():
                    with gr.Tab("Image"):
                        image = _as_file(
                            gr.Image(
                                type="filepath", label="Image", height=280, elem_id="image", buttons=[],
                                sources=["upload", "clipboard"],
                            )
                        )  # fmt: skip
                        keep = gr.Checkbox(False, label="Keep earlier images in the conversation")
                    if video:
                        with gr.Tab("Video"):
                            clip = gr.Video(label="A short video", height=240, elem_id="video")
                            frames = gr.Slider(1, 64, 16, step=1, label="Frames")
                            read = gr.Button("Read the video", elem_id="read_video")
                tokens = gr.Radio(
                    choices, value=choices[0], label="VoCo tokens an image (K)", visible=len(choices) > 1,
                    elem_id="tokens",
                )  # fmt: skip
                with gr.Accordion("Who reads whom", open=False, elem_id="who"):
                    read_by = gr.Markdown(elem_id="read")
                    mask = gr.Image(show_label=False, interactive=False, buttons=[], elem_id="mask")
            with gr.Column(scale=5, min_width=300):
                log = gr.Chatbot(label="Conversation", height=380, elem_id="log", buttons=[])
                question = gr.Textbox(
                    label="Question", placeholder="Ask about it, and press Enter", submit_btn=True,
                    elem_id="question", max_length=4000,
                )  # fmt: skip
                with gr.Row():
                    clear = gr.Button("New conversation", size="sm")
                    compare = gr.Button(
                        "Ask the uncompressed model too", size="sm", visible=plain is not None,
                        elem_id="compare",
                    )  # fmt: skip
                costs = gr.Markdown(elem_id="costs")
                if plain is not None:
                    gr.Markdown(f"<small>Uncompressed: {plain_name}.</small>")
        shown = [talk, log, costs, mask, read_by]
        one: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
        image.change(page.show, [image, keep, tokens, talk], shown, api_name="show", **one)
        tokens.change(page.change_tokens, [image, keep, tokens, talk], shown, api_name="tokens", **one)
        asked = [question, *shown]
        asking = question.submit(page.ask, [question, talk], asked, api_name="ask", **one)
        stopped = question.stop(None, cancels=[asking], api_visibility="private")
        stopped.then(page.stop, [talk], asked, api_visibility="private")
        if plain is not None:
            compare.click(page.compare, [talk], [costs], api_name="compare", **one)
        if video:
            read.click(page.watch, [clip, frames, tokens], shown, api_name="watch", **one)
        clear.click(page.clear, None, [*shown, image], api_name="clear")
        log.clear(page.clear, None, [*shown, image], api_visibility="private")  # the bin on the conversation
        if examples:
            gr.Examples([list(e) for e in examples], [image, question], label="Examples", examples_per_page=8)
    return blocks


THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
"""Gradio's own look, with fonts that no server has to give."""

__all__ = ["THEME", "build_page"]
