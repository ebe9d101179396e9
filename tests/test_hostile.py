"Files that want to run something, fill the memory or leave their folder, given to every reader: one line, nothing else"
import builtins
import io
import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from patience import HANG

import featsd.commands as commands
from featsd.adapters import create_adapter, load_any_adapter, load_pretrained, save_checkpoint, save_pretrained
from featsd.base.core import FeatsdError, read_json, write_json
from featsd.data.answers import read_answers, write_answers
from featsd.data.chunk import chunk_file
from featsd.data.clips import LISTING, open_clips, read_questions
from featsd.data.frames import read_frame, read_video
from featsd.data.events import read_events
from featsd.models.words import NGramTable
from featsd.data.store import StoreWriter, open_states, verify_store
from featsd.base.processes import read_heartbeat
from featsd.data.head import Head
from featsd.models.backbone import load_pair
from featsd.models.checkpoint import read_tensors, tensor_shapes
from featsd.replay import read_log, run_replay
from featsd.timeline import read_timing
from test_train import make_head, make_store

CANARY = Path(os.environ.get("TMPDIR") or "/tmp")/f"featsd-canary-{os.getpid()}"
SCRIPT = "<script>alert(1)</script>"


# ---- the weapons

class Run:
    def __init__(self, how): self.how = how
    def __reduce__(self):
        code = f"open({str(CANARY)!r}, 'w')"
        return {"system": (os.system, (f"touch {CANARY}",)), "eval": (builtins.eval, (code,)),
                "exec": (builtins.exec, (code,)), "open": (open, (str(CANARY), "w")),
                "bytes": (bytearray, (2**40,)), "popen": (subprocess.Popen, (["touch", str(CANARY)],))}[self.how]


class SetState:
    def __init__(self): self.x = 1
    def __setstate__(self, state): CANARY.touch()


class ByState:
    "Runs by what its __setstate__ gets: the class is a harmless one, the state is not"
    def __reduce__(self): return (OrderedDict, (), {"x": Run("system")})


def pt(obj, **kw):
    f = io.BytesIO()
    torch.save(obj, f, **kw)
    return f.getvalue()


def npy(obj):
    f, box = io.BytesIO(), np.empty((), object)
    box[()] = obj
    np.save(f, box, allow_pickle=True)
    return f.getvalue()


def rows(*items):
    box = np.empty(len(items), object)
    box[:] = items
    return box


def zipped(entries, method=zipfile.ZIP_DEFLATED):
    f = io.BytesIO()
    with zipfile.ZipFile(f, "w", method) as z:
        for name, data in entries.items(): z.writestr(name, data)
    return f.getvalue()


def repacked(data, change):
    "A zip whose entries went through `change(name, bytes)`"
    with zipfile.ZipFile(io.BytesIO(data)) as z: entries = {n: z.read(n) for n in z.namelist()}
    return zipped({n: change(n, b) for n, b in entries.items()}, zipfile.ZIP_STORED)


def tensors(header, data=b"\0" * 64, declared=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if declared is None else declared) + text + data


