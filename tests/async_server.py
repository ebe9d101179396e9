"A target whose drafting process is killed, stopped and woken at random; or that decodes until it is killed itself"
import json
import random
import sys
import threading
import time

import psutil
import torch

from featsd.asynchronous import Partner, drafting_process, key_of, speculative_decode_async
from featsd.data.clips import open_clips
from featsd.decode import OracleDraft, encode_prompt, plain_decode
from featsd.models.backbone import load_pair
from featsd.models.lean import lean


def below(pid): # the process that drafts: a child of the nurse
    try: return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess: return []


def disturb(nurse, n, rng, done):
    "Kill the drafting process, or stop it for a while; `n` times, at random instants"
    while sum(done.values()) < n:
        time.sleep(rng.uniform(0, .12))
        if not (alive := below(nurse)): continue
        try:
            if rng.random() < .5: alive[0].kill(); done["killed"] += 1
            else:
                alive[0].suspend()
                time.sleep(rng.uniform(0, .3))
                alive[0].resume()
                done["stopped"] += 1
        except psutil.NoSuchProcess: pass


def main(what, n, seed):
    torch.set_num_threads(1)
    pair, rng = lean(load_pair("pocket", quant="fp32")), random.Random(seed)
    clips = open_clips("pocket", "test", 2)
    prompts = [encode_prompt(pair, clips[i], q) for i in range(2) for q in clips.questions[:2]]
    answers = [plain_decode(pair.target, p).ids for p in prompts]
    class Known(OracleDraft):
        "The oracle, told the answers before"
        def start(self, prompt, sampling=None):
            self.answer = answers[[*map(key_of, prompts)].index(key_of(prompt))]
            super().start(prompt, sampling)
    drafters = {"known": Known(pair.target)}
    with drafting_process(pair, drafters, prompts) as host, torch.inference_mode():
        partner = Partner(host).heard()
        print("ready", host.nurse, *[p.pid for p in below(host.nurse)], flush=True)
        done, count = {"killed": 0, "stopped": 0}, {"answers": 0, "identical": 0, "drafted": 0}
        t = threading.Thread(target=disturb, args=(host.nurse, n, rng, done), daemon=True)
        if what == "disturb": t.start()
        calm = 0 # answers after the last disturbance: the drafter is used again
        while what == "run" or t.is_alive() or calm < 4:
            i = count["answers"] % len(prompts)
            if not t.is_alive(): Partner(host).heard(); calm += 1
            got = speculative_decode_async(pair.target, partner, prompts[i])
            count["answers"] += 1
            count["identical"] += got.ids == answers[i]
            if calm: count["drafted"] += sum(got.drafted)
        print(json.dumps(count | done | {"lives": host.lives, "lost": partner.lost}), flush=True)


if __name__ == "__main__": main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
