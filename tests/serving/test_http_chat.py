"""What a client of OpenAI's gets: the same answers, streamed or not, with images read from their blocks."""

from __future__ import annotations

import asyncio
import io
import json
import time

import openai
import pytest
from http_fakes import NAME, Server, data_url, events, pair, picture, shown, waited
from PIL import Image

from voco_plugin.cache import VoCoCache
from voco_plugin.data.images import open_image
from voco_plugin.inference.answering import compress_images
from voco_plugin.inference.prompts import ask, stream_of
from voco_plugin.serving.engines.request import EngineError, RequestError
from voco_plugin.serving.http.media import IMAGE_FORMATS, image_of_bytes
from voco_plugin.serving.http.settings import ServerSettings


@pytest.fixture
def server():
    return Server()


def said(answer) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def streamed(answer) -> str:
    *found, last = events(answer)
    assert last == "[DONE]"
    return "".join(c["delta"].get("content", "") for one in found for c in one["choices"])


# -- the prompt


@pytest.mark.parametrize("family", ["llava_llama", "qwen2_5_vl", "gemma3"])
def test_the_engine_reads_what_stage_two_reads(family):
    server = Server(family)
    model, tools = pair(family)
    assert said(server.chat(shown(10, 200))) == "a red square"
    (request,) = server.engine.requests
    images = [open_image(picture(tone)) for tone in (10, 200)]
    cache = VoCoCache.cat(compress_images(model, tools, images))
    expected = stream_of(model, tools, [ask("What is this?", 2)], cache)["input_ids"][0].tolist()
    assert list(request.ids) == expected
    assert request.blocks.num_tokens == cache.num_tokens == [2, 2] and len(request.keys) == 2


def test_one_question_about_many_images_is_tokenized_once(server, monkeypatch):
    from voco_plugin.serving.http import prompt_building

    calls = []
    real = prompt_building.stream_of
    monkeypatch.setattr(prompt_building, "stream_of", lambda *a: calls.append(a) or real(*a))
    asked = [shown(10), shown(200), shown(10, text="And this?"), shown(10, 200), shown(200)]
    for turns in asked:
        said(server.chat(turns))
    said(server.chat(shown(10), num_tokens=3))
    ids = [request.ids for request in server.engine.requests]
    voco = server.front.vocabulary.voco_id
    assert ids[0] == ids[1] == ids[4] and len(set(ids)) == 4 == len(calls)
    assert [one.count(voco) for one in ids] == [2, 2, 2, 4, 2, 3]
    first, second = (request.keys for request in server.engine.requests[:2])
    assert first != second
    known = server.front.known_prompts
    for number in range(400):
        known.put(f"{number:03}" * 3000, (1,))
    known.put("x" * 30_000, (1,))
    assert known.get("x" * 30_000) is None and len(known) < 400 and known.get("001" * 3000) is None


@pytest.mark.parametrize("route", ["chat", "compress"])
def test_a_k_that_nobody_means_is_refused(route):
    server = Server(max_num_tokens=8)
    url = shown(10)[0]["content"][0]["image_url"]["url"]
    for count, status in ((8, 200), (9, 400), (10**6, 400)):
        if route == "chat":
            answer = server.chat(shown(10), num_tokens=count)
        else:
            answer = server.post("/v1/voco/compress", {"image": url, "num_tokens": count})
        assert answer.status_code == status, answer.text
        if status == 400:
            error = answer.json()["error"]
            assert error["param"] == "num_tokens" and f"num_tokens={count} is above" in error["message"]


def test_images_stand_where_they_are_said_over_several_turns(server):
    first, second = shown(10)[0], shown(200, text="And now?")[0]
    turns = [
        {"role": "developer", "content": "Be short."},
        first,
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        second,
    ]
    assert said(server.chat(turns)) == "a red square"
    (request,) = server.engine.requests
    voco = server.front.vocabulary.voco_id
    text = server.processor.tokenizer.decode([t for t in request.ids if t != voco])
    assert "SYSTEM: Be short." in text and text.index("red") < text.index("And now?")
    at = [i for i, token in enumerate(request.ids) if token == voco]
    assert len(at) == 4 and at[1] - at[0] == 1 and at[2] - at[1] > 5


def test_usage_counts_text_blocks_and_what_they_saved(server):
    usage = server.chat(shown(10, 20)).json()["usage"]
    details = usage["prompt_tokens_details"]
    vision = sum(block.num_vision for block in server.engine.requests[0].blocks)
    assert details["voco_tokens"] == 4 and details["saved_vision_tokens"] == vision - 4 > 0
    assert usage["prompt_tokens"] == len(server.engine.requests[0].ids) == details["text_tokens"] + 4
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert details["cached_tokens"] == 0
    again = server.chat(shown(10, 30)).json()["usage"]["prompt_tokens_details"]
    assert again["cached_tokens"] == 2


