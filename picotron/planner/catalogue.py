"""The schedules that have a name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from types import MappingProxyType
from typing import Literal

from attrs import frozen

from picotron.errors import PlanError
from picotron.planner.dualpipe import dualpipe, dualpipe_v
from picotron.planner.pipeline import Schedule
from picotron.planner.schedules import afab, bfs, interleaved, one_f_one_b
from picotron.planner.v_schedules import v_half, v_min, zb_v
from picotron.planner.validators import shown
from picotron.planner.zero_bubble import interleaved_zb, zb_h1, zb_h2

DEFAULT_VIRTUAL_STAGES = 2  # of the schedules that take any number
ELSEWHERE = {  # what PyTorch and the zero-bubble papers call them
    "gpipe": "afab",
    "interleaved1f1b": "interleaved",
    "loopedbfs": "bfs",
    "zb1p": "zb-h1",
    "zb2p": "zb-h2",
    "interleavedzerobubble": "interleaved-zb",
    "zbv": "zb-v",
    "zbvzerobubble": "zb-v",
    "dualpipev": "dualpipe-v",
}


@frozen(kw_only=True)
class Named:
    """What is known of a schedule by its name.

    ``make`` takes ranks, microbatches and, where ``virtual_stages`` is "any", stages a rank. ``placement``
    says which rank holds a stage: they go round the ranks, up them and back, or up them from both ends.
    """

    make: Callable[..., Schedule]
    virtual_stages: int | Literal["any"] = 1
    placement: Literal["loop", "v", "mirrored"] = "loop"
    splits_backward: bool = False
    bidirectional: bool = False
    paper: str
    summary: str


SCHEDULES: Mapping[str, Named] = MappingProxyType(
    {
        "afab": Named(
            make=afab,
            paper="Huang et al. 2019, GPipe, arXiv:1811.06965",
            summary="all forwards, then all backwards",
        ),
        "1f1b": Named(
            make=one_f_one_b,
            paper="Narayanan et al. 2019, PipeDream, arXiv:1806.03377",
            summary="one forward, one backward: AFAB's bubble, at most p microbatches held",
        ),
        "interleaved": Named(
            make=interleaved,
            virtual_stages="any",
            paper="Narayanan et al. 2021, Megatron-LM, arXiv:2104.04473",
            summary="1F1B with v stages a rank: 1/v of the bubble",
        ),
        "bfs": Named(
            make=bfs,
            virtual_stages="any",
            paper="Lamy-Poirier 2022, breadth-first, arXiv:2211.05953",
            summary="a stage runs all microbatches at once: few gathers of sharded weights",
        ),
        "zb-h1": Named(
            make=zb_h1,
            splits_backward=True,
            paper="Qi et al. 2023, zero bubble, arXiv:2401.10241",
            summary="1F1B with split backward: a third of the bubble, the same memory",
        ),
        "zb-h2": Named(
            make=zb_h2,
            splits_backward=True,
            paper="Qi et al. 2023, zero bubble, arXiv:2401.10241",
            summary="no bubble within a rank's span, twice the memory",
        ),
        "interleaved-zb": Named(
            make=interleaved_zb,
            virtual_stages="any",
            splits_backward=True,
            paper="Qi et al. 2023, zero bubble, arXiv:2401.10241",
            summary="interleaved 1F1B with split backward",
        ),
        "zb-v": Named(
            make=zb_v,
            virtual_stages=2,
            placement="v",
            splits_backward=True,
            paper="Qi et al. 2023, zero bubble, arXiv:2401.10241",
            summary="no bubble within a rank's span, 1F1B's memory on every rank",
        ),
        "v-half": Named(
            make=v_half,
            virtual_stages=2,
            placement="v",
            splits_backward=True,
            paper="Qi et al. 2024, controllable memory, arXiv:2405.15362",
            summary="half of 1F1B's memory",
        ),
        "v-min": Named(
            make=v_min,
            virtual_stages=2,
            placement="v",
            splits_backward=True,
            paper="Qi et al. 2024, controllable memory, arXiv:2405.15362",
            summary="a third of 1F1B's memory",
        ),
        "dualpipe": Named(
            make=dualpipe,
            placement="mirrored",
            splits_backward=True,
            bidirectional=True,
            paper="DeepSeek-V3 2024, arXiv:2412.19437",
            summary="microbatches from both ends, forward overlapped with backward, twice the parameters",
        ),
        "dualpipe-v": Named(
            make=dualpipe_v,
            virtual_stages=2,
            placement="v",
            splits_backward=True,
            paper="DeepSeek-V3 2024, arXiv:2412.19437, cut in half by Sea AI Lab",
            summary="DualPipe on half of the ranks: forward overlapped with backward",
        ),
    }
)


def make_schedule(
    name: str, num_ranks: int, num_microbatches: int, virtual_stages: int | None = None
) -> Schedule:
    """The schedule of that name; ``virtual_stages`` left out is what it has, or 2 where it takes any.

    Raises PlanError for an unknown name, or sizes that the schedule does not take.
    """
    named = known(name)
    if named.virtual_stages == "any":
        stages = DEFAULT_VIRTUAL_STAGES if virtual_stages is None else virtual_stages
        return named.make(num_ranks, num_microbatches, stages)
    if virtual_stages not in (None, named.virtual_stages):
        takers = ", ".join(other for other, row in SCHEDULES.items() if row.virtual_stages == "any")
        raise PlanError(
            f"virtual_stages of {name} must be {named.virtual_stages}, got {virtual_stages!r}; "
            f"{takers} take any"
        )
    return named.make(num_ranks, num_microbatches)


def known(name: str) -> Named:
    """The schedule of that name. Raises PlanError for an unknown one."""
    if isinstance(name, str) and name in SCHEDULES:
        return SCHEDULES[name]
    text = name.lower() if isinstance(name, str) else ""
    near = [ELSEWHERE[text]] if text in ELSEWHERE else get_close_matches(text, SCHEDULES, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise PlanError(f"schedule must be one of {', '.join(SCHEDULES)}, got {shown(name)}{hint}")
