"""The one door to sentence vectors: all-MiniLM-L6-v2, the mean over real tokens, unit length.

    vectors = embed(texts)                              # (n, 384) float32, unit rows
    vectors = embed(texts, cache="vectors.safetensors")         # texts seen before are read, not computed

About 250 short sentences a second on one core. Equal texts get equal vectors, and a text's vector does not depend on the
others in its batch beyond float32 rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from memlens import check
from memlens.files import replace_files

__all__ = ["DIM", "embed", "encode"]

DIM = 384
LONGEST = 256  # tokens; what comes after them is not read, as in the published encoder
KEY = 16  # bytes of a text's hash in the file


@lru_cache(maxsize=1)
def _minilm():
    from memlens.models.sentence import minilm

    return minilm()


@torch.no_grad()
def encode(texts: Sequence[str]) -> Tensor:
    """Vectors (n, 384) of one batch, float32 unit rows: the mean of the last hidden states over real tokens, normalised."""
    model, tokenizer = _minilm()
    batch = tokenizer(list(texts), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
    hidden = model(**batch).last_hidden_state.float()
    real = batch["attention_mask"][..., None]
    return normalize((hidden * real).sum(1) / real.sum(1), dim=-1)


def embed(
    texts: Sequence[str],
    *,
    batch: int = 64,
    cache: str | Path | None = None,
    encoder: Callable[[Sequence[str]], Tensor] = encode,
) -> Tensor:
    """Unit vectors (n, d) float32 of n texts, each distinct text encoded once.

    Args:
        batch: texts per forward; they are sorted by length, so that little is padding.
        cache: a safetensors file of vectors by the text's hash. It is read first, and replaced whole once new texts came.
        encoder: texts -> (n, d); another model must have a cache file of its own.
    Raises:
        ValueError: a single string, an empty text, a batch below 1, a cache file of another kind, vectors that are not finite.
        FileNotFoundError: the encoder's weights are not to be had; see `memlens.models.sentence.minilm`.
    """
    check.at_least("embed", 1, batch=batch)
    if isinstance(texts, str) or not all(isinstance(text, str) and text.strip() for text in texts):
        check.fail("embed", "one string" if isinstance(texts, str) else "an empty text", "a list of texts with words")
    if not texts:
        return torch.zeros(0, DIM)
    known = _read(Path(cache)) if cache is not None else {}
    missing = sorted({text for text in texts if _key(text) not in known}, key=lambda text: (len(text), text))
    for start in range(0, len(missing), batch):
        part = missing[start : start + batch]
        vectors = encoder(part)
        check.finite("embed", vectors=vectors)
        known.update(zip(map(_key, part), vectors, strict=True))
    if cache is not None and missing:
        _write(Path(cache), known)
    return torch.stack([known[_key(text)] for text in texts])


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8")).digest()[:KEY]


def _read(path: Path) -> dict[bytes, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not path.is_file():
        return {}
    try:
        held = load(path.read_bytes())
        keys, vectors = held["keys"], held["vectors"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"embed: {path.name} is no file of vectors ({error}); delete it and they are made again"
        ) from error
    return dict(zip((bytes(row.tolist()) for row in keys), vectors, strict=True))


def _write(path: Path, known: dict[bytes, Tensor]) -> None:
    from safetensors.torch import save

    keys = torch.tensor([list(key) for key in known], dtype=torch.uint8)
    replace_files(path.parent, {path.name: save({"keys": keys, "vectors": torch.stack(list(known.values()))})})
