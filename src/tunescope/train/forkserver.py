"""One process per run, forked from a server that has done the slow imports.

A crash, an out-of-memory or a kill costs one run. Nothing outlives the launcher: the server leaves when the
launcher's pipe closes, and the kernel kills a run when the server goes.
"""

import contextlib
import ctypes
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1  # Linux prctl(2)
_KILL_WAIT_S = 5.0


@dataclass(frozen=True)
class ProcessEnd:
    """How a run's process ended. exit_code is negative for a signal, 255 where the fork server died, then or before."""

    exit_code: int

    @property
    def cause(self) -> str:
        if self.exit_code < 0:
            name = signal.Signals(-self.exit_code).name
            hint = " (killed from outside, or by the system for lack of memory)" if name == "SIGKILL" else ""
            return f"its process was ended by {name}{hint}"
        if self.exit_code == 255:
            return "its process or the fork server was killed"
        return f"its process ended with exit code {self.exit_code}"


class ForkServer:
    """Runs functions, each in a process of its own, one at a time.

    preload: names of modules to import in the server; none of them may touch CUDA.
    """

    def __init__(self, preload: Sequence[str]) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))

    def run(
        self,
        function: Callable[..., None],
        arguments: tuple[Any, ...],
        *,
        log_file: Path,
        on_message: Callable[[Any], None],
        while_running: contextlib.AbstractContextManager[None] | None = None,
    ) -> ProcessEnd:
        """Calls `function(connection, *arguments)` in a new process and waits for its end.

        What it sends over the connection reaches on_message; what it prints goes to log_file. while_running is
        held from its start to its end. An exception here, Ctrl-C too, kills the process before it passes on.
        """
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_run_child, args=(function, sender, arguments, str(log_file)), daemon=True
        )
        try:
            process.start()
        except (EOFError, ConnectionError):  # the server died while it imported, before it could fork
            receiver.close()
            return ProcessEnd(255)
        finally:
            sender.close()
        try:
            with while_running or contextlib.nullcontext():
                for message in _messages(receiver, process.sentinel):
                    on_message(message)
                process.join()
        finally:
            if process.is_alive():
                process.kill()
                process.join(_KILL_WAIT_S)
            receiver.close()
        return ProcessEnd(process.exitcode if process.exitcode is not None else 255)


def _messages(receiver: Connection, sentinel: int) -> Iterator[Any]:
    """What the child sends, until it has ended and the pipe is empty."""
    while True:
        ready = wait([receiver, sentinel])
        if receiver in ready:
            try:
                yield receiver.recv()
                continue
            except (EOFError, OSError):
                return
        if sentinel in ready:
            return


def _run_child(function: Callable[..., None], sender: Connection, arguments: tuple[Any, ...], log_file: str) -> None:
    _leave_server_to_launcher()
    die_with_parent()
    descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    torch = sys.modules.get("torch")
    assert torch is None or not torch.cuda._is_in_bad_fork(), "the fork server started CUDA; this process cannot"
    function(sender, *arguments)


def _leave_server_to_launcher() -> None:
    """Closes this process's copy of the pipe whose end tells the server to leave, so that only the launcher holds it.

    The standard library hands every child a copy. Server and child then waited for each other: after a kill -9 of the
    launcher a run went on to its end, with the GPU.
    """
    server: Any = multiprocessing.forkserver._forkserver
    os.close(server._forkserver_alive_fd)
    server._forkserver_alive_fd = None


def die_with_parent() -> None:
    """Asks the kernel to kill this process when its parent ends (Linux; elsewhere the pipe's end must do)."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was told
        os._exit(1)