def header(shape, descr="'<i8'"):
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text = text.ljust(-(-(len(text) + 11) // 64) * 64 - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def expanded():
    x = torch.zeros(1)
    return torch.as_strided(x, (2**20, 2**20), (0, 0))


def multiplied():
    "A pickle that encodes one megabyte ten thousand times"
    text = b"X" + struct.pack("<I", 10**6) + b"a" * 10**6 + b"q\x00"
    return b"\x80\x02" + text + b"0](" + b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00utf-32\x86R" * 10**4 + b"e."


def qtensor():
    "A quantised tensor of a terabyte in a file of a kilobyte"
    good = pt({"w": torch.quantize_per_tensor(torch.ones(3), .1, 0, torch.quint8)})
    return repacked(good, lambda n, b: b.replace(b"K\x03\x85", b"\x8a\x06" + (2**40).to_bytes(6, "little") + b"\x85")
                    if n.endswith("data.pkl") else b)


def h5(make):
    h5py = pytest.importorskip("h5py")
    f = io.BytesIO()
    with h5py.File(f, "w") as h: make(h, h5py)
    return f.getvalue()


def columns(h, n=50, **replaced):
    for k in "xytp": h.create_dataset(f"events/{k}", **replaced.get(k, dict(data=np.arange(n) % 2)))


def deep(n): return b'{"a":' * n + b"1" + b"}" * n


PLAYLIST = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{CANARY}.secret.mp4\n#EXT-X-ENDLIST\n".encode()

CORPUS = {
    # pickles in torch's zip
    **{f"pt {how}": lambda how=how: pt(Run(how)) for how in ("system", "eval", "exec", "open", "popen", "bytes")},
    "pt in a state dict": lambda: pt({"model_state_dict": {"w": Run("system")}, "config": {}}),
    "pt in metadata": lambda: pt(dict(egpt_hidden=torch.ones(1, 2, 3), vl_hidden=torch.ones(1, 2, 3),
                                      seq_lens=torch.ones(1, dtype=torch.int64),
                                      metadata=[dict(sample_idx=Run("eval"))], config={})),
    "pt deep in lists": lambda: pt([[[[{"a": (Run("system"),)}]]]]),
    "pt object array": lambda: pt({"egpt_hidden": rows(Run("system"), 1)}),
    "pt __setstate__": lambda: pt({"config": SetState()}),
    "pt built state": lambda: pt({"model_state_dict": ByState()}),
    "pt protocol 4": lambda: pt(Run("system"), pickle_protocol=4),
    "pt legacy": lambda: pt({"w": Run("system")}, _use_new_zipfile_serialization=False),
    "pt legacy, plain": lambda: pt({"w": torch.ones(3)}, _use_new_zipfile_serialization=False),
    "pt compressed bomb": lambda: zipped({"archive/data.pkl": pickle.dumps(b"\0" * 2**28, 2), "archive/version": "3"}),
    "pt multiplied text": lambda: zipped({"archive/data.pkl": multiplied(), "archive/version": "3",
                                          "archive/byteorder": "little"}, zipfile.ZIP_STORED),
    "pt quantised terabyte": qtensor,
    "pt expanded tensor": lambda:
        pt(dict(model_state_dict={"final_norm.weight": expanded(), "layers.0.down_proj.weight": expanded()},
                adapter_type="L1", config={},
               egpt_hidden=expanded()[None], vl_hidden=expanded()[None], seq_lens=torch.ones(1, dtype=torch.int64),
                metadata=[dict(sample_idx=0)])),
    "pt storage that lies": lambda: repacked(pt({"model_state_dict": {"w": torch.ones(3)}}),
                                             lambda n, b: b"" if "/data/" in n else b),
    "pt names that climb": lambda: zipped({"../../evil/data.pkl": pickle.dumps({}, 2), "/etc/version": "3"},
                                          zipfile.ZIP_STORED),
    "pt half": lambda: pt({"w": torch.ones(99)})[:-400],
    "pickle system": lambda: pickle.dumps(Run("system")),
    "pickle text protocol": lambda: pickle.dumps(Run("system"), 0),
    # numpy
    **{f"npy {how}": lambda how=how: npy(Run(how)) for how in ("system", "eval", "exec", "bytes")},
    "npy in a column": lambda: npy({"x": Run("system"), "y": np.arange(3), "t": np.arange(3), "p": np.zeros(3)}),
    "npy object array": lambda: npy({"x": rows(Run("system"), 1), "y": np.arange(2), "t": np.arange(2),
                                     "p": np.zeros(2)}),
    "npy array of objects": lambda: (lambda f: (np.save(f, rows(Run("system"), 1), allow_pickle=True),
                                                f.getvalue())[1])(io.BytesIO()),
    "npy __setstate__": lambda: npy({"x": SetState()}),
    "npy huge shape": lambda: header("(1099511627776,)", "[('x','<u2'),('y','<u2'),('t','<i8'),('p','u1')]"),
    "npy header of code": lambda: header("(__import__('os').system('touch %s'),)" % CANARY),
    "npz bomb": lambda: zipped({f"{k}.npy": header(f"({2**28},)", "'u1'") + bytes(2**28) for k in "xyt"}),
    "npz of objects": lambda: zipped({f"{k}.npy": npy(Run("system")) for k in "xytp"}),
    "npz that climbs": lambda: zipped({f"../{k}.npy": header("(1,)") + bytes(8) for k in "xytp"}),
    # safetensors
    "tensors header of 2**62": lambda: tensors({}, declared=2**62),
    "tensors header past the end": lambda: tensors({}, declared=10**6),
    "tensors huge shape": lambda: tensors({"norm.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 64]},
                                           "__metadata__": {"eps": "1e-6"}}),
    "tensors overflowing shape": lambda:
        tensors({"lm_head.weight": {"dtype": "F32", "shape": [2**32, 2**32, 2**32], "data_offsets": [0, 64]}}),
    "tensors huge offsets": lambda: tensors({"keys": {"dtype": "I64", "shape": [2**37], "data_offsets": [0, 2**40]}}),
    "tensors negative": lambda: tensors({"keys": {"dtype": "I64", "shape": [-8], "data_offsets": [0, -64]}}),
    "tensors overlapping": lambda: tensors({"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]},
                                            "b": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}),
    "tensors deep header": lambda: tensors(deep(10**5)),
    "tensors names that climb": lambda:
        tensors({"../../etc/passwd": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}),
    "tensors hostile metadata": lambda: tensors({"__metadata__": {"featsd": deep(5000).decode(), "eps": "nan"},
                                                 "norm.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
                                                 "lm_head.weight": {"dtype": "F32", "shape": [3, 4],
                                                                    "data_offsets": [16, 64]}}),
    # JSON and text
    "json deep": lambda: deep(10**5), "json less deep": lambda: deep(900), "json endless number": lambda: b"9" * 10**5,
    "json of brackets": lambda: b"[" * 10**6,
    "json numbers": lambda: b'{"target_dim": NaN, "schema": 1e999, "results": -Infinity, "target_token_ms": '
                            b'NaN, "model_type": ' + b"9" * 4000 + b"}",
    "json of paths": lambda: json.dumps(dict(schema=1, chunks=[dict(path="../../../etc/passwd")],
                                             weight_map={"w": "../../etc/passwd.safetensors"},
                                             results=[dict(path="/etc/passwd")])).encode(),
    "json of lists": lambda: json.dumps({k: [] for k in ("schema", "results", "chunks", "model_type", "weight_map",
                                                         "clip_id", "verify", "target_token_ms", "pairs",
                                                         "config")}).encode(),
    "json surrogate": lambda: b'{"clip_id": "\\ud800", "question": "\\u001b[2J\\nq"}',
    "html": lambda: f"<!doctype html>{SCRIPT}".encode(),
    "svg": lambda: f"<svg xmlns='http://www.w3.org/2000/svg'>{SCRIPT}</svg>".encode(),
    "yaml": lambda: b"!!python/object/apply:os.system ['touch x']",
    "notebook": lambda: json.dumps(dict(nbformat=4,
                                        cells=[dict(cell_type="code", source=f"open({str(CANARY)!r}, 'w')")])).encode(),
    "zeros": lambda: bytes(10**6), "nothing": lambda: b"", "one long line": lambda: b"1 " * 10**7,
    # HDF5
    "h5 external link": lambda: h5(lambda h, h5py: [h.__setitem__(f"events/{k}", h5py.ExternalLink("/etc/passwd", "/x"))
                                                    for k in "xytp"]),
    "h5 external storage": lambda:
        h5(lambda h, h5py: columns(h, x=dict(shape=(50,), dtype="u1", external=[("/etc/passwd", 0, 50)]))),
    "h5 terabyte of nothing": lambda:
        h5(lambda h, h5py: columns(h, **{k: dict(shape=(2**27,), dtype="i8", chunks=(2**20,)) for k in "xytp"})),
    "h5 terabyte offset": lambda:
        h5(lambda h, h5py: (columns(h), h.create_dataset("t_offset", shape=(2**40,), dtype="i8", chunks=(2**20,)))),
    "h5 link in a circle": lambda: h5(lambda h, h5py: [h.__setitem__(f"events/{k}", h5py.SoftLink(f"/events/{k}"))
                                                       for k in "xytp"]),
    "h5 huge blocks": lambda: h5(lambda h, h5py: columns(h,
                                                         **{k: dict(shape=(2**26,), dtype="i8", chunks=(2**26,),
                                                                    compression="gzip") for k in "xytp"})),
    # videos that name other files
    "playlist": lambda: PLAYLIST, "concat list": lambda: f"ffconcat version 1.0\nfile '{CANARY}.secret.mp4'\n".encode(),
    "sdp": lambda: b"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
}


# ---- the readers

@pytest.fixture(scope="module")
def good(tmp_path_factory):
    "One sound file of each kind, into whose place the hostile ones are put"
    g = tmp_path_factory.mktemp("good")
    make_store(g/"store", pairs=12)
    weights = Path(commands.__file__).parent/"models"/"pocket_weights"
    (g/"pair").mkdir()
    for f in (weights/"draft").iterdir(): (g/"pair"/f.name).write_bytes(f.read_bytes())
    save_pretrained(create_adapter(1, 16), g/"adapter")
    save_checkpoint(create_adapter(1, 16), g/"adapter.pt")
    return g


def placed(tmp, good, what, name, data):
    root = tmp/what.replace("/", "_")
    shutil.copytree(good/what, root)
    (root/name).write_bytes(data)
    # the sidecar agrees, so that the file itself is looked at
    if name.startswith("chunks/") and name.endswith(".safetensors"):
        side = (root/name).with_suffix(".json")
        side.write_text(json.dumps(json.loads(side.read_text()) | dict(bytes=len(data))))
    return root


def all_of(states):
    for s in states.manifest["streams"][1:]: list(states.batches(s, 4))
    for k in range(len(states)): states.target_ids(k), states.draft_margins(k)
    states.head(), states.clips, states.split(.3)


def own(suffix, read):
    def go(tmp, good, data):
        (tmp/f"file{suffix}").write_bytes(data)
        return read(tmp/f"file{suffix}")
    return go


def binary(tmp, good, data):
    root = placed(tmp, good, "pair", "pytorch_model.bin", data)
    (root/"model.safetensors").unlink()
    return tensor_shapes(root), read_tensors(root)


def weights_index(tmp, good, data):
    root = placed(tmp, good, "pair", "model.safetensors.index.json", data)
    (root/"model.safetensors").unlink()
    return load_pair(draft=root, target=root)


def listing(tmp, good, data):
    (tmp/LISTING).write_bytes(data)
    return open_clips(tmp, "train")


def study_folder(tmp, good, data):
    (tmp/"chunks").mkdir()
    (tmp/"chunks/chunk_000000.pt").write_bytes(data)
    return all_of(open_states(tmp))


def study_index(tmp, good, data):
    (tmp/"index.json").write_bytes(data)
    return all_of(open_states(tmp))


def resumed(tmp, good, data):
    from featsd.train import HiddenAdapterTrainer, new_adapter
    train, val = open_states(good/"store").split(.2)
    t = HiddenAdapterTrainer(new_adapter(1, train.manifest, None, 0), train, val, head=train.head())
    (tmp/"last.pt").write_bytes(data)
    t.load_state(tmp/"last.pt")


def pair_of(name):
    return lambda tmp, good, data: (lambda p: load_pair(draft=p, target=p))(placed(tmp, good, "pair", name, data))
def store_of(name): return lambda tmp, good, data: all_of(open_states(placed(tmp, good, "store", name, data)))


READERS = {
    **{f"read_events {k}": own(k, read_events) for k in (".npy", ".npz", ".h5", ".txt", ".csv")},
    "open_states file": own(".pt", lambda p: all_of(open_states(p))), "open_states folder": study_folder,
    "open_states study index": study_index,
    **{f"open_states {k}": store_of(k) for k in ("manifest.json", "chunks/chunk_000000.json",
                                                 "chunks/chunk_000000.safetensors", "head.safetensors")},
    "load_any_adapter": own(".pt", load_any_adapter), "load_state": resumed,
    **{f"load_pretrained {k}": (lambda tmp, good, data, k=k: load_pretrained(placed(tmp, good, "adapter", k, data)))
       for k in ("config.json", "model.safetensors")},
    "Head.load": own(".safetensors", Head.load), "NGramTable.load": own(".safetensors", NGramTable.load),
    "read_answers .jsonl": own(".jsonl", read_answers), "read_answers .json": own(".json", read_answers),
    "read_answers skipping": own(".jsonl", lambda p: read_answers(p, skip_bad=True)),
    "read_log": own(".json", read_log), "read_json": own(".json", read_json), "read_timing": own(".json", read_timing),
    "read_questions": own(".txt", read_questions),
    "read_frame": own(".png", read_frame), "listing": listing, "tensor_shapes .bin": binary,
    "load_pair index": weights_index,
    **{f"load_pair {k}": pair_of(k) for k in ("config.json", "model.safetensors", "tokenizer.json")},
    **{f"read_video {k}": own(k, read_video) for k in (".mp4", ".avi", ".mkv")},
}
FINE = { # what is a sound file of another kind
    "load_pretrained config.json": {"json less deep", "json of paths", "json of lists", "json surrogate",
                                    "notebook"}, # sizes are read off the weights
    "read_json": {"json numbers", "json of paths", "json of lists", "json surrogate", "notebook",
                  "json endless number"},
}


def status(key): # KiB
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines()
                    if line.startswith(key + ":")).split()[1])


