"""The experiments on reuse: requests and queries as described, thresholds and traces against a count by hand, the stream."""

import pytest
import torch
import xarray as xr
from torch.nn.functional import normalize

from memlens.recall.store import CategoryPolicy, Example, ExampleCache
from memlens.tasks import category_studies as studies
from memlens.tasks import reuse_studies
from memlens.tasks.category_queries import CATEGORIES, category_queries
from memlens.tasks.house_formats import FAMILIES, house_requests

QUERIES = category_queries()


@pytest.fixture
def vectors():
    """Every intent has a direction of its own; wordings of one intent have cosine 0.9 or so."""
    generator = torch.Generator().manual_seed(0)
    kinds = sorted({(query.category, query.intent) for query in QUERIES})
    centre = normalize(torch.randn(len(kinds), 384, generator=generator), dim=-1)
    noise = 0.015 * torch.randn(len(QUERIES), 384, generator=generator)
    return normalize(torch.stack([centre[kinds.index((q.category, q.intent))] for q in QUERIES]) + noise, dim=-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_requests_differ_and_repeat_with_the_seed(family, generator):
    requests = house_requests(family, 24, generator=generator)
    assert len({request.text for request in requests}) == 24
    assert requests == house_requests(family, 24, generator=torch.Generator().manual_seed(0))
    words = requests[0].answer.lower()
    for mark in "#|.@[]/":
        words = words.replace(mark, " ")
    shared = [word for word in words.split() if word in requests[0].text.lower()]
    assert len(shared) >= 2  # the answer is made of the request, in another form


def test_a_date_by_hand():
    request = house_requests("dates", 1, generator=torch.Generator().manual_seed(0))[0]
    month, day, year = request.text.removeprefix("Write the date ").removesuffix(" in our format.").replace(",", "").split()
    assert request.answer == f"[{day}/{month[:3].upper()}/{year}]"


def test_each_query_is_one_of_six_wordings():
    assert len({query.text for query in QUERIES}) == len(QUERIES) == 474
    for category in CATEGORIES:
        own = [query for query in QUERIES if query.category == category]
        assert sorted(query.wording for query in own) == sorted(list(range(6)) * (len(own) // 6))


def test_unknown_questions_are_never_right(vectors):
    result = studies.answered(QUERIES, vectors, {c: CategoryPolicy(0.6) for c in CATEGORIES}, "held out")
    known = {c: sum(q.intent % 4 != 3 for q in QUERIES if q.category == c and q.wording > 3) for c in CATEGORIES}
    assert [round(float(x)) for x in result.hit * result.asked] == list(known.values())
    assert float(result["false"].max()) == 0
    always = studies.answered(QUERIES, vectors, {c: CategoryPolicy(0.0) for c in CATEGORIES}, "held out")
    assert [float(x) for x in always.hit + always["false"]] == pytest.approx([1.0] * 4)


def test_the_lowest_threshold_that_keeps_the_promise():
    false = xr.DataArray(
        [[0.5, 0.0, 0.0, 0.2], [0.02, 0.0, 0.1, 0.2], [0.01, 0.0, 0.0, 0.2]],
        {"threshold": [0.6, 0.8, 1.0], "category": list(CATEGORIES)}, ("threshold", "category"),
    )  # fmt: skip
    curve = xr.Dataset({"false": false}).assign_coords(asked=("category", [10, 10, 10, 10]))
    found = studies.calibrate(curve)
    assert [found[c] for c in CATEGORIES] == [0.8, 0.6, 1.0, 1.0]
    assert found["global"] == 1.0


def test_over_a_trace_a_lifetime_removes_every_stale_answer(vectors, generator):
    asked = studies.trace(QUERIES, 600, generator=generator)
    assert asked.now == sorted(asked.now)
    stale = []
    for ttl in (60.0, float("inf")):
        policies = {c: CategoryPolicy(0.6, ttl=ttl if c == "finance" else float("inf")) for c in CATEGORIES}
        result = studies.replay(QUERIES, vectors, asked, policies)
        assert float(result["false"].max()) == 0
        stale.append(float(result.stale.sel(category="finance")))
    assert stale[0] == 0 < stale[1]


def serve(**how):
    generator = torch.Generator().manual_seed(1)
    requests = reuse_studies.stream(160, generator=generator)
    texts = sorted({request.text for request in requests})
    place = {family: normalize(torch.randn(384, generator=generator), dim=0) for family in FAMILIES}
    noise = {text: 0.02 * torch.randn(384, generator=generator) for text in texts}
    vectors = normalize(torch.stack([place[r.family] + noise[r.text] for r in requests]), dim=-1)
    cache = ExampleCache.empty()
    for family in FAMILIES:
        for number in range(4):
            cache = cache.insert(Example(f"{family} {number}", "x", tokens=30), place[family])
    world = reuse_studies.House([], vectors, cache, [family for family in FAMILIES for _ in range(4)])
    rates = dict.fromkeys(FAMILIES, (0.0, 0.9, 0.9, 0.9))
    return reuse_studies.serve(rates, world, requests, vectors, generator=generator, warm=60, **how)


def test_where_examples_nearly_always_help_the_small_model_serves():
    served = serve()
    assert float(served.small[60:].float().mean()) > 0.8
    assert float(served.reward[60:].mean()) > 0.9 * float(served.fixed.max())
    assert served.cached == 16 + int((~served.small).sum())


def test_no_budget_routes_everything_to_the_large_model():
    served = serve(budget=0)
    assert not served.small.any()
    assert torch.allclose(served.reward, torch.tensor(1 - reuse_studies.PRICES[1]))
