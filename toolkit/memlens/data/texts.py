"""Slices of public-domain text, addressed by file, offset and length, so that an experiment can say what it read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from memlens import check
from memlens.data import cards

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Slice", "names", "python_source", "slice_name", "text"]

_IDS: WeakKeyDictionary[Any, dict[str, list[int]]] = WeakKeyDictionary()  # tokenizer -> ids of each whole text


class Slice(str):
    """Text that knows where it comes from."""

    slice_name: str


def names() -> list[str]:
    """The texts that `text` knows, e.g. "hamlet", "paradise_lost"."""
    return sorted(Path(file).stem for file in cards.read("text").sha256)


def slice_name(name: str, start: int, length: int, *, unit: str = "characters") -> str:
    """How a slice is named in the attributes of a result: `hamlet[2000:2512] tokens`."""
    return f"{name}[{start}:{start + length}] {unit}"


def text(name: str, *, start: int = 0, length: int | None = None, tokenizer: Any = None) -> Slice | Tensor:
    """A slice of a shipped text; its `slice_name` attribute says which.

    Args:
        name: one of `names()`.
        start, length: offset and size, in tokens of the whole text's tokenisation where a tokenizer is given, else in
            characters. `length` None reads to the end.
        tokenizer: None for characters, "bytes" for UTF-8 bytes as ids 0..255, or a Hugging Face tokenizer (no special
            tokens are added).

    Returns:
        A `str`, or ids (1, length), int64.

    Raises:
        ValueError: an unknown name, or a slice beyond the end.
    """
    check.one_of("data.text", names(), name=name)
    return _cut("data.text", name, cards.verified("text", f"{name}.txt").decode("utf-8"), start, length, tokenizer)


def python_source(module: str, *, start: int = 0, length: int | None = None, tokenizer: Any = None) -> Slice | Tensor:
    """A slice of a standard-library module's source, read from this interpreter, addressed as in `text`.

    It differs between Python versions, so it is for experiments on kinds of text, not for stored digits.

    Raises:
        ValueError: a module that is not in the standard library or has no source.
    """
    from importlib.util import find_spec

    check.one_of("data.python_source", sys.stdlib_module_names, module=module.partition(".")[0])
    spec = find_spec(module)
    if spec is None or not spec.has_location or not str(spec.origin).endswith(".py"):
        check.fail("data.python_source", f"{module!r} has no Python source", "one that has, e.g. 'argparse'")
    content = Path(spec.origin).read_text(encoding="utf-8")
    return _cut("data.python_source", f"python:{module}", content, start, length, tokenizer)


def _cut(op: str, name: str, content: str, start: int, length: int | None, tokenizer: Any) -> Slice | Tensor:
    whole, unit = (content, "characters") if tokenizer is None else (_encode(op, name, content, tokenizer), "tokens")
    length = len(whole) - start if length is None else length
    check.at_least(op, 0, start=start)
    check.at_least(op, 1, f"{name} has {len(whole)} {unit}", length=length)
    if start + length > len(whole):
        check.fail(op, slice_name(name, start, length, unit=unit), f"an end within its {len(whole)} {unit}")
    part = whole[start : start + length]
    if tokenizer is None:
        result: Slice | Tensor = Slice(part)
    else:
        import torch

        result, unit = torch.tensor([list(part)], dtype=torch.int64), "bytes" if tokenizer == "bytes" else "tokens"
    result.slice_name = slice_name(name, start, length, unit=unit)
    return result


def _encode(op: str, name: str, content: str, tokenizer: Any) -> list[int] | bytes:
    """Ids of the whole text; kept for each tokenizer, so that many slices cost one tokenisation."""
    if isinstance(tokenizer, str) and tokenizer == "bytes":
        return content.encode()
    if not callable(tokenizer):
        check.fail(op, f"tokenizer is {tokenizer!r}", "None, 'bytes' or a Hugging Face tokenizer", error=TypeError)
    known = _IDS.setdefault(tokenizer, {})
    if name not in known:
        known[name] = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    return known[name]
