"""Films that every browser plays (H.264, yuv420p, faststart), and GIFs for `dvc plots`, which shows no MP4."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from types import TracebackType

import cv2
import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]
"""(height, width, 3) uint8 RGB."""

STDERR_TAIL = 2000
"""Characters of ffmpeg's own words kept in an error; the cause is always at the end."""

# Bitexact, two threads and a fixed preset: x264's output depends on its thread count, and the same run should leave the
# same file on every machine. Without the BT.709 tags players guess the matrix, and guess differently.
H264 = (
    "-vf",
    "scale=out_color_matrix=bt709:out_range=tv,format=yuv420p,"
    "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709",
    *("-c:v", "libx264", "-preset", "veryfast", "-threads", "2"),
    *("-movflags", "+faststart", "-fflags", "+bitexact", "-flags:v", "+bitexact", "-map_metadata", "-1", "-f", "mp4"),
)


class FilmError(RuntimeError):
    """A film could not be written or read; the message carries ffmpeg's own last words."""


class FilmWriter:
    """Write frames to one MP4, as a context manager.

    The film appears at ``path`` only when it is complete, decodes, and holds every frame written; an exception inside
    the ``with`` block leaves nothing. Odd sizes gain one repeated row or column, because yuv420p needs even ones.

    Args:
        path: The film's final name.
        size: (width, height) of the frames in pixels.
        fps: Frames per second.
        crf: x264's constant rate factor, 0 (lossless) to 51; 18 is visually lossless.

    Raises:
        FilmError: ffmpeg failed, no frame was written, or the finished film has another number of frames.
        ValueError: A frame is not (height, width, 3) uint8.
    """

    def __init__(self, path: str | Path, size: tuple[int, int], fps: float, *, crf: int = 20) -> None:
        self.path = Path(path)
        self.frames = 0
        self._encoder = _Encoder(self.path, size, fps, [*H264, "-crf", str(crf)])

    def __enter__(self) -> FilmWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._encoder.abort()

    def write(self, frame: Frame) -> None:
        """Append one (height, width, 3) uint8 RGB frame."""
        self._encoder.write(frame)
        self.frames += 1

    def close(self) -> None:
        """Finish the film, read it back and give it its name; a second call does nothing."""
        if self._encoder.closed:
            return
        try:
            self._encoder.finish()
            self._check(self._encoder.part)
            self._encoder.publish()
        finally:
            self._encoder.abort()

    def _check(self, part: Path) -> None:
        found = frame_count(part)
        if found != self.frames:
            raise FilmError(f"{self.path}: {self.frames} frames were written, but the film holds {found}")


def frame_count(path: str | Path) -> int:
    """Number of frames of a film, counted by decoding every one of them.

    Raises:
        FilmError: The file is missing or does not decode.
    """
    options = ["-v", "error", "-xerror", "-nostdin", "-progress", "pipe:1"]
    passthrough = ["-map", "0:v:0", "-fps_mode", "passthrough", "-f", "null", "-"]  # never drop or repeat a frame
    command = [imageio_ffmpeg.get_ffmpeg_exe(), *options, "-i", str(path), *passthrough]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise FilmError(f"{path}: does not decode; ffmpeg says:\n{done.stderr[-STDERR_TAIL:].strip()}")
    counts = [line.removeprefix("frame=") for line in done.stdout.splitlines() if line.startswith("frame=")]
    return int(counts[-1])


