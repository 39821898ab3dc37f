"""A session walks the plan's rows and nothing else, and says where the world departed from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate

import numpy as np
import pytest
import torch
from attrs import evolve

from picotron.errors import ExecutionError
from picotron.planner.pipeline import schedule_from_csv
from picotron.planner.plan import TrainingPlan
from picotron.planner.program import Kind, rows
from picotron.runtime.backend import Backend
from picotron.runtime.data import collate, step_batches
from picotron.runtime.pipeline import LossError, Session, StepResult
from picotron.runtime.simulated import simulate
from tests.runtime.models import (
    TOLERANCE,
    assert_as_planned,
    distance,
    memory_shares,
    random_samples,
    random_weights,
    reference,
    single_rank,
    tiny_model,
    tiny_plan,
    tiny_workload,
    train,
)

Damage = Callable[[Session], object]


def step(session: Session) -> StepResult:
    """The session's next step on random samples."""
    made = session.plan
    data = random_samples(made.model.vocab_size, made.workload.seq_len)
    consumed = session.num_steps * made.workload.global_batch
    return session.step(step_batches(made, data, consumed=consumed, dp_index=session.where.dp))


def failure(made: TrainingPlan, damage: Damage) -> ExecutionError:
    """The error of a step of sessions that ``damage`` was done to."""

    def main(backend: Backend) -> None:
        session = Session(made, backend, random_weights)
        damage(session)
        step(session)

    with pytest.raises(ExecutionError) as caught:
        simulate(main, made.topology.world_size)
    return caught.value


def row_of(made: TrainingPlan, kind: Kind) -> int:
    """The first row of ``kind`` on the first stage."""
    return made.program().kind[: made.program().offsets[1]].tolist().index(kind)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_world_of_another_size_is_refused(world_size: int) -> None:
    """Before any group opens, with what to do about it."""
    made = tiny_plan(tiny_model("llama"), dp=2)
    expected = f"the plan needs 2 ranks, got a world of {world_size}; launch 2 processes or plan again"
    with pytest.raises(ExecutionError, match=expected):
        simulate(lambda backend: Session(made, backend), world_size)


@pytest.mark.parametrize(
    "csv",
    [
        "0F0,0F1,0F2,0F3,0B3,0B2,0B1,0B0\n1F0,1F1,1F2,1F3,1B3,1B2,1B1,1B0\n",
        "0F2,0F0,0B2,0F1,0B0,0F3,0B1,0B3\n1F2,1B2,1F0,1B0,1F1,1B1,1F3,1B3\n",
    ],
    ids=["last in, first out", "out of order"],
)
def test_any_schedule_trains_the_same(csv: str) -> None:
    """A schedule of one's own, its microbatches in any order, gives the single rank's gradients."""
    work = tiny_workload(global_batch=4)
    made = tiny_plan(tiny_model("qwen3", tied=True), work, pp=2, schedule=schedule_from_csv(csv))
    reports = train(made, random_samples(67, 8), measure_from=1)
    assert distance(made, reports, reference(single_rank(made))).largest <= TOLERANCE["fp64"]
    assert_as_planned(made, reports)
    assert min(memory_shares(made, reports)) >= 0.98


@pytest.mark.parametrize("num_microbatches", [1, 2, 3, 6])
@pytest.mark.parametrize("pp", [1, 2, 4])
def test_1f1b_holds_as_few_microbatches_as_it_says(pp: int, num_microbatches: int) -> None:
    """Stage s had run min(m, p - s) forwards more than backwards at most; all-forward has run m."""
    model, work = tiny_model("llama", layers=4), tiny_workload(global_batch=num_microbatches)
    for schedule in ("1f1b", "afab"):
        made = tiny_plan(model, work, pp=pp, schedule=schedule)
        for stage, report in enumerate(train(made, random_samples(67, 8), steps=1)):
            own = rows(made.program(), stage)
            step = {Kind.FORWARD: 1, Kind.BACKWARD: -1}
            ran = [step.get(own[entry[1]].kind, 0) for entry in report.results[0].entries]
            held = min(num_microbatches, pp - stage) if schedule == "1f1b" else num_microbatches
            assert max(accumulate(ran)) == held