class bounded:
    "Inside, the process may map 1 GiB (or as given) more than now; after it, it must never have held 300 MiB more"
    def __init__(self, maps=2**30): self.maps = maps
    def __enter__(self):
        Path("/proc/self/clear_refs").write_text("5") # the peak starts anew
        self.old, self.rss = resource.getrlimit(resource.RLIMIT_AS), status("VmRSS")
        resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") * 2**10 + self.maps, self.old[1]))
    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_AS, self.old)
        grown = status("VmHWM") - self.rss
        assert grown < 300 * 2**10, f"{grown} KiB"


def refused(read, maps=2**30):
    "`read` ends in one of our errors, of one line; returns it, or None if it ended well"
    with bounded(maps):
        try: read()
        except (ValueError, OSError) as e:
            text = str(e)
            assert "\n" not in text and 10 < len(text) < 1300, text[:2000]
            # FFmpeg says so of what it refuses
            asked = ["memoryerror", "unable to allocate", "can't allocate", "out of memory",
                     "cannot allocate"][:4 if "not a video" in text else 5]
            assert not any(s in text.lower() for s in asked), text # asked for before it was checked
            return text
        finally: assert not CANARY.exists(), "something ran"
    return None


@pytest.fixture(scope="module", autouse=True)
def warm(good):
    "What a first use imports is no reader's memory"
    torch.set_num_threads(1)
    load_pair("pocket"), open_states(good/"store").head(), load_any_adapter(good/"adapter.pt"), load_pretrained(
        good/"adapter")
    yield
    CANARY.unlink(missing_ok=True)


