"""Small shipped data, each with a card: public-domain texts, ARC tasks, handwritten digits.

    ids = memlens.data.text("hamlet", start=2_000, length=512, tokenizer=tokenizer)   # (1, 512) int64
    ids.slice_name                                                                  # "hamlet[2000:2512] tokens"

Every file is checked against the hash in its card when it is read. The folder is found by `root`.
"""

from importlib import import_module

# no module here may bear the name of a function: the import of the module would hide it
_HOMES = {
    "cards": "cards", "root": "cards", "names": "texts", "text": "texts", "slice_name": "texts",
    "python_source": "texts", "arc": "grids", "grid_text": "grids", "digits": "images",
}  # fmt: skip
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        module = import_module(f"{__name__}.{_HOMES[name]}")
        return module if name == "cards" else getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
