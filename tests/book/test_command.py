"""How JupyterLab is started: on loopback only, with nothing that asks the network."""

import json
import sys
from pathlib import Path

from memlens.book import lab


def test_the_command_stays_on_this_machine():
    line = lab.command(port=9999, open_at="notebooks/kv/h2o.ipynb")
    assert line[:3] == [sys.executable, "-m", "jupyterlab"]
    assert "--ServerApp.ip=127.0.0.1" in line
    assert "--ServerApp.port=9999" in line
    assert "--LabApp.default_url=/lab/tree/notebooks/kv/h2o.ipynb" in line
    assert set(lab.OFFLINE) <= set(line)
    assert not [part for part in line if "token" in part or part == "--no-browser"]


def test_a_test_server_opens_no_window_and_has_a_fixed_token():
    line = lab.command(browser=False, token="abc")
    assert {"--no-browser", "--ServerApp.port_retries=0", "--IdentityProvider.token=abc"} <= set(line)


def test_no_one_is_asked_about_news():
    folder = next(part.partition("=")[2] for part in lab.OFFLINE if "app_settings_dir" in part)
    settings = json.loads((Path(folder) / "overrides.json").read_text())
    assert settings["@jupyterlab/apputils-extension:notification"] == {"fetchNews": "false", "checkForUpdates": False}
