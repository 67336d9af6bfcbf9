"""Where the shipped data lies, and the cards that say what it is.

A card is the `README.md` of a folder under `datasets/`. It holds one fenced `toml` block with `source`, `licence`,
`made_by` and a `[sha256]` table of every other file in the folder; the format is described in `datasets/README.md`.

    python -m memlens.data.cards              # check every hash
    python -m memlens.data.cards text arc     # rewrite the [sha256] tables of these folders
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import tomllib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from memlens import check
from memlens.files import replace_text

__all__ = ["Card", "files", "folders", "hashes", "read", "root", "update", "verified", "verify"]

BLOCK = re.compile(r"^```toml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"^\[sha256\]\n.*\Z", re.MULTILINE | re.DOTALL)
WORDS = ("source", "licence", "made_by")


class Card(NamedTuple):
    source: str  # where the data comes from, with a version
    licence: str  # an SPDX name or "public domain"
    made_by: str  # the script in the folder, or how it was made
    sha256: dict[str, str]  # path inside the folder -> hash


def root() -> Path:
    """The `datasets` folder: `MEMLENS_DATASETS`, else the one beside this package, else that of the clone we stand in.

    Raises:
        FileNotFoundError: none of these exists, with what to do.
    """
    if chosen := os.environ.get("MEMLENS_DATASETS"):
        if (Path(chosen) / "README.md").is_file():
            return Path(chosen)
        check.fail("data.root", f"MEMLENS_DATASETS={chosen!r}", "a folder with a README.md", error=FileNotFoundError)
    here = Path.cwd()
    for clone in (Path(__file__).parents[3], here, *here.parents):
        if (clone / "datasets" / "README.md").is_file() and (clone / "toolkit" / "memlens").is_dir():
            return clone / "datasets"
    check.fail(
        "data.root", "memlens is installed without its clone", "the `datasets` folder of the repository",
        "work inside a clone, or set MEMLENS_DATASETS to its datasets folder", error=FileNotFoundError,
    )  # fmt: skip


def folders() -> list[str]:
    """The names of the data sets: every folder under `root()` that holds a file."""
    return sorted(path.name for path in root().iterdir() if path.is_dir() and any(_listed(path)))


def files(folder: str | Path) -> list[Path]:
    """The files of a data set that its card must list: all but the card, scripts and what unfinished writes leave."""
    return _listed(root() / folder)


def _listed(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.is_file() and path != folder / "README.md")
    return sorted(path for path in found if path.suffix not in {".py", ".pyc", ".partial"})


def read(folder: str | Path) -> Card:
    """The card of a data set, named as in `folders()`.

    Raises:
        FileNotFoundError: no such data set (the nearest name is suggested) or no card in it.
        ValueError: a card without its toml block or without one of its words.
    """
    path = _path(folder)
    stat = path.stat()
    return _parse(path, stat.st_mtime_ns, stat.st_size)


def _path(folder: str | Path) -> Path:
    path, known = root() / folder / "README.md", folders()
    if not path.is_file():
        fix = "see datasets/README.md" if folder in known else check.nearest(str(folder), known)
        check.fail("data.cards", f"no card for {str(folder)!r}", f"{folder}/README.md", fix, error=FileNotFoundError)
    return path


@lru_cache(maxsize=64)
def _parse(path: Path, mtime: int, size: int) -> Card:
    name = path.parent.name
    blocks = BLOCK.findall(path.read_text(encoding="utf-8"))
    if len(blocks) != 1:
        check.fail("data.cards", f"card {name!r} has {len(blocks)} toml blocks", "one", "see datasets/README.md")
    try:
        table = tomllib.loads(blocks[0])
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"data.cards: the toml block of {name!r} does not parse: {error}") from error
    missing = [word for word in WORDS if not isinstance(table.get(word), str)]
    if missing or not isinstance(table.get("sha256"), dict):
        lacking = ", ".join([*missing, *([] if "sha256" in table else ["[sha256]"])])
        check.fail("data.cards", f"card {name!r} lacks {lacking}", "source, licence, made_by and [sha256]")
    return Card(*(table[word] for word in WORDS), table["sha256"])


def hashes(folder: str | Path) -> dict[str, str]:
    """sha256 of every file in the data set that its card must list."""
    base = root() / folder
    return {path.relative_to(base).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files(folder)}


def verified(folder: str, file: str) -> bytes:
    """The bytes of one file, once they match the card.

    Raises:
        FileNotFoundError: no such file; ValueError: its hash is not the card's.
    """
    path, want = root() / folder / file, read(folder).sha256.get(file)
    if want is None:
        check.fail("data.cards.verified", f"{file!r} is not in the card of {folder!r}", "a listed file",
                   check.nearest(file, read(folder).sha256))  # fmt: skip
    if not path.is_file():
        check.fail("data.cards.verified", f"{folder}/{file} is missing", "the file that its card lists",
                   f"restore it with git, or run datasets/{folder}/make.py", error=FileNotFoundError)  # fmt: skip
    content = path.read_bytes()
    if (got := hashlib.sha256(content).hexdigest()) != want:
        check.fail("data.cards.verified", f"{folder}/{file} has sha256 {got[:12]}", f"{want[:12]} as in its card",
                   "restore it with git, or run `python -m memlens.data.cards NAME` after a wanted change")  # fmt: skip
    return content


def verify() -> dict[str, int]:
    """Check every hash of every data set; returns the number of files in each.

    Raises:
        ValueError: naming every file that is changed, missing or in no card, and every card that cannot be read.
    """
    wrong, counts = [], {}
    for folder in folders():
        try:
            want, got = read(folder).sha256, hashes(folder)
        except (FileNotFoundError, ValueError) as error:
            wrong.append(str(error))
            continue
        wrong += [f"{folder}/{file} is missing" for file in sorted(want.keys() - got.keys())]
        wrong += [f"{folder}/{file} is not in the card" for file in sorted(got.keys() - want.keys())]
        wrong += [f"{folder}/{file} changed" for file in sorted(want.keys() & got.keys()) if want[file] != got[file]]
        counts[folder] = len(got)
    if wrong:
        check.fail("data.cards.verify", "; ".join(wrong), "the files and hashes of the cards")
    return counts


def update(folder: str) -> None:
    """Rewrite the `[sha256]` table of a card from the files that lie there; the rest of the card stays.

    Raises:
        FileNotFoundError: no card; ValueError: a card without its toml block.
    """
    path = _path(folder)
    content = path.read_text(encoding="utf-8")
    match = BLOCK.search(content)
    if match is None:
        check.fail("data.cards.update", f"card {folder!r} has no toml block", "one", "see datasets/README.md")
    table = "[sha256]\n" + "".join(f'"{file}" = "{value}"\n' for file, value in hashes(folder).items())
    body = match.group(1)
    body = TABLE.sub(table, body) if TABLE.search(body) else f"{body.rstrip()}\n\n{table}"
    replace_text(path, content[: match.start(1)] + body + content[match.end(1) :])


if __name__ == "__main__":
    for chosen in sys.argv[1:]:
        update(chosen)
    for name, count in verify().items():
        print(f"{name}: matches its card (files: {count})")
