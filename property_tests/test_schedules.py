"""Theorems of the papers about their schedules: bubble, memory, and torch's schedules of the same name.

Slots are those of F = I = W = 1 and B = 2 for one stage; idle counts from 0 to the end of the whole step.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from picotron.planner.actions import F, I, W
from picotron.planner.catalogue import SCHEDULES, make_schedule
from picotron.planner.pipeline import Schedule, peak_microbatches, schedule_of
from picotron.planner.schedule_times import (
    idle_seconds,
    own_spans,
    rank_work_seconds,
    schedule_times,
    unit_costs,
)
from picotron.planner.schedules import largest_group, loop_sizes

ranks = st.integers(1, 6)
counts = st.integers(1, 18)
chunks = st.integers(1, 4)
seconds = st.integers(1, 6)


def idle(schedule: Schedule, f: float = 1, i: float = 1, w: float = 1) -> float:
    """Seconds that each rank idles; it is the same for all, as they work alike."""
    costs = unit_costs(schedule.num_stages, f=f, i=i, w=w)
    (found,) = set(idle_seconds(schedule, costs, schedule_times(schedule, costs)))
    return found


def idle_in_span(schedule: Schedule, f: float = 1, i: float = 1, w: float = 1) -> float:
    """Seconds that the rank idles that takes longest from its first start to its last end."""
    costs = unit_costs(schedule.num_stages, f=f, i=i, w=w)
    longest = max(own_spans(schedule, schedule_times(schedule, costs)))
    return longest - max(rank_work_seconds(schedule, costs))


def peaks(schedule: Schedule) -> list[int]:
    """Activations on each rank at its fullest, A and A_W alike."""
    return [peak_microbatches(schedule, rank) for rank in range(schedule.num_ranks)]


def peak_bytes(schedule: Schedule, rank: int, held: int, split: int) -> int:
    """Most on a rank, where an F leaves ``held`` bytes, of which ``split`` remain after I until W."""
    step = np.zeros(4, dtype=np.int64)
    step[[F, I, W]] = held, split - held, -split
    return int(step[schedule.orders.phase[schedule.orders.span(rank)]].cumsum().max())


@given(st.sampled_from(sorted(set(SCHEDULES) - {"dualpipe"})), ranks, counts, chunks)
def test_any_sizes_give_a_schedule_that_ends(name: str, p: int, m: int, v: int) -> None:
    """Every rank and microbatch count is taken, and no two ranks wait for each other."""
    stages = v if SCHEDULES[name].virtual_stages == "any" else None
    schedule = make_schedule(name, p, m, stages)
    assert (schedule.num_ranks, schedule.num_microbatches) == (p, m)
    assert idle(schedule) >= p - 1


@given(st.sampled_from(["afab", "1f1b"]), ranks, counts, seconds, seconds, seconds)
def test_afab_and_1f1b_idle_alike(name: str, p: int, m: int, f: int, i: int, w: int) -> None:
    """(p - 1)(F + B), whatever F and B take."""
    assert idle(make_schedule(name, p, m), f, i, w) == (p - 1) * (f + i + w)


@given(st.sampled_from(["interleaved", "bfs"]), ranks, st.integers(1, 4), chunks, seconds, seconds)
def test_stages_that_go_round_idle_for_one_chunk(
    name: str, p: int, rounds: int, v: int, f: int, b: int
) -> None:
    """(p - 1)(F + B) of a chunk where p divides m, so 1/v as a share of the work."""
    assert idle(make_schedule(name, p, p * rounds, v), f, b / 2, b / 2) == (p - 1) * (f + b)


@given(st.sampled_from(["interleaved", "bfs"]), ranks, counts, chunks)
@example(name="interleaved", p=4, m=5, v=3)  # a group of one after a group of four would wait in a circle
def test_a_remainder_costs_nothing(name: str, p: int, m: int, v: int) -> None:
    """3(p - 1) for any m >= p; for fewer what the last rank waits for the first microbatch to come and go."""
    least = 3 * (p - 1) if m >= p else 3 * (v * (p - m) + m - 1)
    assert idle(make_schedule(name, p, m, v)) == least


@given(st.sampled_from(["zb-h1", "interleaved-zb"]), ranks, counts, chunks, seconds, seconds, seconds)
def test_split_backward_idles_less(name: str, p: int, more: int, v: int, f: int, i: int, w: int) -> None:
    """(p - 1)(F + I - W) of a chunk for m >= p, where W is the shortest of them."""
    shortest, *others = sorted((f, i, w))
    schedule = make_schedule(name, p, p + more, v if name == "interleaved-zb" else None)
    for f, i in (others, others[::-1]):
        assert idle(schedule, f, i, shortest) == (p - 1) * (f + i - shortest)


@given(ranks, counts, seconds, seconds, seconds)
@example(p=4, more=0, f=1, i=1, w=1)
def test_zb_h2_idles_in_its_span_for_what_w_cannot_fill(p: int, more: int, f: int, i: int, w: int) -> None:
    """(p - 1)(F + I - 2W) by stage span for m >= 2p - 1 if W <= F and 2W <= F + I: zero if F = I = W."""
    w, f = sorted((w, f))
    assume(2 * w <= f + i)
    schedule = make_schedule("zb-h2", p, 2 * p - 1 + more)
    assert idle_in_span(schedule, f, i, w) == (p - 1) * (f + i - 2 * w)


@given(st.sampled_from(["zb-h2", "interleaved-zb", "zb-v"]), ranks, counts)
def test_the_last_rank_works_from_its_start_to_the_end(name: str, p: int, more: int) -> None:
    """For m >= 2p - 1 the step takes the work and p - 1 forwards, 3m + p - 1 in ZB-H2: no schedule less."""
    assert idle(make_schedule(name, p, 2 * p - 1 + more)) == p - 1


@given(ranks, counts)
def test_zb_v_has_no_bubble(p: int, m: int) -> None:
    """No rank idles within its span for m >= 2p - 1; over all, p - 1 forwards from m >= p on."""
    assert idle_in_span(make_schedule("zb-v", p, 2 * p - 2 + m)) == 0
    assert idle(make_schedule("zb-v", p, p - 1 + m)) == p - 1


@given(st.integers(3, 14), st.integers(0, 20))
def test_less_memory_costs_a_bubble(p: int, more: int) -> None:
    """For m >= 2p: V-Half 3p - 4 (odd p) or 3p - 7 slots; V-Min 4p - 7, 4p - 5 or 4p - 8 (p modulo 3)."""
    m = 2 * p + more
    assert idle(make_schedule("v-half", p, m)) == (3 * p - 4 if p % 2 else 3 * p - 7)
    assert idle(make_schedule("v-min", p, m)) == 4 * p - (7, 5, 8)[p % 3]


@given(st.integers(1, 4), st.integers(0, 6), seconds, seconds)
def test_dualpipe_idles_on_half_of_the_ranks(half: int, more: int, f: int, w: int) -> None:
    """(p/2 - 1)(F&B + B - 3W) if F = I >= W, on p ranks fed from both ends or on the p/2 of DualPipeV."""
    w, f = sorted((w, f))
    expected = (half - 1) * ((f + f + w) + (f + w) - 3 * w)
    assert idle(make_schedule("dualpipe", 2 * half, 4 * half + 2 * more), f, f, w) == expected
    assert idle(make_schedule("dualpipe-v", half, 2 * half + more), f, f, w) == expected


@given(ranks, counts, chunks)
def test_peaks_where_stages_go_round(p: int, m: int, v: int) -> None:
    """AFAB m, 1F1B min(m, p - s), BFS mv; interleaved min(mv, 2(p - s - 1) + (v - 1)p + 1) chunks.

    With a remainder the last of these is of the largest group g for the ranks where that asks for more.
    """
    assert peaks(make_schedule("afab", p, m)) == [m] * p
    assert peaks(make_schedule("1f1b", p, m)) == [min(m, p - s) for s in range(p)]
    assert peaks(make_schedule("bfs", p, m, v)) == [m * v] * p
    megatron = [2 * (p - s - 1) + (v - 1) * p + 1 for s in range(p)]
    least = [p - s + (v - 1) * largest_group(loop_sizes(p, m, v)) for s in range(p)]
    found = peaks(make_schedule("interleaved", p, m, v))
    assert found == [min(m * v, max(pair)) for pair in zip(megatron, least, strict=True)]
    if m % p == 0 or m < p:
        assert found == [min(m * v, held) for held in megatron]


@given(ranks, counts, st.integers(0, 8), st.integers(0, 8))
def test_peaks_of_split_backward(p: int, more: int, split: int, released: int) -> None:
    """Rank s holds (p - s) A + s A_W in ZB-H1, (2(p - s) - 1) A + 2s A_W in ZB-H2, for any A_W <= A."""
    held = split + released
    h1, h2 = make_schedule("zb-h1", p, p + more), make_schedule("zb-h2", p, 2 * p - 1 + more)
    for s in range(p):
        assert peak_bytes(h1, s, held, split) == (p - s) * held + s * split
        assert peak_bytes(h2, s, held, split) == (2 * (p - s) - 1) * held + 2 * s * split


@given(ranks, counts)
def test_peaks_of_few_microbatches_are_no_larger(p: int, m: int) -> None:
    """p in ZB-H1, 2p - 1 in ZB-H2, m at most."""
    assert peaks(make_schedule("zb-h1", p, m)) == [min(m, p)] * p
    assert peaks(make_schedule("zb-h2", p, m)) == [min(m, 2 * p - 1)] * p


@given(ranks, counts, chunks)
def test_peaks_of_interleaved_zb(p: int, m: int, v: int) -> None:
    """Every rank holds p + (v - 1)g chunks, g the largest group: pv, which is 1F1B's p, where p divides m."""
    group = largest_group(loop_sizes(p, m, v))
    assert peaks(make_schedule("interleaved-zb", p, m, v)) == [min(m * v, p + (v - 1) * group)] * p


