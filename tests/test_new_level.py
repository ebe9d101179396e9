"""A level of one's own is one class: made, saved, found again, trained, listed and decoded with as the others are"""
import json

import pytest
import torch
from closeness import near
from test_train import D, make_store
from torch import nn

import featsd.adapters as A
from featsd.adapters import Adapter, create_adapter, load_any_adapter
from featsd.base.core import FeatsdError, read_json
from featsd.data.clips import open_clips
from featsd.decode import encode_prompt, plain_decode, speculative_decode
from featsd.drafters import AlignedDraft
from featsd.models.backbone import load_pair
from featsd.train import comparison_table, train_adapter, train_levels


@pytest.fixture(params=[False, True], ids=["one position", "looks back"])
def toy(request):
    "A level that is known while the test runs"
    class Toy(Adapter):
        "A low-rank correction; where it looks back, of the mean of all states so far"
        level, looks_back = "toy", request.param

        def __init__(self, hidden_dim=4096, rank=4, scale=.5, **common):
            super().__init__(hidden_dim, **common, rank=rank, scale=scale)
            self.into, self.out = nn.Linear(hidden_dim, rank), nn.Linear(rank, hidden_dim)

        @classmethod
        def recognise(cls, shapes):
            if "into.weight" in shapes: return dict(hidden_dim=shapes["into.weight"][1], rank=shapes["into.weight"][0])

        @classmethod
        def defaults(cls, width): return super().defaults(width) | dict(rank=width // 2)

        def mean(self, h, past=None): # states so far, in one piece
            h = h if past is None else torch.cat([past, h], -2)
            return h.cumsum(-2) / torch.arange(1, h.shape[-2] + 1)[:, None], h

        def map(self, h, m): return self.skip(h) + self.config["scale"] * self.out(self.into(m).tanh())
        def align(self, h, mask=None): return self.map(h, self.mean(h)[0] if self.looks_back else h)

        def step(self, h, cache=None):
            if not self.looks_back: return super().step(h, cache)
            m, seen = self.mean(self.enter(h), cache)
            return self.finish(self.map(h, m[..., -h.shape[-2]:, :])), seen

        def crop(self, cache, n): return None if cache is None else cache[..., :n, :]
    yield Toy
    del A.LEVELS["toy"]


def test_it_is_made_by_its_name_and_its_errors_name_what_it_takes(toy):
    f = create_adapter("toy", D, rank=3)
    assert type(f) is toy and f.label == "toy" and f.adapter_type == "toy_Toy" and f.config["rank"] == 3
    assert type(toy.from_config(f.config)) is toy and toy.from_config(f.config).config == f.config
    with pytest.raises(ValueError, match="expected one of 1, 2, 3, 4, .*toy"): create_adapter("joke")
    with pytest.raises(ValueError, match=r"Toy \(toy\) takes no num_heads; it takes .*rank"):
        create_adapter("toy", D, num_heads=2)
    with pytest.raises(ValueError, match="adapter level 'toy' is taken by Toy"):
        class Other(Adapter): level = "toy"
    assert A.LEVELS["toy"] is toy


def test_it_comes_back_from_its_files(toy, tmp_path):
    f, h = create_adapter("toy", D, target_dim=20, rank=3, scale=.25, head_hash="e" * 64).eval(), torch.randn(2, 5, D)
    f.save_checkpoint(tmp_path/"a.pt")
    f.save_pretrained(tmp_path/"hub")
    for g in (load_any_adapter(tmp_path/"a.pt")[0], load_any_adapter(tmp_path/"hub")[0],
              Adapter.from_pretrained(tmp_path/"hub")):
        assert type(g) is toy and g.config == f.config and torch.equal(g(h), f(h))
    assert json.loads((tmp_path/"hub"/"config.json").read_text())["adapter_type"] == "toy_Toy"
    with pytest.raises(ValueError, match="a Toy .toy., expected a AttentionAdapter .L4."):
        A.AttentionAdapter.load_checkpoint(tmp_path/"a.pt")
    create_adapter(2, D, bottleneck_dim=8).save_checkpoint(tmp_path/"b.pt")
    assert load_any_adapter(tmp_path/"b.pt")[0].level == 2
    torch.save(torch.load(tmp_path/"b.pt") | {"adapter_type": "toy_Toy", "config": {}}, tmp_path/"lie.pt")
    with pytest.raises(ValueError, match="says level 'toy' over weights that say 2"):
        load_any_adapter(tmp_path/"lie.pt")


def test_it_is_in_the_table_of_levels(toy):
    rows = A.adapter_summary(64, runs=1)
    assert [r["level"] for r in rows] == [1, 2, 3, 4, "toy"]
    last, _ = A.format_summary(rows).splitlines()[-2:]
    assert last.split()[:3] == ["toy", "Toy", f"{create_adapter('toy', 64).get_num_parameters():,}"]


def test_it_is_trained_as_the_others_are(toy, tmp_path, monkeypatch, capsys):
    store, quick = make_store(tmp_path/"s"), dict(num_epochs=4, progress=False, val_split=.2, loss="kl")
    r = train_adapter(store, adapter_level="toy", output_dir=tmp_path/"runs", **quick)
    assert r["level"] == "toy" and r["history"]["val_loss"][-1] < r["history"]["val_loss"][0]
    best, config = load_any_adapter(r["best_model"])[0], read_json(f"{r['folder']}/config.json")
    assert type(best) is toy and best.config["rank"] == D // 2 and config["task"] == "train_toy_Toy"
    assert config["training"]["batch_size"] == 32 and (tmp_path/"runs").glob("toy_*")
    assert train_adapter(store, adapter_level="toy", output_dir=tmp_path/"runs", resume=True, **quick) == r
    both = train_levels(store, levels=["toy", 1], rank=2, bottleneck_dim=8, output_dir=tmp_path/"two", **quick)
    assert [load_any_adapter(x["best_model"])[0].config.get("rank") for x in both] == [2, None]
    assert [line.split()[0] for line in str(comparison_table(both)).splitlines()[2:4]] == ["toy", "L1"]
    from featsd.commands import featsd_train
    featsd_train(str(store), adapter_level="toy", num_epochs=1, output_dir=str(tmp_path/"cli"), progress=False)
    assert "toy" in capsys.readouterr().out and len(list((tmp_path/"cli").glob("toy_*"))) == 1
    with pytest.raises(FeatsdError, match="found a setting 'learning_rates', expected one of .*rank"):
        train_adapter(store, adapter_level="toy", output_dir=tmp_path/"no", learning_rates=1)
    assert not (tmp_path/"no").exists()


def test_it_drafts_and_changes_no_token(toy):
    pair = load_pair("pocket")
    clips = open_clips("pocket", "test", 1)
    prompt = encode_prompt(pair, clips[0], clips.questions[0])
    adapter = create_adapter("toy", pair.draft.head.hidden_size, pair.target.head.hidden_size).eval()
    drafter = AlignedDraft(pair.draft, pair.target.head, adapter, pair.shared_vocab)
    want = plain_decode(pair.target, prompt, max_new_tokens=24)
    assert speculative_decode(pair.target, drafter, prompt, gamma=4, max_new_tokens=24).ids == want.ids
    h = torch.randn(1, 6, adapter.hidden_dim)
    near(adapter.folded(pair.target.head)(h[0, :1]), pair.target.head.logits(adapter(h[:, :1])[0]), 2 * h.shape[-1])
