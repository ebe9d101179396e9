"No test writes into its user's home"
import os
import tempfile

if "FEATSD_HOME" not in os.environ: # also for the commands that tests start
    kept = tempfile.TemporaryDirectory(prefix="featsd_home_")
    os.environ["FEATSD_HOME"] = kept.name

if "PYTEST_XDIST_WORKER" in os.environ: # a worker for each core: more threads than that wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
