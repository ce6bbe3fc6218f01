"""Where shards lie: a folder, or a prefix of an object store, through fsspec. A file is there whole, or
not."""

from __future__ import annotations

import json
import re
import uuid
from typing import Any

from ..cache.container import VoCoCacheError
from ..files import atomic_path

MANIFEST = "manifest.json"
_SINGLE_PUT = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "memory", "r2")
_EXTRA = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
_NAME = re.compile(r"[0-9a-f]{64}\.parquet")


class ShardFolder:
    """A prefix of an object store (or a folder) that holds shards.

    Args:
        url: ``s3://bucket/prefix``, ``file:///folder``, ``memory://name`` or a plain path.

    Raises:
        ImportError: fsspec needs a package for this protocol that is not installed.
        ValueError: no such protocol.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        protocol = url.split("://")[0] if "://" in url else "file"
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.url)
        except ImportError as problem:
            package = _EXTRA.get(protocol)
            fix = f"pip install {package}" if package else str(problem)
            raise ImportError(f"{url}: {protocol}:// needs a package that is not installed: {fix}.") from None
        except ValueError as problem:
            raise ValueError(f"{url} cannot be used: {problem}.") from None
        self.single_put = protocol in _SINGLE_PUT
        self.local = protocol in ("file", "local")

    def path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    def shards(self) -> list[str]:
        """Names of the shards that are there, sorted."""
        self.fs.invalidate_cache()
        if not self.fs.isdir(self.root):
            return []
        names = [str(path).rsplit("/", 1)[-1] for path in self.fs.ls(self.root, detail=False)]
        return sorted(name for name in names if _NAME.fullmatch(name))

    def put(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all."""
        target = self.path(name)
        if self.local:
            with atomic_path(target) as temporary:
                temporary.write_bytes(data)
            return
        if self.single_put:
            self.fs.pipe_file(target, data)
            return
        self.fs.makedirs(self.root, exist_ok=True)
        temporary_name = self.path(f".{name}.{uuid.uuid4().hex}.tmp")
        self.fs.pipe_file(temporary_name, data)
        self.fs.mv(temporary_name, target)

    def get(self, name: str) -> bytes:
        try:
            return self.fs.cat_file(self.path(name))
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.url}/{name} does not exist.") from None

    def manifest(self) -> dict[str, Any] | None:
        """What ``write_manifest`` wrote; ``None`` where no run has ended yet.

        Raises:
            VoCoCacheError: it is not a manifest of this release.
        """
        try:
            found = json.loads(self.get(MANIFEST))
        except FileNotFoundError:
            return None
        except ValueError:
            raise VoCoCacheError(f"{self.url}/{MANIFEST} is no manifest of shards: it is no JSON.") from None
        if not isinstance(found, dict) or not isinstance(found.get("shards"), dict):
            raise VoCoCacheError(f"{self.url}/{MANIFEST} is no manifest of shards.")
        return found
