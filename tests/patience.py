"Waiting for an event, however slow the machine: only what hangs for good fails"
import os
import time
from pathlib import Path

HANG = 1800 # seconds after which something counts as hung


def until(happened):
    "Wait for it; what it gives"
    stop = time.monotonic() + HANG
    while not (found := happened()):
        assert time.monotonic() < stop, "it never came"
        time.sleep(.01)
    return found


def gone(pid)->bool:
    "No such process, or one that is dead and not yet buried"
    try: os.kill(pid, 0)
    except ProcessLookupError: return True
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError: return False
