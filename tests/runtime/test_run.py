"""A run brings back what the prediction promises, in the same types, or refuses before anything opens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve

from picotron.errors import PlanError
from picotron.planner.cluster import ClusterSpec
from picotron.planner.memory import memory_timeline
from picotron.planner.model import ModelSpec
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.predict import predict
from picotron.planner.program import execution_order, rows
from picotron.planner.simulate import simulate_step
from picotron.planner.timeline import STREAMS
from picotron.planner.topology import coordinate
from picotron.runtime.pipeline import Session, StepResult
from picotron.runtime.run import Measurement, run, unsupported
from picotron.runtime.simulated import simulate
from tests.runtime.models import (
    random_samples,
    random_weights,
    tiny_config,
    tiny_model,
    tiny_plan,
    tiny_workload,
    train,
)

MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 24,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 67,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


@pytest.fixture(scope="module")
def made() -> TrainingPlan:
    return tiny_plan(tiny_model("llama", tied=True), dp=2, pp=2, tp=2)


@pytest.fixture(scope="module")
def measurement(made: TrainingPlan) -> Measurement:
    return run(made, random_samples(67, 8), steps=4, weights=random_weights)


def test_a_measurement_has_a_value_for_each_step(made: TrainingPlan, measurement: Measurement) -> None:
    """Losses, norms, tokens and seconds, as the sessions gave them; the plan is the one that ran."""
    results = train(made, random_samples(67, 8), steps=4)[0].results
    assert measurement.plan is made
    assert (measurement.backend, measurement.clock, measurement.measured_step) == ("simulated", "virtual", 1)
    assert measurement.losses == tuple(result.loss for result in results)
    assert measurement.grad_norms == tuple(result.grad_norm for result in results)
    assert measurement.tokens == (8 * 8,) * 4
    assert len(measurement.seconds) == 4
    assert min(measurement.seconds) > 0


def test_a_measurement_is_what_was_predicted(made: TrainingPlan, measurement: Measurement) -> None:
    """Payload and rows of every rank, and its live bytes, are equal to the prediction's."""
    assert measurement.payload_bytes_by_rank == predict(made).payload_bytes_by_rank
    for rank, found in enumerate(measurement.rows_by_rank):
        where = coordinate(made.topology, rank)
        assert found == execution_order(rows(made.program(where.tp), where.pp))
    assert [timeline.rank for timeline in measurement.memory] == list(range(8))
    for rank, timeline in enumerate(measurement.memory):
        np.testing.assert_array_equal(timeline.live_bytes, memory_timeline(made, rank).live_bytes)


def test_a_measured_timeline_holds_every_rank(made: TrainingPlan, measurement: Measurement) -> None:
    """Each rank's rows of the measured step, in virtual seconds within the longest rank's step."""
    timeline = measurement.timeline
    assert timeline.clock == "virtual"
    for rank in range(8):
        assert sorted(timeline.row[timeline.rank == rank]) == sorted(measurement.rows_by_rank[rank])
    assert timeline.makespan_seconds > 0


def test_processor_time_is_a_typical_steps(made: TrainingPlan) -> None:
    """The median over the steps that were neither the first nor measured, for each rank."""
    seen: dict[int, list[float]] = {rank: [] for rank in range(8)}

    def observe(session: Session, result: StepResult) -> None:
        seen[session.backend.rank].append(result.cpu_seconds)

    found = run(made, random_samples(67, 8), steps=5, on_step=observe).cpu_seconds_by_rank
    assert found == tuple(median(seen[rank][2:]) for rank in range(8))


def test_every_rank_is_observed_after_every_step(made: TrainingPlan) -> None:
    """The observer has the session and the step's whole result; memory only where it was measured."""
    seen: list[tuple[int, int, bool]] = []

    def observe(session: Session, result: StepResult) -> None:
        seen.append((result.step, session.backend.rank, result.memory is not None))
        assert result.entries
        assert session.num_steps == result.step + 1

    run(made, random_samples(67, 8), steps=3, on_step=observe, measure_step=2)
    assert sorted(seen) == [(step, rank, step == 2) for step in range(3) for rank in range(8)]