def test_the_weapons_are_loaded(tmp_path):
    "Read by a reader that trusts them, they fire: the corpus tests something"
    for name in ("pt system", "pt eval", "pt in a state dict", "pt deep in lists", "pt object array", "pt legacy",
                 "npy system", "npy in a column", "pickle system"):
        f = io.BytesIO(CORPUS[name]())
        if name.startswith("pt"): torch.load(f, weights_only=False)
        elif name.startswith("npy"): np.load(f, allow_pickle=True)
        else: pickle.load(f)
        assert CANARY.exists(), name
        CANARY.unlink()


@pytest.mark.parametrize("name", CORPUS)
def test_every_reader_refuses_every_file(name, good, tmp_path):
    data = CORPUS[name]()
    for k, (reader, read) in enumerate(READERS.items()):
        if reader.startswith("read_events .h5"): pytest.importorskip("h5py")
        if reader.startswith("read_video"): pytest.importorskip("av")
        (tmp := tmp_path/str(k)).mkdir()
        said = refused(lambda: read(tmp, good, data))  # noqa: B023
        assert said is not None or name in FINE.get(reader, ()), f"{reader} took it"
        shutil.rmtree(tmp)


def test_the_corpus_is_large():
    print(f"\n{len(CORPUS)} hostile files, {len(READERS)} readers, {len(CORPUS) * len(READERS)} reads")
    assert len(CORPUS) >= 60 and len(READERS) >= 30


