"""Where each millisecond and each byte of a plan goes, and what one change would do to them.

Seconds by cause and bytes by class are those of ``predict``: of the rank that works longest, and of the one
that holds most; both sum to the whole. A difference between two plans is told cause by cause, so that its
terms sum to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from attrs import evolve, field, frozen

from picotron.errors import PlanError
from picotron.planner.cluster import ClusterSpec
from picotron.planner.columns_of import cases_of_plan
from picotron.planner.estimate import estimate_seconds
from picotron.planner.estimate_memory import estimate_bytes
from picotron.planner.interval import Interval, interval_data
from picotron.planner.plan import TrainingPlan
from picotron.planner.predict import Prediction, predict
from picotron.planner.profile_prices import has_time_model
from picotron.planner.serialize import fingerprint
from picotron.planner.software import SoftwareProfile, software_profile
from picotron.planner.topology import coordinate
from picotron.planner.validators import is_between, is_count, shown
from picotron.planner.what_if import changed, single_changes
from picotron.planner.worst_dispatch import worst_dispatch_bytes

MOST_CHANGES = 3
LEAST_GAIN = 1e-3  # of a step's seconds, for a change to be worth telling
GIVEN = "given by the caller"

Items = tuple[tuple[str, float], ...]


@frozen(kw_only=True)
class Change:
    """What one change would do: the seconds of the step, and the bytes of the fullest rank."""

    setting: str
    step_seconds: float
    peak_bytes: int


@frozen(kw_only=True)
class Explanation:
    """Seconds of a step by cause and bytes of the fullest rank by class; each sums to its whole.

    Both are those of ``predict``. ``interval`` is how far known runs were off, None where none are known.
    ``rank`` is the fullest position of the pipeline. Bytes are of balanced experts; ``worst_dispatch_bytes``
    is how much more it would hold if every token went to the experts of one rank. ``changes`` are single
    changes that save, of plans that fit, picked by estimate and predicted.
    """

    plan: TrainingPlan = field(repr=False)
    profile: str
    step_seconds: float
    interval: Interval | None
    seconds: Items
    bytes: Items
    rank: int
    tokens_per_second: float
    mfu: float
    worst_dispatch_bytes: int = 0
    changes: tuple[Change, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """Bytes of the fullest rank, all classes: what its device holds."""
        return int(sum(size for _, size in self.bytes))

    @property
    def capacity_bytes(self) -> int:
        """What the device has."""
        return self.plan.cluster.device.memory_bytes

    @property
    def margin_bytes(self) -> int:
        """What the fullest rank has left; negative if the plan does not fit."""
        return self.capacity_bytes - self.peak_bytes

    @property
    def data(self) -> dict[str, Any]:
        """The explanation as values that JSON has, in seconds and bytes."""
        return {
            "profile": self.profile,
            "step_seconds": self.step_seconds,
            **interval_data(self.interval, self.step_seconds),
            "seconds": dict(self.seconds),
            "bytes": {name: int(size) for name, size in self.bytes},
            "rank": self.rank,
            "peak_bytes": self.peak_bytes,
            "capacity_bytes": self.capacity_bytes,
            "margin_bytes": self.margin_bytes,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "worst_dispatch_bytes": self.worst_dispatch_bytes,
            "changes": [
                {"setting": one.setting, "step_seconds": one.step_seconds, "peak_bytes": one.peak_bytes}
                for one in self.changes
            ],
            "fingerprint": fingerprint(self.plan),
        }

    def to_json(self) -> str:
        """The explanation as JSON text, in seconds and bytes."""
        return json.dumps(self.data, sort_keys=True, indent=2, allow_nan=False) + "\n"

    def __str__(self) -> str:
        from picotron.planner.draw_explanation import draw_explanation

        return draw_explanation(self)

    def _repr_html_(self) -> str:
        """Both charts, for notebooks."""
        from picotron.planner.draw_explanation import explanation_html

        return explanation_html(self)


@frozen(kw_only=True)
class WhatIf:
    """Two explanations, what was ``asked`` to differ and what ``followed``."""

    before: Explanation
    after: Explanation
    asked: tuple[str, ...]
    followed: tuple[str, ...]

    @property
    def seconds(self) -> Items:
        """What each cause adds to the difference of the step's seconds."""
        return _differences(self.before.seconds, self.after.seconds)

    @property
    def bytes(self) -> Items:
        """What each class adds to the difference of the fullest ranks' bytes."""
        return _differences(self.before.bytes, self.after.bytes)

    @property
    def difference_seconds(self) -> float:
        """How much longer the step takes; the sum of its terms."""
        return sum(value for _, value in self.seconds)

    @property
    def data(self) -> dict[str, Any]:
        """The comparison as values that JSON has."""
        return {
            "asked": list(self.asked),
            "followed": list(self.followed),
            "before": self.before.data,
            "after": self.after.data,
            "difference_seconds": self.difference_seconds,
            "seconds": dict(self.seconds),
            "bytes": {name: int(size) for name, size in self.bytes},
        }

    def __str__(self) -> str:
        from picotron.planner.draw_explanation import draw_what_if

        return draw_what_if(self)


