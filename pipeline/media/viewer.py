"""Live windows, by SDL.

SDL and not OpenCV's `imshow`: it knows which keys are held down, which driving needs, it comes inside the wheel of
pygame, which the game needs anyway, and it opens windows also where OpenCV was installed without them.
"""

from __future__ import annotations

import os
import sys
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # or it greets on stdout, where commands write their results
import pygame

Frame = NDArray[np.uint8]
"""(height, width, 3) uint8 RGB."""

CLOSING = frozenset({"q", "escape", "close"})
"""Keys that close the windows; ``close`` stands for a window's own button."""
INVISIBLE = frozenset({"offscreen", "dummy"})
"""SDL's drivers that show nothing. Without a screen SDL takes the first of them and says nothing."""

MARGIN, TITLE_BAR = 24, 40
CAPTION_HEIGHT, CAPTION_SIZE = 26, 13
BACKGROUND, TEXT = (13, 17, 23), (200, 208, 218)


class ViewerError(Exception):
    """No window can be opened; the message says what to do."""


class Viewer:
    """Windows by name, one picture each; they appear with their first picture and grow with it.

    Use as a context manager, or call :meth:`close`.

    Raises:
        ViewerError: There is no screen.
    """

    def __init__(self) -> None:
        _open_display()
        self._windows: dict[str, pygame.Window] = {}
        self._keys: list[str] = []

    def show(self, name: str, picture: Frame, caption: str = "") -> None:
        """Put a picture, (height, width, 3) uint8 RGB, into the window ``name``, pixel by pixel; a line of text below.

        The picture begins at the window's upper left corner.
        """
        height, width = picture.shape[:2]
        size = (width, height + (CAPTION_HEIGHT if caption else 0))
        window = self._windows.get(name) or self._open(name, size)
        if window.size != size:
            window.size = size
        surface = window.get_surface()
        surface.blit(pygame.surfarray.make_surface(picture.swapaxes(0, 1)), (0, 0))
        if caption:
            surface.fill(BACKGROUND, (0, height, width, CAPTION_HEIGHT))
            surface.blit(_caption(caption), (8, height + 5))
        window.flip()

    def _open(self, name: str, size: tuple[int, int]) -> pygame.Window:
        left = MARGIN + sum(window.size[0] + MARGIN for window in self._windows.values())
        window = pygame.Window(name, size, position=(left, MARGIN + TITLE_BAR))
        self._windows[name] = window
        return window

    def pressed(self) -> list[str]:
        """Keys pressed since the last call, by SDL's names (``a``, ``space``); ``close`` for a closed window."""
        self._pump()
        pressed, self._keys = self._keys, []
        return pressed

    def held(self, key: str) -> bool:
        """Whether a key is down now."""
        self._pump()
        return bool(pygame.key.get_pressed()[pygame.key.key_code(key)])

    def _pump(self) -> None:
        for event in pygame.event.get():
            if event.type == pygame.KEYDOWN:
                self._keys.append(pygame.key.name(event.key))
            elif event.type in (pygame.WINDOWCLOSE, pygame.QUIT):
                self._keys.append("close")
            elif event.type == pygame.WINDOWEXPOSED and event.window in self._windows.values():
                event.window.flip()  # what another window had covered

    @property
    def is_open(self) -> bool:
        """Whether pictures are shown; false after :meth:`close`."""
        return pygame.display.get_init()

    def close(self) -> None:
        """Close all windows; a second call does nothing."""
        for window in self._windows.values():
            window.destroy()
        self._windows.clear()
        pygame.display.quit()

    def __enter__(self) -> Viewer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open_display() -> None:
    advice = "Run it where there is a screen, or on a virtual one: `xvfb-run -a python -m ...`."
    screens = ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER")
    if sys.platform.startswith("linux") and not any(os.environ.get(name) for name in screens):
        raise ViewerError(f"no screen to open a window on: neither DISPLAY nor WAYLAND_DISPLAY is set. {advice}")
    try:
        pygame.display.init()
    except pygame.error as error:
        raise ViewerError(f"no screen to open a window on: SDL says {error}. {advice}") from None
    if pygame.display.get_driver() in INVISIBLE:
        driver = pygame.display.get_driver()
        pygame.display.quit()
        asked = " (SDL_VIDEODRIVER asks for it)" if os.environ.get("SDL_VIDEODRIVER") else ""
        raise ViewerError(f"no screen to open a window on: SDL found only its driver {driver!r}{asked}. {advice}")


def _caption(text: str) -> pygame.Surface:
    if not pygame.font.get_init():
        pygame.font.init()
    return pygame.font.Font(None, CAPTION_SIZE + 6).render(text, True, TEXT)
