from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
from attrs import evolve
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from picotron.errors import PlanError
from picotron.planner.bounds import along, body_seconds, schedule_seconds, sharded_seconds, standing_bytes
from picotron.planner.candidates import plan_of, representative, row_of, row_of_plan, rows_of
from picotron.planner.cases import RECOMPUTES
from picotron.planner.cluster import ClusterSpec
from picotron.planner.constraints import CONSTRAINTS, REPRESENTATIVES, Rows, broken
from picotron.planner.kept import TIE, Kept, Wanted
from picotron.planner.model import ModelSpec
from picotron.planner.rank_bytes import bytes_by_rank
from picotron.planner.space import (
    CHOICES,
    Space,
    cells,
    crossed,
    joined,
    length,
    make_space,
    memory_modes,
    schedulable,
    schedule_table,
    shardings,
    taken,
    with_bodies,
)
from picotron.planner.walk import FEW_LEAVES, covered
from picotron.planner.workload import Workload
from property_tests.strategies_search import MODELS, Request, named_layouts, requests

MANY = settings().max_examples
MOST_CANDIDATES = 60_000


def every_candidate(space: Space) -> Rows:
    """The candidates of a space as rows, made the plain way: every tree's leaf."""
    roots, _ = cells(space)
    assume(length(roots))
    bodies, parts = with_bodies(space, roots), []
    modes = np.array(memory_modes(space)).reshape(-1, 3).T
    for pp in np.unique(bodies["pp"]):
        own, table = taken(bodies, bodies["pp"] == pp), schedule_table(space, int(pp))
        can, ways = schedulable(space, own, table), shardings(space, own)
        body, schedule, way, mode = np.nonzero(
            can[:, :, None, None] & ways.valid[:, None, :, None] & np.ones(modes.shape[1], dtype=bool)
        )
        rows = taken(own, body) | {n: c[schedule] for n, c in table.items() if n != "pp"}
        rows |= {"zero_stage": ways.zero_stage[way], "shard": ways.shard[body, way]}
        chosen = zip(("recompute", "recompute_layers", "offload"), modes[:, mode], strict=True)
        parts.append({**rows, **dict(chosen)})
    rows = joined(parts)
    assume(0 < length(rows) <= MOST_CANDIDATES)
    return rows


def searched(request: Request, wanted: Wanted, *, bounded: bool) -> tuple[Kept, Any]:
    """What is kept, and the counts."""
    return covered(request.space(), request.prices(), wanted, bounded=bounded)


def listed(kept: Kept) -> list[list[tuple[float, ...]]]:
    """The fastest and the front, as tuples of choices."""
    return [[tuple(row_of(kept.rows, i).values()) for i in which] for which in (kept.fastest(), kept.front())]


