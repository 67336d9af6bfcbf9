"""The command's verbs: they exist, they refuse with our own message, and `figures` never loads torch."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from memlens.cli import app

TOP = Path(__file__).parents[1]
VERBS = (
    "reproduce", "test", "status", "report", "new", "store", "check-notebooks", "readme", "workshop", "lab", "figures", "bench",
    "kernels", "model", "bundle",
)  # fmt: skip


def call(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb):
    result = call(verb, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_an_unknown_paper_is_refused_with_the_nearest(monkeypatch):
    monkeypatch.chdir(TOP)
    result = call("reproduce", "--paper", "h20")
    assert result.exit_code == 2
    assert "did you mean 'h2o'" in result.output


def test_an_unknown_family_is_refused(monkeypatch, tmp_path):
    result = call("new", "kw", "x")
    assert result.exit_code == 2
    assert "did you mean 'kv'" in result.output


def test_report_names_versions_and_the_form():
    result = call("report")
    assert result.exit_code == 0
    assert "torch: 2." in result.output
    assert "auto picks: " in result.output


def test_figures_do_not_load_torch(tmp_path):
    script = (
        "import sys; from typer.testing import CliRunner; from memlens.cli import app\n"
        f"result = CliRunner().invoke(app, ['figures', '--format', 'svg', '--out', {str(tmp_path)!r}])\n"
        "assert result.exit_code == 0, result.output\n"
        "assert 'torch' not in sys.modules, 'torch was loaded'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=TOP, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("*.svg"))


def test_a_full_disk_under_the_model_is_said_in_words(monkeypatch):
    from memlens import models

    def full():
        raise OSError(28, "models.load smollm2-135m: no space left; free 542 MB or set MEMLENS_CACHE")

    monkeypatch.setattr(models, "smollm2", full)
    result = call("model")
    assert result.exit_code == 2
    assert "set MEMLENS_CACHE" in result.output
