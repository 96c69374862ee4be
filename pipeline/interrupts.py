"""Being told to stop: signals, a closed console, a ``dvc`` that is gone. The work ends resumable, within 10 s.

The first request asks the work to stop at its next safe moment, where it saves its state. If that takes longer than
:data:`GRACE` (a validation is under way), the main thread is interrupted wherever it is: the last state, at most some
seconds old, serves. A second Ctrl-C ends the process at once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import psutil

log = logging.getLogger(__name__)

GRACE = 4.0
"""Seconds to reach a safe moment; what is left of the 10 s goes to workers, the last metrics and MLflow's status."""
LIMIT = 9.0
"""Seconds after which the process ends whatever it is waiting for."""
CLOSE_GRACE = 0.5
"""The same for a closed console: Windows ends the process after 5 s."""
PARENT_INTERVAL = 0.5
SHELLS = frozenset({"sh", "bash", "dash", "zsh", "fish", "ksh", "ash", "busybox", "cmd", "powershell", "pwsh"})

CTRL_CLOSE_EVENTS = (2, 5, 6)
"""Windows: console closed, logoff, shutdown. Ctrl-C (0) and Ctrl-Break (1) come as signals."""


class Interrupts:
    """Turns requests to stop into ``SystemExit`` with 128 + the signal's number, in the main thread.

    Use as a context manager, in the main thread, around the work; the work calls :meth:`check` at safe moments.

    Args:
        starter: The process for which it is done: when that one is gone, the work is asked to stop. A stage has the
            ``dvc`` that started it, if one did.
    """

    def __init__(self, starter: psutil.Process | None = None) -> None:
        self._starter = starter
        self._number = 0
        self._insisted = self._ending = False
        self._over = threading.Event()
        self._old: dict[int, Any] = {}
        self._console: Any = None  # the callback must live as long as Windows may call it

    def check(self, save: Callable[[], None]) -> None:
        """A safe moment: if asked to stop, save, and raise ``SystemExit``."""
        if self._number:
            self._ending = True
            save()
            raise SystemExit(128 + self._number)

    def request(self, number: int, grace: float | None = None) -> None:
        """Ask the work to stop, from any thread, as the signal ``number`` would; after ``grace`` seconds it must."""
        if self._number:
            return
        self._number = number
        for seconds, action in ((GRACE if grace is None else grace, self._insist), (LIMIT, self._leave)):
            timer = threading.Timer(seconds, action)
            timer.daemon = True
            timer.start()

    def _insist(self) -> None:
        if self._over.is_set() or self._ending:
            return
        self._insisted = True
        main = threading.main_thread().ident
        assert main is not None
        if sys.platform == "win32":
            signal.raise_signal(signal.SIGTERM)
        else:
            signal.pthread_kill(main, signal.SIGTERM)  # also out of a system call that waits

    def _leave(self) -> None:
        if not self._over.is_set():
            os._exit(128 + self._number)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._insisted and not self._ending:
            self._ending = True
            raise SystemExit(128 + self._number)
        if not self._number:
            # Not by print(), which this may have interrupted.
            os.write(2, f"\n{signal.Signals(number).name}: stopping at the next safe moment\n".encode())
            self.request(number)
        elif number == signal.SIGINT:
            os._exit(128 + number)  # the workers notice and end, the last state stays; `sync` ends the run in MLflow

    def __enter__(self) -> Interrupts:
        for number in _numbers():
            # nohup ignores SIGHUP, a shell's background job SIGINT; both are meant.
            if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
                self._old[number] = signal.signal(number, self._on_signal)
        if sys.platform == "win32":
            self._watch_console()
        self._watch(self._starter or (started_by() if os.environ.get("DVC_STAGE") else None))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _watch(self, starter: psutil.Process | None) -> None:
        """Stop when the process that started this one is gone: a killed ``dvc`` would leave a trainer that holds the
        run folder, and whose result nobody waits for."""
        if starter is not None:
            threading.Thread(target=self._wait_for_end, args=[starter], daemon=True, name="parent-watch").start()

    def _wait_for_end(self, starter: psutil.Process) -> None:
        while not self._over.wait(PARENT_INTERVAL):
            if not is_alive(starter):
                log.warning("the process that started this one is gone: stopping; the same command goes on from here")
                self.request(signal.SIGTERM)
                return

    def _watch_console(self) -> None:
        """Windows: be told of a closed console; when the callback returns, Windows ends the process."""
        import ctypes

        windows: Any = ctypes
        self._console = windows.WINFUNCTYPE(ctypes.c_int, ctypes.c_uint)(self.on_console_event)
        windows.windll.kernel32.SetConsoleCtrlHandler(self._console, 1)

    def on_console_event(self, event: int) -> int:
        """Windows' ``HandlerRoutine``, in a thread of its own; returns 1 for events dealt with."""
        if event not in CTRL_CLOSE_EVENTS:
            return 0
        self.request(signal.SIGTERM, CLOSE_GRACE)
        self._over.wait(10)
        return 1


def _numbers() -> list[int]:
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGBREAK")
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


def started_by() -> psutil.Process | None:
    """The nearest ancestor that is no shell: DVC starts its stages through one, which may or may not stay."""
    parents: list[psutil.Process] = psutil.Process().parents()
    return next((parent for parent in parents if _name(parent) not in SHELLS), None)


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name()).lower().removesuffix(".exe")
    except psutil.Error:
        return ""


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that has ended and was not waited for doesn't."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
