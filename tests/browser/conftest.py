"JupyterLab on the loopback address and Debian's Chromium; skipped, saying so, where either is missing"
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def chromium():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found: pytest.skip("no chromium on PATH: apt-get install chromium")
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]) # a container has no user namespaces
        yield browser
        browser.close()


@pytest.fixture
def shots(tmp_path):
    "Where pictures go: FEATSD_SCREENSHOTS, or the test's own folder"
    folder = Path(os.environ.get("FEATSD_SCREENSHOTS") or tmp_path/"screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def lab(chromium, tmp_path_factory):
    "(address, token, folder that it serves)"
    pytest.importorskip("jupyterlab", reason="jupyterlab is not installed: pip install -e '.[dev]'")
    home = tmp_path_factory.mktemp("lab")
    for name in ("config", "data", "runtime", "settings", "workspaces", "root"): (home/name).mkdir()
    def setting(plugin, key, value):
        at = home/"settings"/"@jupyterlab"/plugin.split(":")[0]
        at.mkdir(parents=True, exist_ok=True)
        (at/f"{plugin.split(':')[1]}.jupyterlab-settings").write_text(json.dumps({key: value}))
    setting("apputils-extension:notification", "fetchNews", "false")
    setting("notebook-extension:tracker", "windowingMode", "none") # cells out of sight stay in the page
    setting("docmanager-extension:plugin", "autosave", False)
    env = os.environ | {f"JUPYTER_{k}": str(home/v) for k, v in (("CONFIG_DIR", "config"), ("DATA_DIR", "data"), ("RUNTIME_DIR", "runtime"))}
    env |= {f"JUPYTERLAB_{k.upper()}_DIR": str(home/k) for k in ("settings", "workspaces")}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "FEATSD_SHARED_DATA": os.environ.get("FEATSD_SHARED_DATA") or str(ROOT.parent/"shared"/"data")}
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    token, url = secrets.token_hex(16), f"http://127.0.0.1:{port}"
    with open(home/"lab.log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip", "127.0.0.1", "--port", str(port), "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
                                   "--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={home/'root'}"], env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        while True:
            if server.poll() is not None: pytest.fail("JupyterLab ended:\n" + (home/"lab.log").read_text()[-2000:])
            try: urllib.request.urlopen(f"{url}/api?token={token}", timeout=60); break
            except (urllib.error.URLError, OSError): time.sleep(.5)
        yield url, token, home/"root"
    finally:
        server.terminate() # ends its kernels too
        try: server.wait(600)
        except subprocess.TimeoutExpired: server.kill()
