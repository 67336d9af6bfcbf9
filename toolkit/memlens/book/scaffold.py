"""`memlens new FAMILY KEY`: the four files of one more method, each with a place for what is missing."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from nbformat import reads

from memlens import check
from memlens.book.notebook import text_of
from memlens.book.place import root
from memlens.catalog.entries import FAMILIES, Entry, entries
from memlens.files import replace_text

__all__ = ["scaffold"]

BLOCK = '''"""{title}.

{summary}
"""

from __future__ import annotations

from torch import Tensor

from memlens import backend, check

__all__ = ["{name}"]


def {name}(x: Tensor, *, form: str = "auto") -> Tensor:
    """What comes out, in one line.

    formula, in the code's names

    Args:
        x: (batch, heads, length, dim), float32.
    Raises:
        ValueError: when x has another shape.
    Source: {source}
    """
    check.shapes("{name}", x=(x, "batch heads length dim"))
    backend.choose("{name}", form, x, kernel=False)
    return x
'''
TEST = '''"""{title}: held to something that is not ours, then its properties."""

import pytest
import torch

from memlens.{family}.{name} import {name}


def test_{name}_refuses_a_wrong_rank():
    with pytest.raises(ValueError, match="{name}: x has shape"):
        {name}(torch.zeros(2, 3))


def test_{name}_equals_something_that_is_not_ours(generator, assert_close):
    x = torch.randn(2, 3, 17, 8, generator=generator)
    assert_close({name}(x), x.flip(-1))  # replace by autograd, SDPA, a peer, or a case by hand; red until then
'''
ENTRY = """
[{key}]
title = "{title}"
summary = "{summary}"
block = ["memlens.{family}.{name}.{name}"]
status = "planned"
claims = []
"""


def _notebook(entry: Entry, fields: dict) -> str:
    """The template with its words filled in; the claims come from the catalogue."""
    text = files("memlens.book").joinpath("template.json").read_text(encoding="utf-8")
    book = reads(text, as_version=4)
    claims = "\n".join(
        f"- {claim.text}" + (f": {claim.value:g} {claim.unit}" if claim.value is not None else "") for claim in entry.claims
    )
    for cell in book.cells:
        for name, value in {**fields, "claims": claims or "- (what the paper claims)"}.items():
            cell.source = cell.source.replace("{{" + name + "}}", value)
    return text_of(book)


def scaffold(family: str, key: str, *, top: Path | None = None) -> list[Path]:
    """Write block, test, notebook, and an entry where the catalogue has none; the paths written.

    Raises:
        ValueError: an unknown family or a key that is no identifier.
        FileExistsError: a file that stands already; OSError: one that cannot be written. Nothing is written then.
    """
    check.one_of("new", FAMILIES, family=family)
    name = key.replace("-", "_").lower()
    if not name.isidentifier():
        check.fail("new", f"key={key!r}", "letters, digits, - and _")
    top = top or root()
    known = entries().get(f"{family}/{key}")
    entry = known or Entry(family, key, key, "what is done to what, in a sentence.", (), "planned", ())
    fields = {
        "family": family, "key": key, "name": name, "title": entry.title, "summary": entry.summary,
        "source": entry.source or "the paper, section and equation",
    }  # fmt: skip
    targets = {
        top / f"toolkit/memlens/{family}/{name}.py": BLOCK,
        top / f"tests/{family}/test_{name}.py": TEST,
    }
    notebook = top / f"notebooks/{family}/{key}.ipynb"
    for path in [*targets, notebook]:
        if path.exists():
            raise FileExistsError(f"new: {path.relative_to(top)} stands already; edit it, or take another key")
    texts = {path: text.format(**fields) for path, text in targets.items()} | {notebook: _notebook(entry, fields)}
    if known is None:
        path = top / f"toolkit/memlens/catalog/papers/{family}.toml"
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        texts[path] = old + ENTRY.format(**fields)
    _write(texts, fresh=[*targets, notebook])
    return list(texts)


def _write(texts: dict[Path, str], fresh: list[Path]) -> None:
    """All of them, or none: where one fails, the `fresh` ones are taken away again."""
    try:
        for path, text in texts.items():
            replace_text(path, text)
    except OSError:
        for path in fresh:
            path.unlink(missing_ok=True)
        raise
