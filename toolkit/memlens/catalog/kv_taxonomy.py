"""Where the KV-cache methods stand in a survey's taxonomy: three levels, 28 leaves, one primary leaf for each method.

    kv_taxonomy["token"]["selection"]["static"]        ("snapkv",)
    leaves()                                           "token/selection/static" -> its methods, in the survey's order
    coverage()                                         xarray (leaf): how many methods of memlens each leaf has

A method is a catalogue key, or the name of a preset without a paper of its own here. `ON_THE_LIST` are those that the survey's
own reading list places; the others are placed by us, and `NEAREST` says which of these fit no leaf well. `ALSO` names what a
method does besides its primary leaf. Source: arXiv:2412.19442, and the reading list of its authors (Awesome-KV-Cache-Management).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memlens import check

if TYPE_CHECKING:
    import xarray

__all__ = ["ALSO", "NEAREST", "ON_THE_LIST", "STUDIES", "coverage", "kv_taxonomy", "leaf_of", "leaves"]

kv_taxonomy: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {
    "token": {
        "selection": {
            "static": ("snapkv",),
            "dynamic, evicting": ("h2o", "scissorhands", "keyformer", "sirllm", "locret", "streaming", "tova"),
            "dynamic, not evicting": (),
        },
        "budget": {"by layer": ("prefixkv",), "by head": ()},
        "merging": {"within a layer": ("d2o", "elasticcache"), "across layers": ()},
        "quantisation": {"fixed precision": (), "mixed precision": ("kivi", "mikv"), "outlier redistribution": ("ksort",)},
        "low rank": {"singular values": ("shadowkv", "think"), "tensors": (), "learned": ()},
    },
    "model": {
        "grouping and sharing": {"within a layer": (), "across layers": ()},
        "altered architecture": {"enhanced attention": (), "augmented": ()},
        "no transformer": {"adaptive sequence": (), "hybrid": ("based",)},
    },
    "system": {
        "memory management": {"architectural": ("iccache", "categorycache"), "prefix-aware": ("edgereasoning",)},
        "scheduling": {"prefix-aware": ("batchllm",), "preemptive and fair": (), "by layer, hierarchical": ()},
        "hardware-aware": {
            "one or several GPUs": (),
            "input and output": ("flashattention",),
            "heterogeneous": ("lamina", "apex_hybrid"),
            "SSD": ("instinfer",),
        },
    },
}

ON_THE_LIST = (
    "snapkv", "h2o", "scissorhands", "keyformer", "prefixkv", "d2o", "kivi", "mikv", "shadowkv", "batchllm", "instinfer",
    "flashattention",
)  # fmt: skip
NEAREST = {
    "think": "dropping channels projects keys on axes, not on singular vectors",
    "iccache": "it reuses answers of a larger model, not keys and values",
    "categorycache": "it reuses answers, not keys and values",
}
ALSO = {
    "shadowkv": ("token/selection/dynamic, not evicting", "system/hardware-aware/heterogeneous"),
    "instinfer": ("token/selection/dynamic, not evicting",),
    "d2o": ("token/budget/by layer", "token/selection/dynamic, evicting"),
    "elasticcache": ("token/selection/static",),
    "prefixkv": ("token/selection/static",),
    "mikv": ("token/quantisation/outlier redistribution",),
    "batchllm": ("system/memory management/prefix-aware",),
}
STUDIES = {
    "kvsurvey": "the taxonomy itself",
    "kvstrategies": "a survey by directions and situations",
    "scbench": "a benchmark of methods from many leaves",
}


def leaves() -> dict[str, tuple[str, ...]]:
    """The methods on each leaf, by path `level/branch/leaf`."""
    return {
        f"{level}/{branch}/{leaf}": methods
        for level, branches in kv_taxonomy.items()
        for branch, under in branches.items()
        for leaf, methods in under.items()
    }


def leaf_of(method: str) -> str:
    """The path of a method's primary leaf.

    Raises:
        ValueError: a method that is on none; a study has no leaf, and the message says so.
    """
    found = {key: path for path, methods in leaves().items() for key in methods}
    if method in STUDIES:
        check.fail("leaf_of", f"method={method!r}", "a method", f"it is a study: {STUDIES[method]}")
    check.one_of("leaf_of", found, method=method)
    return found[method]


def coverage() -> xarray.DataArray:
    """Methods of memlens on each leaf, (leaf) int, with the level as a coordinate; 0 where none is."""
    import xarray

    table = leaves()
    coords = {"leaf": list(table), "level": ("leaf", [path.partition("/")[0] for path in table])}
    counts = xarray.DataArray([len(methods) for methods in table.values()], coords, ("leaf",), "methods")
    return counts.assign_attrs(long_name="methods with this primary leaf", units="")
