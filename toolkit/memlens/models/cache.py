"""A folder on disk that is either whole and verified, or not there.

`ensure` builds it once: in a temporary folder beside its place, sealed with a manifest of sizes and hashes, then renamed.
A reader checks every byte against the manifest. So a build that is killed, a full disk, two processes at once and a
flipped bit on disk all end in a whole folder or in a clear error.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

__all__ = ["damage", "ensure", "home"]

MANIFEST = "manifest.json"
PATIENCE = 600.0  # seconds to wait for another process that builds the same folder
FULL_IN_WORDS = re.compile(r"\(os error (28|122)\)")  # how a library in Rust says no space, or over quota
log = logging.getLogger(__name__)


def home() -> Path:
    """Where memlens caches: `MEMLENS_CACHE`, read now, else the user's cache folder."""
    from platformdirs import user_cache_dir

    return Path(os.environ.get("MEMLENS_CACHE") or user_cache_dir("memlens", appauthor=False))


def ensure(folder: Path, build: Callable[[Path], None], *, needs: int, op: str) -> Path:
    """`folder`, whole and verified; where it is not, `build` fills an empty folder that then takes its place.

    Args:
        folder: the final place; its parents are made.
        build: writes files into the empty folder it is given.
        needs: bytes that a build takes on disk.
        op: names the operation in messages.

    Raises:
        OSError: a full disk or a folder that cannot be written, naming the folder and the bytes needed.
        TimeoutError: another process held the lock for ten minutes.
    """
    if damage(folder) is None:
        return folder
    with _locked(folder, op):
        problem = damage(folder)  # again: another process may have built it while we waited
        if problem is None:
            return folder
        if folder.exists():
            log.warning("%s: the cached copy in %s is damaged (%s); it is built again", op, folder, problem)
            folder.rename(_partial(folder, "damaged"))
        _sweep(folder)
        _check_space(folder, needs, op)
        _build(folder, build, needs, op)
    return folder


def damage(folder: Path) -> str | None:
    """What is wrong with a folder, compared byte for byte with its manifest; None where nothing is."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, (size, digest) in files.items():
            if (found := (folder / name).stat().st_size) != size:
                return f"{name} has {found} bytes instead of {size}"
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return f"{name} does not match its hash"
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is unreadable"
    return None


def _partial(folder: Path, word: str | int) -> Path:
    return folder.with_name(f".{folder.name}.{word}.partial")


def _sweep(folder: Path) -> None:
    """Remove what killed builds left; under the lock none of it is in use."""
    for stale in folder.parent.glob(_partial(folder, "*").name):
        shutil.rmtree(stale)


@contextmanager
def _locked(folder: Path, op: str):
    """Hold the folder's lock; the system drops it when its holder dies."""
    from filelock import FileLock, Timeout

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"), timeout=PATIENCE)
        lock.acquire()
    except Timeout as error:
        raise TimeoutError(
            f"{op}: another process has been building {folder} for {PATIENCE:.0f} s; end it, or set MEMLENS_CACHE elsewhere"
        ) from error
    except OSError as error:
        raise _explained(error, folder.parent, 0, op) from error
    try:
        yield
    finally:
        lock.release()


def _build(folder: Path, build: Callable[[Path], None], needs: int, op: str) -> None:
    partial = _partial(folder, os.getpid())
    try:
        partial.mkdir()
        build(partial)
        _seal(partial)
        partial.rename(folder)
    except BaseException as error:
        # an interrupt too must leave nothing half-written
        shutil.rmtree(partial, ignore_errors=True)
        if _is_full(error):
            raise _full(folder.parent, needs, op) from error
        if isinstance(error, PermissionError):
            raise _explained(error, folder.parent, needs, op) from error
        raise


def _seal(folder: Path) -> None:
    """Write the manifest, and give the files the readers that the folder has."""
    files, mode = {}, folder.stat().st_mode & 0o666
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        path.chmod(mode)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.relative_to(folder).as_posix()] = [path.stat().st_size, digest]
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def _check_space(folder: Path, needs: int, op: str) -> None:
    if shutil.disk_usage(folder.parent).free < needs:
        raise _full(folder.parent, needs, op)


def _is_full(error: BaseException | None) -> bool:
    """Whether a full disk or quota is behind an error; the safetensors writer passes it on as text only."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if FULL_IN_WORDS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _full(place: Path, needs: int, op: str) -> OSError:
    free = shutil.disk_usage(place).free
    text = f"{op}: {place} has {free / 1e6:,.0f} MB free and {needs / 1e6:,.0f} MB ({needs} bytes) are needed"
    return OSError(errno.ENOSPC, f"{text}; free some space, or set MEMLENS_CACHE to a folder on another disk")


def _explained(error: OSError, place: Path, needs: int, op: str) -> OSError:
    if _is_full(error):
        return _full(place, needs, op)
    text = f"{op}: cannot write in {place} ({error.strerror}); set MEMLENS_CACHE to a folder that you can write"
    return OSError(error.errno, text)