def shrink_film(source: str | Path, target: str | Path, width: int, fps: float, crf: int = 30) -> None:
    """Write a smaller copy of a film, for a page that carries it along.

    Args:
        source: The film.
        target: Its copy.
        width: Of the copy [pixels], even; the height follows.
        fps: Frames per second of the copy.
        crf: As of :class:`FilmWriter`.

    Raises:
        FilmError: The film does not decode.
    """
    options = ["-vf", f"fps={fps},scale={width}:-2:flags=area,format=yuv420p", "-an", "-c:v", "libx264"]
    small = ["-preset", "slow", "-crf", str(crf), "-movflags", "+faststart", "-map_metadata", "-1", "-f", "mp4"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-y", "-i", str(source), *options, *small]
    done = subprocess.run([*command, str(target)], capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise FilmError(f"{source}: can't be made smaller; ffmpeg says:\n{done.stderr[-STDERR_TAIL:].strip()}")


def write_gif(path: str | Path, frames: Iterable[Frame], fps: float, max_width: int = 480) -> None:
    """Write a small GIF that repeats for ever, in 256 colours chosen for these frames.

    Args:
        path: The GIF's final name; it appears only when complete.
        frames: (height, width, 3) uint8 RGB each, all of one size; read once.
        fps: Frames per second. GIF counts in 1/100 s, so 10, 12.5, 20, 25 and 50 are exact.
        max_width: Wider frames are shrunk to this width [pixels]; narrower ones are kept.

    Raises:
        FilmError: ffmpeg failed or there is no frame.
    """
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise FilmError(f"{path}: no frames to write")
    height, width = first.shape[:2]
    encoder = _Encoder(Path(path), (width, height), fps, _gif_options(max_width))
    try:
        for frame in chain([first], frames):
            encoder.write(frame)
        encoder.finish()
        encoder.publish()
    finally:
        encoder.abort()


def filmstrip(frames: Sequence[Frame], columns: int, *, rows: int = 1, tile_width: int = 320, gap: int = 4) -> Frame:
    """One picture of ``columns * rows`` evenly spaced frames, first and last included, left to right.

    Args:
        frames: (height, width, 3) uint8 RGB each, all of one size.
        columns: Frames side by side.
        rows: Lines of frames.
        tile_width: Wider frames are shrunk to this width [pixels].
        gap: Dark pixels between frames.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    if not len(frames) or columns < 1 or rows < 1:
        raise ValueError(f"filmstrip needs frames, columns and rows, got {len(frames)}, {columns} and {rows}")
    picks = np.linspace(0, len(frames) - 1, columns * rows).round().astype(int)
    tiles = [_shrink(frames[i], tile_width) for i in picks]
    height, width = tiles[0].shape[:2]
    strip = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 16, np.uint8)
    for n, tile in enumerate(tiles):
        y, x = (n // columns) * (height + gap), (n % columns) * (width + gap)
        strip[y : y + height, x : x + width] = tile
    return strip


class _Encoder:
    """One ffmpeg process that eats raw RGB frames and leaves one file under a temporary name."""

    def __init__(self, path: Path, size: tuple[int, int], fps: float, options: Sequence[str]) -> None:
        width, height = size
        self.path = path
        self.part = path.with_name(f".{path.name}.{os.getpid()}.part")  # same folder, so that renaming is atomic
        self._shape = (height, width, 3)
        self._padding = ((0, height % 2), (0, width % 2), (0, 0))
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = [
            "-f",
            "rawvideo",
            "-pix_fmt",
            "rgb24",
            "-s",
            f"{width + width % 2}x{height + height % 2}",
            "-r",
            f"{fps}",
        ]
        executable = imageio_ffmpeg.get_ffmpeg_exe()
        command = [executable, "-v", "error", "-nostats", "-y", *raw, "-i", "pipe:0", *options, str(self.part)]
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  a file, because an unread pipe fills up and blocks ffmpeg
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=self._stderr)
        self._frames = 0

    def write(self, frame: Frame) -> None:
        if frame.shape != self._shape or frame.dtype != np.uint8:
            raise ValueError(f"{self.path}: expected a {self._shape} uint8 frame, got {frame.shape} {frame.dtype}")
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(np.ascontiguousarray(np.pad(frame, self._padding, mode="edge")).data)
        except BrokenPipeError as error:
            raise self._error("ffmpeg stopped") from error
        self._frames += 1

    def finish(self) -> None:
        """Wait for ffmpeg to write the file's end."""
        if not self._frames:
            raise FilmError(f"{self.path}: no frames to write")
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError as error:
            raise self._error("ffmpeg stopped") from error
        if self._process.wait():
            raise self._error(f"ffmpeg failed with {self._process.returncode}")

    def publish(self) -> None:
        """Put the finished file in its place, durably."""
        with self.part.open("rb") as file:
            os.fsync(file.fileno())
        self.part.replace(self.path)

    @property
    def closed(self) -> bool:
        return self._stderr.closed

    def abort(self) -> None:
        """Stop ffmpeg and remove the unfinished file; does nothing after `publish`."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
        self._stderr.close()
        self.part.unlink(missing_ok=True)

    def _error(self, what: str) -> FilmError:
        self._process.wait()
        self._stderr.seek(0)
        words = self._stderr.read().decode(errors="replace")[-STDERR_TAIL:].strip()
        return FilmError(f"{self.path}: {what}; ffmpeg says:\n{words or '(nothing)'}")


def _gif_options(max_width: int) -> list[str]:
    # diff and rectangle spend colours and bytes on what moves; Bayer noise, unlike error diffusion, stays put.
    scale = f"scale='min({max_width},iw)':-1:flags=area"
    palette = "palettegen=stats_mode=diff[p];[b][p]paletteuse=dither=bayer:bayer_scale=4:diff_mode=rectangle"
    return ["-filter_complex", f"{scale},split[a][b];[a]{palette}", "-loop", "0", "-fflags", "+bitexact", "-f", "gif"]


def _shrink(frame: Frame, width: int) -> Frame:
    if frame.shape[1] <= width:
        return frame
    height = round(frame.shape[0] * width / frame.shape[1])
    return cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
