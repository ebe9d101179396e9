"Two models at once: the law whatever the order of messages, plain decoding's ids, a second process that dies or hangs"
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from closeness import near
from patience import HANG, gone, until
from test_decode import EXACT, PATHS, TableDraft, TableTarget, distance, own_law

from featsd.asynchronous import (
    Coupled, Duty, Pace, Partner, Scribe, SharedNoise, ask_settings, asked_sampling, serve, speculative_decode_async)
from featsd.base.core import FeatsdError
from featsd.base.wire import (
    Host, Link, Message, decode_message, encode_message, find_store, join_host, listen, open_store)
from featsd.decode import (
    Cosine, Draft, EveryChoice, Greedy, Prompt, Sampled, Sampling, exact_law, plain_decode)

HERE = Path(__file__).parent
ASKED = Prompt(SimpleNamespace(clip_id="clip"), question="what?")


class Eager(Pace):
    "Takes what is there: which tokens are verified is the schedule's choice alone"
    def choose(self, have): return min(have, self.gamma)


class Moody(Duty):
    "Asks the other side, or does not, for no reason"
    def __init__(self, rng): self.on, self.rng = rng.random() < .5, rng
    def took(self, *_):
        change = self.rng.random() < .4
        self.on ^= change
        return change


class Wire:
    "Both ends in one process; `script` says how many steps the drafter does before each look, `order` what becomes of messages"
    def __init__(self, scribe, script, order=None):
        self.scribe, self.script, self.order = scribe, deque(script), order or (lambda new, old: new)
        self.dead, self.fresh, self.old, self.link = "", [], [], self
    def send(self, m): self.scribe.hear(m)
    def poll(self):
        for _ in range(self.script.popleft() if self.script else 0):
            if m := self.scribe.work(): self.fresh.append(m)
        out, self.old, self.fresh = self.order(self.fresh, self.old), self.old + self.fresh, []
        return out
    def wait(self, seconds): return False


class Twice(Scribe):
    "Hears everything twice, what stands also once more when it is old"
    kept = ()
    def hear(self, m):
        for x in (m, m, *self.kept): super().hear(x)
        self.kept = [x for x in (*self.kept, m) if x.kind == "stand"][-2:]


ORDERS = {"as it is": None, "backwards": lambda new, old: new[::-1], "twice": lambda new, old: old + new + new,
          "one look late": lambda new, old: old[-2:], "the last is lost": lambda new, old: new[:-1]}


class EveryWord(EveryChoice):
    "The target's draws, each outcome in turn; a drafter's own come from elsewhere and are whatever they are"
    at = 0
    def draw(self, law):
        self.at += 1
        return super().draw(law)


class Fickle(TableDraft):
    "Drafts anything, and for a word of its choice falls silent"
    def __init__(self, table, rng): self.table, self.rng = table, rng
    def propose(self, gamma):
        token = self.rng.randrange(self.table.V)
        return Draft([] if token == 2 and self.rng.random() < .5 else [token])


def async_law(target, script, order=None, L=3, scribe=Scribe, warp=(1., 0, 1.), mood=None):
    def run(sampling):
        sampling.at = 0
        side = scribe([Fickle(target, random.Random(7))], lambda key: ASKED, target.eos_ids)
        partner = Partner(Wire(side, script, order))
        partner.pace = Eager(partner.gamma)
        if mood is not None: partner.duty = Moody(random.Random(mood))
        return speculative_decode_async(target, partner, ASKED, Coupled(sampling), L).ids
    return exact_law(run, EveryWord(*warp))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scribe", [Scribe, Twice])
@pytest.mark.parametrize("warp,eos", [((1., 0, 1.), None), ((.7, 2, 1.), 1)])
def test_the_law_is_the_targets_whatever_the_schedule(order, scribe, warp, eos):
    "Every interleaving of up to three drafter steps before each of the target's looks, under every order of messages"
    target = TableTarget(5, eos=eos)
    want = own_law(target, EveryChoice(*warp), 3)
    for script in product((0, 1, 3), repeat=3):
        law = async_law(target, (1, *script), ORDERS[order], scribe=scribe, warp=warp)
        near(sum(law.values()), 1., PATHS, torch.float64)
        assert distance(law, want) <= EXACT, script


def test_an_order_that_reads_the_words_cannot_change_the_law():
    "The adversary: it lets a draft through only where the draft says what it likes"
    target = TableTarget(5)
    for word in range(3):
        law = async_law(target, (3, 3, 3), lambda new, old, word=word: [m for m in new if m.ids != [word]])
        assert distance(law, own_law(target, EveryChoice(), 3)) <= EXACT