@pytest.mark.parametrize(("steps", "asked", "measured"), [(1, 1, 0), (2, 1, 1), (3, 9, 2), (3, 0, 0)])
def test_the_measured_step_is_the_last_if_there_are_fewer(steps: int, asked: int, measured: int) -> None:
    """Step 1 is asked for unless another is."""
    found = run(tiny_plan(tiny_model("llama")), random_samples(67, 8), steps=steps, measure_step=asked)
    assert found.measured_step == measured
    assert len(found.memory) == 1


def test_a_run_on_an_open_backend_is_the_same(made: TrainingPlan, measurement: Measurement) -> None:
    """Handed its world, each rank returns the measurement of all."""
    data = random_samples(67, 8)
    found = simulate(lambda b: run(made, data, steps=4, backend=b, weights=random_weights), 8)
    for each in found:
        assert each.losses == measurement.losses
        assert each.payload_bytes_by_rank == measurement.payload_bytes_by_rank
        assert len(each.cpu_seconds_by_rank) == 8


def test_the_interleaving_is_no_part_of_the_result(made: TrainingPlan, measurement: Measurement) -> None:
    """Another seed runs the ranks in another order to the same losses, to the bit."""
    again = run(made, random_samples(67, 8), steps=4, weights=random_weights, seed=7)
    assert again.losses == measurement.losses
    assert again.grad_norms == measurement.grad_norms


def test_copies_to_a_slow_host_take_the_predicted_time() -> None:
    """Every row, on either rank; beside computing that is shorter than they are."""
    made = tiny_plan(tiny_model("llama", layers=4), pp=2, schedule="zb-h1", recompute="full", offload=True)
    device = evolve(made.cluster.device, host_bytes_per_second=1e6)
    made = evolve(made, cluster=evolve(made.cluster, device=device))
    measured, planned = run(made, random_samples(67, 8), steps=1), simulate_step(made).timeline
    for column in ("rank", "row", "start", "end"):
        np.testing.assert_array_equal(getattr(measured.timeline, column), getattr(planned, column))
    copies = planned.stream == STREAMS.index("copy")
    assert copies.sum() == 2 * 2 * made.num_microbatches
    assert (planned.end - planned.start)[copies] == pytest.approx(2 * made.dims().local_bytes / 1e6)


def test_text_on_disk_is_trained_on(tmp_path: Path) -> None:
    """A path is read as bytes; a model that covers them learns a text of two letters in 20 steps."""
    (tmp_path / "text.txt").write_text("ab" * 200)
    model = tiny_model("gpt2", vocab=256, tied=True)
    work = tiny_workload(optimizer="adamw", learning_rate=1e-2, precision="fp32")
    for path in (tmp_path, str(tmp_path / "text.txt")):
        losses = run(tiny_plan(model, work, dp=2), path, steps=20).losses
        assert losses[-1] < 0.5 * losses[0]


def test_a_run_leaves_torch_as_it_was(made: TrainingPlan) -> None:
    """Random state, threads and gradient mode are the caller's."""
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    run(made, random_samples(67, 8), steps=1)
    assert torch.get_rng_state().equal(before)
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


