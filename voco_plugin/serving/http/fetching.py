"""Images from the internet, for whoever asks: off unless hosts are named, and then those alone.

    URL → its host is listed → its name is resolved here → every address is public → connect to that address
        → a redirect begins at the left again

The address that was checked is the one connected to, so a name that resolves to another address the second
time (DNS rebinding) gains nothing. Of a host that cannot be reached, of one without an address and of one
inside this network the error is the same: it tells nobody what there is.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import urllib.parse
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import ApiError
from .public_addresses import is_public
from .settings import ServerSettings

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of ``host``, as this machine's resolver has them."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


@dataclass(frozen=True)
class Target:
    """A URL that may be fetched, in parts: nobody parses it a second time.

    Attributes:
        scheme: ``http`` or ``https``.
        host: in lower case, ASCII.
        port: a number.
        path: with the query.
    """

    scheme: str
    host: str
    port: int
    path: str

    @property
    def netloc(self) -> str:
        """As a ``Host`` header has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The whole."""
        return f"{self.scheme}://{self.netloc}{self.path}"


class Fetcher:
    """Fetches what :class:`~voco_plugin.serving.http.settings.ServerSettings` lets it.

    Args:
        settings: hosts and limits.
        resolve: ``(host, port)`` → addresses.
        is_public: whether an address may be connected to.
    """

    def __init__(
        self,
        settings: ServerSettings,
        resolve: Resolve = resolve,
        is_public: Callable[[str], bool] = is_public,
    ) -> None:
        self.settings, self.resolve, self.is_public = settings, resolve, is_public
        self._context: Any = None

    async def fetch(self, url: str, param: str) -> bytes:
        """The bytes behind ``url``.

        Raises:
            ApiError: its host is not listed, it cannot be had, or is larger than an image may be.
        """
        target = self._target(url, param)
        try:
            return await asyncio.wait_for(self._fetched(target, param), self.settings.fetch_seconds)
        except asyncio.TimeoutError:
            raise self._unreachable(param) from None

    # -- which URLs

    def _target(self, url: str, param: str) -> Target:
        if not self.settings.allowed_hosts:
            raise ApiError(
                "this server fetches no images; send the image as a data URL (data:image/png;base64,…).",
                param, "remote_images_off",
            )  # fmt: skip
        shown = repr(url[:80])
        if not url.isascii() or any(c <= " " or c in '\\"<>^`{|}\x7f' for c in url):
            raise ApiError(f"{shown} holds characters that no URL has; percent-encode them.", param)
        try:
            parts = urllib.parse.urlsplit(url)
            host, port = (parts.hostname or "").rstrip("."), parts.port
        except ValueError:
            raise ApiError(f"{shown} is not a URL; send one, or a data URL.", param) from None
        scheme = parts.scheme.lower()
        if scheme not in _PORTS:
            raise ApiError(f"{shown} is not fetched; send an http or https URL, or a data URL.", param)
        if "@" in parts.netloc:
            raise ApiError(f"{shown} holds a user name; send a URL without one.", param)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        target = Target(scheme, host, _PORTS[scheme] if port is None else port, path)
        if not host or not self._is_listed(target):
            raise ApiError(
                f"this server fetches no image from {parts.netloc[:80]!r}; send the image as a data URL.",
                param, "host_not_allowed",
            )  # fmt: skip
        return target

    def _is_listed(self, target: Target) -> bool:
        for entry in self.settings.allowed_hosts:
            name, port = _entry(entry)
            if target.port not in ((_PORTS[target.scheme],) if port is None else (port,)):
                continue
            if target.host == name or (name.startswith("*.") and target.host.endswith(name[1:])):
                return True
        return False

    # -- fetching them

    async def _fetched(self, target: Target, param: str) -> bytes:
        for _ in range(self.settings.max_redirects + 1):
            addresses = await self._addresses(target, param)
            found = await self._get(target, addresses, param)
            if isinstance(found, bytes):
                return found
            try:
                following = urllib.parse.urljoin(target.url, found)
            except ValueError:
                raise self._unreachable(param) from None
            target = self._target(following, param)
        raise ApiError(
            f"the image is behind more than {self.settings.max_redirects} redirects; send its own URL.", param
        )

    async def _addresses(self, target: Target, param: str) -> list[str]:
        try:
            addresses = list(await self.resolve(target.host, target.port))
        except (OSError, UnicodeError):
            raise self._unreachable(param) from None
        if not addresses or not all(self.is_public(address) for address in addresses):
            raise self._unreachable(param)
        return addresses

    async def _get(self, target: Target, addresses: Sequence[str], param: str) -> bytes | str:
        """The body, or where it is redirected to."""
        import httpx

        address = ipaddress.ip_address(addresses[0])
        host = f"[{address}]" if address.version == 6 else str(address)
        waits = dict.fromkeys(_WAITS, self.settings.fetch_seconds)
        request = httpx.Request(
            "GET",
            f"{target.scheme}://{host}:{target.port}{target.path}",
            headers={"Host": target.netloc, "Accept": "image/*", "Accept-Encoding": "identity"},
            # the certificate must be the name's, though the address is connected to
            extensions={"sni_hostname": target.host, "timeout": waits},
        )
        try:
            verify = self._certificates() if target.scheme == "https" else False
            async with httpx.AsyncClient(verify=verify, trust_env=False, follow_redirects=False) as client:
                answer = await client.send(request, stream=True)
                try:
                    return await self._read(answer, param)
                finally:
                    await answer.aclose()
        except (httpx.HTTPError, httpx.InvalidURL, OSError):
            raise self._unreachable(param) from None

    def _certificates(self) -> Any:
        """Loaded once: that takes longer than many a fetch."""
        if self._context is None:
            import httpx

            self._context = httpx.create_ssl_context()
        return self._context

    async def _read(self, answer: Any, param: str) -> bytes | str:
        if answer.status_code in _REDIRECTS and "location" in answer.headers:
            return str(answer.headers["location"])
        encoding = answer.headers.get("content-encoding", "identity").lower()
        if answer.status_code != 200 or encoding != "identity":
            raise self._unreachable(param)
        data = bytearray()
        async for piece in answer.aiter_raw():
            data += piece
            if len(data) > self.settings.max_image:
                raise ApiError(
                    f"the image behind the URL has more than {self.settings.max_image} bytes; send a "
                    "smaller one.",
                    param, "image_too_large",
                )  # fmt: skip
        return bytes(data)

    @staticmethod
    def _unreachable(param: str) -> ApiError:
        """One text, whatever was in the way."""
        return ApiError(
            "the image behind the URL could not be fetched; send it as a data URL.",
            param,
            "image_unreachable",
        )


_WAITS = ("connect", "read", "write", "pool")


def _entry(text: str) -> tuple[str, int | None]:
    """An entry of the list as name and port."""
    name, colon, port = text.strip().lower().rpartition(":")
    if colon and port.isdigit() and (name.startswith("[") or ":" not in name):
        return name.strip("[]").rstrip("."), int(port)
    return text.strip().lower().strip("[]").rstrip("."), None


__all__ = ["Fetcher", "Target", "resolve"]
