"What commands say and keep: messages that can be turned off, words that are not made twice"
import os
import subprocess
import sys
from pathlib import Path

import pytest
from patience import HANG
from test_clips import tiny_clip

import featsd.fit as M
from featsd.base.core import FeatsdError, home, write_json
from featsd.data.clips import LISTING, open_clips
from featsd.data.store import open_states
from featsd.models.backbone import load_pair

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pair(): return load_pair("pocket")


@pytest.fixture
def calls(pair, monkeypatch):
    out, generate = [], pair.target.generate
    monkeypatch.setattr(pair.target, "generate", lambda *a, **k: out.append(1) or generate(*a, **k))
    return out


def ids_of(said): return [i.tolist() for i in said.target_ids]


def test_words_are_made_once_per_target_data_and_questions(pair, calls, tmp_path, monkeypatch):
    asked, keep = open_clips("pocket", "train", 1).questions[:2], tmp_path/"words"
    def words(questions=asked, clips=3, start=0, **kw):
        return M.training_words(pair, questions, clips, start, keep=keep, **kw)
    first, again = words(), words()
    file, = keep.iterdir()
    assert len(calls) == 1 and len(first) == 6
    assert vars(first).keys() == vars(again).keys() and ids_of(first) == ids_of(again) # a kept file leads to the same
    assert all(getattr(first, k) == getattr(again, k) for k in vars(first) if "ids" not in k or k == "clip_ids")
    words(asked[:1]), words(clips=2), words(start=1)
    assert max(map(len, words(max_new_tokens=3).target_ids)) == 3 # answers are as long as the comparison's
    assert len(calls) == 5 and len(list(keep.iterdir())) == 5 # each call its own file
    words(start=1)
    assert len(calls) == 5
    for torn in (-40, file.read_text().index("\n") + 1): # in the last record, after the first one: made again
        file.write_text(file.read_text()[:torn])
        assert ids_of(words()) == ids_of(first)
    assert len(calls) == 7
    monkeypatch.setattr(pair.target, "quant", "4bit")
    words()
    monkeypatch.setattr(pair.target, "model_hash", "") # a class that cannot say which weights it has
    words(), words()
    assert len(calls) == 10 and len(list(keep.iterdir())) == 6
    with pytest.raises(FeatsdError, match="batch 8, from clip 3 of 3 in pocket"): words(start=3)
    with pytest.raises(FeatsdError, match="batch 0.*give a batch of 1 or more"): words(batch=0)


def test_words_of_a_data_set_that_changes(pair, calls, tmp_path, monkeypatch):
    root, world, encode = tmp_path/"set", open_clips("pocket", "train", 1), pair.target.encode_all
    seen = lambda clip, questions: encode(world[0], questions) # the pair knows no other clips
    monkeypatch.setattr(pair.target, "encode_all", seen)
    write_json(root.mkdir() or root/LISTING, [tiny_clip(root, "bern", i) for i in range(3)])
    def words(): return M.training_words(pair, world.questions[:1], dataset_dir=root, keep=tmp_path/"words").clips
    (root/"event_npy/bern/000001.npy").write_bytes(b"cut")
    assert words() == words() == ["id-bern-0", "id-bern-2"]
    assert len(calls) == 1 # a clip that cannot be read is no reason to ask again
    tiny_clip(root, "bern", 1)
    assert words() == ["id-bern-0", "id-bern-1", "id-bern-2"] and len(calls) == 2
    tiny_clip(root, "bern", 0) # the same names and listing, other files
    words(), words()
    assert len(calls) == 3


def test_a_home_that_cannot_be(tmp_path, monkeypatch):
    (tmp_path/"file").touch()
    monkeypatch.setenv("FEATSD_HOME", str(tmp_path/"file"))
    with pytest.raises(FeatsdError, match="words: expected a folder that can be written.*set FEATSD_HOME"):
        home("words")


def extract(folder, clip, **env):
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)} | env
    script = folder.parent/"script.py"
    script.write_text(f"""import sys
import featsd.extract as E
from featsd.commands import featsd_extract
read = E.read_clip
E.read_clip = lambda clips, i: (None, "cut short") if i == {clip} else read(clips, i)
flags = "--quant fp32 --split test --max_samples 2 --max_questions 1 --chunked"
sys.argv = "featsd_extract --output_dir {folder}".split() + flags.split()
featsd_extract()""")
    done = subprocess.run([sys.executable, script], env=env, cwd=folder.parent, capture_output=True, text=True,
                          timeout=HANG)
    return done.returncode, done.stderr


def test_a_skipped_clip_is_told_and_can_be_silenced(tmp_path):
    code, err = extract(tmp_path/"a", 1)
    assert code == 0 and ("1 clips could not be read and were skipped; test-000001: cut short; once they are mended, "
                          "run the same command again") in err
    store, = (tmp_path/"a").iterdir()
    code, err = extract(tmp_path/"a", None) # the clip is mended
    assert code == 0 and "skipped" not in err and len(open_states(store)) == 2
    code, err = extract(tmp_path/"b", 1, FEATSD_LOG="error")
    assert code == 0 and "skipped; test" not in err
    code, err = extract(tmp_path/"c", 1, FEATSD_LOG="loud")
    assert code == 2 and not (tmp_path/"c").exists()
    assert err.strip() == "featsd_extract: FEATSD_LOG=LOUD: expected one of DEBUG, INFO, WARNING, ERROR, CRITICAL"
