"""A virtual screen of its own for a test: what it shows is read back from the X server, and keys are pressed there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageGrab

SIZE = "1600x1000x24"
PATIENCE = 60.0


class Screen:
    """An X server without hardware.

    Attributes:
        display: What ``DISPLAY`` has to say.
    """

    def __init__(self, display: str) -> None:
        self.display = display

    def picture(self) -> Image.Image:
        return ImageGrab.grab(xdisplay=self.display)

    def pixels(self) -> NDArray[np.uint8]:
        """(1000, 1600, 3) uint8 RGB."""
        return np.asarray(self.picture().convert("RGB"))

    def window(self, name: str) -> tuple[int, int, int, int] | None:
        """Left, top, width and height of a window; None if there is none of that name."""
        found = self._find(name)
        if found is None:
            return None
        width, height, left, top = (int(number) for number in found.groups()[1:])
        return left, top, width, height

    def press(self, key: str, name: str) -> None:
        """Press and release a key while a window has the focus."""
        found = self._find(name)
        assert found is not None, f"no window {name}"
        self._run("xdotool", "windowfocus", "--sync", found[1])
        self._run("xdotool", "key", key)

    def hold(self, key: str) -> None:
        """Press a key and keep it down."""
        self._run("xdotool", "keydown", key)

    def release(self, key: str) -> None:
        """Let it go."""
        self._run("xdotool", "keyup", key)

    def _find(self, name: str) -> re.Match[str] | None:
        tree = self._run("xwininfo", "-root", "-tree")  # xdotool's own search needs a window manager
        return re.search(rf'(0x[0-9a-f]+) "{re.escape(name)}": .*?(\d+)x(\d+)\S+ +\+(-?\d+)\+(-?\d+)', tree)

    def _run(self, *words: str) -> str:
        environment = {**os.environ, "DISPLAY": self.display}
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Screen]:
    """A new virtual screen, which this process and those it starts open their windows on."""
    if missing := [name for name in ("Xvfb", "xdotool", "xwininfo") if not shutil.which(name)]:
        pytest.skip(f"needs {' and '.join(missing)}: apt-get install xvfb xdotool x11-utils")
    read, write = os.pipe()
    command = ["Xvfb", "-displayfd", str(write), "-screen", "0", SIZE, "-nolisten", "tcp"]
    server = subprocess.Popen(command, pass_fds=[write], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(write)
    with os.fdopen(read) as number:
        display = f":{number.readline().strip()}"
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.delenv("SDL_VIDEODRIVER", raising=False)
    try:
        yield Screen(display)
    finally:
        server.terminate()
        server.wait()


def wait_until(what: Callable[[], object], process: subprocess.Popen[str] | None = None) -> None:
    """Wait until ``what()`` is true, as long as the process lives."""
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"not within {PATIENCE:.0f} s"
        time.sleep(0.05)
