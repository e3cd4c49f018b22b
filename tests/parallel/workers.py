"""Processes that stay, one per rank of a gloo group, and run functions a test gives them.

Starting a process and importing torch costs a second; a run in a process that is there costs milliseconds.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
# imported once, however many ranks are started
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "zoo.conformance", "zoo.parallel.context"])

GRACE_S = 5.0  # how long the other ranks may still answer once one of them has failed


class WorkersFailed(RuntimeError):
    """A function raised on some rank, a rank died, or the time was over."""


class Workers:
    """`size` ranks. `run(function, *args)` calls a module-level function on every rank and returns all results.

    A rank knows its number from `torch.distributed.get_rank()`; arguments and results travel by pickle. After a
    failure the processes are ended, and the next run starts new ones: a rank may be waiting for one that is gone.
    """

    def __init__(self, size: int):
        self.size = size
        self._ranks: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[Any]:
        """`function(*args)` on every rank; the results in the order of the ranks."""
        if not self._ranks:
            self._start()
        for _, connection in self._ranks:
            connection.send((function, args))
        results, errors = self._gather(time.monotonic() + timeout_s)
        if errors or len(results) < self.size:
            self.close()
            silent = [rank for rank in range(self.size) if rank not in results and rank not in errors]
            reports = [f"rank {rank}:\n{text}" for rank, text in sorted(errors.items())]
            if silent:
                reports.append(f"ranks {silent} did not answer within {timeout_s:g} s or after the failure of another")
            raise WorkersFailed("\n".join(reports))
        return [results[rank] for rank in range(self.size)]

    def _gather(self, deadline: float) -> tuple[dict[int, Any], dict[int, str]]:
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        open_ranks = {connection: rank for rank, (_, connection) in enumerate(self._ranks)}
        while open_ranks and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(open_ranks), left):
                rank = open_ranks.pop(connection)  # type: ignore[call-overload]
                try:
                    failed, answer = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    failed, answer = True, "the process ended"
                (errors if failed else results)[rank] = answer
            if errors:
                deadline = min(deadline, time.monotonic() + GRACE_S)
        return results, errors

    def _start(self) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        for rank in range(self.size):
            mine, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_serve, args=(rank, self.size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, mine))

    def close(self) -> None:
        """End the processes."""
        for _, connection in self._ranks:
            connection.close()
        for process, _ in self._ranks:
            process.kill()
            process.join()
        self._ranks = []


def _serve(rank: int, size: int, port: int, connection: Connection) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({k: str(v) for k, v in names.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    while True:
        try:
            function, args = connection.recv()
        except (EOFError, OSError):  # the test session is over
            return
        except Exception:  # the function could not be imported here
            connection.send((True, traceback.format_exc()))
            continue
        try:
            answer = (False, function(*args))
        except BaseException:
            answer = (True, traceback.format_exc())
        try:
            connection.send(answer)
        except Exception:  # a result that cannot be pickled
            connection.send((True, traceback.format_exc()))
