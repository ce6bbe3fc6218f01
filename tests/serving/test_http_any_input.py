"""Whatever is sent, the server is not at fault: no 5xx, and every answer is as its own document says."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
from http_fakes import NAME, Server, data_url, picture
from hypothesis import HealthCheck, given, settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance,
]  # fmt: skip
SERVER = Server(max_tokens=64)
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", SERVER.app)
URL = {"url": data_url(picture(10))}
OPERATIONS = {one.ok().path: one.ok() for one in SCHEMA.get_all_operations()}
BODIES = [path for path, operation in OPERATIONS.items() if list(operation.body)]
RIGHT, WRONG = GenerationMode.POSITIVE, GenerationMode.NEGATIVE


def made_real(case) -> None:
    """Put the model's name and a picture where they go: or else nothing comes further than those."""
    if "name" in case.path_parameters and len(case.path_parameters["name"]) % 2:
        case.path_parameters["name"] = NAME
    body = case.body
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str):
        body["model"] = NAME
    if isinstance(body.get("image"), str) and len(body["image"]) % 2 == 0:
        body["image"] = URL["url"]
        body.pop("video", None)
    for message in body.get("messages") or () if isinstance(body.get("messages"), list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and isinstance(part.get("image_url"), dict):
                part["image_url"] = dict(URL)


@pytest.mark.parametrize(
    ("path", "mode"), [*((path, RIGHT) for path in OPERATIONS), *((path, WRONG) for path in BODIES)]
)
def test_no_input_is_the_servers_fault(path, mode):
    seen: Counter[int] = Counter()

    @settings(
        max_examples=60, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=OPERATIONS[path].as_strategy(generation_mode=mode))
    def sent(case):
        made_real(case)
        answer = case.call()
        case.validate_response(answer, checks=CHECKS)
        seen[answer.status_code] += 1

    sent()
    assert mode is WRONG or 200 in seen, seen
    assert path not in BODIES or mode is RIGHT or set(seen) & {400, 422}, seen
    assert SERVER.front.queue.taken == 0


def test_every_way_in_is_tried():
    assert set(BODIES) == {"/v1/chat/completions", "/v1/completions", "/v1/voco/compress"}
    assert {"/v1/models", "/v1/models/{name}", "/health", "/metrics"} < set(OPERATIONS)
