"""Real and tiny language models behind one loader, and hooks that read or replace their attention."""

from memlens.lazy import attach

_HOMES = {
    "smollm2": "real", "minilm": "sentence", "TinyLM": "tiny", "Layer": "tiny", "train": "tiny", "load_checkpoint": "tiny",
}  # fmt: skip
__all__, __getattr__, __dir__ = attach(__name__, _HOMES)
