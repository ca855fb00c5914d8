"""A model on the Hub at one commit: what files it has, and their bytes.

Everything goes through huggingface_hub's own client: its endpoint (HF_ENDPOINT), its token, its proxies, its offline
switch. A revision is resolved to its commit once, so that a model that changes meanwhile is never mixed.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import (
    HfApi,
    get_session,
    hf_hub_download,  # pyright: ignore[reportUnknownVariableType]
    hf_hub_url,
)
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # pyright: ignore[reportUnknownVariableType]

from ckptbridge.converters.errors import BadInputError, StorageError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
WAITS = (0.0, 1.0, 2.0, 4.0, 8.0, 15.0)
"""Seconds before each further attempt. A byte that arrived begins the count again."""
TIMEOUT = 20.0
"""Seconds without a byte after which a connection counts as cut."""
_OVERLOADED = (408, 429, 500, 502, 503, 504)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a commit. `sha256` is that of its bytes; a small file has git's own `blob` id in its place."""

    name: str
    size: int
    sha256: str | None
    blob: str | None


class Cut(Exception):
    """The connection broke, or the server is overloaded for now: worth another attempt."""


class Cancelled(Exception):
    """The conversion has ended while a shard was on its way."""


@dataclass(frozen=True, slots=True)
class HubRepository:
    """One commit of a model on the Hub."""

    id: str
    commit: str
    files: dict[str, HubFile]

    @property
    def origin(self) -> str:
        """The model and its commit, for receipts and messages."""
        return f"{self.id}@{self.commit}"

    def cached_file(self, name: str) -> Path:
        """A file in huggingface_hub's own cache, downloaded by it unless it is there."""
        with told(self.id, self.commit):
            return Path(hf_hub_download(self.id, name, revision=self.commit))

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file, fewer where it ends before. Raises StorageError when they cannot be had."""
        stop = min(stop, self.files[name].size)
        found = bytearray(stop - start)
        try:
            for at, block in self.blocks(name, start, stop, threading.Event()):
                low, high = max(at, start), min(at + len(block), stop)
                found[low - start : max(low, high) - start] = block[low - at : max(low, high) - at]
        except Cut as cut:
            raise StorageError(f"{self.origin}/{name}: {cut}. Run again, with --resume if it was begun") from cut
        return bytes(found)

    def blocks(self, name: str, start: int, stop: int, cancelled: threading.Event) -> Iterator[tuple[int, bytes]]:
        """(place in the file, block) from `start` until `stop` is reached, through all cuts of the connection.

        A server that ignores ranges begins anew: then places go back to 0. Raises Cut when no byte came for as many
        attempts as there are WAITS, Cancelled when that is set, BadInputError when the Hub refuses.
        """
        at, attempts, why = start, 0, ""
        while at < stop:
            if attempts == len(WAITS):
                raise Cut(f"the connection was cut at byte {at} and {len(WAITS)} attempts brought no more: {why}")
            if cancelled.wait(WAITS[attempts]):
                raise Cancelled
            attempts, before = attempts + 1, at
            try:
                with told(self.id, self.commit), self._connected(name, at, stop) as response:
                    at = at if response.status_code == 206 else 0
                    for block in response.iter_bytes():  # as they come: what is collected is lost with a cut
                        if cancelled.is_set():
                            raise Cancelled
                        yield at, block
                        at += len(block)
                        if at >= stop:
                            return
            except Cut as cut:
                why = str(cut)
            attempts = 0 if at > before else attempts

    @contextmanager
    def _connected(self, name: str, start: int, stop: int) -> Generator[Any]:
        """The response to a request for bytes [start, stop). Redirects are followed; no other host sees the token."""
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        url = hf_hub_url(self.id, name, revision=self.commit)
        with _cuts(), get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
            hf_raise_for_status(response)
            yield response


def find_repository(hub_id: str, revision: str | None) -> HubRepository:
    """The model at a branch, tag or commit (None: the main branch), its files with sizes and checksums.

    Raises BadInputError when there is none or it is closed to the user, StorageError when the network fails.
    """

    def attempt() -> Any:
        with _cuts():
            return HfApi().model_info(hub_id, revision=revision, files_metadata=True, timeout=TIMEOUT)

    with told(hub_id, revision):
        try:
            info = retried(attempt)
        except Cut as cut:
            raise StorageError(
                f"{hub_id}: no such folder here, and the Hub cannot be reached: {cut}; {len(WAITS)} attempts were made"
            ) from cut
    files = {
        file.rfilename: HubFile(file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else None, file.blob_id)
        for file in info.siblings or ()
    }
    commit = info.sha or revision or "main"
    if not re.fullmatch(r"\w[\w.-]{0,99}", commit):  # it becomes the name of a folder
        raise BadInputError(f"{hub_id}: the server calls the commit {commit[:100]!r}, which is none")
    return HubRepository(hub_id, commit, files)


def retried(attempt: Callable[[], T]) -> T:
    """What `attempt` returns, after fewer cuts than there are WAITS. Raises the last Cut."""
    for wait in WAITS[:-1]:
        try:
            return attempt()
        except Cut:
            time.sleep(wait)
    return attempt()


@contextmanager
def _cuts() -> Generator[None]:
    """Turn what the HTTP client raises for a broken connection into Cut.

    The client is httpx in huggingface_hub 1 and httpx2 since: its errors are found where its class is.
    """
    client: Any = sys.modules[type(get_session()).__module__.partition(".")[0]]
    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code in _OVERLOADED:
            raise Cut(f"the server answered {error.response.status_code}") from error
        raise
    except client.HTTPError as error:
        raise Cut(str(error) or type(error).__name__) from error


@contextmanager
def told(hub_id: str, revision: str | None) -> Generator[None]:
    """Turn the Hub's refusals and the network's failures into errors that a user can act on."""
    try:
        yield
    except GatedRepoError as error:
        raise BadInputError(
            f"{hub_id}: the model is gated; accept its terms on the Hub and log in with `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, DisabledRepoError) as error:
        raise BadInputError(
            f"{hub_id}: no such folder here, and no such model on the Hub; for a private one log in with "
            "`hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise BadInputError(f"{hub_id}: has no branch, tag or commit {revision!r}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise StorageError(f"{hub_id}: no such folder here, and the Hub cannot be reached: {error}") from error
    except EntryNotFoundError as error:
        raise BadInputError(f"{hub_id}: a file is missing: {error}") from error
    except HfHubHTTPError as error:
        raise StorageError(f"{hub_id}: the Hub refused: {error}") from error
