"""``ServerSettings``: every limit of the server, and what a request is given where it names nothing."""

from __future__ import annotations

from dataclasses import dataclass, fields

MEBI = 1 << 20


@dataclass(frozen=True)
class ServerSettings:
    """What the server allows. Sizes are in bytes, times in seconds.

    Defaults that differ from OpenAI's: ``temperature`` is 0 (greedy, where theirs is 1), and an answer has
    ``default_max_tokens`` where a request names no number.

    Attributes:
        api_keys: any of them lets in; none: everyone is.
        host_names: what a ``Host`` header may say (without port); none: anything. A server that everyone on
            this machine may use names ``localhost`` and its addresses here, so that no web page reaches it
            under a name of its own.
        max_running: answers that the engine works on at a time.
        max_waiting: answers that may wait beyond those; one more is refused (429).
        retry_after: what a refused request is told to wait.
        request_seconds: from a body's end to the answer's.
        body_seconds: from a body's first byte to its last.
        drain_seconds: that running answers get when the server stops.
        max_body: of a request, images included.
        max_text: characters of a prompt.
        max_image: of an image file.
        max_pixels: of an image; of a video, of each frame.
        max_images: images, videos and keys of one prompt.
        max_num_tokens: VoCo tokens of an image that a request may ask for, where the model's own are fewer.
        max_video: of a video file.
        video_frames: frames that a video gives, evenly spread.
        max_choices: answers that one request asks for (``n``, times its prompts).
        max_tokens: that one answer may ask for.
        default_max_tokens: of an answer whose request names no number.
        temperature: where a request names none.
        max_logprobs: alternatives of a token.
        max_stop_length: characters of a stop string.
        allowed_hosts: hosts that images are fetched from, ``name``, ``*.suffix`` or either with ``:port``;
            none: no image is fetched.
        fetch_seconds: for an image, redirects included.
        max_redirects: followed for an image.
        decoding_threads: that images and videos are decoded in.

    Raises:
        ValueError: a limit that nothing could pass.
    """

    api_keys: tuple[str, ...] = ()
    host_names: tuple[str, ...] = ()
    max_running: int = 16
    max_waiting: int = 64
    retry_after: int = 1
    request_seconds: float = 300.0
    body_seconds: float = 30.0
    drain_seconds: float = 30.0
    max_body: int = 32 * MEBI
    max_text: int = 1_000_000
    max_image: int = 16 * MEBI
    max_pixels: int = 32_000_000
    max_images: int = 16
    max_num_tokens: int = 64
    max_video: int = 24 * MEBI
    video_frames: int = 16
    max_choices: int = 8
    max_tokens: int = 4096
    default_max_tokens: int = 256
    temperature: float = 0.0
    max_logprobs: int = 20
    max_stop_length: int = 256
    allowed_hosts: tuple[str, ...] = ()
    fetch_seconds: float = 10.0
    max_redirects: int = 3
    decoding_threads: int = 2

    def __post_init__(self) -> None:
        may_be_zero = ("max_waiting", "max_redirects", "temperature", "drain_seconds", "max_logprobs")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                if any(not isinstance(one, str) or not one.strip() for one in value):
                    raise ValueError(f"{field.name}={value!r} holds an empty entry; leave it out.")
            elif not value >= 0 or (value == 0 and field.name not in may_be_zero):
                raise ValueError(f"{field.name}={value} lets nothing through; give more than 0.")


__all__ = ["ServerSettings"]
