"Files that cameras write, through the library that writes them: same events, same order, same polarity"
import numpy as np
import pytest

from featsd.base.core import FeatsdError
from featsd.data.events import read_events


def made(n=4000, seed=0):
    rng = np.random.default_rng(seed)
    t = np.sort(rng.integers(0, 200_000, n))
    return t, rng.integers(0, 64, n), rng.integers(0, 48, n), rng.integers(0, 2, n)


def written(path, **kw):
    faery = pytest.importorskip("faery")
    t, x, y, p = made()
    a = np.zeros(len(t), faery.EVENTS_DTYPE)
    a["t"], a["x"], a["y"], a["on"] = t, x, y, p.astype(bool)
    faery.events_stream_from_array(a, (64, 48)).to_file(path, **kw)
    return path


@pytest.mark.parametrize("name,kw", [("e.aedat4", {}), ("e2.raw", {"version": "evt2"}), ("e3.raw", {"version": "evt3"}),
                                     ("e.dat", {}), ("e.csv", {})])
def test_what_a_camera_writes_comes_back(tmp_path, name, kw):
    e = read_events(written(tmp_path/name, **kw))
    for mine, theirs in zip((e.t, e.x, e.y, e.p), made(), strict=True): assert (mine == theirs).all()
    assert len(read_events(tmp_path/name, window_us=(50_000, 60_000))) == ((e.t >= 50_000) & (e.t < 60_000)).sum()
    with pytest.raises(FeatsdError, match="expected at most 100"): read_events(tmp_path/name, max_events=100)


@pytest.mark.parametrize("name,kw", [("e.aedat4", {}), ("e3.raw", {"version": "evt3"})])
def test_a_damaged_recording_is_one_line(tmp_path, name, kw):
    data = bytearray(written(tmp_path/name, **kw).read_bytes())
    for at in range(200, len(data), 97): data[at] ^= 0xFF
    (tmp_path/name).write_bytes(data[:len(data) // 2])
    try: read_events(tmp_path/name)
    except FeatsdError as e: assert "\n" not in str(e) and name in str(e)


@pytest.mark.parametrize("name,start", [("e.aedat4", b"#!AER-DAT4.0\r\n"), ("e.raw", b"% evt 3.0\n")])
def test_without_the_library_the_extra_is_named(tmp_path, name, start, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faery", None)
    (tmp_path/name).write_bytes(start + bytes(64))
    with pytest.raises(FeatsdError, match=r"needs the extra events; pip install 'featsd\[events\]'"):
        read_events(tmp_path/name)
    (tmp_path/name).write_bytes(b"something else")
    with pytest.raises(FeatsdError, match="expected a"): read_events(tmp_path/name)


def test_a_wrapped_clock_is_recognised_and_goes_on(tmp_path):
    t = np.cumsum(np.full(300, 500))
    columns = dict(x=np.arange(300) % 9, y=np.arange(300) % 7, p=np.arange(300) % 2)
    np.savez(tmp_path/"w.npz", t=(t % 2**16).astype(np.uint16), **columns)
    with pytest.raises(FeatsdError, match="16 bits wrapped 2 times"): read_events(tmp_path/"w.npz")
    e = read_events(tmp_path/"w.npz", sort=True)
    assert (e.t - e.t[0] == t - t[0]).all() and "unwrapped" in e.note
    again = np.concatenate([np.arange(5000), np.arange(5000)])
    np.savez(tmp_path/"j.npz", t=again, x=again % 9, y=again % 7, p=again % 2)
    with pytest.raises(FeatsdError, match="starts again 1 times"): read_events(tmp_path/"j.npz")
