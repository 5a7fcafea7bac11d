"""A server on loopback that speaks the part of the hub's protocol that downloading needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import ClassVar

COMMIT = "5" * 40
REPOSITORY = "owner/model"
FILES = {
    "config.json": b'{"model_type": "idefics3"}',
    "model.safetensors": b"weights",
    "onnx/model.onnx": b"not wanted",
}


class Hub(BaseHTTPRequestHandler):
    """Serves one repository with one branch; another one is gated."""

    files: ClassVar[Mapping[str, bytes]] = FILES

    def do_HEAD(self) -> None:
        """Answer with a file's headers."""
        self._answer(with_body=False)

    def do_GET(self) -> None:
        """Answer with a file or with the repository's description."""
        self._answer(with_body=True)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Keep quiet."""

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(("/api/models/owner/gated", "/owner/gated")):
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"}, with_body=with_body)
        elif path in self._descriptions():
            siblings = [{"rfilename": name} for name in self.files]
            info = {"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}
            self._send(200, json.dumps(info).encode(), {}, with_body=with_body)
        elif path.startswith(f"/api/models/{REPOSITORY}/revision/"):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, with_body=with_body)
        elif (name := path.removeprefix(f"/{REPOSITORY}/resolve/{COMMIT}/")) in self.files:
            data = self.files[name]
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self._send(200, data, headers, with_body=with_body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body=with_body)

    @staticmethod
    def _descriptions() -> set[str]:
        return {f"/api/models/{REPOSITORY}/revision/{name}" for name in ("main", COMMIT)}

    def _send(self, status: int, data: bytes, headers: dict[str, str], *, with_body: bool) -> None:
        """Send a whole answer."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body:
            self.wfile.write(data)


@contextmanager
def serve_hub(files: Mapping[str, bytes] = FILES) -> Iterator[str]:
    """Serve the hub with these files while the block runs; yield its address."""
    with serve(type("HubWithFiles", (Hub,), {"files": files})) as address:
        yield address


@contextmanager
def serve(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve on loopback while the block runs; yield the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
