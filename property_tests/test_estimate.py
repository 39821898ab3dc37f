"""Theorems of the time estimate: sums, signs, directions, broadcasting; groups are the topology's."""

from __future__ import annotations

from typing import Any

import numpy as np
from attrs import evolve, fields
from hypothesis import example, given
from hypothesis import strategies as st

from picotron.planner.cases import ORDERS, SCHEDULE_NAMES, Cases
from picotron.planner.constants import constant_table, default_constants, keys_of, replaced
from picotron.planner.estimate import estimate_seconds
from picotron.planner.network import group, strides
from picotron.planner.software import profile_names
from picotron.planner.topology import Topology, groups
from tests.planner.estimated import case

powers = st.sampled_from([1, 2, 4, 8])
layouts = st.fixed_dictionaries(
    {
        "dp": st.sampled_from([1, 2, 8, 32]),
        "pp": powers,
        "cp": st.sampled_from([1, 2, 4]),
        "tp": powers,
        "ep": powers,
        "virtual_stages": st.sampled_from([1, 2]),
        "schedule": st.integers(0, len(SCHEDULE_NAMES) - 1),
        "micro_batch": st.sampled_from([1, 2]),
        "zero_stage": st.integers(0, 3),
        "shard": powers,
        "sequence_parallel": st.integers(0, 1),
        "recompute": st.integers(0, 2),
        "recompute_layers": st.sampled_from([0.25, 1.0]),
        "offload": st.sampled_from([0.0, 0.5]),
        "ends": st.integers(0, 1),
        "order": st.integers(0, len(ORDERS) - 1),
    }
)
classic = st.tuples(layouts, st.integers(0, 3)).map(lambda both: both[0] | {"schedule": both[1]})
described = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["llama-3.2-1b", "gpt2", "qwen3-30b-a3b", "deepseek-v3"]),
        "cluster": st.sampled_from(["h100:128x8", "v100:128x8", "gb200:16x72"]),
        "profile": st.sampled_from(profile_names()),
        "attention": st.sampled_from(["unfused", "flash-2", "cudnn"]),
    }
)


def built(about: dict[str, Any], layout: dict[str, Any]) -> Cases:
    machine = {"product": "fp8"} if about["cluster"].startswith("gb200") else {}
    return case(**about, **machine, **layout, global_batch=256, seq_len=1024)


@given(described, layouts)
def test_causes_are_seconds_and_sum(about: dict[str, Any], layout: dict[str, Any]) -> None:
    """Every cause is finite and not negative; together they are the step, which takes time."""
    estimate = estimate_seconds(built(about, layout))
    assert all(np.isfinite(value).all() and (value >= 0).all() for value in estimate.causes.values())
    assert (estimate.step_seconds == sum(estimate.causes.values())).all() and (
        estimate.step_seconds > 0
    ).all()


FASTER = (
    ["peak_flops", "peak_16bit"],
    ["memory_bytes_per_second"],
    ["intra_bytes_per_second"],
    ["inter_bytes_per_second"],
    ["host_bytes_per_second"],
)


OFFLOADED = {
    "dp": 32,
    "pp": 1,
    "cp": 1,
    "tp": 2,
    "ep": 4,
    "virtual_stages": 1,
    "schedule": 0,
    "micro_batch": 2,
}
OFFLOADED |= {"zero_stage": 3, "shard": 1, "sequence_parallel": 0, "recompute": 0, "offload": 0.5}


@example(  # copies to the host and gathers once hid under the same computing
    {"model": "qwen3-30b-a3b", "cluster": "h100:128x8", "profile": "torchtitan", "attention": "unfused"},
    OFFLOADED | {"recompute_layers": 0.25, "ends": 0, "order": 0},
    ["peak_flops", "peak_16bit"],
    2.0,
)
@given(described, classic, st.sampled_from(FASTER), st.floats(1.0, 8.0))
def test_a_faster_machine_is_never_slower(
    about: dict[str, Any], layout: dict[str, Any], columns: list[str], factor: float
) -> None:
    """More FLOP/s, memory bandwidth or bandwidth of a link, or less latency, never adds a thousandth.

    Less can be added, where less of the gradients' transfers hides under shorter passes.
    Where the host keeps up with launches and the bubble is a share of whole passes: a host-bound step gets no
    shorter, but its passes have other shares in it; so have F, I and W in the zero-bubble schedules.
    """
    cases = built(about, layout)
    quick = replaced(default_constants(), {"launch_seconds": 0.0})
    faster = {name: getattr(cases.machine, name) * factor for name in columns}
    sooner = {name: getattr(cases.machine, name) / factor for name in ("intra_seconds", "inter_seconds")}
    before = estimate_seconds(cases, quick).step_seconds
    for change in (faster, sooner):
        after = estimate_seconds(evolve(cases, machine=evolve(cases.machine, **change)), quick).step_seconds
        assert after <= before * (1 + 1e-3)


