"""Films are read back with decoders of their own: ffmpeg's stream description, OpenCV, Pillow, and the MP4's atoms."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import cv2
import imageio_ffmpeg
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.media import video
from pipeline.media.overlay import (
    BRAKE,
    BRAKE_BAR,
    GAME,
    GAS,
    GAS_BAR,
    NEWEST,
    SIZE,
    SPEED_BAR,
    STEER,
    STEER_BAR,
    TEXT,
    Box,
    Telemetry,
    compose,
)
from pipeline.media.video import FilmError, FilmWriter, filmstrip, frame_count, write_gif

Frame = NDArray[np.uint8]
PATCHES = ((200, 40, 40), (40, 180, 60), (30, 60, 210), (245, 245, 245))


def frames(n: int, width: int = 64, height: int = 48) -> Iterator[Frame]:
    """Four flat patches and a white bar that moves to the right, so that no two frames are equal."""
    for i in range(n):
        frame = np.repeat(np.array(PATCHES, np.uint8), width // 4, axis=0)  # (width, 3)
        frame = np.pad(frame, ((0, width - len(frame)), (0, 0)), mode="edge")
        picture = np.repeat(frame[None], height, axis=0)
        picture[-6:, 2 * i : 2 * i + 4] = 255
        yield picture


def film(path: Path, n: int = 12, width: int = 64, height: int = 48) -> Path:
    with FilmWriter(path, (width, height), fps=25) as writer:
        for frame in frames(n, width, height):
            writer.write(frame)
    return path


def atoms(path: Path) -> list[str]:
    """Names of the top-level boxes of an MP4 (ISO 14496-12, section 4.2)."""
    data, at, names = path.read_bytes(), 0, []
    while at < len(data):
        size, name = struct.unpack(">I4s", data[at : at + 8])
        names.append(name.decode())
        at += size
    return names


def decode_cv2(path: Path) -> list[Frame]:
    capture, pictures = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        pictures.append(read[1][:, :, ::-1])
    capture.release()
    return pictures


def test_film_is_what_browsers_play(tmp_path: Path) -> None:
    stream = next(imageio_ffmpeg.read_frames(str(film(tmp_path / "a.mp4"))))
    assert stream["codec"] == "h264"
    assert stream["pix_fmt"].startswith("yuv420p(tv, bt709")
    assert stream["size"] == (64, 48)
    assert stream["fps"] == 25
    assert stream["duration"] == pytest.approx(12 / 25, abs=0.01)


def test_film_starts_before_it_is_downloaded(tmp_path: Path) -> None:
    names = atoms(film(tmp_path / "a.mp4"))
    assert names.index("moov") < names.index("mdat")


def test_opencv_decodes_every_frame_in_order_and_colour(tmp_path: Path) -> None:
    decoded = decode_cv2(film(tmp_path / "a.mp4"))
    assert len(decoded) == 12 == frame_count(tmp_path / "a.mp4")
    for seen, given in zip(decoded, frames(12), strict=True):
        assert (
            np.abs(seen[20, 8::16].astype(int) - given[20, 8::16]).max() <= 8
        )  # inside the patches: 4:2:0 blurs edges
        assert np.abs(seen.astype(int) - given).mean() < 8


def test_odd_sizes_are_padded_not_cropped(tmp_path: Path) -> None:
    decoded = decode_cv2(film(tmp_path / "odd.mp4", width=67, height=49))
    assert decoded[0].shape == (50, 68, 3)
    assert np.abs(decoded[0][20, 66:].astype(int) - 245).max() <= 8  # the last column is there, and repeated


def test_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    assert film(tmp_path / "a.mp4").read_bytes() == film(tmp_path / "b.mp4").read_bytes()


def test_film_appears_only_when_complete(tmp_path: Path) -> None:
    with FilmWriter(tmp_path / "new" / "a.mp4", (64, 48), fps=25) as writer:
        writer.write(next(frames(1)))
        assert not (tmp_path / "new" / "a.mp4").exists()
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.mp4"]


def test_closing_twice_is_harmless_and_writing_afterwards_is_not(tmp_path: Path) -> None:
    writer = FilmWriter(tmp_path / "a.mp4", (64, 48), fps=25)
    with writer:
        writer.write(next(frames(1)))
        writer.close()
    assert frame_count(tmp_path / "a.mp4") == 1
    with pytest.raises(ValueError, match="closed file"):
        writer.write(next(frames(1)))


def test_interrupted_film_leaves_the_old_one(tmp_path: Path) -> None:
    before = film(tmp_path / "a.mp4").read_bytes()
    writer = FilmWriter(tmp_path / "a.mp4", (64, 48), fps=25)
    writer.write(next(frames(1)))
    with pytest.raises(KeyboardInterrupt), writer:
        raise KeyboardInterrupt
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == before


def test_film_without_frames_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FilmError, match="no frames"), FilmWriter(tmp_path / "a.mp4", (64, 48), fps=25):
        pass
    assert not list(tmp_path.iterdir())


def test_wrong_frame_says_expected_and_actual(tmp_path: Path) -> None:
    writer = FilmWriter(tmp_path / "a.mp4", (64, 48), fps=25)
    with pytest.raises(ValueError, match=r"expected a \(48, 64, 3\) uint8 frame, got \(64, 48, 3\) uint8"), writer:
        writer.write(np.zeros((64, 48, 3), np.uint8))


def test_missing_frames_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "frame_count", lambda path: frame_count(path) - 1)
    with pytest.raises(FilmError, match="12 frames were written, but the film holds 11"):
        film(tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())


def test_ffmpegs_own_words_are_in_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "H264", ("-c:v", "no-such-codec", "-f", "mp4"))
    with pytest.raises(FilmError, match=r"(?s)ffmpeg says.*no-such-codec"):
        film(tmp_path / "a.mp4", n=400)
    assert not list(tmp_path.iterdir())


def test_truncated_film_does_not_pass_for_whole(tmp_path: Path) -> None:
    whole = film(tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(FilmError, match="does not decode"):
        frame_count(tmp_path / "cut.mp4")


def test_damaged_film_does_not_pass_for_whole(tmp_path: Path) -> None:
    data = bytearray(film(tmp_path / "a.mp4", n=24, width=320, height=240).read_bytes())
    data[-700:-400] = bytes(300)  # picture data; the length stays, so that the index at the front still fits
    (tmp_path / "bad.mp4").write_bytes(data)
    with pytest.raises(FilmError, match="does not decode"):
        frame_count(tmp_path / "bad.mp4")


def test_gif_holds_every_frame_at_the_given_speed(tmp_path: Path) -> None:
    write_gif(tmp_path / "a.gif", frames(12), fps=20, max_width=32)
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"], gif.info["loop"]) == (12, (32, 24), 50, 0)
        gif.seek(11)
        seen = np.asarray(gif.convert("RGB")).astype(int)
    assert np.abs(seen[10, 4::8] - np.array(PATCHES)).max() <= 16


def test_gif_is_never_enlarged_and_never_empty(tmp_path: Path) -> None:
    write_gif(tmp_path / "a.gif", frames(2), fps=20, max_width=320)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.size == (64, 48)
    with pytest.raises(FilmError, match="no frames"):
        write_gif(tmp_path / "b.gif", [], fps=20)
    assert not (tmp_path / "b.gif").exists()


def test_filmstrip_shows_evenly_spaced_frames() -> None:
    flat = [np.full((10, 20, 3), i, np.uint8) for i in range(101)]
    strip = filmstrip(flat, 3, rows=2, gap=2)
    assert strip.shape == (22, 64, 3)
    assert strip[[5, 17]][:, [10, 32, 54], 0].tolist() == [[0, 20, 40], [60, 80, 100]]
    assert filmstrip(flat, 2, tile_width=10).shape == (5, 24, 3)


def telemetry(**changes: float | None) -> Telemetry:
    usual = {"frame": 100, "episode_return": 12.3, "speed": 50.0, "tiles": 30, "n_tiles": 300}
    pedals = {"steer": 0.0, "gas": 0.0, "brake": 0.0}
    return Telemetry(**{"track": 7, **usual, **pedals, "value": None, **changes})


def show(
    observation: NDArray[np.uint8] | None = None,
    title: str = "policy",
    channels: int | None = None,
    **changes: float | None,
) -> Frame:
    picture = np.random.default_rng(1).integers(0, 256, (400, 600, 3), dtype=np.uint8)
    blank = np.zeros((4, 84, 84), np.uint8)
    seen = blank if observation is None else observation
    return compose(picture, seen, telemetry(**changes), title, channels=channels)


def painted(canvas: Frame, bar: Box, color: tuple[int, int, int]) -> list[int]:
    """Columns of the bar that have this colour over its whole height."""
    return np.flatnonzero((bar.of(canvas) == color).all(axis=(0, 2))).tolist()


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_film_frame_has_even_size_and_the_games_own_pixels() -> None:
    canvas = show()
    assert canvas.shape == (SIZE[1], SIZE[0], 3)
    assert SIZE[0] % 2 == SIZE[1] % 2 == 0
    np.testing.assert_array_equal(
        GAME.of(canvas), np.random.default_rng(1).integers(0, 256, (400, 600, 3), dtype=np.uint8)
    )


@pytest.mark.parametrize("share", [-0.5, 0.0, 0.25, 0.5, 1.0, 1.7])
def test_pedal_bars_are_as_long_as_their_values(share: float) -> None:
    canvas = show(gas=share, brake=share)
    expected = list(range(round(220 * min(max(share, 0), 1))))
    assert painted(canvas, GAS_BAR, GAS) == painted(canvas, BRAKE_BAR, BRAKE) == expected


def test_steering_bar_grows_from_the_middle_to_the_side_steered_to() -> None:
    left, right = painted(show(steer=-0.5), STEER_BAR, STEER), painted(show(steer=1.0), STEER_BAR, STEER)
    assert (min(left), max(left)) == (55, 108)  # columns 109 and 110 are the mark in the middle
    assert (min(right), max(right)) == (111, 219)
    assert painted(show(steer=0.0), STEER_BAR, STEER) == []


def test_speed_bar_is_as_long_as_the_speed() -> None:
    assert len(painted(show(speed=50.0), SPEED_BAR, TEXT)) == SPEED_BAR.width // 2


def test_network_panel_shows_the_newest_frames_own_pixels() -> None:
    seen = noise(4, 84, 84)
    panel = NEWEST.of(show(seen))
    np.testing.assert_array_equal(panel[1::3, 1::3], np.repeat(seen[-1][..., None], 3, axis=2))
    np.testing.assert_array_equal(panel, panel[1::3, 1::3].repeat(3, axis=0).repeat(3, axis=1))


def test_network_panel_shows_colour_newest_last() -> None:
    seen = noise(12, 84, 84)
    np.testing.assert_array_equal(NEWEST.of(show(seen))[1::3, 1::3], seen[9:].transpose(1, 2, 0))


@pytest.mark.parametrize(("channels", "newest"), [(1, slice(2, 3)), (3, slice(0, 3)), (None, slice(0, 3))])
def test_three_planes_are_read_as_told(channels: int | None, newest: slice) -> None:
    seen = noise(3, 64, 64)
    panel = NEWEST.of(show(seen, channels=channels))[31:222:3, 31:222:3]
    np.testing.assert_array_equal(panel, np.broadcast_to(seen[newest].transpose(1, 2, 0), (64, 64, 3)))


def test_wrong_observation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a .* uint8 observation"):
        show(np.zeros((4, 84, 84, 1), np.uint8))
    with pytest.raises(ValueError, match="4 planes"):
        show(channels=3)


@pytest.mark.parametrize(
    "changes", [{"track": 8}, {"frame": 101}, {"episode_return": 13.0}, {"speed": 60.0}, {"tiles": 31}, {"value": 5.0}]
)
def test_every_number_is_written_outside_the_pictures(changes: dict[str, float]) -> None:
    differs = (show() != show(**changes)).any(axis=2)
    assert differs.any()
    assert not GAME.of(differs[..., None]).any()
    assert not NEWEST.of(differs[..., None]).any()


def test_long_titles_end_before_the_track() -> None:
    assert (show(title="m" * 200)[:48, 800:] == show(title="m")[:48, 800:]).all()


def test_lap_time_is_the_games_own_clock() -> None:
    assert telemetry(frame=725).lap_time == pytest.approx(14.5)