@pytest.mark.parametrize("mood", range(4))
def test_whether_it_is_asked_cannot_change_the_law(mood):
    target = TableTarget(5)
    law = async_law(target, (1, 3, 1), mood=mood)
    assert distance(law, own_law(target, EveryChoice(), 3)) <= EXACT


def test_a_rule_that_lets_drafts_decide_is_caught(monkeypatch):
    "The mutant: a draft stands where the noise is kind, whatever the target says"
    def accept(self, p, draft, h=None):
        said = [self.sampling.draw(p[0])]
        return (1, self.sampling.draw(p[1])) if draft.ids and draft.ids[0] >= said[0] else (0, said[0])
    monkeypatch.setattr(Coupled, "accept", accept)
    target = TableTarget(5)
    assert distance(async_law(target, (3, 3, 3)), own_law(target, EveryChoice(), 3)) > .01


def test_the_same_noise_gives_the_same_answer_with_and_without_drafts():
    "Sampled ids do not know whether anybody drafted, nor how well; a good draft is mostly taken"
    class Sampler(TableDraft):
        def propose(self, gamma): return Draft([self.sampling.draw(self.sampling.law(self.table.logits(self.ids)))])
    accepted = tried = 0
    for n in range(60):
        target, rule = TableTarget(n, 5), lambda n=n: Coupled(SharedNoise(.9, seed=n, at=100))
        alone = speculative_decode_async(target, Partner(SimpleNamespace(link=None)), ASKED, rule(), 12).ids
        assert alone == plain_decode(target, ASKED, rule(), 12).ids
        for table in (target, TableTarget(n + 1, 5)):
            partner = Partner(Wire(Scribe([Sampler(table)], lambda key: ASKED, ()), [4] * 99))
            partner.pace = Eager(partner.gamma)
            got = speculative_decode_async(target, partner, ASKED, rule(), 12)
            assert got.ids == alone
            if table is target: accepted, tried = accepted + sum(got.accepted), tried + sum(got.drafted)
    assert accepted == tried > 0 # the same law and noise: the same words


def plain(target, L, state=None):
    ids = []
    while len(ids) < L and (not ids or ids[-1] not in target.eos_ids): ids.append(int(target.logits(ids).argmax()))
    return ids


def test_any_schedule_gives_plain_decodings_ids():
    "Two thousand random schedules, orders, losses and lies"
    rng, V = random.Random(0), 5
    for n in range(2000):
        target, table = TableTarget(n, V, eos=4 if n % 3 else None), TableTarget(n + n % 2, V)
        class Greedily(TableDraft):
            def propose(self, gamma):
                return Draft([] if rng.random() < .1 else [int(self.table.logits(self.ids).argmax())])
        def order(new, old):
            some = new + [m for m in old if rng.random() < .2]
            rng.shuffle(some)
            return [m for m in some if rng.random() < .9]
        scribe = (Scribe, Twice)[n % 2]([Greedily(table)], lambda key: ASKED, target.eos_ids)
        wire = Wire(scribe, [rng.choice((0, 0, 1, 2, 5, 20)) for _ in range(60)], order)
        partner = Partner(wire, gamma=rng.choice((1, 3, 15)))
        if n % 4: partner.pace = Eager(partner.gamma)
        if n % 5 == 0: partner.duty = Moody(rng)
        got = speculative_decode_async(target, partner, ASKED, Greedy(), 12)
        assert got.ids == plain(target, 12), n
        assert sum(got.accepted) == sum(got.from_draft) or got.ids[-1] in target.eos_ids
        assert len(got.drafted) == len(got.blocks) == got.cycles


def test_a_drafter_behind_the_text_catches_up():
    "What stands in several messages, out of order, is put together; the drafter turns back once"
    target = TableTarget(3, 5)
    side = Scribe([TableDraft(TableTarget(3, 5), certain=True)], lambda key: ASKED, ())
    side.hear(Message("ask", 1, 0, 7, ask_settings(Coupled(SharedNoise()), 40, 20)))
    words = plain(target, 40)
    for at in (20, 10, 0, 10): side.hear(Message("stand", 1, position=at, ids=words[at:at + 10]))
    assert side.stands == words[:30] == side.text and side.branch == 1
    assert side.work().kind == "ready" and side.work().ids == words[30:31]
    side.hear(Message("stand", 1, position=30, ids=words[30:32]))
    assert side.text == words[:32] and side.branch == 2
    side.hear(Message("stand", 0, position=32, ids=[0, 0])) # of an older answer
    assert side.text == words[:32]


