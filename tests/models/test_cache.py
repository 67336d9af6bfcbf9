"""The verified folder: what it survives (damage, a kill, a full disk, two builders, a read-only place) and what it says."""

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from memlens.models import cache

CONTENT = {"model.bin": bytes(range(256)) * 40, "config.json": b'{"layers": 2}'}
HOW = {"needs": 1000, "op": "demo"}


def build(folder: Path) -> None:
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)


def held(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in CONTENT}


@pytest.fixture
def folder(tmp_path) -> Path:
    return cache.ensure(tmp_path / "deep" / "model-v1", build, **HOW)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.parent.iterdir() if path.name.endswith(".partial")]


def test_it_is_built_once(folder):
    assert held(folder) == CONTENT
    assert leftovers(folder) == []
    assert cache.damage(folder) is None

    def never(_):
        raise AssertionError("a whole folder was built again")

    assert cache.ensure(folder, never, **HOW) == folder


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "first byte": (lambda folder: flip(folder / "model.bin", 0), "model.bin does not match its hash"),
    "one bit in the payload": (lambda folder: flip(folder / "model.bin", 5000), "model.bin does not match its hash"),
    "truncated": (lambda folder: os.truncate(folder / "model.bin", 100), "model.bin has 100 bytes instead of 10240"),
    "file gone": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "manifest gone": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest cut": (lambda folder: os.truncate(folder / "manifest.json", 30), "manifest.json is unreadable"),
    "manifest of another kind": (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json is unreadable"),
    "manifest flipped": (lambda folder: flip(folder / "manifest.json", -20), "does not match its hash|unreadable"),
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_damage_is_found_reported_and_mended(folder, fault, caplog):
    spoil, says = DAMAGE[fault]
    spoil(folder)
    with caplog.at_level(logging.WARNING):
        cache.ensure(folder, build, **HOW)
    (record,) = caplog.records
    assert record.name == "memlens.models.cache"
    assert any(word in record.getMessage() for word in says.split("|"))
    assert held(folder) == CONTENT
    assert cache.damage(folder) is None
    assert leftovers(folder) == []


def test_nothing_is_logged_above_info_in_normal_use(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        cache.ensure(cache.ensure(tmp_path / "a", build, **HOW), build, **HOW)
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []


@pytest.mark.parametrize("error", [RuntimeError("no such tensor"), KeyboardInterrupt()])
def test_a_build_that_fails_leaves_nothing(tmp_path, error):
    def fail(folder):
        build(folder)
        raise error

    with pytest.raises(type(error)):
        cache.ensure(tmp_path / "model", fail, **HOW)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


CHILD = """
import sys, time
from pathlib import Path
from memlens.models import cache

folder, log, wait = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])

def build(inside):
    (inside / "model.bin").write_bytes(bytes(1000))
    with log.open("a") as file:
        file.write("built\\n")
    time.sleep(wait)

cache.ensure(folder, build, needs=1000, op="child")
print((folder / "model.bin").stat().st_size)
"""


def child(folder: Path, log: Path, wait: float) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, str(folder), str(log), str(wait)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_a_killed_build_leaves_only_a_partial_that_the_next_removes(tmp_path):
    folder, log = tmp_path / "model", tmp_path / "log"
    killed = child(folder, log, 60)
    until(log.exists)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not folder.exists()
    assert len(leftovers(folder)) == 1
    cache.ensure(folder, build, **HOW)
    assert held(folder) == CONTENT
    assert leftovers(folder) == []


def test_two_processes_at_once_build_once(tmp_path):
    folder, log = tmp_path / "model", tmp_path / "log"
    both = [child(folder, log, 1.0) for _ in range(2)]
    results = [process.communicate(timeout=60) for process in both]
    assert results == [("1000\n", ""), ("1000\n", "")]
    assert log.read_text() == "built\n"


def test_the_wait_for_another_process_ends(tmp_path, monkeypatch):
    from filelock import FileLock

    monkeypatch.setattr(cache, "PATIENCE", 0.05)
    with (
        FileLock(tmp_path / ".model.lock"),
        pytest.raises(TimeoutError, match=r"demo: another process has been building .*model.*MEMLENS_CACHE"),
    ):
        cache.ensure(tmp_path / "model", build, **HOW)


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 2 * 10**6, 2 * 10**6))
    with pytest.raises(
        OSError, match=r"demo: .* has 2 MB free and 540 MB \(540000000 bytes\) are needed.*MEMLENS_CACHE"
    ) as caught:
        cache.ensure(tmp_path / "model", build, needs=540_000_000, op="demo")
    assert caught.value.errno == errno.ENOSPC
    assert str(tmp_path) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [".model.lock"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full (Linux)")
def test_a_disk_that_fills_up_while_writing(tmp_path):
    def fill(folder):
        (folder / "config.json").write_text("{}")
        (folder / "model.bin").symlink_to("/dev/full")
        (folder / "model.bin").write_bytes(bytes(10_000))

    with pytest.raises(OSError, match=r"demo: .*are needed; free some space") as caught:
        cache.ensure(tmp_path / "model", fill, **HOW)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.__cause__ is not None
    assert [path.name for path in tmp_path.iterdir()] == [".model.lock"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root on Linux")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_under_the_safetensors_writer(small_disk):
    import torch
    from safetensors.torch import save_file

    with pytest.raises(OSError, match=r"demo: .*are needed; free some space") as caught:
        cache.ensure(small_disk / "model", lambda folder: save_file({"x": torch.zeros(10**5)}, folder / "x"), **HOW)
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in small_disk.iterdir()] == [".model.lock"]


@pytest.fixture
def read_only():
    """A folder that this process cannot write to, also where it runs as root: the effective user changes for a while."""
    place = Path(tempfile.mkdtemp(prefix="memlens-test-"))
    cache.ensure(place / "kept", build, **HOW)
    root = os.geteuid() == 0
    place.chmod(0o555)
    if root:
        os.seteuid(65534)
    yield place
    if root:
        os.seteuid(0)
    place.chmod(0o755)
    shutil.rmtree(place)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions are tested on POSIX")
def test_a_read_only_cache_serves_what_it_holds_and_refuses_the_rest(read_only):
    assert held(cache.ensure(read_only / "kept", build, **HOW)) == CONTENT
    with pytest.raises(OSError, match=r"demo: cannot write in .*\(Permission denied\); set MEMLENS_CACHE") as caught:
        cache.ensure(read_only / "new", build, **HOW)
    assert caught.value.errno == errno.EACCES


def test_home_is_read_at_each_call(monkeypatch, tmp_path):
    monkeypatch.setenv("MEMLENS_CACHE", str(tmp_path))
    assert cache.home() == tmp_path
    monkeypatch.delenv("MEMLENS_CACHE")
    assert cache.home().name == "memlens"