@pytest.mark.parametrize("bucket_bytes", [1, 2_000, 2**30])
def test_buckets_of_any_size_train_the_same(bucket_bytes: int) -> None:
    """A bucket a tensor, a few and one for each set of groups."""
    made = tiny_plan(tiny_model("llama", tied=True), dp=2, pp=2, tp=2, bucket_bytes=bucket_bytes)
    reports = train(made, random_samples(67, 8))
    assert distance(made, reports, reference(single_rank(made))).largest <= TOLERANCE["fp64"]
    assert_as_planned(made, reports)


def test_every_rank_knows_the_steps_result() -> None:
    """Loss, norm and tokens are the same to the bit on every rank; the rest is each rank's own."""
    made = tiny_plan(tiny_model("gpt2", tied=True), dp=2, pp=2, tp=2)
    reports = train(made, random_samples(67, 8), steps=3)
    for number in range(3):
        results = [report.results[number] for report in reports]
        assert len({(r.loss, r.grad_norm, r.num_tokens, r.learning_rate, r.step) for r in results}) == 1
        assert results[0].step == number
        assert results[0].num_tokens == 8 * 8
    assert all(result.seconds > 0 and result.cpu_seconds > 0 for result in results)
    assert all(result.memory is None for result in results)


def test_entries_are_in_order_on_the_ranks_own_clock() -> None:
    """Rows start no earlier than the step and end no earlier than they start, within the step."""
    made = tiny_plan(tiny_model("llama"), dp=2, pp=2)
    for rank, report in enumerate(train(made, random_samples(67, 8), steps=2)):
        for result in report.results:
            assert all(entry[0] == rank for entry in result.entries)
            assert all(0 <= start <= end <= result.seconds for *_, start, end in result.entries)
            starts = [entry[4] for entry in result.entries if entry[3] == 0]
            assert starts == sorted(starts)


def test_gradients_start_from_nothing_each_step() -> None:
    """Two steps on the same samples at rate zero have the same gradients."""
    made = tiny_plan(tiny_model("llama"), tiny_workload(learning_rate=0.0), dp=2)
    for report in train(made, random_samples(67, 8, count=8), steps=2):
        first, second = report.results
        assert first.loss == pytest.approx(second.loss, rel=1e-12)
        assert first.grad_norm == pytest.approx(second.grad_norm, rel=1e-12)


def test_a_segment_that_skips_its_collective_is_found() -> None:
    """The error names rank, row and operation, and what is missing."""
    made = tiny_plan(tiny_model("llama"), tp=2, sequence_parallel=True)

    def damage(session: Session) -> None:
        session.runners[1].forward = lambda x, tokens: (x, {})  # type: ignore[method-assign]

    error = failure(made, damage)
    assert error.rank in (0, 1)
    assert error.action is not None
    assert error.action.startswith("0F0 attention")
    assert error.position == f"row {row_of(made, Kind.FORWARD)}, operation 0"
    assert "ended before its planned all_gather 'gather attention input'" in str(error)


@pytest.mark.parametrize(
    ("method", "kind", "missing"),
    [
        ("backward_input", Kind.BACKWARD_INPUT, "reduce_scatter"),
        ("backward_weight", Kind.BACKWARD_WEIGHT, "all_gather"),
    ],
)
def test_the_half_of_a_backward_and_the_stage_that_failed_are_named(
    method: str, kind: Kind, missing: str
) -> None:
    """Rank 0 of a V holds stages 0 and 3: what stage 3 does wrong is told as its own, in I and in W."""
    model = tiny_model("llama", layers=4)
    made = tiny_plan(model, tiny_workload(global_batch=2), pp=2, tp=2, schedule="zb-v")

    def damage(session: Session) -> None:
        if session.where.pp == 0:
            setattr(session.runners[-1], method, lambda saved, dy=None: dy)

    error = failure(made, damage)
    own = rows(made.program(), 0)
    index = next(i for i, row in enumerate(own) if row.kind is kind and row.stage == 3)
    assert error.rank in (0, 1)
    assert error.action == f"{own[index]} head"
    assert error.position == f"row {index}, operation 0"
    assert f"ended before its planned {missing}" in str(error)


