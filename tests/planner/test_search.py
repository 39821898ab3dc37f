from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from attrs import evolve

import picotron
from picotron.errors import PlanError
from picotron.planner.candidates import (
    in_words,
    named_choices,
    plan_of,
    representative,
    row_of,
    row_of_plan,
    stage_layers,
)
from picotron.planner.chart import human_seconds
from picotron.planner.cluster import ClusterSpec
from picotron.planner.columns_of import cases_of_plan
from picotron.planner.estimate import estimate_seconds
from picotron.planner.interval import known_interval
from picotron.planner.kept import Wanted
from picotron.planner.model import ModelSpec
from picotron.planner.plan import plan
from picotron.planner.predict import predict
from picotron.planner.priced import prices
from picotron.planner.refine import cut_in_words
from picotron.planner.search import search
from picotron.planner.search_result import SearchResult
from picotron.planner.software import software_columns
from picotron.planner.space import make_space
from picotron.planner.walk import covered
from picotron.planner.workload import Workload

MODEL = ModelSpec.from_hf("llama-3.1-8b")
NODE = ClusterSpec.parse("h100:1x8")
WORK = Workload(global_batch=32, seq_len=4096)
PLAIN: dict[str, Any] = {"recompute": "none", "offload": 0}


@pytest.fixture(scope="module")
def result() -> SearchResult:
    """The best plans of an 8B model on one node."""
    return search(MODEL, NODE, WORK)


def refused(model: str, cluster: str, batch: int = 16, seq_len: int = 1024, **choices: Any) -> str:
    """The words of a search that has nothing to return."""
    work = Workload(global_batch=batch, seq_len=seq_len)
    with pytest.raises(PlanError) as caught:
        search(ModelSpec.from_hf(model), ClusterSpec.parse(cluster), work, **choices)
    return str(caught.value)


def test_a_result_is_a_sequence_of_plans_fastest_first(result):
    """Plans are built when they are looked at; slices stay unbuilt."""
    assert picotron.search is search
    assert 1 < len(result) <= 20
    assert result[0] == result.best == next(iter(result[:1]))
    assert result[-1].workload == WORK
    assert (np.diff(result.fastest.seconds) >= 0).all()
    with pytest.raises(IndexError, match="must be below"):
        result[len(result)]


def test_of_each_choice_of_degrees_the_fastest_is_kept(result):
    """The plans of a result differ in their degrees or in their microbatch."""
    degrees = ("tp", "cp", "pp", "dp", "ep", "etp", "micro_batch")
    kept = {tuple(result.fastest.row(index)[name] for name in degrees) for index in range(len(result))}
    assert len(kept) == len(result)


def test_each_plan_of_the_front_is_slower_and_smaller_than_the_one_before(result):
    """None beats another in both time and memory; the first is as fast as the best, the last within reach."""
    front = result.pareto
    assert (np.diff(front.seconds) > 0).all()
    assert (np.diff(front.bytes) < 0).all()
    assert front.seconds[0] == result.fastest.seconds[0]
    assert front.seconds[-1] <= 1.5 * front.seconds[0]
    assert front.bytes.max() <= result.limit_bytes == NODE.device.memory_bytes


def test_a_built_plan_has_the_choices_of_its_candidate(result):
    """What is built is what was priced."""
    for index in range(0, len(result.pareto), 4):
        row = result.pareto.row(index)
        made = result.pareto[index]
        assert dict(representative(result.space, row_of_plan(made))) == dict(row)
        assert dict(representative(result.space, row)) == dict(row)


def test_every_candidate_is_accounted_for(result):
    """Evaluated and cut candidates add up to all of them."""
    counts = result.counts
    assert counts.covered == counts.candidates > 10_000
    assert 0 < counts.fit <= counts.evaluated < counts.candidates
    assert f"{counts.candidates:,} candidates" in str(counts)


def test_candidates_are_counted_by_hand():
    """On two devices: tp=2 with and without sequence parallelism, cp=2 and dp=2 with two ZeRO stages, pp=2.

    A batch of 4 has microbatches of 1, 2 and 4, or of 1 and 2 over dp=2.
    """
    choices: dict[str, Any] = {"schedule": "1f1b", "zero_stage": (0, 1), "recompute": "none", "offload": 0}
    found = search(MODEL, ClusterSpec.parse("b200:1x2"), Workload(global_batch=4, seq_len=64), **choices)
    sizes = {"tp": 3 * 2, "cp": 3 * 2, "dp": 2 * 2, "pp": 3}
    assert found.counts.candidates == sum(sizes.values())


