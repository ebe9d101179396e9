"No test writes into its user's home"
import os
import tempfile

if "FEATSD_HOME" not in os.environ: # also for the commands that tests start
    kept = tempfile.TemporaryDirectory(prefix="featsd_home_")
    os.environ["FEATSD_HOME"] = kept.name
