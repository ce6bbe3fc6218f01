"""Text comes out whole however it is cut, and what is no request is one sentence in OpenAI's shape."""

from __future__ import annotations

import json

import pytest
from http_fakes import NAME, Server, data_url, events, picture, shown
from hypothesis import given, settings
from hypothesis import strategies as st

from voco_plugin.serving.http.json_text import load
from voco_plugin.serving.http.public_addresses import is_public
from voco_plugin.serving.http.settings import ServerSettings
from voco_plugin.serving.http.stop_strings import StopStrings
from voco_plugin.serving.http.text_pieces import TextPieces
from voco_plugin.serving.http.token_bytes import TokenBytes

ANY = settings(max_examples=150, deadline=None, database=None)


@pytest.fixture(scope="module")
def server():
    return Server()


# -- text


def byte_tokenizer():
    """Byte-level BPE with all 256 bytes, so that a character may take several tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def piece_tokenizer():
    """As Llama's: words begin with a mark, unknown characters are bytes, the first space is dropped."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = [
        *(f"<0x{b:02X}>" for b in range(256)),
        "\u2581a",
        "\u2581red",
        "b",
        "c",
        "\u2581",
        "\u2581\u2581",
    ]
    backend = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )  # fmt: skip
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


class Slow:
    """A tokenizer without a backend in Rust."""

    def __init__(self, tokenizer) -> None:
        self._fast = tokenizer

    def decode(self, ids, **options) -> str:
        return self._fast.decode(ids, **options)


TOKENIZERS = {"bytes": byte_tokenizer(), "pieces": piece_tokenizer()}


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("name", TOKENIZERS)
@ANY
@given(data=st.data())
def test_pieces_together_are_the_whole(name, slow, data):
    tokenizer = TOKENIZERS[name]
    if name == "bytes":
        ids = data.draw(st.lists(st.integers(0, 256), max_size=12) | st.builds(tokenizer.encode, st.text()))
    else:  # whole characters: see text_pieces on others
        byte = st.text(max_size=3).map(lambda text: [*text.encode()])
        ids = sum(data.draw(st.lists(byte | st.integers(256, 263).map(lambda i: [i]), max_size=6)), [])
    pieces = TextPieces(Slow(tokenizer) if slow else tokenizer)
    given_out = [pieces.feed(token) for token in ids]
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(given_out) + pieces.rest() == whole


def test_half_a_character_waits_for_the_other_half():
    tokenizer = TOKENIZERS["bytes"]
    pieces = TextPieces(tokenizer)
    assert [pieces.feed(token) for token in tokenizer("a\u00e9\U0001f600")["input_ids"]] == [
        "a", "", "\u00e9", "", "", "", "\U0001f600",
    ]  # fmt: skip
    pieces = TextPieces(tokenizer)
    assert pieces.feed(tokenizer("\u00e9")["input_ids"][0]) == "" and pieces.rest() == "\ufffd"


def test_bytes_of_tokens_are_exact():
    for tokenizer in TOKENIZERS.values():
        name = TokenBytes(tokenizer)
        text = " red b\u00e9"
        ids = (
            tokenizer(text)["input_ids"] if tokenizer is TOKENIZERS["bytes"] else [257, 260, 258, 0xC3, 0xA9]
        )
        assert b"".join(name(token)[1] for token in ids) == text.encode()
        assert name(ids[-1])[0] == "\ufffd" and name.is_special(tokenizer.eos_token_id)
    assert TokenBytes(tokenizer)(10**6) == ("", b"")