def test_the_same_request_has_the_same_result(result):
    """To the last choice, and to the last bit of a prediction."""
    again = search(MODEL, NODE, WORK)
    assert again.counts == result.counts
    for one, other in ((again.fastest, result.fastest), (again.pareto, result.pareto)):
        assert [dict(one.row(i)) for i in range(len(one))] == [dict(other.row(i)) for i in range(len(other))]
        assert one.seconds.tolist() == other.seconds.tolist()


def test_fixed_choices_hold_in_every_plan():
    """A choice may be fixed to a value or to several."""
    found = search(MODEL, NODE, WORK, tp=(2, 4), schedule="1f1b", recompute="none", shard="all")
    for index in range(len(found)):
        row = found.fastest.row(index)
        assert row["tp"] in (2, 4)
        assert row["recompute"] == 0
    assert {made.schedule_name for made in found[:3]} == {"1f1b"}


def test_less_memory_gives_a_slower_plan(result):
    """The limit binds: what is kept holds no more, and nothing gets faster."""
    limit = 24 * 2**30
    small = search(MODEL, NODE, WORK, memory_limit_bytes=limit)
    assert small.fastest.bytes.max() <= limit
    assert small.fastest.seconds[0] >= result.fastest.seconds[0]


def test_plans_within_the_predictions_error_are_ties(result):
    """All that the prediction cannot tell from the best, and no others."""
    ceiling = result.fastest.seconds[0] * np.exp(result.interval.half)
    assert len(result.ties) == np.count_nonzero(result.fastest.seconds <= ceiling) >= 1


def test_the_simulator_prices_finalists():
    """The first plans, predicted one by one on demand."""
    cluster, work = ClusterSpec.parse("cpu:1x2"), Workload(global_batch=4, seq_len=16, precision="fp32")
    found = search(ModelSpec.from_hf("llama-tiny"), cluster, work)
    (first,) = found.simulated(1)
    assert first.plan == found.best
    assert found.simulated(1)[0] is first


def test_what_was_simulated_stands_in_the_table():
    """Seconds beside the estimate, which plan is really first, and what does not fit when it is counted."""
    found = search(MODEL, NODE, WORK, pp=2, tp=(2, 4), schedule="1f1b", **PLAIN)
    assert "simulated" not in found.table(2)
    told: list[str] = []
    first, second = found.simulated(2, told.append)
    assert told == ["simulating plan 1 of 2", "simulating plan 2 of 2"]
    assert "simulated" in found.table(2).splitlines()[0]
    assert human_seconds(second.step_seconds) in found.table(2).splitlines()[2]
    assert "does not fit" not in str(found)
    assert found.simulated(1) == (first,)
    found.predictions[0] = evolve(first, step_seconds=2 * second.step_seconds)
    assert "of those simulated, 2 is the fastest that fits" in str(found)
    found.predictions[0] = evolve(first, misfits=("stage 0 needs more",))
    assert "1 does not fit when its bytes are counted: stage 0 needs more" in str(found)
    limited = evolve(found, limit_bytes=2**30)
    limited.predictions[1] = second
    assert "GiB of 1.00" in limited.misfit(1)


def test_long_simulations_are_known_by_their_size(result):
    """Actions of a step, once for each kind of rank."""
    assert result.is_quick(0)
    many = Workload(global_batch=2048, seq_len=512)
    assert not search(MODEL, NODE, many, pp=8, micro_batch=1, schedule="interleaved").is_quick(0)


def test_a_better_cut_is_found_layer_by_layer():
    """Faster by the exact simulator, with all layers and within the limit; else the plan stays as it is."""
    found = search(
        MODEL, NODE, WORK, pp=4, schedule="interleaved-zb", virtual_stages=4, profile="megatron-2025"
    )
    better = found.refined()
    assert better.gain > 0.01
    assert better.prediction == predict(better.plan)
    assert better.prediction.step_seconds < better.before.step_seconds == found.simulated(1)[0].step_seconds
    assert sum(better.plan.stage_layers) == MODEL.num_layers
    assert evolve(better.plan, stage_layers=found[0].stage_layers) == found[0]
    assert "less" in str(better)
    assert cut_in_words(better.plan.stage_layers) in str(better)
    kept = evolve(found, limit_bytes=1).refined()
    assert kept.plan == found[0]
    assert kept.gain == 0
    assert "no cut found" in str(kept)


