"Pictures and films of this world: what a viewer shows is what a model sees"
import struct
from itertools import product

import numpy as np
import pytest
from PIL import Image

from featsd.base.core import FeatsdError, say_once
from featsd.data.build import build_dataset, simulate_video
from featsd.data.clips import open_clips
from featsd.data.frames import Clip, even_frames, frame_indices, read_folder, read_frame, read_video, seen_frames


@pytest.fixture(autouse=True)
def heard_anew(): say_once.cache_clear()


def corner(h=32, w=48): # bright at the top left, dimmer to the right
    x = np.full((h, w, 3), 20, np.uint8)
    x[:h // 2, :w // 2] = 230
    x[:h // 2, w // 2:] = 120
    return x


def where(x): # quarters, brightest first
    h, w = x.shape[0] // 2, x.shape[1] // 2
    parts = {"tl": x[:h, :w], "tr": x[:h, w:], "bl": x[h:, :w], "br": x[h:, w:]}
    return sorted(parts, key=lambda k: -parts[k].mean())[:2]


@pytest.mark.parametrize("tag", range(1, 9))
def test_a_photo_is_turned_as_its_exif_says(tmp_path, tag):
    shown = Image.fromarray(corner())
    turn = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]} # as the camera held it
    stored, exif = shown, Image.Exif()
    for how in turn.get(tag, []): stored = stored.transpose(Image.Transpose(how))
    exif[0x0112] = tag
    stored.save(tmp_path/"a.png", exif=exif)
    assert (read_frame(tmp_path/"a.png") == corner()).all()


@pytest.mark.parametrize("levels", [np.arange(256) * 257, np.arange(0, 65536, 13)])
def test_sixteen_bits_of_grey_are_scaled(tmp_path, levels):
    Image.fromarray(levels.astype(np.uint16)[None].repeat(4, 0)).save(tmp_path/"000.png")
    got = read_frame(tmp_path/"000.png")[0, :, 0]
    assert (got == np.round(levels / 257)).all() # libpng's scaling


def film(path, n=40, codec="libx264", rate=20, **options):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as out:
        s = out.add_stream(codec, rate=rate, options={"crf": "5", "bf": "0", "g": "5"} if codec == "libx264" else {})
        s.width, s.height, s.pix_fmt = 48, 32, "yuv420p"
        for k, v in options.items(): setattr(s, k, v)
        for i in range(n):
            x = corner()
            x[24:] = 5 * i % 250
            for p in s.encode(av.VideoFrame.from_ndarray(x, format="rgb24")): out.mux(p)
        out.mux(s.encode(None))
    return path


@pytest.mark.parametrize("matrix", [m for m in product((-1, 0, 1), repeat=4) if abs(m[0] * m[3] - m[1] * m[2]) == 1
                                    and sum(map(abs, m)) == 2])
def test_a_film_is_turned_as_its_container_says(tmp_path, matrix):
    d = bytearray(film(tmp_path/"v.mp4", 6).read_bytes())
    at = d.find(b"tkhd") + 4
    at += 4 + (32 if d[at] else 20) + 16
    a, b, c, e = (65536 * v for v in matrix)
    d[at:at + 36] = struct.pack(">9i", a, b, 0, c, e, 0, 0, 0, 1 << 30)
    (tmp_path/"v.mp4").write_bytes(d)
    x = read_video(tmp_path/"v.mp4", 1)[0][0]
    # where the corners (±1, ±1) go, y down: x' = ax + cy, y' = bx + ey
    name = lambda u, v: ("t" if v < 0 else "b") + ("l" if u < 0 else "r")
    go = lambda u, v: name(matrix[0] * u + matrix[2] * v, matrix[1] * u + matrix[3] * v)
    assert where(x) == [go(-1, -1), go(1, -1)]
    assert x.shape == ((32, 48, 3) if matrix[0] else (48, 32, 3))


def test_pixels_that_are_not_square_are_shown_wide(tmp_path):
    from fractions import Fraction
    f = film(tmp_path/"v.mkv", 4, sample_aspect_ratio=Fraction(2))
    assert read_video(f, 1)[0].shape[1:] == (32, 96, 3)


def test_a_film_that_was_cut_says_so(tmp_path, caplog):
    data = film(tmp_path/"v.mkv").read_bytes()
    assert read_video(tmp_path/"v.mkv")[1] == 40 and not caplog.text
    (tmp_path/"cut.mkv").write_bytes(data[:int(.6 * len(data))])
    assert read_video(tmp_path/"cut.mkv")[1] < 40
    assert "declares 2.00 s, only" in caplog.text and "get it again" in caplog.text


