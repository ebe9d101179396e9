"No test writes into its user's home"
import os
import tempfile

import pytest

if "FEATSD_HOME" not in os.environ: # also for the commands that tests start
    kept = tempfile.TemporaryDirectory(prefix="featsd_home_")
    os.environ["FEATSD_HOME"] = kept.name

if "PYTEST_XDIST_WORKER" in os.environ: # a worker for each core: more threads than that wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "Neighbours go to one worker: what a module prepares for its tests is prepared once"
    if config.getvalue("dist") == "load":
        from xdist.scheduler import WorkStealingScheduling
        return WorkStealingScheduling(config, log)


@pytest.fixture(scope="module")
def slow_pair():
    "The built-in pair on the library's forward"
    import torch

    from featsd.models.backbone import load_pair
    torch.set_num_threads(1)
    return load_pair("pocket")


@pytest.fixture(scope="module")
def pair(slow_pair):
    "The same, lean"
    from featsd.models.lean import lean
    return lean(slow_pair)