@pytest.mark.parametrize("schedule", ["interleaved", "zb-v"])
def test_a_hand_over_on_one_rank_is_no_message(schedule: str) -> None:
    """One rank with both stages sends nothing; a V of two sends twice each way, not across its turn."""
    work, data = tiny_workload(global_batch=3), random_samples(67, 8)
    alone = tiny_plan(tiny_model("llama"), work, schedule=schedule)
    (report,) = train(alone, data, steps=1)
    assert report.results[0].payload_bytes == ()
    pair = tiny_plan(tiny_model("llama", layers=4), work, pp=2, schedule=schedule)
    reports = train(pair, data, steps=1)
    sent = [{(k, g): size for k, g, size in r.results[0].payload_bytes} for r in reports]
    borders = {"interleaved": 3, "zb-v": 2}[schedule]
    total = 2 * borders * 3 * pair.dims().local_bytes  # forward and back, of three microbatches
    assert sum(own["send", "pp"] for own in sent) == total
    assert sum(own["recv", "pp"] for own in sent) == total


def test_a_message_of_another_size_is_found() -> None:
    """The error names the row that sends, not the one that computed."""
    made = tiny_plan(tiny_model("llama"), pp=2)

    def damage(session: Session) -> None:
        runner, forward = session.runners[-1], session.runners[-1].forward
        if session.where.pp == 0:
            runner.forward = lambda x, tokens: (forward(x, tokens)[0][:-1], {})  # type: ignore[method-assign]

    error = failure(made, damage)
    assert error.rank == 0
    assert "send over pp must carry the planned 1536 bytes, got 1344" in str(error)
    assert (error.action, error.position) == ("0SEND_F0", f"row {row_of(made, Kind.SEND_F)}")


def test_a_step_needs_a_label() -> None:
    """Samples of one token each have nothing to learn; every rank says so, once."""
    made = tiny_plan(tiny_model("llama"), tiny_workload(global_batch=2), dp=2)

    def main(backend: Backend) -> str:
        with pytest.raises(ExecutionError) as caught:
            Session(made, backend).step([collate([np.array([1])], 8)])
        return str(caught.value)

    for rank, message in enumerate(simulate(main, 2)):
        assert message.endswith("a step needs at least one token with a label, got none")
        assert message.count(f"rank {rank}") == 1