def reference(text: str, stops: list[str]) -> str:
    """Character by character: the first moment at which a stop string stands at the end."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))]
    return text


@ANY
@given(
    text=st.text("ab#", max_size=30),
    stops=st.lists(st.text("ab#", min_size=1, max_size=4), max_size=4),
    cuts=st.lists(st.integers(1, 5), max_size=30),
)
def test_a_stop_string_cuts_alike_however_text_comes(text, stops, cuts):
    watch, out, rest = StopStrings(stops), "", text
    for cut in [*cuts, len(text) or 1]:
        piece, rest = rest[:cut], rest[cut:]
        out += watch.feed(piece)
        assert reference(text, stops).startswith(out), "gave what it had to hold back"
    out += watch.rest()
    assert out == reference(text, stops)
    assert watch.stopped == (any(stop in text for stop in stops))


def test_what_cannot_become_a_stop_string_is_not_held():
    watch = StopStrings(["###", "END"])
    assert [watch.feed(piece) for piece in ("a #", "# b", "c EN", "d", " #", "##x")] == [
        "a ", "## b", "c ", "ENd", " ", "",
    ]  # fmt: skip


# -- requests that are none


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "empty"),
        (b"   ", "empty"),
        (b"{", "not JSON"),
        (b"[]", "a list; send a JSON object"),
        (b"null", "null; send a JSON object"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b'{"model": "x", "model": "y"}', "'model' twice"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"temperature": -Infinity}', "-Infinity"),
        (b'{"temperature": 1e999}', "1e999"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "5000 digits"),
        (b"[" * 200_000, "nested"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
        (b'{"a\\ud800": 1}', "surrogate"),
    ],
)
@pytest.mark.parametrize("route", ["chat/completions", "completions", "voco/compress"])
def test_a_body_that_is_no_request(server, route, body, says):
    answer = server.post(f"/v1/{route}", body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and says in error["message"], error
    assert error["type"] == "invalid_request_error" and error["code"] == "invalid_json"


def test_numbers_with_a_point_and_marks_of_order_are_taken(server):
    assert load(b"\xef\xbb\xbf[5.0, 5.5, 1e3]") == [5, 5.5, 1000]
    body = {"model": NAME, "messages": [{"role": "user", "content": "a"}], "max_tokens": 5.0, "top_p": 1.0}
    assert server.post("/v1/chat/completions", body).status_code == 200


def test_whole_characters_are_taken(server):
    assert load(b'"\\ud83d\\ude00"') == "\U0001f600"
    assert server.chat("\u4f60\u597d \U0001f600 \x00 \u202e").status_code == 200


FIELDS = [
    ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
    ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"temperature": "1"}, "temperature", "valid number"),
    ({"temperature": 10**39}, "temperature", "temperature"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_k": -2}, "top_k", "top_k=-2"),
    ({"n": 0}, "n", "n=0"),
    ({"n": 9}, "n", "9 answers"),
    ({"n": True}, "n", "n=True"),
    ({"n": 1.5}, "n", "n=1.5"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 10**30}, "max_tokens", "ask for 4096"),
    ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens", "two limits"),
    ({"seed": 2**63}, "seed", "seed="),
    ({"stop": ""}, "stop", "empty string"),
    ({"stop": ["a", ""]}, "stop", "empty string"),
    ({"stop": list("abcde")}, "stop", "5 strings"),
    ({"stop": [1]}, "stop[0]", "stop[0] is a number; give a text."),
    ({"stop": "x" * 1000}, "stop", "1000 characters"),
    ({"logit_bias": {"cat": 1}}, "logit_bias", "'cat'"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "'-1'"),
    ({"logit_bias": {"\u0663": 1}}, "logit_bias", "names the token"),
    ({"logit_bias": {str(10**30): 1}}, "logit_bias", "give ids from 0"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "less than or equal to 100"),
    ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20 at most"),
    ({"logprobs": 3}, "logprobs", "valid boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "belongs to a stream"),
    ({"stream": "yes"}, "stream", "valid boolean"),
    ({"tools": [{"type": "function"}]}, "tools", "calls no tools"),
    ({"tool_choice": "required"}, "tool_choice", "calls no tools"),
    ({"functions": [{}]}, "functions", "calls no tools"),
    ({"response_format": {"type": "json_object"}}, "response_format", "free text"),
    ({"modalities": ["text", "audio"]}, "modalities", "answers are text"),
    ({"audio": {"voice": "x"}}, "audio", "answers are text"),
    ({"store": True}, "store", "not kept"),
    ({"store": 0}, "store", "not kept"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "does not reason"),
    ({"num_tokens": 0}, "num_tokens", "num_tokens=0"),
    ({"messages": []}, "messages", "messages"),
    ({"messages": None}, "messages", "messages is null"),
    ({"messages": "hi"}, "messages", "messages is a text"),
    ({"messages": [None]}, "messages[0]", "messages[0] is null"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "is null"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "give a text or a list"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "no part"),
    ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content[0]", "content[0]"),
    ({"messages": [{"role": "user", "content": [{}]}]}, "messages[0].content[0]", "no type"),
    ({"messages": [{"role": "bot", "content": "a"}]}, "messages[0].role", "'bot'"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", "'tool'"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "messages", "end with the user's"),
    ({"messages": [{"role": "user", "content": "a", "name": "Bob"}]}, "messages[0].name", "'Bob'"),
    ({"messages": [{"role": "user", "content": "a", "colour": 1}]}, "messages[0].colour", "no field"),
    ({"model": "gpt-4"}, "model", "this server has"),
    ({"model": None}, "model", "model"),
    ({"model": ["x"]}, "model", "model"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "says"), FIELDS)
def test_the_field_at_fault_is_named(server, fields, param, says):
    body = {"model": NAME, "messages": [{"role": "user", "content": "a"}], **fields}
    answer = server.post("/v1/chat/completions", body)
    error = answer.json()["error"]
    assert answer.status_code == (404 if fields.get("model") == "gpt-4" else 400), error
    assert error["param"] == param and says in error["message"] and "\n" not in error["message"], error
    assert len(error["message"]) < 300


PARTS = [
    ({"type": "input_audio"}, "'input_audio' is not known"),
    ({"type": "image", "image": "a.png"}, "did you mean 'image_url'"),
    ({"type": "image_url", "image_url": "data:image/png;base64,AA=="}, "give an object"),
    ({"type": "image_url", "image_url": {"url": ""}}, "image_url.url=''"),
    ({"type": "image_url", "image_url": {"url": data_url(picture()), "detail": "high"}}, "detail='high'"),
    ({"type": "image_url", "image_url": {"url": "/etc/passwd"}}, "fetches no images"),
    ({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, "fetches no images"),
    ({"type": "image_url", "image_url": {"url": "data:image/png;base64,@@@@"}}, "not base64"),
    ({"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}, "empty"),
    ({"type": "image_url", "image_url": {"url": "data:image/png;base64"}}, "no head"),
    ({"type": "image_url", "image_url": {"url": "data:text/html;base64,AAAA"}}, "text/html"),
    ({"type": "image_url", "image_url": {"url": data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n")}}, "no image"),
    ({"type": "image_url", "image_url": {"url": data_url(picture()[:60])}}, "cannot be read"),
    ({"type": "video_url", "video_url": {"url": "https://x.org/a.mp4"}}, "data URLs alone"),
    ({"type": "video_url", "video_url": {"url": data_url(b"#EXTM3U\nfile:/a", "video/mp4")}}, "no video"),
    ({"type": "image_url", "image_url": {"url": data_url(picture(kind="PCX"))}}, "no image"),
    ({"type": "image_url", "image_url": {"url": data_url(picture(kind="PPM"))}}, "no image"),
    ({"type": "voco", "key": "xyz"}, "64 hex digits"),
    ({"type": "voco", "key": "../" * 30}, "64 hex digits"),
    ({"type": "text"}, "text is missing"),
    ({"type": "text", "text": None}, "text is null; give a text."),
    ({"type": "text", "text": "a <image> b"}, "'<image>'"),
    ({"type": "text", "text": "<voco>"}, "'<voco>'"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "says"), PARTS)
def test_the_part_at_fault_is_named(server, part, says):
    answer = server.chat([{"role": "user", "content": [{"type": "text", "text": "a"}, part]}])
    error = answer.json()["error"]
    assert answer.status_code == 400 and says in error["message"], error
    assert error["param"].startswith("messages[0].content[1]") and "/tmp" not in error["message"]


def test_fields_that_ask_for_nothing_are_taken(server):
    nothing = {
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"],
        "store": False, "user": "me", "safety_identifier": "x", "service_tier": "auto", "seed": None,
        "temperature": None, "n": None, "stop": None, "max_tokens": None, "logit_bias": None, "stream": None,
        "functions": None, "logprobs": None, "stream_options": None, "metadata": None, "top_k": None,
    }  # fmt: skip
    assert server.chat(**nothing).status_code == 200
    said = {"role": "assistant", "content": "b", "refusal": None, "tool_calls": None, "annotations": []}
    turns = [{"role": "user", "content": "a"}, said, {"role": "user", "content": ""}]
    assert server.chat(turns).status_code == 200


@pytest.mark.parametrize(
    "texts", [("<ima", "ge>"), ("<vo", "co>"), ("<", "image>"), ("<image", ">"), ("a <i", "mage> b")]
)
def test_marks_put_together_of_parts_are_found(server, texts):
    parts = [{"type": "text", "text": text} for text in texts]
    answer = server.chat([{"role": "user", "content": parts}])
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "image_mark"


def test_routes_that_are_none(server):
    for path in ("/", "/v1", "/v1/chat/completions/", "/v1/embeddings", "/docs", "/../etc/passwd"):
        answer = server.get(path)
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "unknown_url", path
    answer = server.get("/v1/chat/completions")
    assert answer.status_code == 405 and answer.headers["allow"] == "POST"
    assert "use POST" in answer.json()["error"]["message"]
    assert server.get("/v1/models/gpt-4").json()["error"]["code"] == "model_not_found"


def test_the_model_is_listed(server):
    (card,) = server.get("/v1/models").json()["data"]
    assert card["id"] == NAME and card == server.get(f"/v1/models/{NAME}").json()


def test_the_document_resolves(server):
    document = server.get("/openapi.json").json()
    text = json.dumps(document)
    names = set(document["components"]["schemas"])
    assert {"ChatRequest", "CompletionRequest", "CompressRequest", "ErrorAnswer"} <= names
    for part in text.split('"#/components/schemas/')[1:]:
        assert part.split('"')[0] in names


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "224.0.0.1", "255.255.255.255", "240.0.0.1", "192.0.2.1", "198.18.0.1", "192.88.99.1", "::", "::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:7f00:1", "64:ff9b::7f00:1", "64:ff9b:1::1", "fe80::1",
        "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "2002:7f00:1::", "2001::1", "2001:db8::1",
        "::7f00:1", "fec0::1", "100::1", "2606:4700::1111%1", "", "localhost",
        "2130706433", "0x7f.1", "127.1", "0177.0.0.1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


def test_addresses_that_are():
    assert all(map(is_public, ("93.184.216.34", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8")))


@pytest.mark.parametrize("wrong", [{"max_body": 0}, {"request_seconds": float("nan")}, {"api_keys": ("",)}])
def test_settings_that_let_nothing_through(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ServerSettings(**wrong)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "internvl"])
def test_marks_of_other_families_are_found(name):
    server = Server(name)
    mark = {"qwen2_5_vl": "<|image_pad|>", "gemma3": "<start_of_image>", "internvl": "<IMG_CONTEXT>"}[name]
    assert server.chat(f"a{mark}").json()["error"]["code"] == "image_mark"
    answer = server.chat(shown(10), stream=True)
    assert answer.status_code == 200 and events(answer)[-1] == "[DONE]"
    assert server.chat("a </s> b").status_code == 200
