"""Processes for a function that may raise, hang or kill its process, as a compiler under test may."""

from __future__ import annotations

import multiprocessing
import os
import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection


def _serve(connection: Connection, function: Callable[..., str]) -> None:
    """A worker: takes arguments, answers (worked, text)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a pass that fails prints its whole program
    while True:
        arguments = connection.recv()
        try:
            connection.send((True, function(*arguments)))
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            connection.send((False, f"{type(error).__name__}: {lines[-1][:100]}"))


class Worker:
    """A process that is replaced when it dies or hangs."""

    def __init__(self, function: Callable[..., str], limit: float) -> None:
        self._function, self._limit = function, limit
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._function), daemon=True)
        self._process.start()
        theirs.close()

    def call(self, arguments: tuple) -> tuple[bool, str]:
        try:
            self._connection.send(arguments)
            if self._connection.poll(self._limit):
                return self._connection.recv()
            reason = f"took over {self._limit:g} s"
        except (EOFError, OSError):
            reason = "killed its process"
        self.stop()
        self._start()
        return False, reason

    def stop(self) -> None:
        self._process.kill()
        self._process.join()


class WorkerPool:
    """Workers side by side."""

    def __init__(self, function: Callable[..., str], count: int, limit: float) -> None:
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self._workers = [Worker(function, limit) for _ in range(count)]
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(count)

    def submit(self, *arguments: object) -> Future[tuple[bool, str]]:
        """(whether it worked, what it returned or why it did not), when it is known."""
        return self._threads.submit(self._call, arguments)

    def _call(self, arguments: tuple) -> tuple[bool, str]:
        worker = self._idle.get()
        try:
            return worker.call(arguments)
        finally:
            self._idle.put(worker)

    def stop(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.stop()
