"""The two ways things go wrong: the request cannot be planned, or the world departed from the plan."""

from __future__ import annotations


class PlanError(ValueError):
    """The request cannot be planned.

    The message gives the rule, the value and any remedy: "stage must be in [0, 4), got 7".
    """


class ExecutionError(RuntimeError):
    """The world departed from the plan, at ``rank``, in ``action`` and at ``position``.

    ``action`` is what the rank was doing ("2B5", "all_reduce over tp"); ``position`` is the index of the
    row (and of the operation within it) in that rank's program. Either is None before the first row.
    ``message`` is what went wrong, without the place.
    """

    def __init__(
        self, message: str, *, rank: int | None = None, action: str | None = None, position: str | None = None
    ) -> None:
        self.message, self.rank, self.action, self.position = message, rank, action, position
        where = [
            f"{name} {value}"
            for name, value in (("rank", rank), ("action", action), ("position", position))
            if value is not None
        ]
        super().__init__(f"{', '.join(where)}: {message}" if where else message)

    def __reduce__(self) -> tuple[object, ...]:
        """Cross a process border whole (the default would prefix the place twice)."""
        return _again, (type(self), self.message, self.rank, self.action, self.position)


def _again(
    kind: type[ExecutionError], message: str, rank: int | None, action: str | None, position: str | None
) -> ExecutionError:
    return kind(message, rank=rank, action=action, position=position)