def refused(**changes: Any) -> TrainingPlan:
    """A plan that can be priced: its model, workload and parallelism changed."""
    config = changes.pop("config", tiny_config("llama"))
    work = tiny_workload(**changes.pop("work", {}))
    ranks = changes.get("cp", 1)
    cluster = ClusterSpec.preset("cpu", devices_per_node=ranks)
    return plan(ModelSpec.from_hf(config), cluster, work, **{"dp": 1, **changes})


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
REFUSED: dict[str, tuple[Callable[[], TrainingPlan], str]] = {
    "mixtral": (lambda: refused(config=MIXTRAL), "the family mixtral"),
    "fp16": (lambda: refused(work={"precision": "fp16"}), "precision fp16"),
    "yarn": (lambda: refused(config=tiny_config("llama", rope_scaling=YARN)), "rope scaling yarn"),
    "gated gelu": (
        lambda: refused(config=tiny_config("llama", hidden_act="gelu_pytorch_tanh")),
        "activation",
    ),
    "plain silu": (lambda: refused(config=tiny_config("gpt2", activation_function="silu")), "activation"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_run_yet_is_refused_by_name(case: str) -> None:
    """A plan that can be priced and not run is told what is missing, before the backend opens."""
    make, words = REFUSED[case]
    made = make()
    (line,) = unsupported(made)
    assert words in line
    with pytest.raises(PlanError, match=f"can be priced but not run yet: .*{words}"):
        run(made, random_samples(67, 8), steps=1, backend="gloo")


def test_everything_that_is_missing_is_listed() -> None:
    """One line each; an unknown backend is one of them."""
    made = refused(config=MIXTRAL, work={"precision": "fp16"})
    lines = unsupported(made, "tpu")
    assert len(lines) == 3
    assert lines[-1] == "the backend tpu (runnable: simulated, gloo, nccl)"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
@pytest.mark.parametrize("backend", ["simulated", "gloo", "nccl"])
def test_what_can_run_lacks_nothing(family: str, backend: str) -> None:
    """Every runnable family in fp32 and fp64."""
    for precision in ("fp32", "fp64"):
        made = tiny_plan(tiny_model(family), tiny_workload(precision=precision), pp=2, tp=2)
        assert unsupported(made, backend) == ()


@pytest.mark.parametrize("steps", [0, -1, 1.0, True, "3"])
def test_steps_are_a_whole_number_of_at_least_one(steps: Any) -> None:
    """Anything else is refused with what was given."""
    with pytest.raises(PlanError, match=f"steps must be a whole number of at least 1, got {steps!r}"):
        run(tiny_plan(tiny_model("llama")), random_samples(67, 8), steps=steps)


@pytest.mark.parametrize("measure_step", [-1, "1"])
def test_the_measured_step_is_a_whole_number(measure_step: Any) -> None:
    """A step that can never come is refused."""
    with pytest.raises(PlanError, match="measure_step must be"):
        run(tiny_plan(tiny_model("llama")), random_samples(67, 8), steps=2, measure_step=measure_step)


def test_bad_data_is_refused(tmp_path: Path) -> None:
    """No samples, an empty path, ids the model has no row for, at once or later."""
    made = tiny_plan(tiny_model("llama"))
    with pytest.raises(PlanError, match="must hold at least one sample of seq_len 8, got none"):
        run(made, [], steps=1)
    with pytest.raises(PlanError, match="the data path must exist, got 'nowhere'"):
        run(made, "nowhere", steps=1)
    (tmp_path / "text.txt").write_text("the letter t is 116")
    with pytest.raises(PlanError, match=r"must be in \[0, 67\), the vocabulary of llama, got 116"):
        run(made, tmp_path, steps=1)
    with pytest.raises(PlanError, match=r"must be in \[0, 67\), the vocabulary of llama, got 99"):
        run(made, [np.array([1, 2]), np.array([1, 99])], steps=1)


def test_the_id_that_is_refused_is_named() -> None:
    """A negative one is, too."""
    with pytest.raises(PlanError, match=r"must be in \[0, 67\), the vocabulary of llama, got -1"):
        run(tiny_plan(tiny_model("llama")), [np.array([-1, 3])], steps=1)


def test_a_sample_without_tokens_is_refused() -> None:
    """An empty array is no sample."""
    with pytest.raises(PlanError):
        run(tiny_plan(tiny_model("llama")), [np.array([], dtype=np.int64)], steps=1)
