"""Pictures that can be checked by hand, and what every picture promises."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pytest
from attrs import evolve

from picotron.errors import PlanError
from picotron.planner import draw
from picotron.planner.chart import (
    Bar,
    background_bars,
    column_activities,
    compute_bars,
    human_bytes,
    human_seconds,
    rank_ranges,
    time_ticks,
)
from picotron.planner.cluster import ClusterSpec
from picotron.planner.draw import (
    draw_grid,
    draw_memory,
    draw_plan,
    draw_prediction,
    draw_timeline,
    stage_contents,
    stage_memory,
)
from picotron.planner.draw_schedule import draw_schedule
from picotron.planner.draw_svg import schedule_svg, timeline_svg
from picotron.planner.grid import WIDTH
from picotron.planner.model import ModelSpec
from picotron.planner.pipeline import schedule_from_csv
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.predict import predict
from picotron.planner.program import Kind, Row, rows
from picotron.planner.schedule_times import unit_costs
from picotron.planner.schedules import afab, one_f_one_b
from picotron.planner.timeline import Timeline, make_timeline
from picotron.planner.workload import Workload

SVG = "{http://www.w3.org/2000/svg}"


def tiny(devices: int, *, batch: int = 8, memory_bytes: int | None = None, **degrees: object) -> TrainingPlan:
    """A plan for the tiny model on one node of CPU cores."""
    cluster = ClusterSpec.preset("cpu", nodes=1, devices_per_node=devices)
    if memory_bytes is not None:
        cluster = evolve(cluster, device=evolve(cluster.device, memory_bytes=memory_bytes))
    work = Workload(global_batch=batch, seq_len=32, precision="fp32")
    return plan(ModelSpec.from_hf("llama-tiny"), cluster, work, **degrees)  # type: ignore[arg-type]


def by_hand() -> tuple[Timeline, list[list[Row]]]:
    """Two ranks, one microbatch: F takes 2 s, the transfers 1 s, B 3 s, and rank 0 updates for 1 s."""
    programs = [
        [
            Row(Kind.FORWARD, 0, 0),
            Row(Kind.SEND_F, 0, 0, peer=1),
            Row(Kind.RECV_B, 0, 0, peer=1),
            Row(Kind.WAIT, 0, 0, target=2),
            Row(Kind.BACKWARD, 0, 0),
            Row(Kind.UPDATE),
        ],
        [
            Row(Kind.RECV_F, 1, 0, peer=0),
            Row(Kind.WAIT, 1, 0, target=0),
            Row(Kind.FORWARD, 1, 0),
            Row(Kind.BACKWARD, 1, 0),
            Row(Kind.SEND_B, 1, 0, peer=0),
        ],
    ]
    entries = [
        (0, 0, -1, 0, 0.0, 2.0),
        (0, 1, -1, 1, 2.0, 3.0),
        (0, 2, -1, 2, 8.0, 9.0),
        (0, 3, -1, 0, 2.0, 9.0),
        (0, 4, -1, 0, 9.0, 12.0),
        (0, 5, -1, 0, 12.0, 13.0),
        (1, 0, -1, 2, 2.0, 3.0),
        (1, 1, -1, 0, 0.0, 3.0),
        (1, 2, -1, 0, 3.0, 5.0),
        (1, 3, -1, 0, 5.0, 8.0),
        (1, 4, -1, 1, 8.0, 9.0),
    ]
    return make_timeline("predicted", entries), programs


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (10_720_904, "10.2 MiB"),
        (2**20 - 1, "1.00 MiB"),
        (80 * 2**30, "80.0 GiB"),
        (-(14 * 2**30), "-14.0 GiB"),
        (2**62, "4096 PiB"),
    ],
)
def test_bytes_have_three_figures_and_a_binary_unit(size: int, text: str) -> None:
    """People read sizes in binary units; a size that rounds to 1024 takes the next one."""
    assert human_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (0.06385533, "63.9 ms"),
        (1e-6, "1.00 µs"),
        (0.9999, "1.00 s"),
        (84.26, "84.3 s"),
        (600, "10.0 min"),
        (86_400 * 3, "3.00 d"),
        (-0.5, "-500 ms"),
        (3e-12, "0.00 ns"),
    ],
)
def test_seconds_have_three_figures_and_a_unit(seconds: float, text: str) -> None:
    """People read times in the unit that leaves one to three digits before the point."""
    assert human_seconds(seconds) == text


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([5], "5"),
        ([0, 1], "0-1"),
        ([0, 8], "0,8"),
        ([7, 6, 5, 4], "4-7"),
        ([0, 4, 8, 12], "0-12:4"),
        ([0, 1, 4, 5], "0-1,4-5"),
        ([0, 1, 2, 9], "0-2,9"),
        ([], ""),
    ],
)
def test_ranks_are_shortened_to_ranges(ranks: list[int], text: str) -> None:
    """Neighbours become a-b, equal steps a-b:k, and two ranks far apart stay two."""
    assert rank_ranges(ranks) == text


def test_the_grid_of_1f1b_is_the_papers_figure() -> None:
    """Two ranks, two microbatches, B twice F: rank 1 alternates at once, rank 0 waits for its gradients."""
    assert draw_schedule(one_f_one_b(2, 2)).splitlines() == [
        "1f1b: 2 ranks, 2 microbatches, 9 time units",
        "rank 0  F0F1····B0▓▓··B1▓▓",
        "rank 1  ··F0B0▓▓F1B1▓▓····",
        "units   |0",
        "· idle, ░ forward, ▓ backward",
    ]


def test_costs_set_the_width_of_actions() -> None:
    """With B as long as F, afab on one rank fills the same columns with each."""
    assert "rank 0  F0F1B0B1" in draw_schedule(afab(1, 2), unit_costs(1, i=0.5, w=0.5))
    assert "rank 0  F0F1B0▓▓▓▓B1▓▓▓▓" in draw_schedule(afab(1, 2), unit_costs(1, i=2))


def test_a_long_grid_shows_its_beginning_and_end_and_says_so() -> None:
    """64 microbatches do not fit: what is left out is an ellipsis, what is shown is stated."""
    text = draw_schedule(one_f_one_b(4, 64))
    first, *ranks = text.splitlines()
    assert "201 time units, shown: 0-14 and 186-201" in first
    assert all(line.count("…") == 1 for line in ranks[:5])
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "F0" in ranks[0] and "B63" in ranks[0]


def test_stages_are_named_where_a_rank_holds_several() -> None:
    """Two stages on one rank: F0 alone would not say of which."""
    schedule = schedule_from_csv("0F0,1F0,1B0,0B0\n")
    assert "rank 0  0F01F01B0▓▓▓0B0▓▓▓" in draw_schedule(schedule)


def test_ranks_that_wait_for_each_other_are_named() -> None:
    """A circular order cannot be drawn; the error says where each rank stands."""
    schedule = schedule_from_csv("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n")
    with pytest.raises(PlanError, match="rank 0 at 0B0; rank 1 at 1F1"):
        draw_schedule(schedule)


def test_an_action_without_length_is_not_drawn() -> None:
    """With weight gradients that take no time, I stands alone."""
    schedule = schedule_from_csv("0F0,0I0,0W0\n")
    assert "rank 0  F0I0\n" in draw_schedule(schedule, unit_costs(1, w=0))


def test_a_wait_counts_only_while_its_transfer_is_under_way() -> None:
    """Rank 0 waits from 2 s to 9 s, but its gradient travels from 8 s to 9 s: the rest is the bubble."""
    bars = compute_bars(*by_hand())
    assert [(bar.rank, bar.activity, bar.start_seconds, bar.end_seconds, bar.label) for bar in bars] == [
        (0, "forward", 0.0, 2.0, "F0"),
        (0, "wait", 8.0, 9.0, ""),
        (0, "backward", 9.0, 12.0, "B0"),
        (0, "update", 12.0, 13.0, "update"),
        (1, "wait", 2.0, 3.0, ""),
        (1, "forward", 3.0, 5.0, "F0"),
        (1, "backward", 5.0, 8.0, "B0"),
    ]


def test_transfers_under_way_stand_apart() -> None:
    """Each transfer is beside both its ranks."""
    assert [(bar.rank, bar.label, bar.start_seconds) for bar in background_bars(*by_hand())] == [
        (0, "0SEND_F0", 2.0),
        (0, "0RECV_B0", 8.0),
        (1, "1RECV_F0", 2.0),
        (1, "1SEND_B0", 8.0),
    ]


def test_a_timeline_is_drawn_to_scale() -> None:
    """Thirteen seconds on 26 columns: two columns a second."""
    timeline, programs = by_hand()
    assert draw_timeline(timeline, programs, width=34).splitlines()[-4:] == [
        "time    |0 s                |10 s",
        "· idle, ░ forward, ▓ backward, ~",
        "  exposed transfer or reduction, u",
        "  update",
    ]
    assert draw_timeline(timeline, programs, width=34).splitlines()[-6:-4] == [
        "rank 0  F0░░············~~B0▓▓▓▓uu",
        "rank 1  ····~~F0░░B0▓▓▓▓··········",
    ]


def test_time_starts_at_the_first_row() -> None:
    """A measured step that begins late on its clock looks like one that begins at zero."""
    timeline, programs = by_hand()
    late = evolve(timeline, start=timeline.start + 100, end=timeline.end + 100)
    assert draw_timeline(late, programs) == draw_timeline(timeline, programs)
    assert compute_bars(late, programs) == compute_bars(timeline, programs)


def test_operations_inside_a_row_are_not_drawn_over_it() -> None:
    """A measured timeline also times what rows contain; the chart has whole rows."""
    timeline, programs = by_hand()
    columns = {
        name: getattr(timeline, name) for name in ("rank", "row", "operation", "stream", "start", "end")
    }
    inside = dict(zip(columns, (0, 0, 3, 0, 0.5, 1.0), strict=True))
    both = evolve(timeline, **{name: np.append(column, inside[name]) for name, column in columns.items()})
    assert compute_bars(both, programs) == compute_bars(timeline, programs)


def test_the_clock_is_named() -> None:
    """Virtual time is labelled as such, and a measured clock by its name."""
    timeline, programs = by_hand()
    assert "(virtual time, predicted)" in draw_timeline(timeline, programs)
    assert "(host clock)" in draw_timeline(evolve(timeline, clock="host"), programs)


def test_a_column_shows_what_takes_most_of_it() -> None:
    """Ten seconds on five columns: 1.2 s of 2 win a column, half of one stays idle."""
    bars = [
        Bar(rank=0, activity="forward", start_seconds=0.0, end_seconds=3.2),
        Bar(rank=0, activity="backward", start_seconds=7.0, end_seconds=9.5),
    ]
    assert column_activities(bars, span_seconds=10.0, columns=5) == [
        "forward",
        "forward",
        "idle",
        "idle",
        "backward",
    ]


def test_ticks_are_round_and_carry_units() -> None:
    """63.9 ms in at most seven steps: every ten milliseconds."""
    assert [text for _, text in time_ticks(0.0639, 7)] == [f"{10 * i} ms" for i in range(7)]
    assert [text for _, text in time_ticks(2.0, 4)] == ["0 s", "0.5 s", "1 s", "1.5 s", "2 s"]


def test_the_grid_of_ranks_by_hand() -> None:
    """pp=2, dp=2, tp=2 in the default order: tensor-parallel neighbours are adjacent ranks."""
    assert draw_grid(tiny(8, pp=2, dp=2, tp=2)).splitlines() == [
        "ranks                           dp 0  dp 1",
        "stage 0: embedding, layers 0-2  0-1   2-3",
        "stage 1: layers 3-5, head       4-5   6-7",
    ]


def test_a_wide_grid_merges_columns() -> None:
    """Sixty-four data-parallel ranks do not fit one by one; ranges take their place."""
    text = draw_grid(tiny(64, batch=64))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.splitlines()[1].split()[-4:] == ["0-15", "16-31", "32-47", "48-63"]


def test_an_order_of_its_own_is_drawn_as_it_is() -> None:
    """With pp fastest, stages hold every other rank."""
    text = draw_grid(tiny(8, pp=2, dp=4, order=("dp", "cp", "tp", "pp")))
    assert [line.split()[-4:] for line in text.splitlines()[1:]] == [list("0246"), list("1357")]


def test_stages_say_what_they_hold() -> None:
    """The embedding is on the first stage, the head on the last, one layer is singular."""
    assert stage_contents(tiny(3, pp=3, dp=1, stage_layers=(1, 3, 2))) == (
        "embedding, layer 0",
        "layers 1-3",
        "layers 4-5, head",
    )


def test_memory_bars_have_one_scale() -> None:
    """Every row ends in the same column, and the fullest stage's bar has no idle part."""
    lines = draw_memory(tiny(4, pp=4, dp=1)).splitlines()[2:-1]
    assert {len(line) for line in lines} == {WIDTH}
    assert sum(not line.endswith("·") for line in lines) >= 1


