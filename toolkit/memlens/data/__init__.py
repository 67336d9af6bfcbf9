"""Small shipped data, each with a card: public-domain texts, ARC tasks, handwritten digits.

    ids = memlens.data.text("hamlet", start=2_000, length=512, tokenizer=tokenizer)   # (1, 512) int64
    ids.slice_name                                                                  # "hamlet[2000:2512] tokens"

Every file is checked against the hash in its card when it is read. The folder is found by `root`.
"""

from memlens.lazy import attach

# no module here may bear the name of a function: the import of the module would hide it
_HOMES = {
    "root": "cards", "names": "texts", "text": "texts", "slice_name": "texts",
    "python_source": "texts", "arc": "grids", "grid_text": "grids", "digits": "images",
}  # fmt: skip
__all__, __getattr__, __dir__ = attach(__name__, _HOMES, ("cards",))
