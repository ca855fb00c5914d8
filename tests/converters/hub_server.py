"""A Hub on this machine: HTTP as huggingface_hub speaks it, with every fault that a network has.

Two servers on two ports, as huggingface.co and its CDN are two hosts: the Hub answers with metadata and small files and
sends those who ask for large ones (git LFS) to the CDN, which must never see a token.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

LARGE_SUFFIXES = (".safetensors", ".bin")
BLOCK_NBYTES = 1 << 14


@dataclass(slots=True)
class Faults:
    """What goes wrong, by file name. Each fault is used up by the response that shows it."""

    cuts: dict[str, list[int]] = field(default_factory=dict)
    """Bytes of the file at which the connection breaks."""
    flips: dict[str, list[int]] = field(default_factory=dict)
    """Bytes of the file that arrive with one bit changed."""
    refusals: dict[str, list[int]] = field(default_factory=dict)
    """HTTP statuses in place of an answer."""
    ignores_ranges: set[str] = field(default_factory=set)
    """Files that are always sent from their first byte."""


@dataclass
class HubServer:
    """`models` are folders by Hub id. Used as a context; `endpoint` is for HF_ENDPOINT."""

    models: dict[str, Path]
    commit: str = "c0ffee" + "0" * 34
    gated: set[str] = field(default_factory=set)
    token: str | None = None
    """The token that opens the gated models."""
    faults: Faults = field(default_factory=Faults)
    bytes_per_second: float | None = None
    """Of each connection to the CDN."""
    sent: Counter[str] = field(default_factory=Counter)
    """Body bytes by file name."""
    requests: list[str] = field(default_factory=list)
    """Method, host (hub or cdn) and path of everything that was asked for."""
    leaked_tokens: list[str] = field(default_factory=list)
    """Paths at the CDN that were asked for with a token."""
    before_block: Callable[[str, int], None] | None = None
    """Called with (file name, byte) before each block of a large file is sent."""

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self._servers = [_Server(("127.0.0.1", 0), _Hub, self), _Server(("127.0.0.1", 0), _Cdn, self)]
        hub, cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)
        self.endpoint, self.cdn = hub, cdn.replace("127.0.0.1", "localhost")  # another host, as in the world

    def __enter__(self) -> HubServer:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def environment(self, cache: Path) -> dict[str, str]:
        """What a process needs to meet this Hub and no other, with a cache of its own."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], hub: HubServer) -> None:
        super().__init__(address, handler)
        self.hub = hub

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients are killed in the middle of an answer: that is no error of the server's."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    host = ""

    @property
    def hub(self) -> HubServer:
        assert isinstance(self.server, _Server)
        return self.server.hub

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is written to stderr; `requests` has it all."""

    def do_HEAD(self) -> None:
        self.respond()

    def do_GET(self) -> None:
        self.respond()

    def respond(self) -> None:
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {self.host} {self.path}")
        name = urlsplit(self.path).path.rsplit("/", 1)[-1]
        with self.hub.lock:
            refusals = self.hub.faults.refusals.get(name)
            status = refusals.pop(0) if refusals else None
        if status is not None:
            self.answer(status, b"for now")
        else:
            self.route(unquote(urlsplit(self.path).path))

    def route(self, path: str) -> None:
        raise NotImplementedError

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            with self.hub.lock:
                self.hub.sent[urlsplit(self.path).path.rsplit("/", 1)[-1]] += len(body)


class _Hub(_Handler):
    host = "hub"

    def route(self, path: str) -> None:
        if hit := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self.model(hit[1], hit[2])
        elif hit := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(hit[1], hit[2], hit[3])
        else:
            self.answer(404, b"")

    def admits(self, model: str, revision: str | None, *, reads_files: bool) -> bool:
        """Whether the model may be read; if not, the refusal has been sent as the Hub words it."""
        if model not in self.hub.models:
            self.answer(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif model in self.hub.gated and reads_files and self.headers["Authorization"] != f"Bearer {self.hub.token}":
            self.answer(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif revision not in (None, "main", self.hub.commit):
            self.answer(
                404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"}
            )
        else:
            return True
        return False

    def model(self, model: str, revision: str | None) -> None:
        if not self.admits(model, revision, reads_files=False):
            return
        files = sorted(p for p in self.hub.models[model].iterdir() if p.is_file())
        siblings = [
            {
                "rfilename": file.name,
                "size": file.stat().st_size,
                "blobId": blob_id(file),
                **(
                    {"lfs": {"sha256": sha256(file), "size": file.stat().st_size, "pointerSize": 134}}
                    if file.name.endswith(LARGE_SUFFIXES)
                    else {}
                ),
            }
            for file in files
        ]
        told = {"id": model, "modelId": model, "sha": self.hub.commit, "siblings": siblings, "private": False}
        self.answer(200, json.dumps(told).encode(), {"Content-Type": "application/json"})

    def resolve(self, model: str, revision: str, name: str) -> None:
        if not self.admits(model, revision, reads_files=True):
            return
        file = self.hub.models[model] / name
        commit = {"X-Repo-Commit": self.hub.commit}
        if not file.is_file():
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", **commit})
        elif name.endswith(LARGE_SUFFIXES):
            linked = {"X-Linked-Size": str(file.stat().st_size), "X-Linked-ETag": f'"{sha256(file)}"'}
            place = f"{self.hub.cdn}/{model}/{sha256(file)}/{name}"
            self.answer(302, b"", {**commit, **linked, "Location": place, "Accept-Ranges": "bytes"})
        else:
            self.answer(200, file.read_bytes(), {**commit, "ETag": f'"{blob_id(file)}"'})


class _Cdn(_Handler):
    host = "cdn"

    def route(self, path: str) -> None:
        if self.headers["Authorization"]:
            self.hub.leaked_tokens.append(path)
        model, _, name = path[1:].rsplit("/", 2)
        file = self.hub.models[model] / name
        size, start, status = file.stat().st_size, 0, 200
        stop = size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if wanted and name not in self.hub.faults.ignores_ranges:
            start, stop, status = int(wanted[1]), min(size, int(wanted[2] or size - 1) + 1), 206
            if start >= size:
                self.answer(416, b"", {"Content-Range": f"bytes */{size}"})
                return
        self.send_response(status)
        self.send_header("Content-Length", str(stop - start))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        if self.command != "HEAD":
            self.send_body(file, start, stop)

    def send_body(self, file: Path, start: int, stop: int) -> None:
        name, began = file.name, time.monotonic()
        with file.open("rb") as source:
            source.seek(start)
            for at in range(start, stop, BLOCK_NBYTES):
                if self.hub.before_block:
                    self.hub.before_block(name, at)
                block = bytearray(source.read(min(BLOCK_NBYTES, stop - at)))
                for byte in self.used_up(self.hub.faults.flips, name, at, len(block)):
                    block[byte - at] ^= 0x10
                cut = self.used_up(self.hub.faults.cuts, name, at, len(block))
                if cut:
                    block = block[: cut[0] - at]
                self.wfile.write(block)
                with self.hub.lock:
                    self.hub.sent[name] += len(block)
                if cut:
                    self.close_connection = True
                    return
                if self.hub.bytes_per_second:
                    time.sleep(
                        max(0.0, began + (at + len(block) - start) / self.hub.bytes_per_second - time.monotonic())
                    )

    def used_up(self, faults: dict[str, list[int]], name: str, at: int, nbytes: int) -> list[int]:
        """The faults of one kind in this block, at most one of them taken, so that each meets a response of its own."""
        with self.hub.lock:
            found = [byte for byte in sorted(faults.get(name, ())) if at <= byte < at + nbytes][:1]
            for byte in found:
                faults[name].remove(byte)
        return found


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def blob_id(file: Path) -> str:
    """git's id of a file's content."""
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