@pytest.mark.parametrize(("gib", "few"), [(80, 0), (32, 10_000), (24, 0), (12, 10_000)])
def test_short_memory_hides_nothing_from_the_bounds(monkeypatch, gib, few):
    """The plans of a whole search are those of one that evaluates every candidate."""
    monkeypatch.setattr("picotron.planner.walk.FEW_LEAVES", few)
    space = make_space(MODEL, NODE, WORK, schedule=("1f1b", "zb-v", "interleaved"), micro_batch=1)
    priced = prices(space, software_columns(NODE.profile, NODE.device.architecture))
    wanted = Wanted(limit_bytes=gib * 2**30, keep=20, reach=9.0)
    (quick, counts), (slow, every) = (covered(space, priced, wanted, bounded=b) for b in (True, False))
    assert counts.evaluated < every.evaluated == counts.candidates
    for which in ("fastest", "front"):
        one, other = ([row_of(kept.rows, i) for i in getattr(kept, which)()] for kept in (quick, slow))
        assert one == other


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"tp": 3}, "tp must divide the 32 query heads, got tp=3"),
        ({"tp": 8, "pp": 4}, "must be the cluster's 8 devices, got 4 * 1 * 1 * 8"),
        ({"pp": 8, "virtual_stages": 5, "schedule": "bfs"}, "at most the 32 layers, got 8 * 5"),
        ({"schedule": "zb-v", "virtual_stages": 3}, "virtual_stages=3 is not what zb-v has"),
        ({"schedule": "zb-v", "pp": 1}, "nothing to schedule, got zb-v"),
        ({"sequence_parallel": True, "tp": 1}, "sequence_parallel needs tp > 1"),
        ({"ep": 2}, "need a model with experts, got ep=2"),
        ({"dp": 8, "micro_batch": 5}, "must divide global_batch 16, got 8 * 5"),
        ({"cp": 3}, "cp must divide seq_len 1024, got cp=3"),
        ({"zero_stage": 1, "dp": 1, "cp": 1}, "ZeRO shards nothing over one rank"),
    ],
)
def test_contradictory_choices_are_told_apart(choices, words):
    """The rule, the values, and a remedy after a semicolon."""
    message = refused("llama-3.1-8b", "h100:1x8", **choices)
    assert words in message
    assert all(f"{name}={value}" in message for name, value in choices.items())
    assert message.rpartition(words)[2].count(";") >= 1


def test_impossible_workloads_are_refused():
    """A batch that no layout can share, and sequences beyond the learned positions."""
    assert "must divide global_batch 4, got 13 * 1" in refused("gpt2", "h100:1x13", batch=4)
    assert "at most the model's 1024 learned positions" in refused("gpt2", "h100:1x2", seq_len=4096)
    with pytest.raises(PlanError, match="must be a positive finite number"):
        evolve(NODE.inter_node, bytes_per_second=0)
    assert "v100 has no bf16" in refused("llama-3.1-8b", "v100:1x8")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tpp": 3}, "did you mean tp"),
        ({"tp": 0}, "tp must be a whole number of at least 1"),
        ({"tp": []}, "tp must have a value at least"),
        ({"schedule": "1f1c"}, "did you mean 1f1b"),
        ({"offload": 2}, "offload must be a share of the layers from 0 to 1"),
        ({"zero_stage": 4}, "zero_stage must be 0, 1, 2 or 3"),
        ({"ends": "both"}, "ends must be True or False"),
        ({"order": "pp"}, "order must be one of pp,dp,cp,tp"),
        ({"keep": 0}, "keep must be a whole number"),
        ({"reach": math.nan}, "reach must be a number of at least 1"),
        ({"memory_limit_bytes": 0}, "memory_limit_bytes must be a whole number"),
        ({"profile": "megatron"}, "a software profile must be one of"),
    ],
)
def test_values_that_there_are_not_are_refused(options, words):
    """With the rule and, where one is near, a name that there is."""
    assert words in refused("llama-3.1-8b", "h100:1x8", **options)


def test_other_things_than_specs_are_refused():
    """By the name of what is wanted."""
    with pytest.raises(PlanError, match="cluster must be a ClusterSpec, got str"):
        search(MODEL, "h100", WORK)  # type: ignore[arg-type]