def test_films_joined_end_to_end_are_read_to_the_end(tmp_path, caplog):
    data = film(tmp_path/"v.mpg", 30, "mpeg1video", 25).read_bytes()
    (tmp_path/"joined.mpg").write_bytes(data + data)
    one, both = read_video(tmp_path/"v.mpg")[1], read_video(tmp_path/"joined.mpg")[1]
    assert both >= 2 * one - 2 and "starts again 1 times" in caplog.text


def uneven(path, times, rate=20): # frame k, of its own grey, from times[k] on
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as out:
        s = out.add_stream("libx264", rate=rate, options={"bf": "0", "crf": "5"})
        s.width, s.height, s.pix_fmt = 48, 32, "yuv420p"
        for k, at in enumerate(times):
            f = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 20 + 200 * k // len(times), np.uint8), format="rgb24")
            f.pts = at
            out.mux(s.encode(f))
        out.mux(s.encode(None))
    return path


def shown(frames, times): # numbers of the frames
    grey = frames.reshape(len(frames), -1).mean(1)
    return [int(np.abs(20 + 200 * np.arange(len(times)) // len(times) - g).argmin()) for g in grey]


def test_uneven_films_are_read_by_time(tmp_path, caplog):
    frames, total = read_video(uneven(tmp_path/"v.mkv", times := (0, 1, 2, 3, 4, 30)))
    assert total == 31 and "chosen by time" in caplog.text # as many as a film of that rate would have
    assert shown(frames, times) == [0, 4, 4, 4, 4, 4, 4, 5] # what is to be seen then
    with pytest.raises(FeatsdError, match="frames; cut it"): even_frames("v", [0, 1, 2, 10**8])


def test_clips_of_an_uneven_film_are_cut_by_time(tmp_path, caplog):
    pytest.importorskip("av")
    times = (*range(10), 15, *range(20, 25), 34, *range(44, 61)) # twentieths of a second
    film = uneven(tmp_path/"v.mkv", times)
    on = lambda tick: max(k for k, at in enumerate(times) if at <= tick) # the frame on the screen
    assert build_dataset([film], tmp_path/"ds", noise_rate=1, progress=False).clips == 5 # half a second apart
    for i, clip in enumerate(open_clips(tmp_path/"ds")):
        seen = [on(10 * i + t) for t in range(20)]
        assert shown(clip.frames, times) == [seen[k] for k in frame_indices(20)]
        assert shown(read_video(tmp_path/f"ds/mp4/v/{i:06d}.mp4", 20)[0], times) == seen # at an even rate
    assert caplog.text.count("chosen by time") == 1
    first = simulate_video(film, n_frames=None)
    assert shown(first.frames, times) == [on(t) for t in range(20)] and first.meta["total_frames"] == 20


def test_even_times_are_left_alone_and_uneven_ones_follow_the_screen():
    rng = np.random.default_rng(0)
    for times in ([7], [0, 10**6], [0, 33, 67, 100], np.arange(50) * 33_367, np.arange(40) * 50_000 // 3):
        assert even_frames("v", times) == (list(range(len(times))), list(times))
    assert even_frames("v", [0, 50, 100, 200, 250])[0] == [*range(5)] # one that was dropped
    for i in range(50):
        pauses = rng.permuted([[40] * 18 + [500] * 2] * 3, axis=1)
        times = np.cumsum([50] * 40 + [25] * 40 if i % 2 else pauses) + i # another rate, or pauses
        start = times[15 if i % 2 else 3] + 7
        numbers, ticks = even_frames("v", times, start, start + 1500)
        assert numbers == [max(k for k, at in enumerate(times) if at <= t) for t in ticks]
        (step,) = set(np.diff(ticks))
        assert ticks[0] == start and ticks[-1] < start + 1500 <= ticks[-1] + step


def test_a_model_takes_its_own_frames_or_says_that_they_are_missing(tmp_path):
    for i in range(20): Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(tmp_path/f"{i:03d}.png")
    looks = [(8, "linspace"), (16, "linspace"), (8, "arange")]
    pick = lambda total: sorted({k for n, r in looks for k in frame_indices(total, n, r)})
    frames, total = read_folder(tmp_path, pick=pick)
    clip = Clip("c", frames, None, "s", {"kept": pick(total), "total_frames": total})
    for n, rule in looks: assert seen_frames(clip, n, rule)[:, 0, 0, 0].tolist() == frame_indices(20, n, rule)
    with pytest.raises(FeatsdError, match="read it with n_frames=5"): seen_frames(clip, 5, "linspace")
