"What commands say and keep: messages that can be turned off, words that are not made twice"
import os
import subprocess
import sys
from pathlib import Path

import pytest

import featsd.makers as M
from featsd.core import FeatsdError
from featsd.data.clips import open_clips
from featsd.data.store import open_states
from featsd.models.backbone import load_pair

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pair(): return load_pair("pocket")


def test_words_are_made_once_per_target_data_and_questions(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("FEATSD_HOME", str(tmp_path))
    asked, calls, generate = open_clips("pocket", "train", 1).questions[:2], [], pair.target.generate
    monkeypatch.setattr(pair.target, "generate", lambda *a, **k: calls.append(1) or generate(*a, **k))
    def words(questions=asked, clips=3, start=0): return M.training_words(pair, questions, clips, start, path=True)
    first, again = words(), words()
    assert len(calls) == 1 and len(first) == 6 and [i.tolist() for i in first.target_ids] == [i.tolist() for i in again.target_ids]
    words(asked[:1]), words(clips=2), words(start=1)
    assert len(calls) == 4 and len(list((tmp_path/"words").iterdir())) == 4 # each call its own file
    words(start=1)
    assert len(calls) == 4
    file = M.words_file(pair, asked, 3)
    file.write_text(file.read_text()[:-40]) # the last record is torn: made again
    assert [i.tolist() for i in words().target_ids] == [i.tolist() for i in first.target_ids] and len(calls) == 5
    monkeypatch.setattr(pair.target, "quant", "4bit")
    assert M.words_file(pair, asked, 3) != file


def test_a_home_that_cannot_be(tmp_path, monkeypatch, pair):
    (tmp_path/"file").touch()
    monkeypatch.setenv("FEATSD_HOME", str(tmp_path/"file"))
    with pytest.raises(FeatsdError, match="words: expected a folder that can be written.*set FEATSD_HOME"): M.words_file(pair, ["?"])


def extract(folder, clip, **env):
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)} | env
    script = folder.parent/"script.py"
    script.write_text(f"""import sys
import featsd.extract as E
from featsd.commands import featsd_extract
read = E.read_clip
E.read_clip = lambda clips, i: (None, "cut short") if i == {clip} else read(clips, i)
sys.argv = "featsd_extract --output_dir {folder} --quant fp32 --split test --max_samples 2 --max_questions 1 --chunked".split()
featsd_extract()""")
    done = subprocess.run([sys.executable, script], env=env, cwd=folder.parent, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


def test_a_skipped_clip_is_told_and_can_be_silenced(tmp_path):
    code, err = extract(tmp_path/"a", 1)
    assert code == 0 and "1 clips could not be read and were skipped; test-000001: cut short; once they are mended, run the same command again" in err
    store, = (tmp_path/"a").iterdir()
    code, err = extract(tmp_path/"a", None) # the clip is mended
    assert code == 0 and "skipped" not in err and len(open_states(store)) == 2
    code, err = extract(tmp_path/"b", 1, FEATSD_LOG="error")
    assert code == 0 and "skipped; test" not in err
    code, err = extract(tmp_path/"c", 1, FEATSD_LOG="loud")
    assert code == 2 and err.strip() == "featsd_extract: FEATSD_LOG=LOUD: expected one of DEBUG, INFO, WARNING, ERROR, CRITICAL" and not (tmp_path/"c").exists()
