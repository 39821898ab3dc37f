"""Bubbles, idle by cause and the critical path of small steps, by hand."""

from __future__ import annotations

import pytest

from picotron.planner.analysis import (
    bubble_fraction,
    bubble_seconds,
    critical_path,
    exposed_seconds,
    idle_causes,
    work_seconds,
)
from picotron.planner.flow import Times, program_times
from picotron.planner.lower import lower, with_transfers
from picotron.planner.passes import with_unsharding
from picotron.planner.pipeline import schedule_from_csv
from picotron.planner.program import Kind, Program, rows
from picotron.planner.schedule_times import unit_costs
from picotron.planner.schedules import afab, one_f_one_b


def _path(program: Program, times: Times) -> str:
    return " ".join(f"{rank}:{rows(program, rank)[row]}" for rank, row in critical_path(program, times))


def _causes(program: Program, times: Times, rank: int) -> dict[str, float]:
    return {cause: seconds for cause, seconds in idle_causes(program, times)[rank].items() if seconds}


def test_1f1b_on_two_ranks() -> None:
    """F=1, B=2, free messages: rank 1 idles at both ends, rank 0 between; the path turns at rank 1's work."""
    program = with_transfers(one_f_one_b(2, 2), 4)
    times = program_times(program, unit_costs(2))
    assert times.makespan_seconds == 9.0
    assert work_seconds(program, times) == (6.0, 6.0)
    assert bubble_seconds(program, times) == (3.0, 3.0)
    assert bubble_fraction(program, times) == pytest.approx(1 / 3)
    assert _causes(program, times, 0) == {"backward": 3.0}
    assert _causes(program, times, 1) == {"warm-up": 1.0, "end": 2.0}
    assert exposed_seconds(program, times) == (0.0, 0.0)
    assert _path(program, times) == "0:0F0 0:0SEND_F0 1:1F0 1:1B0 1:1F1 1:1B1 1:1SEND_B1 0:0B1"


def test_a_slow_channel_holds_its_sender_up() -> None:
    """Messages of 2 s: the second send waits a second for the first one; transfers show on both ranks."""
    program = with_transfers(afab(2, 2), 4)
    times = program_times(program, unit_costs(2, transfer=2.0))
    assert _causes(program, times, 0) == {"send": 1.0, "backward": 7.0}
    assert _causes(program, times, 1) == {"warm-up": 3.0, "forward": 1.0, "send": 2.0, "end": 2.0}
    assert times.makespan_seconds == 14.0
    assert exposed_seconds(program, times) == (3.0, 5.0)
    assert _path(program, times) == ("0:0F0 0:0SEND_F0 0:0SEND_F1 1:1F1 1:1B0 1:1SEND_B0 0:0B0 0:0B1")


def test_waiting_for_others_at_the_end_is_the_end() -> None:
    """The norm is computed together: who comes first has nothing left to do; only the sum itself shows."""
    schedule = one_f_one_b(2, 2)
    program = lower(
        schedule,
        boundary_bytes=4,
        buckets=((), ()),
        bucket_bytes=((), ()),
        data_parallel=False,
        world_size=2,
    )
    times = program_times(program, unit_costs(2), bytes_per_second={Kind.NORM: 48.0}, update_seconds=0.25)
    assert times.makespan_seconds == 9.75
    assert _causes(program, times, 0) == {"backward": 3.0, "collective": 0.5}
    assert _causes(program, times, 1) == {"warm-up": 1.0, "collective": 0.5, "end": 2.0}


def test_gathering_shows_only_where_nothing_is_computed_beside_it() -> None:
    """Parameters of 1 s: the first gathering is waited for, that of stage 1 runs beside 0F0."""
    program = with_unsharding(with_transfers(schedule_from_csv("0F0,1F0,1B0,0B0\n"), 4), [8, 8])
    times = program_times(program, unit_costs(2), bytes_per_second={Kind.UNSHARD: 8.0})
    assert _causes(program, times, 0) == {"collective": 1.0}
    assert exposed_seconds(program, times) == (1.0,)
    assert _path(program, times) == "0:0UNSHARD 0:0F0 0:1F0 0:1B0 0:0B0"
