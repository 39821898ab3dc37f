"""Schedules as pictures."""

from __future__ import annotations

from picotron.planner.pipeline import Schedule


def orders_svg(schedule: Schedule) -> str:
    """The schedule as SVG."""
    raise NotImplementedError