def explain(
    plan: TrainingPlan,
    *,
    profile: SoftwareProfile | str | None = None,
    interval: float | None = None,
    changes: int = MOST_CHANGES,
) -> Explanation:
    """Where the seconds and bytes of ``plan`` go; under ``profile`` in place of its cluster's, if given.

    ``changes`` single changes that save are looked for; ``interval`` replaces the error that predictions are
    known to have. Raises PlanError for what is no plan, an unknown profile, or numbers of a cluster from
    which no time can be told.
    """
    if not isinstance(plan, TrainingPlan):
        raise PlanError(f"plan must be a TrainingPlan, got {type(plan).__name__}; make one with plan(...)")
    if interval is not None and not is_between(interval, 0, 10):
        raise PlanError(f"interval must be a relative error in [0, 10], got {shown(interval)}")
    if not is_count(changes):
        raise PlanError(f"changes must be a whole number of at least 0, got {shown(changes)}")
    plan = under_profile(plan, profile)
    found = predict(plan)
    return Explanation(
        plan=plan,
        profile=plan.cluster.profile.name,
        step_seconds=found.step_seconds,
        interval=found.interval if interval is None else Interval(half=interval, source=GIVEN),
        seconds=found.seconds_by_cause,
        bytes=_bytes(found),
        rank=coordinate(plan.topology, found.peak_memory_rank).pp,
        tokens_per_second=found.tokens_per_second,
        mfu=found.mfu,
        worst_dispatch_bytes=worst_dispatch_bytes(plan),
        changes=_best_changes(found, changes) if changes else (),
    )


def under_profile(plan: TrainingPlan, profile: SoftwareProfile | str | None) -> TrainingPlan:
    """``plan`` on a cluster with another software profile; as it is where none is given."""
    if profile is None:
        return plan
    software = profile if isinstance(profile, SoftwareProfile) else software_profile(profile)
    return evolve(plan, cluster=evolve(plan.cluster, profile=software))


def what_if(
    plan: TrainingPlan,
    settings: Mapping[str, Any] | None = None,
    *,
    cluster: ClusterSpec | None = None,
    profile: SoftwareProfile | str | None = None,
    profile_after: SoftwareProfile | str | None = None,
    interval: float | None = None,
    asked: Sequence[str] = (),
) -> WhatIf:
    """What changes with ``settings`` of the plan, on another ``cluster`` or under another profile.

    ``asked`` says so in the caller's own words. Raises PlanError for a plan that cannot be.
    """
    if not isinstance(plan, TrainingPlan):
        raise PlanError(f"plan must be a TrainingPlan, got {type(plan).__name__}; make one with plan(...)")
    if not isinstance(asked, Sequence) or not all(isinstance(words, str) for words in asked):
        raise PlanError(f"asked must be words, one text for each thing that differs, got {shown(asked)}")
    settings = {} if settings is None else settings
    other, followed = changed(plan, settings, cluster)
    own = tuple(f"{name}={value}" for name, value in settings.items())
    return WhatIf(
        before=explain(plan, profile=profile, interval=interval, changes=0),
        after=explain(other, profile=profile_after or profile, interval=interval, changes=0),
        asked=tuple(asked) or own,
        followed=followed,
    )


def _bytes(found: Prediction) -> Items:
    """What the fullest rank's device holds: tensors by category, the framework's own and fragmentation."""
    apart = (("framework", found.framework_bytes), ("fragmentation", found.fragmentation_bytes))
    return tuple((name, float(size)) for name, size in (*found.memory_by_category, *apart))


def _best_changes(found: Prediction, count: int) -> tuple[Change, ...]:
    """The single changes with the fastest steps of those that fit; of any speed where nothing fits yet.

    Tried in the order of their estimates, until there are enough or twice as many have been predicted.
    """
    chosen: list[Change] = []
    limit = found.step_seconds * (1 - LEAST_GAIN) if found.fits else float("inf")
    for words, other in _promising(found.plan, limit / found.step_seconds)[: 2 * count]:
        made = predict(other)
        if made.fits and made.step_seconds < limit:
            chosen.append(
                Change(setting=words, step_seconds=made.step_seconds, peak_bytes=made.reserved_bytes)
            )
        if len(chosen) == count:
            break
    return tuple(sorted(chosen, key=lambda one: (one.step_seconds, one.setting)))


def _promising(plan: TrainingPlan, most: float) -> list[tuple[str, TrainingPlan]]:
    """Plans that differ in one thing, in words, the fastest by estimate first.

    Those that by estimate do not fit, or take more than ``most`` times as long, are left out where there is a
    time model to say so.
    """
    every = list(_changed_plans(plan))
    if not has_time_model(plan.cluster):
        return sorted(every, key=lambda pair: predict(pair[1]).step_seconds)
    own, capacity = _estimated(plan)[0], plan.cluster.device.memory_bytes
    estimates = [_estimated(other) for _, other in every]
    order = sorted(range(len(every)), key=lambda index: (estimates[index][0], every[index][0]))
    return [
        every[index]
        for index in order
        if estimates[index][0] < most * own and estimates[index][1] <= capacity
    ]


def _changed_plans(plan: TrainingPlan) -> Iterator[tuple[str, TrainingPlan]]:
    for setting in single_changes(plan):
        try:
            other, _ = changed(plan, setting)
        except PlanError:
            continue
        yield ", ".join(f"{name}={value}" for name, value in setting.items()), other


def _estimated(plan: TrainingPlan) -> tuple[float, float]:
    """Seconds of a step and bytes of the fullest device, by the closed forms."""
    cases = cases_of_plan(plan)
    return _one(estimate_seconds(cases).step_seconds), _one(estimate_bytes(cases).reserved_bytes)


def _one(column: np.ndarray) -> float:
    value = float(np.ravel(column)[0])
    if not np.isfinite(value):
        raise PlanError(f"an estimate must be a finite number, got {value}; look at the cluster's rates")
    return value


def _differences(before: Items, after: Items) -> Items:
    """After less before, name by name."""
    old, new = dict(before), dict(after)
    return tuple((name, new.get(name, 0.0) - old.get(name, 0.0)) for name in {**old, **new})