def test_a_huge_file_is_refused_unread(good, tmp_path):
    for reader, suffix in ((read_json, ".json"), (read_answers, ".json"), (read_timing, ".json"),
                           (NGramTable.load, ".safetensors"), (Head.load, ".safetensors"), (read_events, ".txt"),
                           (read_events, ".npy"), (load_any_adapter, ".pt"), (open_states, ".pt"),
                           (read_questions, ".txt")):
        path = tmp_path/f"huge{suffix}"
        path.touch()
        os.truncate(path, 2 * 2**30) # a hole: it takes no room on the disk
        assert refused(lambda: reader(path), 3 * 2**30), reader  # noqa: B023
        path.unlink()
    assert read_heartbeat(path) == {}


# ---- links and paths

def test_links_that_leave_the_folder(good, tmp_path):
    secret = tmp_path/"secret"
    secret.mkdir()
    for name in ("manifest.json", "head.safetensors", "chunks/chunk_000000.json", "chunks/chunk_000000.safetensors"):
        store = shutil.copytree(good/"store", tmp_path/"store")
        shutil.move(store/name, secret/Path(name).name)
        (store/name).symlink_to(secret/Path(name).name)
        assert "link that leaves" in refused(lambda: all_of(open_states(store))), name  # noqa: B023
        assert any("link that leaves" in v for _, v in verify_store(store)), name
        shutil.rmtree(store)