@given(st.integers(1, 12), st.integers(1, 30))
def test_peaks_of_v_schedules(p: int, m: int) -> None:
    """In microbatches, of two chunks: p, floor((p + 2) / 2) and floor((p + 4) / 3) on the fullest rank.

    Never more, and so many for m >= 2p; in ZB-V on every rank.
    """
    bounds = {"zb-v": 2 * p, "v-half": (p + 2) // 2 * 2, "v-min": (p + 4) // 3 * 2}
    for name, bound in bounds.items():
        assert max(peaks(make_schedule(name, p, m))) <= bound
        full = peaks(make_schedule(name, p, 2 * p + m))
        assert max(full) == bound
        assert name != "zb-v" or set(full) == {bound}


@given(st.integers(1, 4), st.integers(0, 6), st.integers(1, 20))
def test_peaks_of_dualpipe(half: int, more: int, m: int) -> None:
    """p + 1 microbatches' activations, on every rank; DualPipeV 2p + 1 chunks."""
    p = 2 * half
    assert peaks(make_schedule("dualpipe", p, 2 * p + 2 * more)) == [p + 1] * p
    assert peaks(make_schedule("dualpipe-v", half, 2 * half + 1 + more)) == [p + 1] * half
    assert max(peaks(make_schedule("dualpipe-v", half, m))) <= p + 1


TORCH = {
    "afab": "GPipe",
    "1f1b": "1F1B",
    "interleaved": "Interleaved1F1B",
    "bfs": "LoopedBFS",
    "interleaved-zb": "InterleavedZeroBubble",
    "zb-v": "ZBVZeroBubble",
    "dualpipe-v": "DualPipeV",
}


@st.composite
def torch_sizes(draw: st.DrawFn) -> tuple[str, int, int, int]:
    """(name, p, m, v) that torch takes: m is a multiple of its rounds; 1F1B wants p, DualPipeV 2p."""
    name = draw(st.sampled_from(sorted(TORCH)))
    p, m = draw(st.integers(2, 5)), draw(st.integers(1, 14))
    if name.startswith("interleaved"):
        m -= m % max(1, m // p)
    m += {"1f1b": p - 1, "dualpipe-v": 2 * p - 1}.get(name, 0)
    taken = SCHEDULES[name].virtual_stages
    return name, p, m, draw(st.integers(2, 3)) if taken == "any" else taken


def torch_schedule(name: str, p: int, m: int, v: int) -> Schedule:
    """torch's schedule as one of ours, without what it adds to compute.

    torch 2.13 numbers the forwards of 1F1B's last rank from 1, and its own validator refuses that: put right.
    """
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    kind = schedules.get_schedule_class(TORCH[name])
    stage = SimpleNamespace(group_rank=0, group_size=p, num_stages=p * v, submod=None)
    single = issubclass(kind, schedules.PipelineScheduleSingle)
    made = kind(stage if single else [stage] * v, m)
    rows = [made.pipeline_order[rank] for rank in range(p)]
    cells = [[str(action) for action in row if action is not None] for row in rows]
    cells = [[cell for cell in row if "REDUCE_GRAD" not in cell] for row in cells]
    if name == "1f1b" and f"{p - 1}F{m}" in cells[-1]:
        cells[-1] = [re.sub(r"F(\d+)", lambda number: f"F{int(number[1]) - 1}", cell) for cell in cells[-1]]
    return schedule_of(cells)


@given(torch_sizes())
@example(sizes=("zb-v", 4, 3, 2))
@example(sizes=("interleaved", 4, 10, 2))
def test_no_more_bubble_than_torch(sizes: tuple[str, int, int, int]) -> None:
    """Nor more memory on the fullest rank; less of a bubble in ZB-V where m <= p."""
    name, p, m, v = sizes
    ours, theirs = make_schedule(name, p, m, v), torch_schedule(*sizes)
    assert ours.stage_ranks == theirs.stage_ranks
    assert idle(ours) <= idle(theirs)
    assert max(peaks(ours)) <= max(peaks(theirs))
    if name == "zb-v" and m <= p:
        assert idle(ours) < idle(theirs)
