"""Predicted beside measured: what must be equal, and what is an estimate."""

from __future__ import annotations

from statistics import median

from attrs import frozen

from picotron.errors import PlanError
from picotron.planner.host_seconds import cpu_seconds_by_rank
from picotron.planner.interval import Interval
from picotron.planner.memory import memory_timeline, static_bytes
from picotron.planner.predict import Prediction
from picotron.planner.program import execution_order, rows
from picotron.planner.topology import coordinate
from picotron.runtime.run import Measurement


@frozen(kw_only=True)
class Line:
    """One quantity. ``verdict``: "equal", "differs", "within", "outside", or a ratio measured / predicted."""

    quantity: str
    predicted: str
    measured: str
    verdict: str
    remark: str = ""


@frozen
class Comparison:
    """Lines of predicted and measured; prints as a table."""

    lines: tuple[Line, ...]

    @property
    def promises_kept(self) -> bool:
        """Whether everything that must be equal is."""
        return all(line.verdict != "differs" for line in self.lines)

    def __str__(self) -> str:
        cells = [("quantity", "predicted", "measured", "", "")] + [
            (line.quantity, line.predicted, line.measured, line.verdict, line.remark) for line in self.lines
        ]
        widths = [max(len(row[column]) for row in cells) for column in range(4)]
        align = "<>><"
        drawn = ["  ".join([*(f"{row[i]:{align[i]}{widths[i]}}" for i in range(4)), row[4]]) for row in cells]
        return "\n".join(line.rstrip() for line in (drawn[0], "-" * len(drawn[0].rstrip()), *drawn[1:]))


def compare(prediction: Prediction, measurement: Measurement) -> Comparison:
    """The prediction beside what a run of the same plan measured; PlanError for two different plans."""
    if not isinstance(prediction, Prediction) or not isinstance(measurement, Measurement):
        raise PlanError(
            "compare takes a Prediction and a Measurement, got "
            f"{type(prediction).__name__} and {type(measurement).__name__}"
        )
    if prediction.plan != measurement.plan:
        raise PlanError("prediction and measurement must be of one plan; predict the plan that was run")
    return Comparison(
        (
            *_payloads(prediction, measurement),
            _rows(measurement),
            *_memory(prediction, measurement),
            *_seconds(prediction, measurement),
        )
    )


def _verdict(equal: bool) -> str:
    return "equal" if equal else "differs"


def _ratio(measured: float, predicted: float) -> str:
    return f"{measured / predicted:.2f}x" if predicted > 0 else "-"


def _totals(by_rank: tuple[tuple[tuple[str, str, int], ...], ...]) -> dict[tuple[str, str], int]:
    totals: dict[tuple[str, str], int] = {}
    for rank in by_rank:
        for kind, group, size in rank:
            totals[kind, group] = totals.get((kind, group), 0) + size
    return totals


def _payloads(prediction: Prediction, measurement: Measurement) -> list[Line]:
    planned, counted = _totals(prediction.payload_bytes_by_rank), _totals(measurement.payload_bytes_by_rank)
    return [
        Line(
            quantity=f"{kind} {group} payload, all ranks",
            predicted=f"{planned.get((kind, group), 0):,} B",
            measured=f"{counted.get((kind, group), 0):,} B",
            verdict=_verdict(planned.get((kind, group)) == counted.get((kind, group))),
        )
        for kind, group in sorted(planned.keys() | counted.keys())
    ]


def _rows(measurement: Measurement) -> Line:
    plan = measurement.plan
    planned = []
    for rank in range(plan.topology.world_size):
        where = coordinate(plan.topology, rank)
        planned.append(execution_order(rows(plan.program(where.tp), where.pp)))
    same = sum(p == m for p, m in zip(planned, measurement.rows_by_rank, strict=True))
    return Line(
        quantity="order of rows, ranks as planned",
        predicted=str(len(planned)),
        measured=str(same),
        verdict=_verdict(same == len(planned)),
        remark=f"{sum(map(len, planned))} rows",
    )