def test_pace_learns_what_to_verify():
    good, bad = Pace(15), Pace(15)
    for _ in range(200):
        for p, n in ((good, 8), (bad, 0)): p.verified(8, n, 10. + .4 * 8), p.verified(0, 0, 10.)
    assert [good.choose(k) for k in (0, 2, 15, 40)] == [0, 2, 15, 15]
    assert bad.choose(0) == bad.choose(8) == 0
    assert abs(good.verify_ms(4) - 11.6) < .1 and Pace(5).choose(3) == 3
    for pace, ahead in ((good, 32), (bad, 4)): # who is never right writes little
        partner = Partner(SimpleNamespace(link=None))
        partner.pace = pace
        partner.ask(7, Greedy(), 50)
        assert partner.asked.ids[:2] == [50, ahead], pace.alpha


def test_who_is_not_worth_its_way_is_not_asked():
    "A token with it takes 11, alone 10: it is asked seldom, ever more seldom; when it takes 4, always"
    duty, on = Duty(), []
    for _ in range(4000):
        on.append(duty.on)
        duty.took(1, 11. if duty.on else 10., 10.)
    assert sum(on[:1000]) < 200 and sum(on[2000:]) < 100
    duty, on = Duty(), []
    for _ in range(400):
        on.append(duty.on)
        duty.took(1, 4., 10.)
    assert all(on)
    for _ in range(3000):
        on.append(duty.on)
        duty.took(1, 8. if duty.on else 10., 10.)
    assert sum(on[-2000:]) > 1900


class Right(TableDraft):
    def propose(self, gamma): return Draft([int(self.table.logits(self.ids).argmax())])


@pytest.mark.parametrize("wrong_at, told", [
    ((), [0, 8, 16, 24, 32]), ((10,), [0, 8, 11, 19, 27])])
def test_a_side_that_wrote_the_same_is_seldom_told(wrong_at, told):
    "A correction goes at once, what stands of its own words every eighth token: behind a side that is ahead"
    class But(Right):
        def propose(self, gamma):
            (x,) = super().propose(gamma).ids
            return Draft([(x + 1) % 3 if len(self.ids) in wrong_at else x])
    target, heard = TableTarget(3, 5), []
    wire = Wire(Scribe([But(TableTarget(3, 5))], lambda key: ASKED, ()), [40] * 99)
    send = wire.send
    wire.send = lambda m: (heard.append((m.position, len(m.ids))) if m.kind == "stand" else None, send(m))
    partner = Partner(wire, gamma=1)
    partner.pace.choose = lambda have: min(have, 1)
    got = speculative_decode_async(target, partner, ASKED, Greedy(), 40)
    assert got.ids == plain_decode(target, ASKED, max_new_tokens=40).ids and [p for p, _ in heard] == told
    assert all(a + n == b for (a, n), (b, _) in zip(heard, heard[1:]))


def test_what_was_not_asked_is_asked_again_when_it_comes_back():
    "Another life, or a word after a silence; the hook that gives the other core away hears of every turn"
    target, side = TableTarget(2, 5), Scribe([Right(TableTarget(2, 5))], lambda key: ASKED, ())
    class Once(Duty):
        "Gives up after twenty cycles"
        cycles = 0
        def took(self, *_):
            self.cycles += 1
            if self.cycles == 20: self.on = False
            return self.cycles == 20
    wire, took = Wire(side, []), []
    partner = Partner(wire, alone=took.append)
    partner.duty = Once()
    decode = lambda: speculative_decode_async(target, partner, ASKED, Greedy(), 40)
    ids = decode().ids
    assert not partner.duty.on and partner.silent and took == [False, True]
    assert decode().ids == ids and took[-1] and side.answer == 1 # it was not asked
    wire.fresh.append(Message("draft", 1, 0, 0, [1]))
    assert decode().ids == ids and partner.duty.on and not took[-1] and side.answer == partner.answer
    partner.duty.on, partner.host = False, Wire(side, [5] * 99) # another life
    got = decode()
    assert got.ids == ids and partner.duty.on and sum(got.accepted) > 0


def test_settings_cross_the_wire():
    s = SharedNoise(.7, 40, .9, 5, 77)
    got = asked_sampling(decode_message(encode_message(Message("ask", ids=ask_settings(Coupled(s), 50, 32))), 10).ids)
    assert (got.top_k, round(got.temperature, 6), round(got.top_p, 6), got.seed, got.at) == (40, .7, .9, 5, 77)
    assert asked_sampling(ask_settings(Greedy(), 50, 32)) is None
    for rule in (Cosine(.9), Sampled(Sampling())):
        with pytest.raises(FeatsdError, match="in turn"):
            speculative_decode_async(TableTarget(1), Partner(SimpleNamespace(link=None)), ASKED, rule)
    with pytest.raises(FeatsdError, match="1 ≤ gamma < ahead"): Partner(None, gamma=0)


