"""Images are fetched from listed hosts at public addresses, and from nowhere else, whatever the way there."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from http_fakes import Server, picture

from voco_plugin.serving.http.errors import ApiError
from voco_plugin.serving.http.fetching import Fetcher, resolve
from voco_plugin.serving.http.public_addresses import is_public
from voco_plugin.serving.http.settings import ServerSettings


class Site:
    """A server on loopback that answers a path as ``pages`` says: ``(status, headers, body)``."""

    def __init__(self) -> None:
        self.pages: dict[str, Callable | tuple] = {"/a.png": (200, {}, picture(10))}
        self.seen: list[tuple[str, dict]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
                status, headers, body = outer.pages.get(self.path, (404, {}, b""))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    for piece in body if not isinstance(body, bytes) else [body]:
                        self.wfile.write(piece)
                except OSError:
                    pass

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.port = self.http.server_port
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture(scope="module")
def site():
    made = Site()
    yield made
    made.http.shutdown()
    made.http.server_close()


def fetched(url: str, site: Site | None = None, names: dict | None = None, **settings) -> bytes:
    """Fetch with a resolver that knows ``names``; 127.0.0.1 counts as public where ``site`` is given, as it
    has to stand for the internet."""
    asked: list[str] = []

    async def known(host: str, port: int) -> list[str]:
        asked.append(host)
        found = (names or {}).get(host, ["127.0.0.1"] if host.endswith("pictures.org") else None)
        found = found(len(asked)) if callable(found) else found
        if found is None:
            raise OSError("no such name")
        return found

    def public(address: str) -> bool:
        return (site is not None and address == "127.0.0.1") or is_public(address)

    port = f":{site.port}" if site else ""
    settings.setdefault("allowed_hosts", (f"pictures.org{port}", f"*.pictures.org{port}"))
    fetcher = Fetcher(
        ServerSettings(fetch_seconds=settings.pop("fetch_seconds", 2.0), **settings), known, public
    )
    return asyncio.run(fetcher.fetch(url, "p"))


def refusal(*args, **kwargs) -> ApiError:
    with pytest.raises(ApiError) as caught:
        fetched(*args, **kwargs)
    assert caught.value.status == 400 and caught.value.param == "p"
    return caught.value


def test_a_listed_host_is_fetched_from_its_checked_address(site):
    site.seen.clear()
    url = f"http://pictures.org:{site.port}/a.png"
    assert fetched(url, site) == picture(10)
    ((_, headers),) = site.seen
    assert headers["host"] == f"pictures.org:{site.port}" and headers["accept-encoding"] == "identity"
    assert not {"cookie", "authorization", "referer"} & set(headers)
    assert fetched(f"HTTP://WWW.Pictures.ORG.:{site.port}/a.png#part", site) == picture(10)


def test_nothing_is_fetched_unless_hosts_are_named(site):
    assert (
        refusal(f"http://pictures.org:{site.port}/a.png", site, allowed_hosts=()).code == "remote_images_off"
    )


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "file://pictures.org/a", "ftp://pictures.org/a", "gopher://pictures.org/",
        "//pictures.org/a.png", "pictures.org/a.png", "/etc/passwd", "../a.png", "http://", "http:///a",
        "http://pictures.org@127.0.0.1/", "http://127.0.0.1@pictures.org/", "http://u:p@pictures.org/",
        "http://pictures.org:22/", "http://pictures.org:0/", "http://pictures.org:99999/",
        "http://pictures.org.evil.org/", "http://evilpictures.org/", "http://evil.org/#pictures.org",
        "http://evil.org?.pictures.org", "http://evil.org\\@pictures.org/", "http://evil.org\\.pictures.org/",
        "http://pictures.org\t.evil.org/", "http://pictures.org\r\nHost: evil.org/", "http://pictures.org /",
        "http://pictures\u3002org/", "http://\u24c5ictures.org/", "http://127.0.0.1/", "http://2130706433/",
        "http://0x7f000001/", "http://017700000001/", "http://127.1/", "http://[::1]/", "http://[::ffff:7f00:1]/",
        "http://localhost/", "http://[::1", "http://.pictures.org@/", "data:image/png;base64,AA",
        "http://%70ictures.org.evil.org/", "jar:http://pictures.org/!/", "http:pictures.org",
    ],
)  # fmt: skip
def test_urls_that_are_tricks(url):
    listed = ("pictures.org", "*.pictures.org")
    refused = refusal(url, names={"evil.org": ["93.184.216.34"]}, allowed_hosts=listed)
    assert refused.code != "image_unreachable", "its name was looked up"


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"], ["10.0.0.1"], ["169.254.169.254"], ["::1"], ["::ffff:127.0.0.1"], ["64:ff9b::7f00:1"],
        ["0.0.0.0"], ["fe80::1%lo"], ["93.184.216.34", "127.0.0.1"], [], None, ["fd00::1", "8.8.8.8"],
    ],
)  # fmt: skip
def test_an_inner_address_looks_like_no_address(addresses):
    inner = refusal("http://pictures.org/a.png", names={"pictures.org": addresses})
    nothing = refusal("http://gone.pictures.org/a.png", names={"gone.pictures.org": None})
    assert str(inner) == str(nothing) and inner.code == nothing.code == "image_unreachable"


@pytest.mark.parametrize("addresses", [["127.0.0.1", "10.0.0.1"], ["10.0.0.1", "127.0.0.1"]])
def test_one_inner_address_among_public_ones_is_enough(addresses, site):
    site.seen.clear()
    refusal(f"http://pictures.org:{site.port}/a.png", site, {"pictures.org": addresses}, fetch_seconds=0.5)
    assert site.seen == []


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "017700000001", "127.1", "127.0.0.1", "[::1]"])
def test_listed_numbers_are_checked_as_any_name(host, site):
    """Whatever the resolver of this machine makes of them."""
    settings = ServerSettings(allowed_hosts=(f"{host}:{site.port}",), fetch_seconds=2.0)
    with pytest.raises(ApiError, match="could not be fetched"):
        asyncio.run(Fetcher(settings).fetch(f"http://{host}:{site.port}/a.png", "p"))
    assert asyncio.run(resolve("127.0.0.1", 80)) == ["127.0.0.1"]


def test_a_name_that_turns_inward_is_asked_once(site):
    """DNS rebinding: the second answer would be another address; there is no second question."""
    names = {"pictures.org": lambda times: ["127.0.0.1"] if times == 1 else pytest.fail("asked twice")}
    assert fetched(f"http://pictures.org:{site.port}/a.png", site, names) == picture(10)


def test_redirects_are_checked_as_the_first(site):
    there = f"http://pictures.org:{site.port}"
    listed = (f"pictures.org:{site.port}", f"inner.org:{site.port}", f"other.pictures.org:{site.port}")
    site.pages |= {
        "/ok": (302, {"Location": "/a.png"}, b""),
        "/far": (307, {"Location": f"http://other.pictures.org:{site.port}/ok"}, b""),
        "/file": (302, {"Location": "file:///etc/passwd"}, b""),
        "/home": (302, {"Location": f"http://127.0.0.1:{site.port}/a.png"}, b""),
        "/inner": (301, {"Location": f"http://inner.org:{site.port}/a.png"}, b""),
        "/loop": (302, {"Location": "/loop"}, b""),
        "/user": (302, {"Location": f"http://a:b@pictures.org:{site.port}/a.png"}, b""),
        "/odd": (302, {"Location": "http://["}, b""),
        "/data": (302, {"Location": "data:image/png;base64,AAAA"}, b""),
    }
    names = {"inner.org": ["10.0.0.1"]}
    assert fetched(f"{there}/ok", site, allowed_hosts=listed) == picture(10)
    assert fetched(f"{there}/far", site, allowed_hosts=listed) == picture(10)
    for page in ("file", "home", "inner", "loop", "user", "odd", "data"):
        site.seen.clear()
        refusal(f"{there}/{page}", site, names, allowed_hosts=listed)
        assert {path for path, _ in site.seen} == {f"/{page}"}, "went where it must not"
    assert len(site.seen) == 1
    site.seen.clear()
    refusal(f"{there}/loop", site, allowed_hosts=listed, max_redirects=3)
    assert len(site.seen) == 4
    refusal(f"{there}/ok", site, allowed_hosts=listed, max_redirects=0)


def test_size_and_time_are_limited(site):
    def slowly():
        for _ in range(100):
            time.sleep(0.05)
            yield b"x"

    there = f"http://pictures.org:{site.port}"
    site.pages |= {
        "/big": (200, {}, [b"x" * 10_000] * 100),
        "/lie": (200, {"Content-Length": "5"}, picture()),
        "/zip": (200, {"Content-Encoding": "gzip"}, b"\x1f\x8b"),
        "/gone": (500, {}, b"secret"),
        "/partial": (206, {}, picture()),
    }
    assert refusal(f"{there}/big", site, max_image=50_000).code == "image_too_large"
    assert len(fetched(f"{there}/lie", site)) == 5
    for page in ("zip", "gone", "none", "partial"):
        assert refusal(f"{there}/{page}", site).code == "image_unreachable"
    site.pages["/slow"] = (200, {}, slowly())
    start = time.monotonic()
    assert refusal(f"{there}/slow", site, fetch_seconds=0.3).code == "image_unreachable"
    assert time.monotonic() - start < 2


def test_proxies_of_the_environment_are_not_used(site, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert fetched(f"http://pictures.org:{site.port}/a.png", site) == picture(10)


def test_a_fetched_image_is_read_as_any(site):
    settings = {"allowed_hosts": (f"pictures.org:{site.port}",)}

    async def known(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    server = Server(fetcher=Fetcher(ServerSettings(**settings), known, lambda address: True), **settings)
    site.pages["/text"] = (200, {"Content-Type": "image/png"}, b"<html>internal</html>")

    def shown(path: str) -> list:
        url = {"url": f"http://pictures.org:{site.port}{path}"}
        return [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]

    assert server.chat(shown("/a.png")).status_code == 200
    answer = server.chat(shown("/text"))
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_image"
    assert "internal" not in answer.text
    compressed = server.post("/v1/voco/compress", {"image": f"http://pictures.org:{site.port}/a.png"})
    assert compressed.json()["hit"] is True