def _memory(prediction: Prediction, measurement: Measurement) -> list[Line]:
    if not measurement.memory:
        return []
    lines, moments, equal = [], 0, 0
    for measured in measurement.memory:
        planned = memory_timeline(measurement.plan, measured.rank)
        moments += len(planned.live_bytes)
        if len(planned.live_bytes) == len(measured.live_bytes):
            equal += int((planned.live_bytes == measured.live_bytes).sum())
    lines.append(
        Line(
            quantity="live bytes at segment ends, moments",
            predicted=str(moments),
            measured=f"{equal} equal",
            verdict=_verdict(equal == moments),
        )
    )
    lines += _standing(measurement)
    peak = max(timeline.max_bytes for timeline in measurement.memory)
    lines.append(
        Line(
            quantity="peak memory, fullest rank",
            predicted=f"{prediction.peak_memory_bytes:,} B",
            measured=f"{peak:,} B",
            verdict=_ratio(peak, prediction.peak_memory_bytes),
            remark="tensor storages, not the process",
        )
    )
    return lines


def _standing(measurement: Measurement) -> list[Line]:
    """What stands between steps, all ranks together, by category."""
    plan = measurement.plan
    planned: dict[str, int] = {}
    counted: dict[str, int] = {}
    for measured in measurement.memory:
        static = static_bytes(plan, coordinate(plan.topology, measured.rank))
        found = dict(measured.peak_by_category)
        for name, size in static.items():
            planned[name] = planned.get(name, 0) + size
            counted[name] = counted.get(name, 0) + found.get(name, 0)
    return [
        Line(
            quantity=f"{name}, all ranks",
            predicted=f"{planned[name]:,} B",
            measured=f"{counted[name]:,} B",
            verdict=_verdict(planned[name] == counted[name]),
        )
        for name in planned
    ]


_CLOCKS = {
    "virtual": "virtual time, in which the plan's own seconds pass",
    "virtual cpu": "virtual time: CPU seconds, with a core for each rank",
    "host": "host clock",
    "device": "device clock",
}


def _seconds(prediction: Prediction, measurement: Measurement) -> list[Line]:
    predicted_cpu, measured_cpu = (
        sum(cpu_seconds_by_rank(measurement.plan)),
        sum(measurement.cpu_seconds_by_rank),
    )
    undisturbed = [s for i, s in enumerate(measurement.seconds) if i not in (0, measurement.measured_step)]
    steps = undisturbed or measurement.seconds
    lines = []
    if measurement.plan.cluster.device.kind == "cpu":
        lines.append(
            Line(
                quantity="CPU seconds a step, all ranks",
                predicted=f"{predicted_cpu:.3f} s",
                measured=f"{measured_cpu:.3f} s",
                verdict=_ratio(measured_cpu, predicted_cpu),
                remark=f"estimate for {measurement.plan.cluster.name}"
                + ("" if prediction.interval else ", of unknown error"),
            )
        )
        lines += _within(prediction.interval, "CPU seconds a step", predicted_cpu, measured_cpu)
    lines.append(
        Line(
            quantity="step time",
            predicted=f"{prediction.step_seconds:.3f} s",
            measured=f"{median(steps):.3f} s",
            verdict=_ratio(median(steps), prediction.step_seconds),
            remark=_CLOCKS.get(measurement.clock, measurement.clock),
        )
    )
    if measurement.plan.cluster.device.kind != "cpu" and measurement.clock != "virtual":
        lines += _within(prediction.interval, "step time", prediction.step_seconds, median(steps))
    return lines


def _within(interval: Interval | None, quantity: str, predicted: float, measured: float) -> list[Line]:
    """Whether what was measured is where known runs would be: a line for half of them, one for 80 %."""
    if interval is None:
        return []
    ranges = {"half": interval.half_range(predicted), "80 %": interval.most_range(predicted)}
    return [
        Line(
            quantity=f"{quantity}, range of {share} of known runs",
            predicted=f"{found[0]:.3f} to {found[1]:.3f} s",
            measured=f"{measured:.3f} s",
            verdict="within" if found[0] <= measured <= found[1] else "outside",
            remark=interval.source,
        )
        for share, found in ranges.items()
        if found is not None
    ]
