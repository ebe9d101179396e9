"Laws of the simulator and the renderer, golden values of real streams, and a corpus of hostile event files"
import hashlib
import os
import pickle
import random
import struct
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from closeness import near, tol

from featsd.base.core import FeatsdError
from featsd.data import events as ev
from featsd.data.events import Events, read_events, render_events, save_events, simulate_events, windows

SHARED = Path(os.environ.get("FEATSD_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data") / "events"
REAL = ["sample1.npy", "interlaken_00_d_000089.npy", "interlaken_00_d_000099.npy"]

def real(name):
    if not (SHARED / name).is_file():
        pytest.skip(f"{name} is not at hand: set FEATSD_SHARED_DATA to the folder that holds events/{name}")
    return SHARED / name

def crowd(n, h=480, w=640, seed=0):
    rng = np.random.default_rng(seed)
    return Events(rng.integers(0, w, n).astype(np.int32), rng.integers(0, h, n).astype(np.int32),
                  np.sort(rng.integers(0, 10**6, n)),
                  rng.integers(0, 2, n).astype(np.uint8))

def digits_clip(seed, frames=33, side=48):
    "Three blobs that move over a ground, all in integers: log intensities in thousandths"
    rng = random.Random(seed)
    clip = np.full((frames, side, side), 2100, np.int32)
    for _ in range(3):
        blob = np.array([[rng.randrange(2100, 5500) for _ in range(12)] for _ in range(12)])
        x, y, vx, vy = rng.randrange(36), rng.randrange(36), rng.choice((-1, 0, 1)), rng.choice((-1, 0, 1))
        for i in range(frames):
            a, b = min(36, max(0, x + vx * i // 2)), min(36, max(0, y + vy * i // 2))
            clip[i, b:b + 12, a:a + 12] = np.maximum(clip[i, b:b + 12, a:a + 12], blob)
    return (clip / 1000).astype(np.float32)

T33 = np.arange(33) * 1500

# ---- the simulator

def test_simulator_agrees_with_a_loop_over_pixels():
    clip, step = digits_clip(3, frames=9), 250
    fast, slow = simulate_events(clip, T33[:9]), []
    milli = np.rint(clip.astype(np.float64) * 1000).astype(int)
    for y, x in np.ndindex(48, 48):
        ref = int(milli[0, y, x])
        for i in range(1, 9):
            a, b, t0, dt = int(milli[i - 1, y, x]), int(milli[i, y, x]), int(T33[i - 1]), 1500
            while abs(b - ref) >= step:
                ref += step if b > ref else -step
                slow.append((t0 + abs(ref - a) * dt // abs(b - a), x, y, int(b > a)))
    assert len(fast) > 300
    assert sorted(slow) == sorted(zip(fast.t.tolist(), fast.x.tolist(), fast.y.tolist(), fast.p.tolist(), strict=True))

def test_simulator_is_bitwise_pinned():
    "Same bytes on every machine and numpy: a changed digest changes every clip of the built-in world"
    out = simulate_events(digits_clip(1), T33, noise_rate=2., seed=7)
    assert [out.x.dtype, out.y.dtype, out.t.dtype, out.p.dtype] == [np.int32, np.int32, np.int64, np.uint8]
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(getattr(out, k), dtype=d).tobytes()
                                     for k, d in zip("xytp", ("<i4", "<i4", "<i8", "u1"), strict=True)))
    assert (len(out), digest.hexdigest()[:16]) == PINNED

PINNED = (16_349, "ea20a531b1bba7d4")

def test_every_event_is_one_threshold():
    "Summing signed thresholds over events reconstructs each pixel to within one threshold"
    clip = digits_clip(5)
    out = simulate_events(clip, T33, threshold=.2)
    sums = np.zeros((48, 48))
    np.add.at(sums, (out.y, out.x), np.where(out.p == 1, .2, -.2))
    assert np.abs(clip[-1] - clip[0] - sums).max() < .2 + tol(33) # brightness is 1 at most, in 33 frames
    assert (np.diff(out.t) >= 0).all() and out.t.min() >= 0 and out.t.max() <= T33[-1]

def test_simulator_ignores_changes_below_the_threshold_and_below_rounding():
    clip = digits_clip(2)
    assert len(simulate_events(clip * np.float32(1e-3), T33)) == 0
    np.testing.assert_array_equal(simulate_events(clip + np.float32(1e-5), T33).t, simulate_events(clip, T33).t)

def lines(f):
    "How many lines Python runs inside: what works on arrays runs as many for a thousand times the data"
    n, before = [0], sys.gettrace()
    def count(frame, event, arg): n[0] += event == "line"; return count
    sys.settrace(count)
    try: f()
    finally: sys.settrace(before)
    return n[0]

def test_the_simulator_works_on_whole_pictures():
    small, large = (lines(lambda: simulate_events(np.tile(digits_clip(1), (1, k, k)), T33))  # noqa: B023
                    for k in (1, 8))
    assert small <= large <= small + 100

# ---- the renderer

def render_loop(events, n_parts=5, polarity_order="last"):
    n, k, out = len(events), len(events) // n_parts, []
    for i in range(n_parts):
        a, b = i * k, (i + 1) * k if i < n_parts - 1 else n
        x, y, p = events.x[a:b], events.y[a:b], events.p[a:b]
        img = np.full((y.max() + 1, x.max() + 1, 3), 255, np.uint8)
        rounds = [(0, 1)] if polarity_order == "last" else [(1,), (0,)]
        for wanted in rounds:
            for x_, y_, p_ in zip(x, y, p, strict=True):
                if p_ in wanted: img[y_, x_] = (0, 0, 255) if p_ == 0 else (255, 0, 0)
        out.append(img)
    return out

def same(a, b):
    return (len(a) == len(b) and all(np.array_equal(u, v) and u.dtype == v.dtype == np.uint8
                                     for u, v in zip(a, b, strict=True)))

@pytest.mark.parametrize("order", ["last", "blue_last"])
def test_renderer_agrees_with_a_loop(order):
    for seed, (n, parts, h, w) in enumerate([(5, 5, 4, 4), (7, 3, 2, 9), (1000, 1, 5, 5), (4003, 5, 31, 17),
                                             (9999, 7, 120, 160)]):
        stream = crowd(n, h, w, seed)
        assert same(render_events(stream, parts, order), render_loop(stream, parts, order))

@pytest.mark.parametrize("name", REAL)
def test_renderer_agrees_with_a_loop_on_real_streams(name):
    stream = read_events(real(name))[:40_000]
    for order in ("last", "blue_last"): assert same(render_events(stream, 5, order), render_loop(stream, 5, order))

def test_renderer_works_on_whole_streams_and_is_identical_on_a_million_events():
    stream = crowd(1_000_000)
    assert same(render_events(stream), render_loop(stream))
    few = crowd(1_000)
    assert (lines(lambda: render_events(stream)) <= lines(lambda: render_events(few)) +
            100 < lines(lambda: render_loop(few)))

def test_golden_pictures_of_a_real_stream():
    stream = read_events(real("sample1.npy"))
    pictures = render_events(stream)
    assert len(stream) == 4 * 26_453 + 26_456 and [p.shape for p in pictures] == [(480, 640, 3)] * 5
    counts = [[int((p == c).all(-1).sum()) for c in ((255, 0, 0), (0, 0, 255), (255, 255, 255))] for p in pictures]
    assert counts[0] == [13_513, 11_484, 282_203] and counts[1] == [11_286, 14_272, 281_642]
    assert hashlib.sha256(pictures[0].tobytes()).hexdigest().startswith("fd292a606d45b16f")
    differ = [int((a != b).any(-1).sum()) for a, b in zip(pictures, render_events(stream, polarity_order="blue_last"),
                                                          strict=True)]
    assert differ == [60, 113, 175, 112, 54]

@pytest.mark.parametrize("name", REAL[1:])
def test_real_dsec_streams(name):
    stream = read_events(real(name))
    assert stream.duration_us < 100_000 and stream.t.min() > 50_000_000_000 and stream.note == ""
    assert [p.shape for p in render_events(stream, size=(480, 640))] == [(480, 640, 3)] * 5

def test_renderer_refuses():
    for call, words in [(lambda: render_events(crowd(4)), "4 events, expected at least 5"),
                        (lambda: render_events(crowd(9), polarity_order="red"), "polarity_order"),
                        (lambda: render_events(crowd(900), size=(48, 48)), "within 48x48"),
                        (lambda: render_events(Events(*[np.array([0, 65535])] * 3, np.array([0, 1]))[:2], 1), "stray")]:
        with pytest.raises(FeatsdError, match=words): call()

# ---- reading what is sound

def columns(n=100, **dtypes):
    c = crowd(n)
    return {k: getattr(c, k).astype(dtypes.get(k, getattr(c, k).dtype)) for k in "xytp"}

def equal(a, b):
    return all(np.array_equal(getattr(a, k), b[k] if isinstance(b, dict) else getattr(b, k)) for k in "xytp")

@pytest.mark.parametrize("protocol", range(6))
def test_dictionaries_of_every_protocol(tmp_path, protocol):
    c = (columns(x="u2", y=">u2", t="<i8", p="?") | {"duration_ms": 50., "time_start": np.int64(3),
                                                     "name": np.str_("seq"), "none": None, "f": np.float32(.5)})
    head = tmp_path / "head.npy"
    np.save(head, np.array(0, dtype=object), allow_pickle=True)
    box = np.empty((), object)
    box[()] = c
    path = tmp_path / "d.npy"
    path.write_bytes(head.read_bytes()[:128] + pickle.dumps(box, protocol))
    assert equal(read_events(path), c)

def test_every_format_gives_the_same_stream(tmp_path):
    c = columns()
    np.save(tmp_path / "dict.npy", {k: v.astype("i8") for k, v in c.items()}, allow_pickle=True)
    fields = np.zeros(100, [("x", "u2"), ("extra", "S3"), ("y", "u2"), ("t", "f8"), ("p", "?")])
    for k in "xytp": fields[k] = c[k]
    np.save(tmp_path / "fields.npy", fields)
    np.savez_compressed(tmp_path / "z.npz", **c)
    save_events(tmp_path / "saved.npz", Events(**c))
    rows = list(zip(*(c[k].tolist() for k in "xytp"), strict=True))
    (tmp_path / "a.txt").write_text("# a comment\n\n" + "".join("%d %d %d %d\n" % r for r in rows))
    (tmp_path / "b.csv").write_text("t,X,y,p,more\n" + "".join(f"{t},{x},{y},{p},9\n" for x, y, t, p in rows))
    names = sorted(tmp_path.iterdir())
    assert len(names) == 6
    for path in names:
        stream = read_events(path)
        assert equal(stream, c), path
        assert [stream.x.dtype, stream.y.dtype, stream.t.dtype,
                stream.p.dtype] == [np.int32, np.int32, np.int64, np.uint8]

def test_signed_polarity_is_mapped_and_said(tmp_path):
    c = columns()
    np.savez(tmp_path / "s.npz", **c | {"p": c["p"].astype("i1") * 2 - 1})
    stream = read_events(tmp_path / "s.npz")
    assert equal(stream, c) and "-1/1 mapped" in stream.note

def test_unsorted_only_on_request(tmp_path):
    c = columns()
    shuffled = np.random.default_rng(0).permutation(100)
    np.savez(tmp_path / "u.npz", **{k: v[shuffled] for k, v in c.items()})
    with pytest.raises(FeatsdError, match="sort=True"): read_events(tmp_path / "u.npz")
    stream = read_events(tmp_path / "u.npz", sort=True)
    assert (np.diff(stream.t) >= 0).all() and stream.note == "sorted by t"

def test_window_of_a_file(tmp_path):
    c = columns(1000)
    save_events(tmp_path / "w.npz", Events(**c))
    part = read_events(tmp_path / "w.npz", window_us=(200_000, 300_000))
    assert 0 < len(part) == ((c["t"] >= 200_000) & (c["t"] < 300_000)).sum()
    with pytest.raises(FeatsdError, match="no events in"): read_events(tmp_path / "w.npz", window_us=(10**9, 10**9 + 5))

def test_windows_cover_every_event():
    stream = crowd(5000)
    halves = list(windows(stream, 100_000, 50_000))
    starts = [s for s, _ in halves]
    assert starts == list(range(int(stream.t[0]), int(stream.t[-1]) - 100_000 + 2, 50_000))
    assert sum(len(p) for _, p in windows(stream[:2500], 10_000, 10_000)) <= 2500

@pytest.mark.parametrize("compressed", [False, True])
def test_dsec_hdf5(tmp_path, compressed):
    h5py = pytest.importorskip("h5py", reason="h5py is optional: pip install h5py hdf5plugin")
    options = dict(pytest.importorskip("hdf5plugin").Blosc(cname="zstd")) if compressed else {}
    c = columns(20_000, x="u2", y="u2", t="u4", p="u1")
    with h5py.File(tmp_path / "events.h5", "w") as f:
        for k in "xytp": f.create_dataset(f"events/{k}", data=c[k], chunks=(1000,), **options)
        f["ms_to_idx"] = np.searchsorted(c["t"], np.arange(0, c["t"][-1] // 1000 + 1) * 1000)
        f["t_offset"] = np.int64(51_836_900_000)
    whole = read_events(tmp_path / "events.h5")
    assert equal(whole, c | {"t": c["t"].astype(np.int64) + 51_836_900_000})
    for lo, hi in [(0, 1), (200_500, 300_250), (990_000, 5_000_000), (-5, 2000)]:
        keep = (c["t"] >= max(0, lo)) & (c["t"] < hi)
        if keep.any(): assert equal(read_events(tmp_path / "events.h5", window_us=(lo, hi)), whole[keep])
    with pytest.raises(FeatsdError, match="window_us"): read_events(tmp_path / "events.h5", max_events=10_000)

def test_hdf5_without_its_packages(tmp_path, monkeypatch):
    (tmp_path / "e.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(FeatsdError, match="pip install h5py hdf5plugin"): read_events(tmp_path / "e.h5")

# ---- refusing what is not

class Run:
    "Unpickling this writes the file that the tests look for"
    def __init__(self, sentinel, how="system"): self.sentinel, self.how = str(sentinel), how
    def __reduce__(self):
        code = f"open({self.sentinel!r}, 'w').close()"
        if self.how == "eval": return eval, (code,)
        if self.how == "exec": return exec, (code,)
        return os.system, (f"touch '{self.sentinel}'",)

class SetState:
    "Runs by its state instead"
    def __init__(self, sentinel): self.run = Run(sentinel)
    def __setstate__(self, state): raise AssertionError("the reader built a foreign object")

def objects(item):
    box = np.empty(2, object)
    box[:] = [item, 1]
    return box

def one_line(path, words="", **kw):
    "Reading `path` gives one line that names it, within a bound of memory"
    tracemalloc.start()
    try:
        with pytest.raises((FeatsdError, FileNotFoundError)) as e: read_events(path, **kw)
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    text = str(e.value)
    assert "\n" not in text and str(path) in text and len(text) < len(str(path)) + 500, text
    assert words in text, text
    assert peak < 64 * 2**20, peak
    return text

@pytest.mark.parametrize("how", ["system", "eval", "exec"])
@pytest.mark.parametrize("wrap", [lambda b: b, lambda b: {"x": b}, lambda b: columns() | {"extra": b},
                                  lambda b: columns() | {"extra": [({"deep": b},)]},
                                  lambda b: columns() | {"p": objects(b)}, lambda b: [b, columns()]])
def test_pickles_that_would_run_something(tmp_path, how, wrap):
    sentinel, path = tmp_path / "ran", tmp_path / "evil.npy"
    box = np.empty((), object)
    box[()] = wrap(Run(sentinel, how))
    np.save(path, box, allow_pickle=True)
    one_line(path)
    assert not sentinel.exists()
    np.load(path, allow_pickle=True) # the weapon is loaded: numpy's own reader fires it
    assert sentinel.exists()

HEAD = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (), }".ljust(117) + b"\n"

def array(raw, code="u1", shape=None):
    "Opcodes of one pickled array (protocol 3), with whatever shape it claims"
    shape = len(raw) if shape is None else shape
    number = b"\x8a" + bytes([9]) + struct.pack("<q", shape) + b"\0"
    code = code.encode()
    return (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\x01b\x87R(K\x01" + number +
            b"\x85cnumpy\ndtype\nX" + struct.pack("<I", len(code)) + code
            + b"\x89\x88\x87R(K\x03X\x01\0\0\0<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89B" +
            struct.pack("<I", len(raw)) + raw + b"tb")

def test_the_handmade_array_is_sound(tmp_path):
    raw = bytes([0, 1])
    (tmp_path / "a.npy").write_bytes(HEAD + b"\x80\x03}(" +
                                     b"".join(b"X\x01\0\0\0" + k.encode() + array(raw) for k in "xytp") + b"u.")
    assert read_events(tmp_path / "a.npy").t.tolist() == [0, 1]

@pytest.mark.parametrize("name,body,words", [
    ("setstate", pickle.dumps(SetState("/nowhere")), "names"),
    ("global", b"\x80\x03cos\nsystem\n.", "os.system"),
    ("builtins", b"\x80\x03cbuiltins\neval\nX\x01\0\0\x001\x85R.", "builtins.eval"),
    ("numpy function", b"\x80\x03cnumpy\nload\nX\x01\0\0\0a\x85R.", "numpy.load"),
    ("dotted name", b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.", "ndarray.__init__"),
    ("persistent id", b"\x80\x03Pid\n.", "PERSID"),
    ("extension", b"\x80\x03\x82\x01.", "EXT1"),
    ("instance", b"(ios\nsystem\n.", "INST"),
    ("newobj", b"\x80\x03cnumpy\nndarray\n)\x81.", "NEWOBJ"),
    ("build on a name", b"\x80\x03cnumpy\nndarray\n}X\x01\0\0\0aK\x01sb.", "do not fit"),
    ("call a number", b"\x80\x03K\x01)R.", "do not fit"),
    ("ndarray called", b"\x80\x03cnumpy\nndarray\nK\x05\x85R.", "unknown way"),
    ("codec", b"\x80\x03c_codecs\nencode\nX\x01\0\0\0aX\x03\0\0\0zip\x86R.", "unknown way"),
    ("huge shape", b"\x80\x03}X\x01\0\0\0x" + array(b"ab", shape=2**39) + b"s.", "do not fit"),
    ("absurd shape", b"\x80\x03}X\x01\0\0\0x" + array(b"ab", shape=2**62) + b"s.", "do not fit"),
    ("negative shape", b"\x80\x03}X\x01\0\0\0x" + array(b"ab", shape=-2) + b"s.", "do not fit"),
    ("objects from bytes", b"\x80\x03}X\x01\0\0\0x" + array(bytes(16), code="O8", shape=2) + b"s.", "array of objects"),
    ("dates", b"\x80\x03}X\x01\0\0\0x" + array(bytes(16), code="M8", shape=2) + b"s.", "dtype"),
    ("huge bytes", b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"ab.", "damaged"),
    ("huge memo", b"\x80\x03K\x01r\xff\xff\xff\x7f.", "a pickled int"),
    ("huge number", b"\x80\x03I" + b"9" * 5000 + b"\n.", "damaged"),
    ("many steps", b"\x80\x03" + b"N" * 200_000 + b".", "steps"),
    ("multiplied bytes", b"\x80\x03X" + struct.pack("<I", 10**6) + b"a" * 10**6 + b"q\0" +
     b"c_codecs\nencode\nh\0X\x06\0\0\0latin1\x86R" * 200 + b".", "multiplies"),
    ("marks only", b"\x80\x03t.", "damaged"), ("nothing", b"", "damaged"), ("a list", b"\x80\x03].", "a pickled list"),
    ("keys", b"\x80\x03}K\x01K\x02s.", "keys"),
    ("deep", b"\x80\x03" + b"]" * 40_000 + b"a" * 39_999 + b".", "a pickled list"),
])
def test_crafted_pickles(tmp_path, name, body, words):
    path = tmp_path / "crafted.npy"
    path.write_bytes(HEAD + body)
    one_line(path, words)

def header(descr, shape, version=b"\x01\x00"):
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text = text.ljust(-(-(len(text) + 11) // 64) * 64 - 11) + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text

FIELDS = "[('x','<u2'),('y','<u2'),('t','<i8'),('p','u1')]"

@pytest.mark.parametrize("content,words", [
    (b"", "begins with"), (b"\x93NUMPZ" + bytes(50), "begins with"), (b"\x80\x04}.", "begins with"),
    (b"\x93NUMPY", "damaged"), (b"\x93NUMPY\x09\x00" + bytes(60), "format"),
    (header(FIELDS, "(10**3,)"), "damaged"), (header(FIELDS, "(1000,)") + bytes(13), "declared"),
    (header(FIELDS, "(10000000000000,)"), "events declared"),
    (header(FIELDS, "(-5,)"), ""), (header(FIELDS, "()"), "expected x, y, t, p"),
    (header("'<i8'", "(4, 4)") + bytes(128), "expected x, y, t, p"),
    (header("[('x','O')]", "(3,)"), "expected x, y, t, p"),
    (header("'|O'", "(3,)") + pickle.dumps([1, 2, 3]), "array of objects"),
    (header("__import__('os').system('true')", "(3,)"), "damaged"),
    (header("[('x','<u2',(1000000,1000000))]", "(1,)"), ""), (header("'nonsense'", "(1,)"), "damaged"),
    (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b"{" * 100, "damaged"), (b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535, ""),
    (header("[" * 900, "(1,)"), "damaged"),
])
def test_crafted_npy(tmp_path, content, words):
    path = tmp_path / "crafted.npy"
    path.write_bytes(content)
    one_line(path, words)

def test_zip_bombs_and_broken_archives(tmp_path):
    for name, need in [("bomb", 40 * 2**20), ("lies", None), ("cut", None), ("crc", None), ("objects", None),
                       ("empty", None)]:
        path = tmp_path / f"{name}.npz"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
            if name == "empty": continue
            for k in "xytp":
                with z.open(f"{k}.npy", "w", force_zip64=True) as f:
                    if name == "objects": f.write(header("'|O'", "(2,)") + pickle.dumps([Run(tmp_path / "ran")] * 2))
                    elif name == "lies": f.write(header("'<i8'", f"({10**8},)") + bytes(80))
                    else:
                        f.write(header("'u1'", f"({need or 50},)"))
                        for _ in range((need or 0) // 2**20): f.write(bytes(2**20))
                        if not need: f.write(bytes(range(50)))
        data = path.read_bytes()
        if name == "cut": path.write_bytes(data[:len(data) // 2])
        if name == "crc":
            path.write_bytes(data.replace(struct.pack("<L", zipfile.crc32(header("'u1'", "(50,)") + bytes(range(50)))),
                                          b"abcd"))
        text = one_line(path)
        assert {"bomb": "zip bomb", "lies": "declared", "cut": "damaged", "crc": "damaged", "objects": "row of numbers",
                "empty": "no column 'x'"}[name] in text, text
    assert not (tmp_path / "ran").exists()

@pytest.mark.parametrize("change,words", [
    ({"x": np.zeros(99, int)}, "lengths"), ({"x": np.full(100, -1)}, "0 to 65535"),
    ({"y": np.full(100, 65536)}, "0 to 65535"), ({"p": np.full(100, 2)}, "polarities"),
    ({"p": np.arange(100) % 3 - 1}, "polarities"), ({"t": np.arange(100)[::-1]}, "sort=True"),
    ({"t": np.linspace(0, 1, 100)}, "whole"), ({"t": np.full(100, np.nan)}, "whole"),
    ({"t": np.full(100, 2**63, "u8")}, "2**62"), ({"x": np.zeros((10, 10), int)}, "row of numbers"),
    ({"t": np.array(["a"] * 100)}, "row of numbers"), ({"t": None}, "no column 't'"),
    ({k: np.zeros(0, int) for k in "xytp"}, "no events"),
    ({"t": (np.arange(100) * 700 % 65536).astype("u2")}, "wrapped"),
])
def test_columns_that_are_no_stream(tmp_path, change, words):
    path = tmp_path / "bad.npz"
    np.savez(path, **{k: v for k, v in (columns() | change).items() if v is not None})
    one_line(path, words)

def test_limits_and_names(tmp_path):
    save_events(tmp_path / "a.npz", crowd(100))
    one_line(tmp_path / "a.npz", "max_events", max_events=99)
    one_line(tmp_path / "a.npz", "max_bytes", max_bytes=99)
    one_line(tmp_path / "none.npz", "no such file")
    (tmp_path / "a.bin").write_bytes(b"x")
    one_line(tmp_path / "a.bin", "unknown kind")
    one_line(tmp_path, "no such file")
    with pytest.raises(FeatsdError, match="ends in .npz"): save_events(tmp_path / "a.npy", crowd(3))

@pytest.mark.parametrize("text,words", [("", "no events"), ("1 2 3\n", "damaged"), ("a b c d\n", "damaged"),
                                        ("1 2 3 1\n1 2 x 1\n", "damaged"), ("1 2 .5 1\n", "whole"),
                                        ("x y t p\n", "no events"), ("1 2 nan 1\n", "whole"), ("\0" * 100, "damaged"),
                                        ("1,2,3,1\n" + "1," * 10**5, ""),
                                        ("x,y,t,p" + "," * 10**5 + "\n", "no events"),
                                        ("1 2 3 1\n" * 50, "max_events")])
def test_text_that_is_no_stream(tmp_path, text, words):
    (tmp_path / "a.txt").write_text(text)
    one_line(tmp_path / "a.txt", words, max_events=20)

def test_fuzzed_files_give_a_stream_or_one_line(tmp_path):
    "Cut and flipped files of every kind: never another exception, never much memory"
    c, rng, outcomes = columns(60, x="u2", y="u2", p="u1"), random.Random(0), {True: 0, False: 0}
    np.save(tmp_path / "a.npy", c, allow_pickle=True)
    fields = np.zeros(60, [(k, c[k].dtype) for k in "xytp"])
    for k in "xytp": fields[k] = c[k]
    np.save(tmp_path / "b.npy", fields)
    np.savez_compressed(tmp_path / "c.npz", **c)
    (tmp_path / "d.csv").write_text("x,y,t,p\n" + "".join("%d,%d,%d,%d\n" % r
                                                          for r in zip(*(c[k].tolist() for k in "xytp"), strict=True)))
    for source in sorted(tmp_path.iterdir()):
        whole, path = source.read_bytes(), tmp_path / f"fuzzed{source.suffix}"
        for _ in range(150):
            data = bytearray(whole)
            if rng.random() < .2: del data[rng.randrange(len(data)):]
            for _ in range(rng.choice((0, 1, 1, 2, 8))):
                if data: data[rng.randrange(min(len(data), rng.choice((200, len(data)))))] = rng.randrange(256)
            path.write_bytes(data)
            try: sound = len(read_events(path, sort=rng.random() < .5)) > 0
            except FeatsdError as e:
                assert "\n" not in str(e) and str(path) in str(e)
                sound = False
            outcomes[sound] += 1
    assert min(outcomes.values()) > 30, outcomes

def test_representations_agree_with_loops():
    stream = crowd(700, 9, 11)
    counts, grid, surface = np.zeros((2, 9, 11)), np.zeros((4, 9, 11)), np.zeros((2, 9, 11))
    span = stream.t[-1] - stream.t[0]
    for x, y, t, p in zip(stream.x, stream.y, stream.t, stream.p, strict=True):
        counts[p, y, x] += 1
        surface[p, y, x] = np.exp(-(stream.t[-1] - t) / 20_000)
        for b in range(4): grid[b, y, x] += (2. * p - 1) * max(0., 1 - abs(3 * (t - stream.t[0]) / span - b))
    np.testing.assert_array_equal(ev.count_image(stream, (9, 11)), counts)
    near(ev.voxel_grid(stream, 4, (9, 11)), grid, len(stream)) # every event may fall on one pixel
    near(ev.time_surface(stream, 20_000, (9, 11)), surface, 4)


# ---- a format from outside

def test_a_format_takes_one_entry(tmp_path, monkeypatch):
    "A toy format: ten bytes of header, then bytes x, y, t, p of each event"
    def read_toy(path, f, max_events, window_us):
        f.seek(10)
        rows = np.frombuffer(f.read(4 * max_events), np.uint8).reshape(-1, 4)
        return dict(zip("xytp", rows.T, strict=True)), 1000
    def write_toy(f, events):
        rows = np.stack([events.x, events.y, events.t - 1000, events.p], 1)
        f.write(b"TOY EVENTS" + rows.astype(np.uint8).tobytes())
    monkeypatch.setattr(ev, "READERS", [*ev.READERS, ev.Format((".toy", ".toys"), b"TOY EVENTS", read_toy, write_toy)])
    stream = Events(np.array([3, 0]), np.array([1, 2]), np.array([1005, 1007]), np.array([1, 0], np.uint8))
    save_events(tmp_path/"a.toy", stream)
    for name in ("a.toy", "A.TOYS"):
        (tmp_path/name).write_bytes((tmp_path/"a.toy").read_bytes())
        assert all(np.array_equal(getattr(read_events(tmp_path/name), k), getattr(stream, k)) for k in "xytp")
    (tmp_path/"b.toy").write_bytes(b"TOY EVENT?" + bytes(8))
    for name, says in (("b.toy", "expected a .toy file"),
                       ("a.what", "expected .npy, .npz, .h5, .hdf5, .txt, .csv, .aedat4, .raw, .dat, .toy, .toys")):
        if not (tmp_path/name).exists(): (tmp_path/name).write_bytes(b"?")
        with pytest.raises(FeatsdError) as e: read_events(tmp_path/name)
        assert says in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(FeatsdError, match="ends in .npz or .toy or .toys"): save_events(tmp_path/"a.npy", stream)
    assert read_events(tmp_path/"a.toy", window_us=(6, 9)).t.tolist() == [1007]
