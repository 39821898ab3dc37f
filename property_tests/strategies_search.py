"""Strategies for searches: small requests whose whole space can be evaluated, and layouts named at random."""

from __future__ import annotations

from typing import Any

from attrs import frozen
from hypothesis import strategies as st

from picotron.planner.cases import ORDERS, RECOMPUTES, SCHEDULE_NAMES
from picotron.planner.cluster import ClusterSpec
from picotron.planner.model import ModelSpec
from picotron.planner.priced import Prices, prices
from picotron.planner.software import profile_names, software_columns, software_profile
from picotron.planner.space import Space, make_space
from picotron.planner.workload import Workload

MODELS = ("llama-tiny", "gpt2", "llama-3.1-8b", "mixtral-8x7b", "qwen3-30b-a3b", "llama-3.1-70b")
MACHINES = ("h100", "a100-80gb", "b200")


@frozen(kw_only=True)
class Request:
    """What a search is asked for."""

    model: ModelSpec
    cluster: ClusterSpec
    work: Workload
    profile: str
    choices: dict[str, Any]

    def space(self) -> Space:
        """The space of the request."""
        return make_space(self.model, self.cluster, self.work, **self.choices)

    def prices(self) -> Prices:
        """What prices its candidates."""
        software = software_columns(software_profile(self.profile), self.cluster.device.architecture)
        return prices(self.space(), software)


@st.composite
def requests(draw: st.DrawFn, names: tuple[str, ...] = MODELS) -> Request:
    """A request for up to 16 devices whose space has some thousands of candidates."""
    schedules = st.lists(st.sampled_from(SCHEDULE_NAMES), min_size=1, max_size=2, unique=True)
    choices: dict[str, Any] = {
        "schedule": draw(schedules.map(tuple)),
        "micro_batch": draw(st.sampled_from([1, 2, (1, 2), (1, 4)])),
        "order": draw(st.sampled_from([ORDERS[:1], ORDERS[1:3]])),
        "zero_stage": draw(st.sampled_from([(0, 1), (0, 3), (1, 2, 3), 2])),
        "offload": draw(st.sampled_from([0, (0, 1)])),
        "recompute": draw(st.sampled_from([RECOMPUTES, "none", ("selective", "full")])),
        "recompute_layers": draw(st.sampled_from([1.0, (0.5, 1.0)])),
        "virtual_stages": draw(st.sampled_from([(1, 2), (1, 2, 3)])),
    }
    shape = draw(st.sampled_from(["1x2", "1x4", "2x2", "2x3", "1x8", "2x4", "4x4"]))
    return Request(
        model=ModelSpec.from_hf(draw(st.sampled_from(names))),
        cluster=ClusterSpec.parse(f"{draw(st.sampled_from(MACHINES))}:{shape}"),
        work=Workload(
            global_batch=draw(st.sampled_from([4, 6, 8, 16, 32])),
            seq_len=draw(st.sampled_from([30, 128, 1024])),
        ),
        profile=draw(st.sampled_from(profile_names())),
        choices=choices,
    )


@st.composite
def named_layouts(draw: st.DrawFn, devices: int) -> dict[str, float]:
    """Any value of every choice, most often degrees whose product is the number of devices."""
    degree = st.sampled_from([1, 1, 2, 2, 3, 4, 8])
    row: dict[str, float] = {name: draw(degree) for name in ("tp", "cp", "pp", "ep", "etp")}
    left = devices // (row["tp"] * row["cp"] * row["pp"])
    row["dp"] = draw(st.sampled_from([max(1, int(left)), max(1, int(left)), 2]))
    ranks = int(row["dp"] * row["cp"])
    zero_stage = draw(st.integers(0, 3))
    recompute = draw(st.integers(0, len(RECOMPUTES) - 1))
    return row | {
        "micro_batch": draw(st.sampled_from([1, 1, 2, 3])),
        "schedule": draw(st.integers(0, len(SCHEDULE_NAMES) - 1)),
        "virtual_stages": draw(st.sampled_from([1, 1, 2, 2, 3])),
        "sequence_parallel": draw(st.integers(0, 1)),
        "zero_stage": zero_stage,
        "shard": draw(st.sampled_from([ranks, 1, 2])) if zero_stage else 1,
        "recompute": recompute,
        "recompute_layers": 1.0 if recompute else 0.0,
        "offload": draw(st.sampled_from([0.0, 1.0])),
        "ends": 0,
        "order": draw(st.integers(0, len(ORDERS) - 1)),
    }
