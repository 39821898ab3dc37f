"""DualPipe and its half, DualPipeV: figure 5 of DeepSeek-V3, arXiv:2412.19437, for fewer ranks."""

from __future__ import annotations

import re

from picotron.planner.dualpipe import dualpipe, dualpipe_v
from picotron.planner.pipeline import peak_microbatches
from picotron.planner.schedule_times import idle_seconds, schedule_times, unit_costs

DUALPIPE = """\
0F0,0F1,0F2,3F4,3I4,3W4,3F5,(0F3;3B5)OVERLAP_F_B,(3F6;0B0)OVERLAP_F_B,3B6,(3F7;0B1)OVERLAP_F_B,3B7,0I2,0W2,0I3,0W3
1F0,2F4,1F1,2F5,1F2,2B4,(2F6;1B0)OVERLAP_F_B,(1F3;2B5)OVERLAP_F_B,(2F7;1B1)OVERLAP_F_B,2B6,1B2,2I7,1I3,2W7,1W3
1F4,2F0,1F5,2F1,1F6,2B0,(2F2;1B4)OVERLAP_F_B,(1F7;2B1)OVERLAP_F_B,(2F3;1B5)OVERLAP_F_B,2B2,1B6,2I3,1I7,2W3,1W7
0F4,0F5,0F6,3F0,3I0,3W0,3F1,(0F7;3B1)OVERLAP_F_B,(3F2;0B4)OVERLAP_F_B,3B2,(3F3;0B5)OVERLAP_F_B,3B3,0I6,0W6,0I7,0W7
"""
DUALPIPE_V = """\
0F0,0F1,0F2,3F0,3I0,3W0,3F1,(0F3;3B1)OVERLAP_F_B,(3F2;0B0)OVERLAP_F_B,3B2,(3F3;0B1)OVERLAP_F_B,3B3,0I2,0W2,0I3,0W3
1F0,2F0,1F1,2F1,1F2,2B0,(2F2;1B0)OVERLAP_F_B,(1F3;2B1)OVERLAP_F_B,(2F3;1B1)OVERLAP_F_B,2B2,1B2,2I3,1I3,2W3,1W3
"""


def test_dualpipe_feeds_both_ends() -> None:
    """The later half of the microbatches runs the mirror image of the earlier half."""
    assert str(dualpipe(4, 8)) == DUALPIPE


def test_dualpipe_v_is_one_half_of_dualpipe() -> None:
    """Ranks 0 and 1 of DualPipe, where the other flow is the first one coming back."""
    assert str(dualpipe_v(2, 4)) == DUALPIPE_V
    half = [re.sub(r"[4-7]\b", lambda late: str(int(late[0]) - 4), row) for row in DUALPIPE.splitlines()[:2]]
    assert half == DUALPIPE_V.splitlines()


def test_few_microbatches_leave_no_pairs() -> None:
    """What is left of the order for four microbatches, where partners are missing."""
    assert str(dualpipe_v(2, 2)) == "0F0,0F1,3F0,3I0,3W0,3F1,3B1,0B0,0B1\n1F0,2F0,1F1,2F1,2B0,1B0,2B1,1B1\n"


def test_memory_and_bubble_of_eight_ranks_and_twenty_microbatches() -> None:
    """The published figure: p + 1 activations, and (p/2 - 1)(F&B + B - 3W) idle with F = I = W."""
    schedule, costs = dualpipe(8, 20), unit_costs(8)
    assert [peak_microbatches(schedule, rank) for rank in range(8)] == [9] * 8
    assert set(idle_seconds(schedule, costs, schedule_times(schedule, costs))) == {3 * (3 + 2 - 3)}