def test_a_writer_follows_no_link_out_of_its_folder(tmp_path):
    (tmp_path/"mine.txt").write_text("dear")
    (tmp_path/"elsewhere").mkdir()
    (tmp_path/"elsewhere/thesis.tmp").write_text("dear")
    for name, to in ((".lock", tmp_path/"mine.txt"), ("chunks", tmp_path/"elsewhere")):
        store = tmp_path/f"store{name}"
        store.mkdir()
        (store/name).symlink_to(to)
        assert refused(lambda: StoreWriter(store, {"target_dim": 4, "draft_dim": 4}))  # noqa: B023
    assert (tmp_path/"mine.txt").read_text() == "dear" and (tmp_path/"elsewhere/thesis.tmp").read_text() == "dear"


def test_claims_and_timings_follow_no_link(tmp_path):
    from featsd.base.processes import Claims, Launch
    from featsd.extract import log_chunk
    (tmp_path/"mine").write_text("dear")
    for name in (".claims", "timings.jsonl"): (tmp_path/name).symlink_to(tmp_path/"mine")
    with pytest.raises(OSError, match=".claims"): Claims(tmp_path, Launch(0, 2, 0, 2, "g"), [(0, 4)], lambda *_: False)
    log_chunk(tmp_path, 0, 4, 1., 1.)
    assert (tmp_path/"mine").read_text() == "dear"


@pytest.mark.parametrize("bad", ["../x.pt", "/etc/passwd", "..\\x", "a/b", ".hidden", "a\0b", "a\nb", ""])
def test_names_that_become_files(bad, tmp_path):
    from featsd.base.core import safe_name
    from featsd.extract import extract
    assert refused(lambda: safe_name(bad, "checkpoint_name"))
    if bad: assert refused(lambda: extract(tmp_path/"out", split=bad)) and not (tmp_path/"out").exists()


def test_a_pair_that_names_code(good, tmp_path):
    "auto_map, kernels, quantisation with its own loader, a weight index that climbs: refused or without effect"
    for k, change in enumerate((dict(attn_implementation="evil/kernel"), dict(_attn_implementation="evil/kernel"),
                                dict(quantization_config={"quant_method": "gptq"}), dict(num_hidden_layers=10**9),
                                dict(num_hidden_layers=1024), dict(hidden_size=2**20), dict(vocab_size=2**22),
                                dict(intermediate_size=2**23), dict(num_attention_heads=7),
                                dict(sensor="__import__('os')"), dict(sensor=[]),
                                dict(rope_scaling={"rope_type": "evil"}), dict(hidden_act="os.system"),
                                dict(rms_norm_eps="x"), dict(model_type=["featsd_pocket"]))):
        root = shutil.copytree(good/"pair", tmp_path/str(k))
        write_json(root/"config.json", read_json(root/"config.json") | change)
        assert refused(lambda: load_pair(draft=root, target=root)), change  # noqa: B023
    (root/"evil.py").write_text(f"open({str(CANARY)!r}, 'w')")
    write_json(root/"config.json", read_json(good/"pair/config.json") |
               dict(auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}))
    refused(lambda: load_pair(draft=root, target=root))


# ---- what is shown

def log_of(folder, text):
    from featsd.data.answers import Answers
    n = 12
    ids = [np.array([1, 2, 3 + k % 2, 4]) for k in range(n)]
    write_answers(folder/"log.jsonl", Answers([f"c{k}{text}" for k in range(n)], [f"q{k % 3}{text}" for k in range(n)],
                                              ids, ids, [text] * n, [text] * n))
    return folder/"log.jsonl"