@given(described, st.lists(layouts, min_size=2, max_size=4))
def test_many_layouts_are_priced_as_one_by_one(about: dict[str, Any], several: list[dict[str, Any]]) -> None:
    """Columns of shape () and (n,) broadcast: a search's table says what single cases say."""
    many = built(about, {name: [layout[name] for layout in several] for name in several[0]})
    together = estimate_seconds(many)
    for index, layout in enumerate(several):
        alone = estimate_seconds(built(about, layout))
        np.testing.assert_allclose(together.step_seconds[index], alone.step_seconds[0], rtol=1e-12)
        for cause, value in alone.causes.items():
            np.testing.assert_allclose(together.causes[cause][index], value[0], rtol=1e-9, atol=1e-15)


@given(described, layouts, st.booleans())
def test_constants_at_their_bounds_still_give_seconds(
    about: dict[str, Any], layout: dict[str, Any], high: bool
) -> None:
    """Calibration may try every value within the stated bounds."""
    values = {
        path: max(constant.bounds[high], 1e-9)
        for constant in constant_table().values()
        for path in keys_of(constant)
        if constant.calibrated
    }
    estimate = estimate_seconds(built(about, layout), replaced(default_constants(), values))
    assert np.isfinite(estimate.step_seconds).all() and (estimate.step_seconds > 0).all()


@given(powers, powers, powers, powers, st.integers(0, len(ORDERS) - 1), st.sampled_from([4, 8, 16]))
def test_ranks_inside_a_node_are_those_of_the_topology(
    dp: int, pp: int, cp: int, tp: int, order: int, per_node: int
) -> None:
    """As many of a group's ranks share the first one's node as its stride says, under every order of axes."""
    topology = Topology(dp=dp, pp=pp, cp=cp, tp=tp, order=ORDERS[order])
    cases = case(dp=dp, pp=pp, cp=cp, tp=tp, order=order)
    cases = evolve(cases, machine=evolve(cases.machine, devices_per_node=np.asarray(float(per_node))))
    for axis, stride in strides(cases).items():
        ranks = groups(topology, axis)[0]
        inside = sum(rank // per_node == ranks[0] // per_node for rank in ranks)
        assert group(cases, getattr(cases.layout, axis), stride).inside == inside


def test_every_column_has_a_part_in_it() -> None:
    """No column of software or machine is forgotten: each changes some estimate."""
    base = {
        "dp": 16,
        "pp": 2,
        "tp": 2,
        "ep": 16,
        "zero_stage": 1,
        "shard": 16,
        "offload": 1.0,
        "micro_batch": 2,
    }
    about = {"model": "qwen3-30b-a3b", "profile": "plain", "seq_len": 4096, "global_batch": 256}
    cases = [case(**about, **base), case(**about, **base | {"recompute": "full", "recompute_layers": 0.5})]
    cases.append(case(**about | {"profile": "megatron-2025"}, **base))
    cases.append(case(model="llama-3.1-8b", recompute="full", recompute_layers=1))
    cases.append(case(**about | {"model": "llama-3.1-8b"}, dp=4, tp=8))  # switches may sum at both levels
    cases.append(case(tp=8, seq_len=256))
    unused = {"memory_bytes", "loss"}  # what only memory reads
    for part in ("software", "machine"):
        for field in fields(type(getattr(cases[0], part))):
            if field.name not in unused:
                assert any(_differs(each, part, field.name) for each in cases), field.name


def _differs(cases: Cases, part: str, name: str) -> bool:
    columns = getattr(cases, part)
    value = getattr(columns, name)
    flag = value in (0, 1) and name not in ("clock", "compute_scale", "communication_scale")
    other = {"kernels": 0.0, "architecture": 2.0}.get(name, 1.0 - value if flag else value * 0.5)
    changed = evolve(cases, **{part: evolve(columns, **{name: np.asarray(other)})})
    return bool(estimate_seconds(changed).step_seconds != estimate_seconds(cases).step_seconds)
