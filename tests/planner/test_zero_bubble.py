"""ZB-H1 and ZB-H2 as figure 3 of Qi et al. 2023, arXiv:2401.10241, draws them, and their interleaving."""

from __future__ import annotations

import pytest

from picotron.planner.pipeline import Schedule
from picotron.planner.schedule_times import idle_seconds, own_spans, schedule_times, unit_costs
from picotron.planner.zero_bubble import interleaved_zb, zb_h1, zb_h2

ZB_H1 = """\
0F0,0F1,0F2,0F3,0I0,0W0,0F4,0I1,0W1,0F5,0I2,0W2,0F6,0I3,0W3,0F7,0I4,0W4,0I5,0W5,0I6,0W6,0I7,0W7
1F0,1F1,1F2,1I0,1F3,1I1,1W0,1F4,1I2,1W1,1F5,1I3,1W2,1F6,1I4,1W3,1F7,1I5,1W4,1I6,1W5,1I7,1W6,1W7
2F0,2F1,2I0,2F2,2I1,2F3,2I2,2W0,2F4,2I3,2W1,2F5,2I4,2W2,2F6,2I5,2W3,2F7,2I6,2W4,2I7,2W5,2W6,2W7
3F0,3I0,3F1,3I1,3F2,3I2,3F3,3I3,3W0,3F4,3I4,3W1,3F5,3I5,3W2,3F6,3I6,3W3,3F7,3I7,3W4,3W5,3W6,3W7
"""
ZB_H2 = """\
0F0,0F1,0F2,0F3,0F4,0F5,0F6,0I0,0W0,0F7,0I1,0W1,0I2,0W2,0I3,0W3,0I4,0W4,0I5,0W5,0I6,0W6,0I7,0W7
1F0,1F1,1F2,1F3,1F4,1I0,1F5,1I1,1F6,1I2,1W0,1F7,1I3,1W1,1I4,1W2,1I5,1W3,1I6,1W4,1I7,1W5,1W6,1W7
2F0,2F1,2F2,2I0,2F3,2I1,2F4,2I2,2F5,2I3,2F6,2I4,2W0,2F7,2I5,2W1,2I6,2W2,2I7,2W3,2W4,2W5,2W6,2W7
3F0,3I0,3F1,3I1,3F2,3I2,3F3,3I3,3F4,3I4,3F5,3I5,3F6,3I6,3W0,3F7,3I7,3W1,3W2,3W3,3W4,3W5,3W6,3W7
"""


def test_zb_h1_is_the_papers_figure() -> None:
    """1F1B's warm-up; the W of rank s are s microbatches behind its I."""
    assert str(zb_h1(4, 8)) == ZB_H1


def test_zb_h2_is_the_papers_figure() -> None:
    """2(p - s) - 1 forwards to begin with, so that the first I comes in when they are done."""
    assert str(zb_h2(4, 8)) == ZB_H2


def test_interleaved_zb_goes_round() -> None:
    """Rank 1 has its later stage's first I as soon as its first microbatch has gone round."""
    assert str(interleaved_zb(2, 4, 2)) == (
        "0F0,0F1,2F0,2F1,2I0,2W0,0F2,2I1,2W1,0F3,0I0,0W0,2F2,0I1,0W1,2F3,2I2,2W2,2I3,2W3,0I2,0W2,0I3,0W3\n"
        "1F0,1F1,3F0,3I0,3F1,3I1,3W0,1F2,1I0,3W1,1F3,1I1,1W0,3F2,3I2,1W1,3F3,3I3,3W2,1I2,3W3,1I3,1W2,1W3\n"
    )


@pytest.mark.parametrize(
    ("schedule", "idle"), [(zb_h1(4, 8), 3), (zb_h2(4, 8), 3), (interleaved_zb(4, 8), 3)]
)
def test_a_rank_idles_until_the_last_one_starts(schedule: Schedule, idle: int) -> None:
    """(p - 1)F is the least there is, for the last rank cannot start before."""
    costs = unit_costs(schedule.num_stages)
    assert set(idle_seconds(schedule, costs, schedule_times(schedule, costs))) == {idle}


def test_no_rank_of_zb_h2_idles_within_its_own_span() -> None:
    """Zero bubble in the paper's own figure: 3m from each rank's first start to its last end."""
    schedule = zb_h2(4, 8)
    assert own_spans(schedule, schedule_times(schedule, unit_costs(4))) == (24.0,) * 4
