"""Memory across requests: what was asked and answered before, found again, used or refused, forgotten.

from memlens.recall.embed import embed

vectors = embed(["Write the date March 3, 2021 in our format."])      # (1, 384), unit rows
cache = ExampleCache.empty().insert(Example(request, answer), vectors[0])
idx, cosine = cache.near(vector, k=20)
"""

from memlens.lazy import attach

_HOMES = {
    "Cost": "index", "Index": "index", "cells": "index", "flat": "index", "hnsw": "index",
    "CategoryPolicy": "store", "Example": "store", "ExampleCache": "store", "Hit": "store", "SemanticCache": "store",
    "GainProxy": "routing", "LinearBandit": "routing", "Ridge": "routing", "adapt": "routing", "example_features": "routing",
    "knapsack_keep": "routing", "load_bias": "routing", "replay_gain": "routing", "replay_order": "routing",
    "select_examples": "routing", "ThresholdGrid": "routing",
}  # fmt: skip
__all__, __getattr__, __dir__ = attach(__name__, _HOMES)
