"""Real and tiny language models behind one loader, and hooks that read or replace their attention."""

from importlib import import_module

_HOMES = {
    "smollm2": "real", "minilm": "sentence", "TinyLM": "tiny", "Layer": "tiny", "train": "tiny", "load_checkpoint": "tiny",
}  # fmt: skip
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
