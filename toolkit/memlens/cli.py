"""The `memlens` command. Each verb loads only what it needs: `memlens figures` never imports torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(
    help="The memory of language models: blocks, kernels, notebooks.", no_args_is_help=True, add_completion=False
)
Paper = Annotated[str | None, typer.Option(help="one paper, e.g. h2o or kv/h2o")]
Family = Annotated[str | None, typer.Option(help="one family, e.g. kv")]


def _stop(error: Exception) -> None:
    """Our own errors say what came and the way out; the traceback adds nothing to them."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    typer.secho(text, fg="red", err=True)
    raise typer.Exit(2)


@app.command()
def reproduce(paper: Paper = None, family: Family = None, workers: Annotated[int | None, typer.Option()] = None):
    """Run the notebooks, keep what changed, redraw the figures, print the ledger."""
    from memlens.book.reproduce import reproduce as run

    try:
        code = run(paper=paper or None, family=family or None, workers=workers)
    except (KeyError, ValueError, FileNotFoundError) as error:
        _stop(error)
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on where this one stopped", err=True)
        code = 130
    raise typer.Exit(code)


@app.command()
def status():
    """Papers known and working by family, and the stored verdicts."""
    from rich.console import Console

    from memlens.book.ledger import as_table, family_table, stored

    console = Console()
    console.print(family_table().replace("`", ""))
    console.print(as_table(row for rows in stored().values() for row in rows))


@app.command()
def report():
    """Versions, device, and the form that `auto` picks: paste it into a bug report."""
    from memlens.book.report import report as text

    typer.echo(text())


@app.command()
def new(family: str, key: str):
    """Scaffold the four files of one more method."""
    from memlens.book.scaffold import scaffold

    try:
        written = scaffold(family, key)
    except (KeyError, ValueError, FileExistsError) as error:
        _stop(error)
    typer.echo("\n".join(f"wrote {path}" for path in written))


@app.command()
def store(notebooks: list[Path]):
    """Run notebooks and write them back as they are stored."""
    from memlens.book.check import findings
    from memlens.book.store import store as run

    bad = False
    for path in notebooks:
        try:
            typer.echo(f"{path}: {run(path):.1f} s")
        except RuntimeError as error:
            _stop(error)
        for finding in findings(path):
            bad = True
            typer.echo(f"  {finding}")
    raise typer.Exit(int(bad))


@app.command("check-notebooks")
def check_notebooks():
    """What nbval does not see in the stored notebooks."""
    from memlens.book.check import check_all
    from memlens.book.place import notebooks

    found = check_all()
    for name, lines in found.items():
        typer.echo(name + "".join(f"\n  {line}" for line in lines))
    typer.echo(f"{len(notebooks())} notebooks, {len(found)} with findings")
    raise typer.Exit(int(bool(found)))


@app.command()
def readme(check: Annotated[bool, typer.Option(help="only say what is not current")] = False):
    """Write the generated parts of the README and of the door anew."""
    from memlens.book.ledger import refresh, stale

    changed = stale() if check else refresh()
    typer.echo("\n".join(f"{'not current' if check else 'wrote'}: {name}" for name in changed) or "all current")
    raise typer.Exit(int(check and bool(changed)))


@app.command()
def workshop():
    """Student copies of the notebooks, each proven against its solutions."""
    from memlens.book.workshop import make_workshop

    raise typer.Exit(make_workshop())


@app.command()
def test():
    """Lint, unit tests, kernels, notebooks, browser: `make test`."""
    from memlens.book.place import root

    try:
        raise typer.Exit(subprocess.run(["make", "test"], cwd=root()).returncode)
    except FileNotFoundError as error:
        _stop(error)


@app.command()
def lab(port: Annotated[int, typer.Option()] = 8888):
    """JupyterLab, opened at the door; needs no network."""
    from memlens.book.execute import THREADS
    from memlens.book.lab import command
    from memlens.book.place import root

    os.chdir(root())
    os.environ.update({**THREADS, **os.environ})
    os.execv(sys.executable, command(port=port, open_at="notebooks/00-start-here.ipynb"))


@app.command()
def figures(
    names: Annotated[list[str] | None, typer.Argument(help="figures to draw; all when left out")] = None,
    style: Annotated[str | None, typer.Option(help="memlens, neurips, slides or poster")] = None,
    format: Annotated[str | None, typer.Option(help="svg, pdf or png; default svg and png")] = None,
    width: Annotated[str | None, typer.Option(help="e.g. 3.25in or 82mm")] = None,
    out: Annotated[Path | None, typer.Option(help="the folder to write into; default build/figures")] = None,
):
    """Redraw stored figures from their data, without torch."""
    from memlens.viz.redraw import redraw

    try:
        written = redraw(names or (), style=style, format=format, width=width, out=out or Path("build/figures"))
    except (KeyError, ValueError, OSError) as error:
        _stop(error)
    typer.echo("\n".join(str(path) for path in written))


@app.command()
def bench(family: Family = None):
    """Measure each block against its peer and store the rows."""
    from memlens.bench.run import bench as run

    try:
        code = run(family=family or None)
    except ValueError as error:
        _stop(error)
    raise typer.Exit(code)


@app.command()
def kernels(check: Annotated[bool, typer.Option(help="only compare with the stored table")] = False):
    """Compile every kernel ahead of time for every target and write the table."""
    environment = {**os.environ, "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "memlens_kernels.report", *(["--check"] if check else [])]
    raise typer.Exit(subprocess.run(command, env=environment).returncode)


@app.command()
def model():
    """Find and convert the real model once, so that notebooks load it in a second."""
    from memlens.models import smollm2

    try:
        network, _ = smollm2()
    except (FileNotFoundError, ImportError, OSError) as error:
        _stop(error)
    typer.echo(f"SmolLM2: {sum(p.numel() for p in network.parameters()) / 1e6:.0f} M parameters, ready")


@app.command()
def bundle(out: Annotated[Path, typer.Option(help="the folder to fill")] = Path("bundle")):
    """Wheels, the repository and the model in one folder, for a room without internet."""
    from memlens.book.bundle import bundle as make

    try:
        make(out)
    except (OSError, subprocess.CalledProcessError) as error:
        _stop(error)


if __name__ == "__main__":
    app()