@settings(max_examples=MANY // 2)
@given(
    requests(),
    st.sampled_from([1, 7]),
    st.sampled_from([1.2, 3.0, 1e9]),
    st.sampled_from([1.0, 0.25, 1e3]),
    st.sampled_from([0, FEW_LEAVES]),
)
def test_bounds_cut_nothing_that_is_kept(request, keep, reach, share, few):
    """With bounds a search finds what it finds when it evaluates every candidate, to the last choice.

    Whether it looks for promising ones first, or not.
    """
    space = request.space()
    every_candidate(space)
    limit = int(request.cluster.device.memory_bytes * share)
    wanted = Wanted(limit_bytes=limit, keep=keep, reach=reach)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("picotron.planner.walk.FEW_LEAVES", few)
        quick, counts = searched(request, wanted, bounded=True)
    slow, every = searched(request, wanted, bounded=False)
    assert listed(quick) == listed(slow)
    assert counts.covered == counts.candidates == every.candidates == every.evaluated
    assert counts.fit <= every.fit


@settings(max_examples=MANY // 4)
@given(requests())
def test_candidates_are_counted_once_each(request):
    """The count is that of the distinct layouts; each stands for itself and meets every constraint."""
    space = request.space()
    rows = every_candidate(space)
    counts = searched(request, Wanted(limit_bytes=1, keep=1, reach=1.0), bounded=True)[1]
    table = np.stack([rows[name].astype(float) for name in CHOICES])
    assert counts.candidates == length(rows) == np.unique(table, axis=1).shape[1]
    rules = [rule for rule in REPRESENTATIVES if rule.name != "order"]
    assert not broken(space.known, rows, CONSTRAINTS).any()
    assert not broken(space.known, rows, rules).any()


def combinations(space: Space) -> Iterator[dict[str, float]]:
    """All values of all choices but the degrees of experts, which are 1, with nothing left out."""
    names = [name for name in CHOICES if name not in ("shard", "recompute", "recompute_layers", "offload")]
    for values in product(*(space.domains[name] for name in names)):
        row = dict(zip(names, values, strict=True))
        ranks = row["dp"] * row["cp"]
        node = np.gcd(int(ranks), max(1, space.known.devices_per_node // int(row["tp"])))
        modes = {(mode, share, offload) for mode, share, offload in memory_modes(space)}
        for (mode, share, offload), shard in product(modes, {ranks, node} if row["zero_stage"] else {1}):
            kept = {"recompute": mode, "recompute_layers": share, "offload": offload, "shard": shard}
            yield {name: {**row, **kept}[name] for name in CHOICES}


@settings(max_examples=4)
@given(
    st.sampled_from(["llama-tiny", "gpt2"]),
    st.sampled_from(["1x2", "2x2", "1x3"]),
    st.sampled_from([("1f1b", "zb-v"), ("interleaved",)]),
)
def test_the_space_is_what_is_left_of_all_combinations(name, shape, schedule):
    """Candidates are the representatives of all combinations that meet the constraints, no others."""
    space = make_space(
        ModelSpec.from_hf(name),
        ClusterSpec.parse(f"h100:{shape}"),
        Workload(global_batch=6, seq_len=30),
        schedule=schedule,
        virtual_stages=(1, 2, 3),
        zero_stage=(0, 2),
        recompute="none",
        offload=0,
        order=(("pp", "dp", "cp", "tp"), ("dp", "pp", "cp", "tp")),
    )
    rows = rows_of(list(combinations(space)))
    allowed = ~broken(space.known, rows).any(axis=0)
    stands = ~broken(space.known, rows, [r for r in REPRESENTATIVES if r.name != "order"]).any(axis=0)
    left = {
        tuple(representative(space, row_of(rows, int(i))).values()) for i in np.flatnonzero(allowed & stands)
    }
    found = every_candidate(space)
    assert {tuple(row_of(found, i).values()) for i in range(length(found))} == left


@given(st.data(), st.sampled_from(MODELS), st.sampled_from([1, 2, 4, 6, 8]))
def test_a_layout_meets_the_constraints_exactly_if_it_can_be_planned(data, name, devices):
    """The table that prunes the space refuses what ``plan`` refuses, and nothing else."""
    model = ModelSpec.from_hf(name)
    work = Workload(
        global_batch=data.draw(st.sampled_from([4, 6, 8])), seq_len=data.draw(st.sampled_from([12, 16]))
    )
    space = make_space(model, ClusterSpec.parse(f"h100:1x{devices}"), work)
    row = data.draw(named_layouts(devices))
    refused = broken(space.known, rows_of([row]))[:, 0]
    rules = [rule for rule, bad in zip(CONSTRAINTS, refused, strict=True) if bad]
    try:
        made = plan_of(space, row)
    except PlanError:
        assert rules
        assert all(rule.explain(space.known, row) for rule in rules)
    else:
        assert not rules, [rule.explain(space.known, row) for rule in rules]
        again = row_of_plan(made)
        assert dict(representative(space, again)) == dict(representative(space, row))


@settings(max_examples=MANY // 2)
@given(requests(), st.randoms(use_true_random=False))
def test_a_bound_is_never_above_what_it_bounds(request, random):
    """Each candidate takes at least the seconds, and holds at least the bytes, of every group it is in."""
    space, prices = request.space(), request.prices()
    rows = every_candidate(space)
    rows = taken(rows, np.array(random.sample(range(length(rows)), min(200, length(rows)))))
    seconds = np.broadcast_to(prices.seconds(rows).step_seconds, length(rows))
    size = np.broadcast_to(prices.memory(rows).reserved_bytes, length(rows))
    ways = shardings(space, rows)
    wanted = np.where(rows["zero_stage"] == 0, 1, rows["shard"])
    mine = (ways.zero_stage == rows["zero_stage"][:, None]) & (ways.shard == wanted[:, None]) & ways.valid
    way = mine.argmax(axis=1)
    index = np.arange(length(rows))
    assert mine.any(axis=1).all()
    assert (standing_bytes(prices, rows, ways)[index, way] <= size * (1 + TIE)).all()
    body = body_seconds(prices, rows, ways)[index, way]
    assert (body <= seconds * (1 + TIE)).all()
    assert (sharded_seconds(prices, rows) <= seconds * (1 + TIE)).all()
    for one in index[:20]:
        table = {name: rows[name][[one]] for name in ("schedule", "virtual_stages", "ends")}
        step, pipeline = schedule_seconds(prices, taken(rows, np.array([one])), table)
        assert max(step[0, 0], body[one] + pipeline[0, 0]) <= seconds[one] * (1 + TIE)


@settings(max_examples=MANY // 10)
@given(requests(names=("gpt2", "llama-3.1-8b", "mixtral-8x7b", "qwen3-30b-a3b")), st.integers(1, 9))
def test_what_a_search_says_fits_fits(request, tenth):
    """A kept plan's exact timelines hold what was estimated, and so the limit, but for a twentieth.

    Under this package's own profile, whose kernels the timelines are of; the framework's own bytes, which are
    the same, set aside. What is left out is less than an allocator's share, and a plan's own: dense layers in
    front, stages of unequal layers, and chunks between the two fullest moments.
    """
    request = evolve(request, profile="picotron")
    space, prices = request.space(), request.prices()
    sizes = np.quantile(prices.memory(every_candidate(space)).reserved_bytes, tenth / 10)
    limit = int(np.ceil(sizes))
    kept, _ = searched(request, Wanted(limit_bytes=limit, keep=2, reach=1.0), bounded=True)
    for index in kept.fastest():
        made = plan_of(space, row_of(kept.rows, int(index)))
        fullest = max(bytes_by_rank(made), key=lambda own: own.reserved_bytes)
        framework = fullest.framework_bytes
        assert fullest.reserved_bytes - framework <= 1.05 * (kept.bytes[index] - framework)
        assert fullest.reserved_bytes <= 1.05 * limit


@settings(max_examples=MANY // 2)
@given(requests(), st.randoms(use_true_random=False))
def test_more_offload_takes_no_less_and_holds_no_more(request, random):
    """So the least share of a domain bounds the seconds of the others, and the greatest their bytes."""
    rows, prices = every_candidate(request.space()), request.prices()
    rows = taken(rows, np.array(random.sample(range(length(rows)), min(100, length(rows)))))
    shares = [rows | {"offload": np.full(length(rows), share)} for share in (0.0, 0.3, 0.6, 1.0)]
    seconds = [np.broadcast_to(prices.seconds(some).step_seconds, length(rows)) for some in shares]
    size = [np.broadcast_to(prices.memory(some).reserved_bytes, length(rows)) for some in shares]
    for less, more in zip(range(3), range(1, 4), strict=True):
        assert (seconds[less] <= seconds[more] * (1 + TIE)).all()
        assert (size[less] >= size[more] * (1 - TIE)).all()


@settings(max_examples=MANY // 2)
@given(requests(), st.randoms(use_true_random=False))
def test_prices_do_not_depend_on_the_shape_of_the_block(request, random):
    """A candidate costs the same in a block of many axes as in a plain row of candidates."""
    space, prices = request.space(), request.prices()
    rows = every_candidate(space)
    some = taken(rows, np.array(random.sample(range(length(rows)), min(6, length(rows)))))
    modes = np.array(memory_modes(space)).T
    names = ("recompute", "recompute_layers", "offload")
    flat = crossed(some, **dict(zip(names, modes.tolist(), strict=True)))
    grid = along(some, 1, 3) | {name: mode[None, None] for name, mode in zip(names, modes, strict=True)}
    shape = (1, length(some), modes.shape[1])
    for price in (lambda r: prices.seconds(r).step_seconds, lambda r: prices.memory(r).reserved_bytes):
        np.testing.assert_allclose(np.broadcast_to(price(grid), shape).ravel(), price(flat), rtol=1e-12)


def test_modes_are_told_apart():
    """A share of no layers is no recomputation, and shares of one layer are one candidate."""
    space = make_space(
        ModelSpec.from_hf("llama-tiny"), ClusterSpec.parse("cpu"), Workload(global_batch=4, seq_len=8)
    )
    shares = sorted({share for mode, share, _ in memory_modes(space) if RECOMPUTES[int(mode)] == "full"})
    layers = space.known.layers
    assert shares == sorted({max(1, round(quarter / 4 * layers)) / layers for quarter in range(1, 5)})