def test_an_image_alone_is_a_question(server):
    content = shown(10)[0]["content"][:1]
    assert said(server.chat([{"role": "user", "content": content}])) == "a red square"


def test_a_kept_image_goes_by_its_key(server):
    url = data_url(picture(10))
    kept = server.post("/v1/voco/compress", {"image": url}).json()
    assert kept["hit"] is False and kept["num_tokens"] == 2 and kept["blocks"] == 1
    assert kept["bytes"] == server.blocks.kept[kept["key"]].cache.nbytes and kept["vision_tokens"] == 9
    assert server.post("/v1/voco/compress", {"image": url, "model": NAME}).json()["hit"] is True
    part = {"type": "voco", "key": kept["key"]}
    said(server.chat([{"role": "user", "content": [part, {"type": "text", "text": "What is this?"}]}]))
    said(server.chat(shown(10)))
    one, other = server.engine.requests
    assert one.ids == other.ids and one.keys == other.keys == (kept["key"],)
    answer = server.chat([{"role": "user", "content": [{"type": "voco", "key": "0" * 64}]}])
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "unknown_key"
    assert answer.json()["error"]["param"] == "messages[0].content[0].key"


def test_a_number_of_tokens_may_be_asked_for(server):
    said(server.chat(shown(10), num_tokens=5))
    assert server.engine.requests[0].blocks.num_tokens == [5]
    answer = server.post("/v1/voco/compress", {"image": data_url(picture()), "num_tokens": 99})
    assert answer.status_code == 400
    assert "this server's 64 VoCo tokens an image" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body", [{}, {"image": None}, {"image": "data:,", "video": "data:,"}, {"imag": "data:,"}, {"image": 3}]
)
def test_compressing_nothing_is_refused(server, body):
    answer = server.post("/v1/voco/compress", body)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", IMAGE_FORMATS)
def test_every_format_that_is_named_is_read(kind):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow was built without {kind}")
    assert image_of_bytes(picture(kind=kind), ServerSettings(), "p").size == (20, 16)


def gif(frames: int = 4) -> bytes:
    file = io.BytesIO()
    first, *others = [Image.new("RGB", (16, 16), (60 * i, 9, 9)) for i in range(frames)]
    first.save(file, "GIF", save_all=True, append_images=others, duration=500)
    return file.getvalue()


def mp4(size: tuple[int, int] = (32, 32)) -> bytes:
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for tone in (10, 90, 170, 250):
            frame = av.VideoFrame.from_image(Image.new("RGB", size, (tone, 9, 9)))
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize(("made", "kind"), [(gif, "image/gif"), (mp4, "video/mp4")])
def test_a_video_is_read_with_its_times(made, kind):
    server = Server(video_frames=3)
    url = data_url(made(), "video/mp4")
    part = {"type": "video_url", "video_url": {"url": url}}
    answer = server.chat([{"role": "user", "content": [part, {"type": "text", "text": "What happens?"}]}])
    assert said(answer) == "a red square", kind
    (request,) = server.engine.requests
    assert request.blocks.num_tokens == [2, 2, 2] and len(set(request.keys)) == 3
    text = server.processor.tokenizer.decode(request.ids)
    (kept,) = server.blocks.kept.values()
    assert all(time in text for time in kept.times) and text.count("<voco>") == 6
    compressed = server.post("/v1/voco/compress", {"video": url}).json()
    assert compressed["hit"] and compressed["blocks"] == 3 and compressed["key"] == kept.key


def test_a_video_that_is_none_or_too_large():
    server = Server(max_pixels=500)
    for data, code in ((mp4()[:200], "invalid_video"), (mp4(), "image_too_large"), (b"", None)):
        answer = server.post("/v1/voco/compress", {"video": data_url(data, "video/mp4")})
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["code"] == code, error
        assert "voco_video_" not in error["message"] and "/tmp" not in error["message"], error


# -- the answer


def test_streams_are_as_openai_has_them(server):
    found = events(server.chat(shown(10), stream=True))
    assert found.pop() == "[DONE]"
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert found[-1]["choices"][0] == {
        "index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop",
    }  # fmt: skip
    assert [one["choices"][0]["delta"].get("content") for one in found[1:-1]] == ["a", " red", " square"]
    assert len({one["id"] for one in found}) == 1 and "usage" not in found[0]
    assert {one["object"] for one in found} == {"chat.completion.chunk"}