def test_memory_marks_the_capacity() -> None:
    """Twice as much memory as the peak: the mark stands at the end, half the bar is empty."""
    peak = predict(tiny(1)).peak_memory_bytes
    *_, row, _ = draw_memory(tiny(1, memory_bytes=2 * peak)).splitlines()
    assert row.endswith("|")
    bar = row.split()[-1]
    assert abs(bar.count("·") - len(bar) / 2) <= 1
    *_, row, _ = draw_memory(tiny(1, memory_bytes=peak // 2)).splitlines()
    bar = row.split()[-1]
    assert abs(bar.index("|") - len(bar) / 2) <= 1 and "·" not in bar


def test_memory_numbers_are_the_predictions() -> None:
    """The fullest stage is the fullest rank of the prediction."""
    request = tiny(4, pp=2, tp=2)
    assert max(own.max_bytes for own in stage_memory(request)) == predict(request).peak_memory_bytes
    assert f"{predict(request).peak_memory_bytes / 2**20:.1f}" in draw_memory(request)


def test_a_prediction_that_fits_says_so() -> None:
    """Each figure has its name, value and unit."""
    prediction = predict(tiny(2, pp=2))
    text = draw_prediction(prediction)
    assert "fits: yes" in text
    assert f"step time             {human_seconds(prediction.step_seconds)}" in text
    for name in (
        "tokens/s",
        "tokens/s/device",
        "MFU",
        "MFU causal",
        "HFU",
        "bubble",
        "exposed",
        "peak",
        "margin",
    ):
        assert f"  {name}" in text
    assert f"{prediction.mfu:.1%}".replace("%", " %") in text


def test_a_prediction_that_does_not_fit_gives_every_reason() -> None:
    """Each misfit has its line, whole but for line breaks."""
    prediction = predict(tiny(2, pp=2, memory_bytes=2**20))
    text = " ".join(draw_prediction(prediction).split())
    assert "fits: NO" in text
    assert len(prediction.misfits) == 2
    assert all(" ".join(misfit.split()) in text for misfit in prediction.misfits)


def test_print_shows_the_picture() -> None:
    """``print(plan)`` is ``draw_plan``, the same bytes every time, within a hundred columns."""
    request = tiny(8, pp=2, tp=2)
    assert str(request) == draw_plan(request) == draw_plan(tiny(8, pp=2, tp=2))
    assert max(map(len, str(request).splitlines())) <= WIDTH


def test_the_picture_names_the_request_and_the_choices() -> None:
    """Model, devices, degrees, batch, tokens, schedule and precision stand in the headline."""
    first, second, *rest = draw_plan(tiny(8, pp=2, tp=2)).splitlines()
    assert first == "llama-tiny on 8 x cpu (cpu:1x8): pp=2 dp=2 cp=1 tp=2, sequence parallel"
    assert second == "batch 8 x 32 = 256 tokens a step, 4 microbatches of 1, 1f1b, fp32, adamw"
    assert rest[0] == "  chosen dp=2: the devices that pp * cp * tp leave"


def test_the_plan_is_predicted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A big plan's prediction takes a second; the picture asks for one."""
    calls = []

    def counted(request: TrainingPlan) -> object:
        calls.append(request)
        return predict(request)

    monkeypatch.setattr(draw, "predict", counted)
    draw_plan(tiny(2, pp=2))
    assert len(calls) == 1


def test_the_svg_holds_each_action_once() -> None:
    """Valid XML; F and B of each microbatch on each stage; a title, a style for dark readers, units."""
    text = schedule_svg(tiny(2, pp=2, batch=4))
    root = ET.fromstring(text)
    for activity in ("forward", "backward"):
        bars = [shape for shape in root.iter(f"{SVG}rect") if shape.get("class") == activity]
        assert len(bars) == 2 * 4 + 1  # and one in the legend
    assert root.find(f"{SVG}title") is not None
    assert "prefers-color-scheme:dark" in text
    assert " ms</text>" in text
    assert "virtual time" in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


def test_the_svg_is_deterministic_and_stays_on_its_page() -> None:
    """The same plan gives the same bytes, and no bar leaves the page."""
    text = schedule_svg(tiny(4, pp=4))
    assert text == schedule_svg(tiny(4, pp=4))
    root = ET.fromstring(text)
    width, height = float(root.get("width", "0")), float(root.get("height", "0"))
    for shape in root.iter(f"{SVG}rect"):
        x, y, wide, high = (float(shape.get(name, "-1")) for name in ("x", "y", "width", "height"))
        assert 0 <= x <= x + wide <= width and 0 <= y <= y + high <= height


def test_a_crowded_svg_is_small() -> None:
    """A thousand microbatches are drawn by pixel, not by bar."""
    text = schedule_svg(tiny(2, pp=2, batch=1024))
    ET.fromstring(text)
    assert len(text) < 60_000
    assert "<path" in text


def test_names_are_escaped_in_the_svg() -> None:
    """A title is text, whatever it holds."""
    timeline, programs = by_hand()
    text = timeline_svg(timeline, programs, title="a < b & c", labels=["<0>|x & y", "1"])
    found = [element.text for element in ET.fromstring(text).iter(f"{SVG}text")]
    assert {"a < b & c", "<0>", "x & y"} <= set(found)


def test_everything_is_drawn_of_the_smallest_plan() -> None:
    """One device, one microbatch: nothing divides by an absent axis."""
    request = tiny(1, batch=1)
    text = draw_plan(request)
    assert "stage 0: embedding, layers 0-5, head  0" in text
    ET.fromstring(schedule_svg(request))
    program = request.program()
    assert "F0" in draw_timeline(predict(request).timeline, [rows(program, 0)])


def test_bars_end_at_the_nearest_column() -> None:
    """B takes 1.3 units of two columns each: from 4 to 6.6 and to 9.2, drawn from 4 to 7 and to 9."""
    assert "rank 0  F0F1B0▓B1·" in draw_schedule(afab(1, 2), unit_costs(1, i=0.8, w=0.5))


def test_what_two_activities_share_is_not_idle() -> None:
    """A column with 40 % F, 40 % B and 20 % idle is no bubble."""
    bars = [
        Bar(rank=0, activity="forward", start_seconds=0.0, end_seconds=0.4),
        Bar(rank=0, activity="backward", start_seconds=0.4, end_seconds=0.8),
    ]
    assert column_activities(bars, span_seconds=1.0, columns=1) == ["forward"]


def test_names_are_all_or_none() -> None:
    """Where F has no room for its name, a B here and there that has would mislead."""
    request = tiny(2, pp=2, batch=25)
    program = request.program()
    text = draw_timeline(predict(request).timeline, [rows(program, stage) for stage in range(2)])
    assert "B0" not in text and "▓▓" in text and "░" in text


def test_a_long_step_shows_its_beginning_and_its_end() -> None:
    """With 64 microbatches in a hundred columns nothing could be read: first and last actions are shown."""
    request = tiny(2, pp=2, batch=64)
    program = request.program()
    text = draw_timeline(predict(request).timeline, [rows(program, stage) for stage in range(2)])
    assert "its beginning and its end" in text
    assert "F0" in text and "B63" in text and " … " in text
    assert max(map(len, text.splitlines())) <= 100


def test_names_of_many_stages_are_wrapped():
    """Eight ranks of eight stages, whose names alone are wider than the page."""
    work = Workload(global_batch=128, seq_len=2048)
    made = plan(
        ModelSpec.from_hf("llama-3.1-70b"),
        ClusterSpec.preset("h100", nodes=16),
        work,
        pp=8,
        tp=8,
        schedule="interleaved",
        virtual_stages=10,
    )
    lines = draw_grid(made, width=80).splitlines()
    assert max(map(len, lines)) <= 80
    assert "stages 7-79:8: layer 7; layer 15;" in "\n".join(lines)
    assert sum("head" in line for line in lines) == 1


def test_a_page_of_many_stages_a_rank_keeps_its_width() -> None:
    """Thirty stages on each of two ranks: a range names them, also where they do not fit the device."""
    model = evolve(ModelSpec.from_hf("llama-tiny"), num_layers=60)
    cluster = ClusterSpec.preset("cpu", devices_per_node=2)
    small = evolve(cluster, device=evolve(cluster.device, memory_bytes=2**20))
    work = Workload(global_batch=4, seq_len=8, precision="fp32")
    made = plan(model, small, work, pp=2, schedule="interleaved", virtual_stages=30)
    text = str(made)
    assert max(map(len, text.splitlines())) <= 100
    assert "stages 0-58:2 need" in text