def test_answers_that_hold_html_are_shown_as_text(tmp_path, capsys):
    log = log_of(tmp_path, SCRIPT + "\x1b[2J</pre><img src=x onerror=alert(1)>")
    run_replay(log, out=tmp_path/"out", gammas=[3], nodes=[4], order=3)
    page = (tmp_path/"out/replay.html").read_text()
    assert SCRIPT not in page and "<img src=x" not in page and "</script>alert" not in page
    assert "\x1b[2J" not in capsys.readouterr().out


def test_pages_escape_text_and_figures(tmp_path):
    from featsd.base.figures import Chart, Panel, Series
    from featsd.base.page import Figure, Page
    evil = f"{SCRIPT}</pre><img src=x onerror=alert(1)>"
    chart = Chart(evil, [Panel(evil, [Series(evil, [1, 2], [1., 2.], text=[evil, evil])], evil, evil)])
    Page(evil, evil, [evil, Figure(chart, evil), Figure(chart.plotly(), evil)]).save(tmp_path/"p.html")
    page = (tmp_path/"p.html").read_text()
    assert SCRIPT not in page and "<img src=x" not in page


def test_terminal_codes_do_not_reach_the_terminal(tmp_path, capsys):
    (tmp_path/"m.json").write_text(json.dumps({"\x1b[2Jkey\nname": 1}))
    with pytest.raises(SystemExit) as e:
        commands.featsd_timeline(timing=str(tmp_path/"m.json"), output_dir=str(tmp_path/"o"))
    err = capsys.readouterr().err
    assert e.value.code == 2 and "\x1b" not in err and err.count("\n") == 1


# ---- through the commands

def cli(fn, capsys, **kw):
    with pytest.raises(SystemExit) as e, bounded():
        fn(**{k: str(v) if isinstance(v, Path) else v for k, v in kw.items()})
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith(f"{fn.__name__}: ") and err.count(
        "\n") == 1 and "Traceback" not in err and not CANARY.exists(), err
    return err


@pytest.mark.parametrize("name", ["pt system", "pt in a state dict", "pt bytes", "pt compressed bomb", "pt legacy",
                                  "npy system", "npz bomb", "tensors huge shape", "json deep", "json endless number",
                                  "html", "nothing"])
def test_commands(name, good, tmp_path, capsys):
    evil = tmp_path/"evil.pt"
    evil.write_bytes(CORPUS[name]())
    cli(commands.featsd_train, capsys, train_data=evil, output_dir=tmp_path/"o", progress=False)
    cli(commands.featsd_measure, capsys, checkpoint=evil, test_data=good/"store", output_dir=tmp_path/"o")
    cli(commands.featsd_measure, capsys, checkpoint=good/"adapter.pt", test_data=evil, output_dir=tmp_path/"o")
    cli(commands.featsd_replay, capsys, answers=evil)
    cli(commands.featsd_timeline, capsys, timing=evil, output_dir=tmp_path/"o")
    cli(commands.featsd_extract, capsys, pair=f"draft={evil},target={evil}", quant="fp32", output_dir=tmp_path/"o")
    cli(commands.featsd_extract, capsys, dataset_dir=evil, output_dir=tmp_path/"o")
    cli(commands.featsd_decode, capsys, adapter=evil, drafter="aligned")


@pytest.mark.parametrize("args", [["featsd_train", "--train_data"], ["featsd_replay", "--answers"],
                                  ["featsd_timeline", "--timing"]], ids=lambda a: a[0])
def test_commands_as_a_user_runs_them(args, tmp_path):
    evil = tmp_path/"evil.pt"
    evil.write_bytes(CORPUS["pt system"]())
    (tmp_path/"run.py").write_text(f"from featsd.commands import {args[0]}\n{args[0]}()\n")
    r = subprocess.run([sys.executable, tmp_path/"run.py", args[1], evil], capture_output=True, text=True, cwd=tmp_path,
                       timeout=HANG, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert r.returncode == 2 and r.stderr.count(
        "\n") == 1 and "Traceback" not in r.stderr and not CANARY.exists(), r.stderr


def test_our_errors_are_one_line_whatever_they_quote():
    e = FeatsdError(f"a\nb\r\x1b[2J\u2028{'x' * 10**6}")
    assert len(str(e)) < 1100 and str(e).isprintable()
    assert chunk_file("s", 3).name == "chunk_000003.safetensors" and make_head().hash
