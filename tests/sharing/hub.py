"""The hub's protocol for one dataset repository: listing, ranges, LFS uploads and commits."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from urllib.parse import unquote

from tests.unit.hub import COMMIT, Hub, serve

DATASET = "owner/goldens"
_API = f"/api/datasets/{DATASET}"


class DatasetHub(Hub):
    """Takes what is committed into `files`; every request with a wrong token is refused."""

    files: ClassVar[dict[str, bytes]] = {}
    uploaded: ClassVar[dict[str, bytes]] = {}
    tokens: ClassVar[set[str]] = {"hf_writer"}

    def do_POST(self) -> None:  # noqa: N802 - the server's own names
        """Answer what an upload asks: how, where to, and the commit itself."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(self.path)
        if self.headers.get("Authorization", "").removeprefix("Bearer ") not in self.tokens:
            self._reply({"error": "no permission"}, status=401)
        elif path == f"{_API}/preupload/main":
            files = [
                {**f, "uploadMode": "lfs", "shouldIgnore": False} for f in _json(body, "files")
            ]
            self._reply({"files": files})
        elif path == f"/datasets/{DATASET}.git/info/lfs/objects/batch":
            self._reply({"transfer": "basic", "objects": self._places(_json(body, "objects"))})
        elif path == f"{_API}/commit/main":
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self._reply({}, status=404)

    def do_PUT(self) -> None:  # noqa: N802
        """Take the bytes of an LFS object, and refuse others than were announced."""
        data = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.removeprefix("/lfs/")
        good = hashlib.sha256(data).hexdigest() == oid
        if good:
            self.uploaded[oid] = data
        self._reply({}, status=200 if good else 400)

    def _places(self, objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
        address = f"http://{self.headers['Host']}/lfs"
        return [
            {**item, "actions": {"upload": {"href": f"{address}/{item['oid']}"}}}
            for item in objects
        ]

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if line["key"] == "lfsFile":
                value = line["value"]
                self.files[value["path"]] = self.uploaded[value["oid"]]
        self._reply({"success": True, "commitOid": COMMIT, "commitUrl": f"/commit/{COMMIT}"})

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(self.path.partition("?")[0])
        if path in (_API, f"{_API}/revision/main"):
            self._reply({"id": DATASET, "sha": COMMIT, "siblings": []})
        elif match := re.fullmatch(rf"{_API}/tree/main/?(.*)", path):
            self._list(match[1])
        elif match := re.fullmatch(rf"/datasets/{DATASET}/resolve/main/(.+)", path):
            self._resolve(match[1], with_body=with_body)
        else:
            headers = {"X-Error-Code": "RepoNotFound"}
            self._send(404, b"{}", headers, with_body=with_body)

    def _list(self, folder: str) -> None:
        found = [
            {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
            for name, data in self.files.items()
            if name.startswith(f"{folder}/" if folder else "")
        ]
        if not found and folder:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"}, with_body=True)
        else:
            self._reply(found)

    def _resolve(self, name: str, *, with_body: bool) -> None:
        if name not in self.files:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"}, with_body=with_body)
            return
        data = self.files[name]
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if span:
            data = data[int(span[1]) : int(span[2]) + 1]
        self._send(206 if span else 200, data, {"ETag": '"e"'}, with_body=with_body)

    def _reply(self, value: object, *, status: int = 200) -> None:
        headers = {"Content-Type": "application/json"}
        self._send(status, json.dumps(value).encode(), headers, with_body=True)


def _json(body: bytes, key: str) -> list[dict[str, Any]]:
    value: list[dict[str, Any]] = json.loads(body)[key]
    return value


@contextmanager
def serve_dataset(files: dict[str, bytes]) -> Iterator[str]:
    """Serve the dataset repository; what is committed is found in `files`."""
    with serve(type("Dataset", (DatasetHub,), {"files": files, "uploaded": {}})) as address:
        yield address
