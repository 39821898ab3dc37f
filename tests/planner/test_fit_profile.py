"""Constants fitted to runs that were made up with known ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from picotron.cli import main
from picotron.errors import PlanError
from picotron.planner.cluster import load_cluster
from picotron.planner.fit_profile import Run, fit_profile, runs_from_text
from picotron.planner.plan import TrainingPlan
from picotron.planner.serialize import plan_to_json, save_plan
from picotron.planner.simulate import simulate_step
from tests.planner.test_cost import TINY, _cluster, _measured_cluster, _plan

FOUR = TINY | {"num_hidden_layers": 4}
# Much communication, none of it, and steps of different lengths.
PLANS: tuple[TrainingPlan, ...] = (
    _plan(_cluster(nodes=4), FOUR, tp=2, dp=2),
    _plan(_cluster(nodes=1), FOUR),
    _plan(_cluster(nodes=1), FOUR, batch=32, micro_batch=1),
    _plan(_cluster(nodes=2), FOUR, batch=16, micro_batch=4, tp=2),
)


def run(made: TrainingPlan, **truth: float) -> Run:
    """What is observed of a plan where the constants are ``truth``."""
    efficiency = evolve(made.cluster.efficiency, **truth)  # type: ignore[arg-type]
    true = evolve(made, cluster=evolve(made.cluster, efficiency=efficiency))
    return Run(plan=made, seconds=simulate_step(true).step_seconds)


def test_one_run_tells_the_scale_of_computing() -> None:
    """A step without communication that took 1.7 times as long."""
    fit = fit_profile([run(PLANS[1], compute_scale=1.7)])
    assert fit.fitted == ("compute_scale",)
    assert fit.cluster.efficiency.compute_scale == pytest.approx(1.7)
    assert (fit.error_before, fit.error_after) == (pytest.approx(0.7 / 1.7), pytest.approx(0, abs=1e-6))
    assert fit.cluster.efficiency.source == "invented; compute_scale fitted to 1 observed run"


def test_runs_with_different_shares_tell_all_three() -> None:
    """Four layouts of one machine: both scales and the seconds of a step come back."""
    truth = {"compute_scale": 0.8, "communication_scale": 2.5, "step_seconds": 150.0}
    fit = fit_profile([run(made, **truth) for made in PLANS])
    assert fit.fitted == tuple(truth)
    for name, value in truth.items():
        assert getattr(fit.cluster.efficiency, name) == pytest.approx(value, rel=1e-3), name
    assert fit.error_after < 1e-4 < fit.error_before


def test_runs_that_do_not_communicate_tell_nothing_of_communication() -> None:
    """Only what changes a prediction is fitted: the other constants stay as they were."""
    one = _plan(_cluster(), FOUR, batch=16, micro_batch=1)
    fit = fit_profile([run(made, compute_scale=3) for made in (PLANS[1], one)])
    assert "communication_scale" not in fit.fitted
    assert fit.cluster.efficiency.communication_scale == 1
    assert fit.cluster.efficiency.compute_scale == pytest.approx(3, rel=1e-3)


def test_cpu_seconds_are_fitted_by_what_ranks_compute() -> None:
    """The sum over ranks, with no time of waiting in it, on a measured machine."""
    made = _plan(_measured_cluster(4), FOUR, dp=2, tp=2)
    from picotron.planner.host_seconds import cpu_seconds_by_rank

    fit = fit_profile([Run(plan=made, seconds=2 * sum(cpu_seconds_by_rank(made)), quantity="cpu_seconds")])
    assert fit.cluster.efficiency.compute_scale == pytest.approx(2)


def test_data_that_cannot_tell_are_refused() -> None:
    """No run, machines that differ, and seconds that are of something else."""
    with pytest.raises(PlanError, match="got none; give one or more"):
        fit_profile([])
    other = evolve(_cluster(), efficiency=evolve(_cluster().efficiency, kernel_seconds=2))
    with pytest.raises(PlanError, match="differ in device, links or efficiency; fit them apart"):
        fit_profile([run(PLANS[1]), run(_plan(other, FOUR))])
    with pytest.raises(PlanError, match="within a factor of 1000"):
        fit_profile([Run(plan=PLANS[1], seconds=1e9)])
    with pytest.raises(PlanError, match="seconds must be a positive finite number, got 0"):
        Run(plan=PLANS[1], seconds=0)


def lines(*seconds: float, clock: str = "host") -> str:
    """Metrics as a run writes them."""
    return "\n".join(
        json.dumps({"step": i, "rank_seconds": s, "rank_clock": clock}) for i, s in enumerate(seconds)
    )


def test_metrics_are_the_median_of_steps_but_the_first() -> None:
    """The first step warms up; of a measurement on simulated ranks, the sum of their CPU seconds counts."""
    (found,) = runs_from_text(lines(9, 1, 3, 2), Path(), PLANS[1])
    assert (found.plan, found.seconds, found.quantity) == (PLANS[1], 2, "step_seconds")
    data: dict[str, Any] = {"plan": json.loads(plan_to_json(PLANS[0])), "cpu_seconds_by_rank": [1, 2, 3, 4]}
    (found,) = runs_from_text(json.dumps(data | {"clock": "virtual", "seconds": [7, 7]}), Path())
    assert (found.plan, found.seconds, found.quantity) == (PLANS[0], 10, "cpu_seconds")
    (found,) = runs_from_text(json.dumps(data | {"clock": "host", "seconds": [7, 5]}), Path())
    assert (found.seconds, found.quantity) == (5, "step_seconds")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "an empty text; train at least"),
        (lines(1), "the first warms up, got 1"),
        (lines(1, 2, clock="virtual"), "give the run's measurement.json"),
        (lines(1, -2), "must be positive numbers"),
        ("[]", "must be lines of metrics, a measurement, or a list"),
        ("{}", "must be lines of metrics, a measurement, or a list"),
        ('[{"plan": "p.json"}]', "run 0 must be an object with a plan and step_seconds"),
        ('[{"plan": "p.json", "hours": 3}]', "run 0 must have step_seconds or cpu_seconds, got 'hours'"),
        ('[{"plan": "nowhere.json", "step_seconds": 3}]', "nowhere.json"),
        ('{"cpu_seconds_by_rank": [1]}', "must hold its plan"),
    ],
)
def test_a_text_that_holds_no_observed_run_says_what_is_missing(text: str, words: str) -> None:
    """Never a traceback, and never a fit to what was not observed."""
    plan = PLANS[1] if "rank_seconds" in text else None
    with pytest.raises(PlanError) as caught:
        runs_from_text(text, Path("."), plan)
    assert words in str(caught.value)


def test_the_command_fits_what_a_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A list of plans and seconds becomes a cluster's file; errors are told before and after."""
    save_plan(PLANS[1], tmp_path / "one.json")
    seconds = run(PLANS[1], compute_scale=1.25).seconds
    observed = tmp_path / "observed.json"
    observed.write_text(json.dumps([{"plan": "one.json", "step_seconds": seconds}]))
    fitted = tmp_path / "fitted.json"
    assert main(["calibrate", "--from-run", str(observed), "-o", str(fitted)]) == 0
    assert "median error 20.0% before, 0.0% after\ncompute_scale = 1.25" in capsys.readouterr().out
    assert load_cluster(fitted).efficiency.compute_scale == pytest.approx(1.25)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(lines(1, seconds, seconds))
    asked = ["calibrate", "--from-run", str(metrics), "--plan", str(tmp_path / "one.json"), "--json"]
    assert main(asked) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fitted"] == {"compute_scale": pytest.approx(1.25)}
    assert found["error_after"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["--plan", "p.json"], "--plan goes with --from-run"),
        (["--from-run", "m.json", "--seconds", "3"], "measures nothing, got --seconds"),
        (["--from-run", "nowhere.json"], "nowhere.json"),
    ],
)
def test_the_command_ignores_nothing(
    asked: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What does not go together is refused by name."""
    assert main(["calibrate", *asked]) == 2
    assert words in capsys.readouterr().err
