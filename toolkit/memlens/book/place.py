"""Where the project's folders are: a clone's own tree, found from the current folder or from the installed package."""

from __future__ import annotations

from pathlib import Path

from memlens import check

__all__ = ["notebooks", "root", "select", "state"]


def root(start: Path | None = None) -> Path:
    """The top of the clone: the nearest folder upwards that holds `notebooks/` and `toolkit/memlens/`.

    Raises:
        FileNotFoundError: outside a clone.
    """
    for base in (start or Path.cwd(), Path(__file__).resolve()):
        for folder in (base, *base.parents):
            if (folder / "notebooks").is_dir() and (folder / "toolkit" / "memlens").is_dir():
                return folder
    raise FileNotFoundError("memlens: no clone found here; run this inside a clone of the project (it needs notebooks/)")


def state() -> Path:
    """The folder of run results that git does not track, made when missing."""
    folder = root() / ".state"
    folder.mkdir(exist_ok=True)
    return folder


def notebooks() -> dict[str, Path]:
    """Every notebook by its name, `kv/h2o` or `00-start-here`, the door first."""
    base = root() / "notebooks"
    found = sorted(p for p in base.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    found.sort(key=lambda path: (len(path.relative_to(base).parts), path))
    return {path.relative_to(base).with_suffix("").as_posix(): path for path in found}


def select(*, paper: str | None = None, family: str | None = None) -> dict[str, Path]:
    """The notebooks of one paper or one family, or all.

    Raises:
        KeyError: an unknown paper (naming the nearest), or a paper or family that has no notebook yet.
        ValueError: an unknown family.
    """
    from memlens.catalog import FAMILIES, find

    known = notebooks()
    if paper is not None and paper in known:
        return {paper: known[paper]}
    if paper is not None:
        entry = find(paper)
        name = entry.book or entry.name
        if name not in known:
            raise KeyError(f"reproduce: {entry.name} is {entry.status} and has no notebook yet; see `memlens status`")
        return {name: known[name]}
    if family is not None:
        check.one_of("reproduce", FAMILIES, family=family)
        if not (chosen := {name: path for name, path in known.items() if name.startswith(f"{family}/")}):
            raise KeyError(f"reproduce: family {family!r} has no notebook yet; see `memlens status`")
        return chosen
    return known