def test_alone_it_is_plain_decoding():
    "No second process: the answer is complete, and says nothing"
    target = TableTarget(2, 5)
    assert speculative_decode_async(target, Partner(SimpleNamespace(link=None)), ASKED, Greedy(), 20).ids == plain(target, 20)


# ---- a second process that dies, hangs, returns; and one whose target dies

ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                    "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))}


def server(*args): return [sys.executable, str(HERE/"async_server.py"), *map(str, args)]


@pytest.mark.parametrize("n", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_the_answer_goes_on_whatever_becomes_of_the_drafting_process(n):
    r = subprocess.run(server("disturb", n, n), env=ENV, capture_output=True, text=True, timeout=HANG)
    assert r.returncode == 0, r.stdout[-1000:] + r.stderr[-4000:]
    got = json.loads(r.stdout.splitlines()[-1])
    print(", ".join(f"{v} {k}" for k, v in got.items()))
    assert got["identical"] == got["answers"] > 0 and got["killed"] + got["stopped"] >= n
    assert 1 < got["lives"] <= got["killed"] + 1 + got["lost"] and got["drafted"] > 0 # it came back, and was used
    assert "Traceback" not in r.stderr, r.stderr[-2000:]
    assert r.stderr.count("goes on without it") <= got["killed"] + got["stopped"]


@pytest.mark.parametrize("n", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_nothing_is_left_when_the_target_is_killed(n):
    rng = random.Random(n)
    for i in range(n):
        p = subprocess.Popen(server("run", 0, i), env=ENV, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        pids = [int(x) for x in p.stdout.readline().split()[1:]]
        assert len(pids) == 2
        if i % 2: os.kill(pids[1], 19) # stopped: it ends all the same
        end = time.monotonic() + rng.random()
        until(lambda end=end: time.monotonic() > end)
        p.kill()
        p.wait()
        for pid in pids: until(lambda pid=pid: gone(pid))


@pytest.mark.parametrize("n", [2, 3])
def test_two_processes_of_a_launcher_are_target_and_drafter(n):
    command = [str(Path(sys.executable).parent/"torchrun"), "--nproc_per_node", str(n), *server("calm", 0, 0)[1:]]
    r = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=HANG)
    if n == 2:
        assert r.returncode == 0, r.stderr[-4000:]
        got = json.loads(r.stdout.splitlines()[-1])
        assert got["identical"] == got["answers"] == 4 and got["drafted"] > 0 and got["lost"] == 0
    else: assert r.returncode and "3 processes: two models at once are two" in r.stderr, r.stderr[-4000:]


@pytest.mark.parametrize("slow", [(0., 0.), (1e5, 0.)])
@pytest.mark.parametrize("early", [True, False])
def test_a_good_bye_is_heard_although_the_connection_closes_behind_it(slow, early):
    "Then nobody looks for another life of a target that has ended"
    ends = tcp_pair()
    ends[0].slow(*slow)
    if early: ends[0].close()
    else: threading.Timer(.05, ends[0].close).start()
    serve(Scribe([], lambda key: ASKED, ()), ends[1], HANG)
    assert ends[1].dead == "good-bye"
    ends[1].close()


def tcp_pair():
    door = listen()
    far = socket.create_connection(door.getsockname())
    near = door.accept()[0]
    door.close()
    return Link(near, 9), Link(far, 9)


def test_what_has_come_is_there_although_python_never_lets_go():
    "A busy thread that keeps the interpreter finds its mail: nothing of Python's has to run to put it there"
    store, port = open_store()
    who, words = {"vocabulary": 9}, [[1, 2], [3], [4, 5, 6]]
    if (pid := os.fork()) == 0:
        with suppress(BaseException):
            link = join_host(find_store("127.0.0.1", port), who)
            link.wait(HANG)
            for ids in words: link.send(Message("draft", ids=ids))
            link.wait(HANG)
        os._exit(0)
    host = Host(store, who)
    until(lambda: host.link is not None)
    link, found, before, end = host.link, [], sys.getswitchinterval(), time.monotonic() + HANG
    try:
        sys.setswitchinterval(2 * HANG)
        link.send(Message("ask"))
        while len(found) < len(words) and time.monotonic() < end: found += link.poll()
    finally: sys.setswitchinterval(before)
    host.close()
    os.waitpid(pid, 0)
    assert [m.ids for m in found] == words
