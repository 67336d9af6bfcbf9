"""Every data set has a card, and every file is what its card says."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from memlens import data
from memlens.data import cards

FOLDERS = cards.folders()


def test_every_hash_of_every_data_set_matches():
    counts = cards.verify()
    assert set(counts) == set(FOLDERS) >= {"arc", "digits", "text"}
    assert all(count >= 1 for count in counts.values())


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_card_says_source_licence_and_how_it_was_made(folder):
    card = cards.read(folder)
    assert all(len(words.strip()) > 3 for words in (card.source, card.licence, card.made_by))
    assert all(len(digest) == 64 and set(digest) <= set("0123456789abcdef") for digest in card.sha256.values())
    script = cards.root() / folder / card.made_by.split()[0]
    assert script.suffix == ".py"
    ast.parse(script.read_text(encoding="utf-8"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_data_set_is_small_and_named_in_the_index(folder):
    assert sum(path.stat().st_size for path in cards.files(folder)) < 20e6
    assert f"`{folder}`" in (cards.root() / "README.md").read_text(encoding="utf-8")


CARD = """# A set

```toml
source = "a generator"
licence = "CC0-1.0"
made_by = "make.py"
```

More words.
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A `datasets` folder of its own with one data set in it."""
    folder = tmp_path / "datasets" / "sums"
    (folder / "deep").mkdir(parents=True)
    (tmp_path / "datasets" / "README.md").write_text("# Data\n")
    (folder / "README.md").write_text(CARD)
    (folder / "a.txt").write_text("one")
    (folder / "deep" / "b.txt").write_text("two")
    (folder / "make.py").write_text("")
    monkeypatch.setenv("MEMLENS_DATASETS", str(tmp_path / "datasets"))
    cards.update("sums")
    return folder


def test_update_writes_the_table_and_keeps_the_words(place):
    written = (place / "README.md").read_text()
    assert written.startswith("# A set\n\n```toml\nsource = ")
    assert written.endswith("```\n\nMore words.\n")
    assert cards.verify() == {"sums": 2}
    cards.update("sums")
    assert (place / "README.md").read_text() == written
    assert not list(place.glob("*.partial"))


def test_update_replaces_an_old_table(place):
    (place / "a.txt").write_text("changed on purpose")
    (place / "deep" / "b.txt").unlink()
    cards.update("sums")
    assert cards.verify() == {"sums": 1}


FAULTS = {
    "changed": (lambda place: (place / "a.txt").write_text("On"), r"sums/a\.txt changed"),
    "missing": (lambda place: (place / "a.txt").unlink(), r"sums/a\.txt is missing"),
    "unlisted": (lambda place: (place / "c.txt").write_text("3"), r"sums/c\.txt is not in the card"),
    "no block": (lambda place: (place / "README.md").write_text("# A set\n"), "card 'sums' has 0 toml blocks"),
    "no licence": (
        lambda place: (place / "README.md").write_text(CARD.replace("licence", "x")),
        r"lacks licence, \[sha256\]",
    ),
    "bad toml": (lambda place: (place / "README.md").write_text(CARD.replace('"a gen', "a gen")), "'sums' does not parse"),
    "no card": (
        lambda place: (place / "README.md").unlink(),
        r"no card for 'sums'; expected sums/README\.md; see datasets/README",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_names_what_is_wrong(place, fault):
    spoil, says = FAULTS[fault]
    spoil(place)
    with pytest.raises(ValueError, match=says):
        cards.verify()


def test_all_faults_are_named_at_once(place):
    (place / "a.txt").write_text("On")
    (place / "c.txt").write_text("3")
    (place.parent / "other").mkdir()
    (place.parent / "other" / "x.txt").write_text("4")
    with pytest.raises(ValueError, match=r"no card for 'other'.*sums/c\.txt is not in the card; sums/a\.txt changed"):
        cards.verify()


def test_a_file_is_checked_when_it_is_read(place):
    assert cards.verified("sums", "deep/b.txt") == b"two"
    (place / "a.txt").write_text("On")
    with pytest.raises(ValueError, match=r"sums/a\.txt has sha256 .* expected .* as in its card; restore it with git"):
        cards.verified("sums", "a.txt")
    (place / "a.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"sums/a\.txt is missing.*make\.py"):
        cards.verified("sums", "a.txt")
    with pytest.raises(ValueError, match=r"'b\.txt' is not in the card of 'sums'.*did you mean .*'deep/b\.txt'"):
        cards.verified("sums", "b.txt")


def test_an_unknown_data_set_gets_the_nearest_name():
    with pytest.raises(FileNotFoundError, match=r"no card for 'digit'.*did you mean 'digits'\?"):
        cards.read("digit")
    with pytest.raises(FileNotFoundError, match=r"no card for 'digit'.*did you mean 'digits'\?"):
        cards.update("digit")


def test_the_root_from_the_environment_must_be_one(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMLENS_DATASETS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"MEMLENS_DATASETS=.*expected a folder with a README\.md"):
        data.root()


def read_from(folder: Path, site: Path) -> subprocess.CompletedProcess:
    """Read data from `folder` with the package under `site`, without the path files of an editable install."""
    paths = os.pathsep.join([str(site), *(path for path in sys.path if path.endswith("site-packages"))])
    env = {name: value for name, value in os.environ.items() if name != "MEMLENS_DATASETS"} | {"PYTHONPATH": paths}
    code = "import memlens.data as d; print(d.root()); print(len(d.text('hamlet', length=10)))"
    return subprocess.run([sys.executable, "-S", "-c", code], cwd=folder, env=env, capture_output=True, text=True)


def test_an_installed_package_finds_the_clone_it_stands_in_or_says_what_to_do(tmp_path):
    clone, site = cards.root().parent, tmp_path / "site"
    shutil.copytree(clone / "toolkit" / "memlens", site / "memlens", ignore=shutil.ignore_patterns("__pycache__"))
    assert read_from(clone / "toolkit", site).stdout == f"{cards.root()}\n10\n"
    away = read_from(tmp_path, site)
    assert away.returncode == 1
    assert "memlens is installed without its clone" in away.stderr
    assert "set MEMLENS_DATASETS" in away.stderr


def test_the_command_checks_all(capsys):
    done = subprocess.run([sys.executable, "-m", "memlens.data.cards"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "text: matches its card (files: 11)" in done.stdout