def test_microbatches_without_labels_are_allowed() -> None:
    """One of two ranks has no label at all: the loss is the other's mean."""
    made = tiny_plan(tiny_model("llama"), tiny_workload(global_batch=2), dp=2)
    labelled = collate([np.arange(9)], 8)

    def spread(backend: Backend) -> StepResult:
        session = Session(made, backend, random_weights)
        return session.step([labelled if backend.rank else collate([np.array([1])], 8)])

    def alone(backend: Backend) -> StepResult:
        plan = single_rank(evolve(made, workload=tiny_workload(global_batch=2)))
        return Session(plan, backend, random_weights).step([labelled, collate([np.array([1])], 8)])

    (expected,) = simulate(alone, 1)
    for result in simulate(spread, 2):
        assert result.num_tokens == 8
        assert result.loss == pytest.approx(expected.loss, rel=1e-12)
        assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-12)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_loss_that_is_no_number_changes_no_weight(poison: float, rank: int, optimizer: str) -> None:
    """One bad element on one of eight ranks: all raise LossError, and all weights stay as they were."""
    work = tiny_workload(optimizer=optimizer, max_skipped_steps=0)
    made = tiny_plan(tiny_model("llama", tied=True), work, dp=2, pp=2, tp=2)

    def main(backend: Backend) -> str:
        session = Session(made, backend, random_weights)
        step(session)
        if backend.rank == rank:
            next(w for name, w in session.weights.items() if "up_proj" in name)[0, 0] = poison
        before = {name: weight.clone() for name, weight in session.weights.items()}
        with pytest.raises(LossError) as caught:
            step(session)
        for name, weight in session.weights.items():
            assert torch.equal(weight.nan_to_num(), before[name].nan_to_num())
        assert session.num_steps == 1
        assert (caught.value.rank, caught.value.action) == (backend.rank, "NORM")
        return str(caught.value).split(": ", 1)[1]

    (message,) = set(simulate(main, 8))
    assert message.startswith("loss and gradient norm must be finite, got ")
    assert "in step 1; the weights are those of the last good step" in message


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_a_step_without_a_finite_loss_is_skipped(precision: str) -> None:
    """NaN in what one of eight ranks computes: all skip the step alike, weights and optimizer as they were.

    The second in a row ends the run where one is allowed; a good step in between begins the count anew.
    """
    work = tiny_workload(optimizer="adamw", precision=precision, max_skipped_steps=1)
    made = tiny_plan(tiny_model("llama", tied=True), work, dp=2, pp=2, tp=2)

    def main(backend: Backend) -> tuple[tuple[bool, ...], str]:
        session, found = Session(made, backend, random_weights), []
        own = next(w for name, w in session.weights.items() if "up_proj" in name)

        def state() -> list[torch.Tensor]:
            standing = session.parameters.standing()
            return [t.clone().nan_to_num() for t in (*standing["parameters"], *standing["optimizer"])]

        for poisoned in (False, True, False, True):
            kept = own[0, 0].clone()
            own[0, 0] = math.nan if poisoned and backend.rank == 5 else kept
            before, result = state(), step(session)
            after = state()
            found.append(result.skipped)
            assert math.isnan(result.loss) is result.skipped
            assert all(map(torch.equal, before, after)) is result.skipped
            own[0, 0] = kept if result.skipped else own[0, 0]
        own[0, 0] = math.nan if backend.rank == 5 else own[0, 0]
        with pytest.raises(LossError) as caught:
            step(session)
        assert session.num_steps == 4
        return tuple(found), str(caught.value).split(": ", 1)[1]

    ((found, message),) = set(simulate(main, 8))
    assert found == (False, True, False, True)
    assert "in step 4, and none in the 1 skipped before it; the weights are those of the last good" in message


def test_training_goes_on_after_a_bad_step() -> None:
    """With the bad weight put right the next step is the one that would have been."""
    made = tiny_plan(tiny_model("qwen2"), tiny_workload(optimizer="adamw", max_skipped_steps=0), dp=2, tp=2)

    def main(backend: Backend) -> list[float]:
        session = Session(made, backend, random_weights)
        losses = [step(session).loss]
        weight = session.weights["model.layers.0.mlp.up_proj.weight"]
        kept = weight.clone()
        weight.fill_(math.nan)
        with pytest.raises(LossError):
            step(session)
        weight.copy_(kept)
        return [*losses, step(session).loss, step(session).loss]

    expected = [result.loss for result in train(made, random_samples(67, 8), steps=3)[0].results]
    for losses in simulate(main, 4):
        assert losses == expected


def test_a_rank_that_fails_ends_the_others() -> None:
    """What a rank raises is what the caller sees, with the rank noted; nobody waits for it."""
    made = tiny_plan(tiny_model("llama"), dp=2, pp=2)

    def main(backend: Backend) -> None:
        session = Session(made, backend)
        if backend.rank == 3:
            session.runners[0].forward = lambda x, tokens: 1 / 0  # type: ignore[method-assign]
        step(session)

    with pytest.raises(ZeroDivisionError) as caught:
        simulate(main, 4, timeout_seconds=30.0)
    assert caught.value.__notes__[0] == "raised on simulated rank 3 of 4"


def test_batches_that_are_not_the_plans_are_refused() -> None:
    """Too few microbatches, or another sequence length, name the rank and the rule before anything runs."""
    made = tiny_plan(tiny_model("llama"), tiny_workload(global_batch=2))

    def main(backend: Backend) -> list[str]:
        session, messages = Session(made, backend), []
        for batches in ([collate([np.arange(9)], 8)], [collate([np.arange(5)], 4)] * 2):
            with pytest.raises(ExecutionError) as caught:
                session.step(batches)
            messages.append(str(caught.value))
        return messages

    few, short = simulate(main, 1)[0]
    assert few == "rank 0: a step needs 2 microbatches of shape (1, 8), got shapes [(1, 8)]"
    assert "got shapes [(1, 4), (1, 4)]" in short
