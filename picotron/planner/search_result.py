"""What a search returns: plans fastest first, the Pareto front, the counts, the ties and the reasons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from attrs import field, frozen

from picotron.errors import PlanError
from picotron.planner.candidates import Plans, in_words
from picotron.planner.interval import Interval
from picotron.planner.plan import TrainingPlan
from picotron.planner.predict import Prediction, predict
from picotron.planner.priced import Prices
from picotron.planner.refine import Refined, refined
from picotron.planner.space import Space
from picotron.planner.validators import is_count, shown

if TYPE_CHECKING:
    from picotron.planner.why import Why

TOP_ROWS = 10
SIMULATED = 3
QUICK_ACTIONS = 20_000  # of a step, counted once for each kind of rank: some seconds of simulation
GIB = 2**30

Progress = Callable[[str], None]


@frozen(kw_only=True)
class Counts:
    """How every candidate was covered: evaluated, or cut by a proven bound.

    ``refused``: combinations of degrees (tp, cp, pp, ep, etp, microbatch) that broke a constraint, by the
    first one broken; they never became candidates. ``cut_by_memory`` cannot fit; ``cut_by_time`` are neither
    among the fastest that are kept nor on the front. ``fit`` of the evaluated ones do.
    """

    candidates: int
    evaluated: int
    cut_by_memory: int
    cut_by_time: int
    fit: int
    refused: Mapping[str, int]

    @property
    def covered(self) -> int:
        """Evaluated or cut by a bound: all of them."""
        return self.evaluated + self.cut_by_memory + self.cut_by_time

    def __str__(self) -> str:
        refused = ", ".join(f"{name} {count:,}" for name, count in sorted(self.refused.items()))
        return (
            f"{self.candidates:,} candidates: {self.evaluated:,} evaluated ({self.fit:,} fit), "
            f"{self.cut_by_memory:,} cut by the memory bound, {self.cut_by_time:,} by the time bound"
            + (f"; refused before: {refused}" if refused else "")
        )


@frozen(kw_only=True, eq=False, repr=False)
class SearchResult(Sequence[TrainingPlan]):
    """The plans that a search keeps, fastest first: of each choice of degrees and microbatch the fastest one.

    A plan is built when it is looked at. ``pareto``: the plans that none beats in both time and memory.
    ``interval``: the error of a predicted time (the median, as in ``Prediction``), None where none is known;
    plans closer than that to the best are ``ties``.
    """

    space: Space
    prices: Prices = field(repr=False)
    fastest: Plans
    pareto: Plans
    counts: Counts
    limit_bytes: int
    interval: Interval | None

    def __len__(self) -> int:
        return len(self.fastest)

    @overload
    def __getitem__(self, index: int) -> TrainingPlan: ...

    @overload
    def __getitem__(self, index: slice) -> Plans: ...

    def __getitem__(self, index: int | slice) -> TrainingPlan | Plans:
        """The plan at ``index``, 0 the fastest."""
        return self.fastest[index]

    @cached_property
    def best(self) -> TrainingPlan:
        """The fastest plan that fits."""
        return self.fastest[0]

    @property
    def ties(self) -> Plans:
        """The kept plans whose predicted time is within the prediction's interval of the best."""
        best = float(self.fastest.seconds[0])
        most = self.interval.half_range(best)[1] if self.interval else best
        near = int(np.searchsorted(self.fastest.seconds, most, "right"))
        return self.fastest[:near]

    def simulated(self, count: int = SIMULATED, progress: Progress | None = None) -> tuple[Prediction, ...]:
        """The first ``count`` plans priced by the exact simulator, in the search's order.

        Once asked for, they stand beside the estimates wherever the result is shown.
        """
        if not is_count(count):
            raise PlanError(f"count must be a whole number of at least 0, got {shown(count)}")
        wanted = range(min(count, len(self)))
        for index in wanted:
            if progress is not None and index not in self.predictions:
                progress(f"simulating plan {index + 1} of {len(wanted)}")
            self._predicted(index)
        return tuple(map(self._predicted, wanted))

    def _predicted(self, index: int) -> Prediction:
        if index not in self.predictions:
            self.predictions[index] = predict(self.fastest[index])
        return self.predictions[index]

    @cached_property
    def predictions(self) -> dict[int, Prediction]:
        """The exact simulator's predictions so far, by the plan's number."""
        return {}

    def misfit(self, index: int) -> str:
        """What the exact count of bytes says against a simulated plan, or nothing where it fits."""
        found = self.predictions[index]
        if found.misfits or found.reserved_bytes <= self.limit_bytes:
            return "; ".join(found.misfits)
        held, limit = found.reserved_bytes / GIB, self.limit_bytes / GIB
        return f"rank {found.peak_memory_rank} needs {held:.2f} GiB of {limit:.2f}"

    def is_quick(self, index: int) -> bool:
        """Whether a plan is simulated in a few seconds, as far as its size tells."""
        row, known = self.fastest.row(index), self.space.known
        microbatches = known.global_batch // int(row["dp"] * row["micro_batch"])
        kinds = row["ep"] * (row["tp"] if known.vocab % row["tp"] else 1)  # of ranks on a stage
        return 3 * row["pp"] * row["virtual_stages"] * microbatches * kinds <= QUICK_ACTIONS

    def refined(self, index: int = 0) -> Refined:
        """The plan at ``index`` with its layers cut into stages as the exact simulator likes best.

        Layers are moved one at a time between stages; a cut counts if its step is faster and every rank fits.
        """
        if not is_count(index) or index >= len(self):
            raise PlanError(f"a plan's number must be in [0, {len(self)}), got {shown(index)}")
        return refined(self._predicted(index), self.limit_bytes)

    def why(self, layout: TrainingPlan | str | None = None, **choices: Any) -> Why:
        """Why a layout is not the best: the rule that refuses it, bytes that do not fit, or milliseconds.

        The layout is a plan, a text such as ``"tp=4 pp=8"`` or keywords; what they leave open is chosen as
        the search would.
        """
        from picotron.planner.why import why

        return why(self, layout, choices)

    def table(self, count: int = TOP_ROWS) -> str:
        """The fastest plans, a line each."""
        from picotron.planner.draw_search import table

        return table(self, count)

    def __str__(self) -> str:
        from picotron.planner.draw_search import draw_search

        return draw_search(self)

    def _repr_html_(self) -> str:
        from picotron.planner.draw_search import search_html

        return search_html(self)

    def __repr__(self) -> str:
        best = in_words(self.fastest.row(0))
        return f"<SearchResult: {len(self)} plans, the best {best} in {self.fastest.seconds[0]:.4g} s>"