def test_the_usage_of_a_stream_is_that_of_the_whole(server):
    *found, usage, done = events(server.chat(stream=True, stream_options={"include_usage": True}))
    assert done == "[DONE]" and usage["choices"] == [] and all(one["usage"] is None for one in found)
    assert usage["usage"] == server.chat().json()["usage"]


STOPS = [
    (["square"], "a red ", "stop"),
    (["d sq"], "a re", "stop"),
    (["sq", "square"], "a red ", "stop"),
    (["square", "sq"], "a red ", "stop"),
    (["a"], "", "stop"),
    (["squares"], "a red square", "stop"),
    (["zzz", "e!", " red sq!"], "a red square", "stop"),
    ("red", "a ", "stop"),
]


@pytest.mark.parametrize(("stop", "text", "reason"), STOPS)
def test_stop_strings_cut_wherever_tokens_end(server, stop, text, reason):
    server.engine.script = lambda request: [server.engine.text, 0.02]
    answer = server.chat(stop=stop)
    assert said(answer) == text and answer.json()["choices"][0]["finish_reason"] == reason
    assert streamed(server.chat(stop=stop, stream=True)) == text
    assert text == "a red square" or all(one.left for one in server.engine.answers)


def test_a_stop_string_ends_its_own_answer_while_others_go_on(server):
    def script(request) -> list:
        return ["red", 0.2, " late"] if request.sampling.seed else ["a square", 0.1, "never"]

    server.engine.script = script
    answer = server.chat(n=2, seed=0, stop=[" square"]).json()
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["a", "red late"]
    first, second = server.engine.answers
    assert first.left and not second.left


def test_log_probabilities_are_those_of_what_is_said(server):
    def content(answer) -> list:
        return answer.json()["choices"][0]["logprobs"]["content"]

    found = content(server.chat(logprobs=True, top_logprobs=2))
    assert [one["token"] for one in found] == ["a", " red", " square"]
    assert bytes(sum((one["bytes"] for one in found), [])) == b"a red square"
    assert all(one["logprob"] == -0.5 and len(one["top_logprobs"]) == 2 for one in found)
    assert server.engine.requests[0].sampling.logprobs == 2
    assert [one["token"] for one in content(server.chat(logprobs=True, stop=["sq"]))] == [
        "a",
        " red",
        " square",
    ]
    assert [one["token"] for one in content(server.chat(logprobs=True, stop=[" red"]))] == ["a"]
    for stop in (None, ["d s"]):
        whole = content(server.chat(logprobs=True, stop=stop))
        *chunks, _ = events(server.chat(logprobs=True, stop=stop, stream=True))
        parts = [one["choices"][0]["logprobs"] for one in chunks]
        assert sum((part["content"] for part in parts if part), []) == whole


def test_several_answers_each_with_a_seed_of_its_own(server):
    server.engine.script = lambda request: [f"{request.sampling.seed}"]
    server.engine.delay = 0.001
    answer = server.chat(n=3, seed=41, temperature=1.5)
    texts = [choice["message"]["content"] for choice in answer.json()["choices"]]
    assert texts == ["41", "42", "43"]
    *found, _ = events(server.chat(n=3, seed=2**63 - 1, stream=True))
    by_index: dict[int, str] = {}
    for one in found:
        for choice in one["choices"]:
            text = choice["delta"].get("content", "")
            by_index[choice["index"]] = by_index.get(choice["index"], "") + text
    assert by_index == {0: str(2**63 - 1), 1: "0", 2: "1"}
    reasons = [one["choices"][0]["finish_reason"] for one in found]
    assert reasons.count("stop") == 3


def test_sampling_goes_to_the_engine_as_it_was_asked_for(server):
    server.chat()
    plain = server.engine.requests[-1].sampling
    assert (plain.temperature, plain.top_p, plain.top_k, plain.seed) == (0.0, 1.0, 0, None)
    assert plain.max_new_tokens == server.settings.default_max_tokens and plain.logprobs is None
    server.chat(
        temperature=0.5, top_p=0.9, top_k=7, seed=-1, presence_penalty=1, frequency_penalty=-1.5,
        logit_bias={"40": 3, "041": -100}, max_completion_tokens=9, logprobs=True,
    )  # fmt: skip
    asked = server.engine.requests[-1].sampling
    assert (asked.temperature, asked.top_p, asked.top_k, asked.seed) == (0.5, 0.9, 7, 2**63 - 1)
    assert (asked.presence_penalty, asked.frequency_penalty) == (1, -1.5)
    assert asked.logit_bias == {40: 3, 41: -100} and asked.max_new_tokens == 9 and asked.logprobs == 0