def test_a_model_that_fits_nowhere_says_what_would_do():
    """The nearest layout, how much too much it holds, and how many devices the search succeeds on."""
    message = refused("llama-3.1-70b", "h100:1x4", batch=64)
    assert "fits nowhere on h100:1x4: the nearest layout, tp=" in message
    assert "recompute=full" in message
    enough = int(message.split(" such devices would do")[0].rpartition(" ")[2])
    work = Workload(global_batch=64, seq_len=1024)
    found = search(ModelSpec.from_hf("llama-3.1-70b"), ClusterSpec.parse(f"h100:{enough // 4}x4"), work)
    assert len(found)
    limited = refused("gpt2", "h100:1x2", memory_limit_bytes=2**20)
    assert "GiB of 0.00 on its fullest device" in limited
    assert "a limit of 2 GiB would do" in limited or "a limit of 3 GiB would do" in limited


def test_why_a_layout_is_slower(result):
    """The causes sum to the whole difference, and the text tells the greatest first."""
    why = result.why(tp=8, recompute="full", recompute_layers=1.0)
    assert why.verdict == "slower"
    assert why.slower_seconds == pytest.approx(why.seconds - result.fastest.seconds[0], rel=1e-9)
    assert why.causes["recompute"] > 0 < why.causes["tensor"]
    assert "recompute=full" in why.layout
    assert " ms  " in str(why).splitlines()[1]


def test_why_a_layout_does_not_fit(result):
    """The bytes by class on the fullest rank, and the single change that makes it fit at the least time."""
    why = result.why("tp=1 pp=1 cp=1 zero_stage=0 recompute=none offload=0")
    assert why.verdict == "too large"
    assert why.bytes > why.limit_bytes == result.limit_bytes
    assert sum(why.classes.values()) == pytest.approx(why.bytes, rel=1e-6)
    assert max(why.classes, key=why.classes.__getitem__) == "moments"
    best = why.changes[0]
    assert best.bytes <= why.limit_bytes
    assert best.seconds == min(change.seconds for change in why.changes)
    assert f"{best.words} makes it fit" in why.sentence
    assert " GiB  moments" in str(why)


def test_a_single_change_really_makes_it_fit(result):
    """The changed layout can be planned, and the search accepts it."""
    why = result.why("tp=1 pp=1 cp=1 zero_stage=0 recompute=none offload=0")
    for change in why.changes[:3]:
        assert result.why(plan_of(result.space, change.row)).verdict in ("slower", "tie", "best")


def test_why_a_layout_is_refused(result):
    """By the constraint's own sentence."""
    why = result.why(tp=3)
    assert why.verdict == "refused"
    assert "tp must divide the 32 query heads" in str(why)


def test_why_of_the_best_and_of_a_plan(result):
    """The best is the best by any name; a plan of another request cannot be compared."""
    assert result.why(result.best).verdict == "best"
    row = result.fastest.row(0)
    assert result.why(tp=int(row["tp"]), pp=int(row["pp"])).verdict == "best"
    made = plan(MODEL, NODE, WORK, tp=2, pp=2)
    assert result.why(made).layout.startswith("tp=2 pp=2 dp=2 micro_batch=1 1f1b sequence_parallel")
    with pytest.raises(PlanError, match="the search's own workload"):
        result.why(plan(MODEL, NODE, evolve(WORK, global_batch=64), tp=8))
    for bad in ({"layout": made, "tp": 2}, {}, {"layout": 3}, {"layout": "tp"}):
        with pytest.raises(PlanError, match="name a layout|not both|must be"):
            result.why(**bad)


def test_a_result_is_drawn(result):
    """A table of aligned rows, the front as a chart with its scales, and the counts."""
    lines = str(result).splitlines()
    assert lines[0].startswith("llama-3.1-8b on h100:1x8, 32 x 4096 tokens: ")
    assert lines[1].split() == ["step", "tokens/s/device", "MFU", "GiB", "layout"]
    assert lines[2].startswith(" 1  ") or lines[2].startswith("1  ")
    assert f"Pareto front of {len(result.pareto)} plans" in str(result)
    assert sum(line.count("o") for line in lines if " |" in line) > 1
    assert lines[-1] == str(result.counts)
    assert result.table(2).count("\n") == 2
    assert result._repr_html_().count("<tr>") == 1 + min(10, len(result))
    assert "the best tp=" in repr(result)
    assert "not" not in repr(result)
    assert "none is built" in repr(result.pareto)


