"""ZB-V, V-Half and V-Min: figure 2 and section 4 of Qi et al. 2024, arXiv:2405.15362."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from picotron.planner.pipeline import Schedule, peak_microbatches
from picotron.planner.schedule_times import idle_seconds, own_spans, schedule_times, unit_costs
from picotron.planner.v_schedules import v_half, v_min, zb_v

ZB_V_ENDS = (
    "0F0,0F1,0F2,0F3,0F4,0F5,0F6,7F0,7I0,7W0,7F1,7I1,7W1,7F2,7I2,7W2,7F3,7I3,7W3,0F7,0I0,0W0",
    "3F0,4F0,3F1,4F1,3F2,4F2,3F3,4F3,4I0,4W0,3F4,3I0,3W0",
)
V_MIN = """\
0F0,0F1,7F0,7I0,0F2,7W0,7F1,7I1,0I0,7W1,0F3,0W0,7F2,7I2,0I1,7W2,0W1,7F3,7I3,0I2,7W3,0W2,0I3,0W3
1F0,6F0,1F1,6I0,6W0,6F1,1F2,1I0,6I1,1W0,6W1,6F2,1F3,1I1,6I2,1W1,6W2,6F3,1I2,6I3,1W2,6W3,1I3,1W3
2F0,5F0,2F1,5I0,5F1,5W0,2I0,2F2,2W0,5I1,5F2,5W1,2I1,2F3,2W1,5I2,5F3,5W2,2I2,2W2,5I3,5W3,2I3,2W3
3F0,4F0,3F1,4F1,4I0,3I0,4W0,3W0,3F2,4F2,4I1,3I1,4W1,3W1,3F3,4F3,4I2,3I2,4W2,3W2,4I3,3I3,4W3,3W3
"""


def test_zb_v_starts_as_the_papers_figure() -> None:
    """Rank s fills the wait for the first microbatch's return with 2(p - s) - 1 forwards."""
    rows = str(zb_v(4, 8)).splitlines()
    assert rows[0].startswith(ZB_V_ENDS[0])
    assert rows[3].startswith(ZB_V_ENDS[1])


def test_input_gradients_come_before_what_nobody_waits_for() -> None:
    """With few microbatches W wait until the rank has nothing else: the I of one are not held up."""
    assert str(zb_v(2, 1)) == "0F0,3F0,3I0,3W0,0I0,0W0\n1F0,2F0,2I0,1I0,2W0,1W0\n"


def test_v_min_keeps_an_activation_as_briefly_as_can_be() -> None:
    """Each step is followed by the next rank's at once."""
    assert str(v_min(4, 4)) == V_MIN


@pytest.mark.parametrize(
    ("make", "microbatches"),
    [
        (zb_v, [1, 2, 3, 4, 5, 6, 7, 8]),
        (v_half, [1, 2, 2, 3, 3, 4, 4, 5]),
        (v_min, [1, 2, 2, 2, 3, 3, 3, 4]),
    ],
)
def test_peaks_on_one_to_eight_ranks(make: Callable[[int, int], Schedule], microbatches: list[int]) -> None:
    """p, floor((p + 2) / 2) and floor((p + 4) / 3) microbatches of a rank, two chunks each."""
    schedules = [make(p, 3 * p) for p in range(1, 9)]
    peaks = [max(peak_microbatches(one, rank) for rank in range(one.num_ranks)) for one in schedules]
    assert peaks == [2 * count for count in microbatches]


@pytest.mark.parametrize(
    ("make", "idle"),
    [
        (zb_v, [0, 1, 2, 3, 4, 5, 6, 7]),
        (v_half, [0, 1, 5, 5, 11, 11, 17, 17]),
        (v_min, [0, 1, 5, 11, 12, 17, 23, 24]),
    ],
)
def test_idle_slots_on_one_to_eight_ranks(make: Callable[[int, int], Schedule], idle: list[int]) -> None:
    """Slots that a rank idles, of 6m it works; half a pipeline's memory costs about 3p, a third about 4p."""
    for p, expected in enumerate(idle, 1):
        schedule, costs = make(p, 5 * p), unit_costs(2 * p)
        assert set(idle_seconds(schedule, costs, schedule_times(schedule, costs))) == {expected}


def test_no_rank_of_zb_v_idles_within_its_own_span() -> None:
    """Zero bubble in the paper's own figure, from 2p - 1 microbatches on."""
    schedule = zb_v(4, 7)
    assert own_spans(schedule, schedule_times(schedule, unit_costs(8))) == (42.0,) * 4