def test_what_is_left_of_the_positions_is_the_default(server):
    server.engine.max_positions = 40
    prompt = server.chat().json()["usage"]["prompt_tokens"]
    assert server.engine.requests[-1].sampling.max_new_tokens == 40 - prompt
    answer = server.chat("a" * 60)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
    answer = server.chat(max_tokens=39)
    assert answer.json()["error"]["param"] == "max_tokens"


def test_answers_end_by_length(server):
    answer = server.chat(max_tokens=2).json()
    assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 2


def test_an_end_token_is_not_said(server):
    server.engine.script = lambda request: ["red", server.processor.tokenizer.eos_token_id]
    answer = server.chat(logprobs=True).json()
    assert answer["choices"][0]["message"]["content"] == "red" and answer["usage"]["completion_tokens"] == 4
    assert "".join(t["token"] for t in answer["choices"][0]["logprobs"]["content"]) == "red"


# -- failures of the engine


@pytest.mark.parametrize(
    ("failure", "status", "says"),
    [
        (EngineError("the paged cache is full."), 503, "the paged cache is full."),
        (RequestError("no such thing.", "seed", "odd"), 400, "no such thing."),
        (RuntimeError("secret path /root"), 500, "its log says why"),
        ("finish:cancelled", 503, "ended this answer"),
    ],
)
@pytest.mark.parametrize("n", [1, 3])
def test_what_fails_is_told_before_and_in_a_stream(server, failure, status, says, n):
    server.engine.script = lambda request: ["red", 0.005, failure]
    answer = server.chat(n=n)
    assert answer.status_code == status and says in answer.json()["error"]["message"]
    *found, last = events(server.chat(n=n, stream=True))
    assert "red" in "".join(c["delta"].get("content", "") for one in found for c in one["choices"])
    assert says in last["error"]["message"] and "secret" not in json.dumps(last)
    assert server.engine.state()["running"] == 0 and server.front.queue.taken == 0
    server.engine.script = lambda request: ["fine"]
    assert said(server.chat()) == "fine"


def test_an_engine_that_is_gone_is_said(server):
    server.engine.dead = True
    answer = server.chat(stream=True)
    assert answer.status_code == 503 and "it was killed." in answer.json()["error"]["message"]
    health = server.get("/health")
    assert health.status_code == 503 and health.json()["engine"]["error"] == "it was killed."


@pytest.mark.parametrize("problem", [OSError("disk full at /srv"), MemoryError(), KeyError("x")])
def test_a_store_that_fails_is_said_without_its_inside(server, problem):
    async def fails(image, num_tokens=None):
        raise problem

    server.blocks.of_image = fails
    answer = server.chat(shown(10))
    assert answer.status_code == 503 and "/srv" not in answer.text
    assert type(problem).__name__ in answer.json()["error"]["message"]
    assert said(server.chat("text alone")) == "a red square"


def test_an_image_that_fails_does_not_wait_for_the_others(server):
    server.blocks.delay = 5.0
    (turn,) = shown(10)
    turn["content"].append({"type": "voco", "key": "0" * 64})
    start = time.monotonic()
    assert server.chat([turn]).status_code == 404
    assert time.monotonic() - start < 4


def test_templates_may_refuse(server):
    server.front.processor.chat_template = "{{ raise_exception('roles must alternate') }}"
    answer = server.chat()
    assert answer.status_code == 400 and "roles must alternate" in answer.json()["error"]["message"]
    server.front.processor.chat_template = "{{ messages[-1]['content'][0]['text'] }}"
    answer = server.chat([{"role": "system", "content": "Be odd."}, {"role": "user", "content": "a"}])
    assert answer.status_code == 400 and "leaves out the system text" in answer.json()["error"]["message"]


# -- completions