def test_names_and_words_of_candidates(result):
    """What is as usual is left out of the words; what is asked in a text is read as it would be given."""
    row = dict(result.fastest.row(0)) | {
        "tp": 1,
        "pp": 1,
        "cp": 1,
        "zero_stage": 2,
        "dp": 8,
        "shard": 4,
        "order": 1,
    }
    assert "zero_stage=2 over 4 ranks" in in_words(row)
    assert in_words(row).endswith("order=dp,pp,cp,tp")
    assert named_choices("tp=1,2 order=pp,dp,cp,tp sequence-parallel=False") == {
        "tp": (1, 2),
        "order": ("pp", "dp", "cp", "tp"),
        "sequence_parallel": False,
    }


@pytest.mark.parametrize(("stages", "ends"), [(4, False), (4, True), (7, True), (3, True)])
def test_layers_are_cut_as_a_plan_can_have_them(stages, ends):
    """Every layer is in a stage, no stage is empty, and both ends are relieved where they weigh."""
    cut = stage_layers(16, stages, ends)
    assert sum(cut) == 16
    assert len(cut) == stages
    assert min(cut) >= 1
    if ends:
        assert max(cut[0], cut[-1]) < max(cut) or max(cut) - min(cut) <= 1


def test_spaces_do_not_share_what_is_asked():
    """What one request fixes is open in the next."""
    fixed = make_space(MODEL, NODE, WORK, tp=8)
    assert fixed.domains["tp"] == (8,)
    assert make_space(MODEL, NODE, WORK).domains["tp"] == (1, 2, 4, 8)


def test_the_interval_is_that_of_a_prediction(result):
    """Of the machine and the kind of model; where none is known, no plan ties with the best."""
    assert result.interval == known_interval(NODE) == predict(result[0]).interval
    small, work = ModelSpec.from_hf("llama-tiny"), Workload(global_batch=8, seq_len=64)
    unknown = search(small, ClusterSpec.parse("cpu:1x4"), work)
    assert unknown.interval is None
    assert len(unknown.ties) == np.count_nonzero(unknown.fastest.seconds == unknown.fastest.seconds[0])
    assert "a tie" not in str(unknown) and "not known" in str(unknown)


def test_sequence_parallelism_cuts_all_tokens_of_a_microbatch():
    """Eight ranks cannot share 12 tokens, but they can share the 24 of two sequences."""
    options: dict[str, Any] = {"seq_len": 12, "tp": 8, "sequence_parallel": True}
    assert "needs tp to divide the tokens" in refused("llama-3.1-8b", "h100:1x8", micro_batch=1, **options)
    work = Workload(global_batch=16, seq_len=12)
    assert len(search(MODEL, NODE, work, tp=8, sequence_parallel=True, micro_batch=2)) == 1


def test_the_plan_in_hand_is_the_plan_that_was_priced():
    """Its cluster carries the profile and its buckets are the profile's: estimated, it takes as long."""
    found = search(MODEL, NODE, WORK, profile="megatron-2025")
    assert found[0].cluster.profile.name == "megatron-2025"
    for index in range(3):
        seconds = float(estimate_seconds(cases_of_plan(found[index])).step_seconds[0])
        assert seconds == pytest.approx(float(found.fastest.seconds[index]), rel=1e-9)


def test_a_shard_that_is_asked_for_is_in_the_plan():
    """It is not dropped for a plan without ZeRO."""
    found = search(MODEL, NODE, WORK, shard=2)
    assert all(one.zero_stage > 0 and 2 in (one.shard, one.topology.dp * one.topology.cp) for one in found)


@pytest.mark.parametrize(
    ("choices", "rule"),
    [
        ({"shard": 5}, "shard must divide the dp * cp data-parallel ranks, got shard=5"),
        ({"shard": "node", "zero_stage": 0}, "nothing is shared without it"),
    ],
)
def test_a_shard_that_cannot_be_is_refused_by_its_rule(choices, rule):
    """And not by a layout that would do without."""
    with pytest.raises(PlanError, match=re.escape(rule)):
        search(MODEL, NODE, WORK, **choices)


def test_numbers_of_plans_are_checked(result):
    """What is no number of a plan is refused before anything is simulated."""
    beyond = len(result)
    for ask in (lambda: result.simulated(-1), lambda: result.simulated("a"), lambda: result.refined(beyond)):
        with pytest.raises(PlanError, match=r"must be (a whole number|in \[0, )"):
            ask()
