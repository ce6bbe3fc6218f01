"""Ask a running `voco serve` with the official `openai` client, unchanged.

    voco serve gridworld --port 8000              # in another terminal; with --engine vllm, the same client
    python examples/serve_openai_client.py runs/demo_gridworld/examples/000000.png --question "What is at b2?"

What it shows: an image in a message; the same image by its key, not sent again; an answer that streams;
several answers and their log-probabilities; what the answer read, in tokens, beside what the image's vision
tokens would have been; a mistake, as the client's own exception.
"""

from __future__ import annotations

import argparse
import base64
import os
from pathlib import Path

import openai


def data_url(path: str) -> str:
    """The file as the URL that messages carry."""
    kind = Path(path).suffix.lower().lstrip(".").replace("jpg", "jpeg") or "png"
    return f"data:image/{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


def turn(image: dict, question: str) -> list:
    return [{"role": "user", "content": [image, {"type": "text", "text": question}]}]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("image", help="an image file")
    parser.add_argument("--question", action="append", help="more than once if you like")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default=os.environ.get("VOCO_API_KEY", "none"))
    args = parser.parse_args(arguments)
    questions = args.question or ["What is at b2?", "What is at a1?"]
    client = openai.OpenAI(base_url=args.base_url, api_key=args.api_key)
    model = client.models.list().data[0].id

    # the image in the message, as with any vision model
    shown = {"type": "image_url", "image_url": {"url": data_url(args.image)}}
    answer = client.chat.completions.create(model=model, messages=turn(shown, questions[0]), max_tokens=32)
    details = answer.usage.prompt_tokens_details
    print(f"{questions[0]} {(answer.choices[0].message.content or '').strip()}")
    print(
        f"  the prompt: {details.text_tokens} tokens of text and {details.voco_tokens} of the image, whose "
        f"{details.voco_tokens + details.saved_vision_tokens} vision tokens were compressed"
    )

    # compressed once, asked about by its key: nothing is sent or computed again
    kept = client.post("/voco/compress", body={"image": data_url(args.image)}, cast_to=object)
    print(f"kept under {kept['key'][:12]}…: {kept['bytes']:,} bytes, kept before: {kept['hit']}")
    by_key = {"type": "voco", "key": kept["key"]}
    for question in questions:
        print(question, end="", flush=True)
        stream = client.chat.completions.create(
            model=model, messages=turn(by_key, question), max_tokens=32, stream=True
        )
        for chunk in stream:
            if chunk.choices:
                print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()

    # two answers drawn with a seed, and how likely each token was
    drawn = client.chat.completions.create(
        model=model, messages=turn(by_key, questions[-1]), max_tokens=8, n=2, temperature=0.7, seed=1,
        logprobs=True, top_logprobs=2,
    )  # fmt: skip
    for choice in drawn.choices:
        likely = " ".join(f"{one.token!r} {one.logprob:.2f}" for one in choice.logprobs.content)
        print(f"  drawn: {(choice.message.content or '').strip()}   ({likely})")

    # what is wrong is an exception of the client, with a line that says what and why
    try:
        client.chat.completions.create(model=model, messages=turn({"type": "voco", "key": "0" * 64}, "?"))
    except openai.APIStatusError as error:
        print(f"{type(error).__name__}: {error.body['message'] if isinstance(error.body, dict) else error}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
