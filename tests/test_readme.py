"""What the README shows is what Picotron makes."""

from __future__ import annotations

from pathlib import Path

import picotron as pt
from picotron.planner.catalogue import make_schedule
from picotron.planner.draw_schedule import comparison_svg
from picotron.planner.draw_svg import schedule_svg

ROOT = Path(__file__).parent.parent


def test_the_readmes_picture_is_made_by_picotron():
    """docs/images/plan.svg is, to the byte, what ``picotron show --svg`` draws of the plan it names."""
    plan = pt.plan(
        pt.ModelSpec.from_hf("llama-3.1-8b"),
        pt.ClusterSpec.parse("h100:8x8"),
        pt.Workload(global_batch=128, seq_len=8192),
        pp=4,
        tp=4,
        dp=4,
        micro_batch=4,
    )
    assert (ROOT / "docs/images/plan.svg").read_text(encoding="utf-8") == schedule_svg(plan)


def test_the_picture_of_schedules_is_made_by_picotron():
    """docs/images/schedules.svg is what ``picotron schedule compare`` draws of the three that it names."""
    drawn = comparison_svg([make_schedule(name, 4, 8) for name in ("1f1b", "zb-h1", "zb-v")])
    assert (ROOT / "docs/images/schedules.svg").read_text(encoding="utf-8") == drawn
