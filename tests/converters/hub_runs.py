"""How the tests run the command line against a Hub of their own: in real processes, killed and resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from ckptbridge.converters.hub.shards import SHARDS_SUFFIX
from ckptbridge.converters.receipt import RECEIPT_NAME, read_receipt
from tests.converters.hub_server import HubServer
from tests.converters.running import ROOT

HUB_ID = "org/name"


@dataclass(frozen=True, slots=True)
class Done:
    """How a run of the command line ended."""

    code: int
    stdout: str
    stderr: str


def start(
    hub: HubServer, work: Path, *words: object, prefix: tuple[str, ...] = (), **more: str
) -> subprocess.Popen[str]:
    """`python -m ckptbridge WORDS`, with this Hub, a cache of its own under `work`, and `more` in the environment."""
    command = [*prefix, sys.executable, "-m", "ckptbridge", *map(str, words)]
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")}
    environment |= hub.environment(work / "cache") | {"OMP_NUM_THREADS": "1"} | more
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


def run(hub: HubServer, work: Path, *words: object, prefix: tuple[str, ...] = ()) -> Done:
    process = start(hub, work, *words, prefix=prefix)
    stdout, stderr = process.communicate(timeout=120)
    return Done(process.returncode, stdout, stderr)


def stop_at_byte(hub: HubServer, nbytes: int, process: list[subprocess.Popen[str]], signal_number: int) -> None:
    """Send a signal to process[0] when the Hub has sent so many bytes of shards, and nothing more to it after that."""
    sent, lock, silent = 0, threading.Lock(), threading.Event()

    def before_block(name: str, at: int) -> None:
        nonlocal sent
        with lock:
            sent += 1 << 14
            due = sent >= nbytes and not silent.is_set()
            if due:
                silent.set()
        if due:
            process[0].send_signal(signal_number)
        if silent.is_set() and signal_number == signal.SIGKILL:
            process[0].wait()

    hub.before_block = before_block


def shards_folder(target: Path) -> Path:
    return target.with_name(target.name + SHARDS_SUFFIX)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a checkpoint but its receipt."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != RECEIPT_NAME
    }


def assert_same(made: Path, expected: Path) -> None:
    """Both hold the same files, byte for byte, and their receipts the same digests."""
    a, b = files_of(made), files_of(expected)
    assert a.keys() == b.keys()
    assert [name for name in a if a[name] != b[name]] == []
    one, other = read_receipt(made), read_receipt(expected)
    assert one.source_tensors == other.source_tensors
    assert one.target_tensors == other.target_tensors