def test_completions_go_on_with_texts_and_ids(server):
    answer = server.post("/v1/completions", {"model": NAME, "prompt": "the red", "logprobs": 1}).json()
    (choice,) = answer["choices"]
    assert choice["text"] == "a red square" and choice["finish_reason"] == "stop"
    assert choice["logprobs"]["tokens"] == ["a", " red", " square"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 5]
    ids = server.processor.tokenizer("the red")["input_ids"]
    assert server.engine.requests[-1].ids == tuple(ids) and len(server.engine.requests[-1].blocks) == 0
    server.post("/v1/completions", {"model": NAME, "prompt": [ids, ids[:2]], "n": 2})
    assert [r.ids for r in server.engine.requests[-4:]] == [tuple(ids)] * 2 + [tuple(ids[:2])] * 2
    *found, done = events(server.post("/v1/completions", {"model": NAME, "prompt": ids, "stream": True}))
    assert done == "[DONE]" and "".join(one["choices"][0]["text"] for one in found) == "a red square"


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ([], "empty list"), ([[]], "is empty"), ("a <image>", "'<image>'"),
        ([6], "stands for an image"), ([181], "stands for an image"), ([-1], "outside 0"),
        ([10**12], "outside 0"), ([1, "a"], "prompt"), (None, "prompt"), (["a"] * 9, "9 answers"),
        ({"a": 1}, "prompt"), ([[1], "a"], "prompt"), (1.5, "prompt"), ([True], "prompt"),
    ],
)  # fmt: skip
def test_prompts_that_are_none(server, prompt, says):
    answer = server.post("/v1/completions", {"model": NAME, "prompt": prompt})
    assert answer.status_code == 400 and says in answer.json()["error"]["message"], answer.text


def test_an_empty_text_goes_on_from_what_the_tokenizer_begins_with(server):
    begins = server.processor.tokenizer("")["input_ids"]
    answer = server.post("/v1/completions", {"model": NAME, "prompt": ""})
    assert answer.status_code == (200 if begins else 400), answer.text


# -- the official client, over a real server


@pytest.fixture(scope="module")
def real():
    server = Server(api_keys=("secret", "other"), max_running=2, max_waiting=0)
    with server.running() as url:
        yield server, openai.OpenAI(base_url=f"{url}/v1", api_key="other", max_retries=0), url


def test_the_official_client(real):
    server, client, _ = real
    answer = client.chat.completions.create(
        model=NAME, messages=shown(10), n=2, logprobs=True, top_logprobs=1, seed=3
    )
    assert [choice.message.content for choice in answer.choices] == ["a red square"] * 2
    assert answer.choices[0].logprobs.content[1].token == " red"
    assert answer.usage.prompt_tokens_details.model_extra["saved_vision_tokens"] == 7
    stream = client.chat.completions.create(
        model=NAME, messages=shown(10), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.delta.content or "" for one in chunks for c in one.choices) == "a red square"
    assert chunks[-1].usage.completion_tokens == 3
    assert client.completions.create(model=NAME, prompt="the").choices[0].text == "a red square"
    assert [model.id for model in client.models.list()] == [NAME] == [client.models.retrieve(NAME).id]


def test_errors_become_those_of_the_official_client(real):
    server, client, url = real
    talk = {"model": NAME, "messages": [{"role": "user", "content": "a"}]}
    with pytest.raises(openai.BadRequestError, match="empty string") as caught:
        client.chat.completions.create(**talk, stop="")
    assert caught.value.param == "stop"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").chat.completions.create(**talk)
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
        client.chat.completions.create(**{**talk, "model": "gpt-4"})
    server.engine.script = lambda request: ["red", EngineError("it broke.")]
    with pytest.raises(openai.APIError, match="it broke."):
        list(client.chat.completions.create(**talk, stream=True))
    with pytest.raises(openai.InternalServerError, match="it broke."):
        client.chat.completions.create(**talk)
    server.engine.script = lambda request: [5.0, "late"]
    held = [client.chat.completions.create(**talk, stream=True) for _ in range(2)]
    with pytest.raises(openai.RateLimitError, match="places are taken") as full:
        client.chat.completions.create(**talk)
    assert full.value.response.headers["retry-after"] == "1"
    for stream in held:
        stream.close()
    assert waited(lambda: server.front.queue.taken == 0), "who has left still holds a place"
    server.engine.script = lambda request: ["back"]
    assert client.chat.completions.create(**talk).choices[0].message.content == "back"


def test_many_at_once_get_their_own(server):
    server.engine.delay = 0.001
    server.engine.script = lambda request: [server.processor.tokenizer.decode(request.ids[-22:])]

    async def many() -> list:
        async with server.client() as client:
            bodies = [
                {"model": NAME, "messages": shown(10 * i, text=f"the {i:03d}"), "stream": bool(i % 2)}
                for i in range(24)
            ]
            return await asyncio.gather(*(client.post("/v1/chat/completions", json=b) for b in bodies))

    for number, answer in enumerate(asyncio.run(many())):
        text = streamed(answer) if number % 2 else said(answer)
        assert f"{number:03d}" in text
