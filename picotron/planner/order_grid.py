"""Orders as a grid of text: a row a rank, a column a position, with the cells in question marked."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from picotron.planner.actions import Orders, cells

WIDTH = 100
HEIGHT = 16
_CUT = "…"
_MISSING = "?"


def orders_grid(
    orders: Orders,
    *,
    rank: int = 0,
    index: int | None = None,
    also: Collection[int] = (),
    width: int = WIDTH,
    height: int = HEIGHT,
) -> str:
    """The cells of every rank, that of the action at ``index`` marked as in ``>1B0<``, and those in ``also``.

    At index -1 the end of ``rank``, which lacks something, bears ``>?<``; at None, nothing. What does not fit
    into ``width`` characters and ``height`` rows is cut away round the marked cell, which is always shown.

    >>> from picotron.planner.actions import make_orders
    >>> print(orders_grid(make_orders([["0F0", "0B0"], ["1B0", "1F0"]]), rank=1, index=2))
    rank 0:  0F0  0B0
    rank 1: >1B0< 1F0
    """
    shown = _around(rank, len(orders), height)
    marked = {
        (orders.rank_of(one), _column(orders, one)) for one in (index, *also) if one is not None and one >= 0
    }
    if index == -1 and 0 <= rank < len(orders):
        marked.add((rank, len(cells(orders, rank))))
    rows = {own: _row(orders, own, {column for other, column in marked if other == own}) for own in shown}
    widths = [
        max(len(row[c]) for row in rows.values() if c < len(row)) for c in range(_longest(rows.values()))
    ]
    label = len(f"rank {shown.stop - 1}:")
    centre = 0 if index is None else _column(orders, index) if index >= 0 else len(rows.get(rank, " ")) - 1
    first, stop = _fitting(widths, centre, width - label - 2)
    lines = []
    for own, row in rows.items():
        text = "".join(
            cell.ljust(size) for cell, size in zip(row[first:stop], widths[first:stop], strict=False)
        )
        cut = _CUT if stop < len(row) else ""
        lines.append(f"{f'rank {own}:':<{label}}{_CUT if first else ' '}{text.rstrip()}{cut}".rstrip())
    above, below = ([_CUT] if there else [] for there in (shown.start > 0, shown.stop < len(orders)))
    return "\n".join([*above, *lines, *below])


def _around(centre: int, count: int, room: int) -> range:
    """Up to ``room`` numbers of ``range(count)`` round one of them."""
    first = max(0, min(centre - room // 2, count - room))
    return range(first, min(first + room, count))


def _row(orders: Orders, rank: int, marked: Collection[int]) -> list[str]:
    """A rank's cells, each between marks or blanks; what is marked behind the last is missing."""
    texts = cells(orders, rank)
    if len(texts) in marked:
        texts.append(_MISSING)
    return [f">{text}<" if column in marked else f" {text} " for column, text in enumerate(texts)]


def _column(orders: Orders, index: int) -> int:
    """The position of an action's cell among the cells of its rank."""
    first = orders.offsets[orders.rank_of(index)]
    seconds = orders.joined[first:index]  # an action that is joined shares its cell with the next
    return index - first - int(seconds.sum())


def _longest(rows: Collection[Sequence[str]]) -> int:
    return max(map(len, rows), default=0)


def _fitting(widths: Sequence[int], centre: int, room: int) -> tuple[int, int]:
    """The first and the last but one of the columns round ``centre`` that fit; it always does."""
    first, stop = centre, min(centre + 1, len(widths))
    room -= sum(widths[first:stop])
    grown = True
    while grown:
        grown = False
        if stop < len(widths) and widths[stop] <= room:
            room, stop, grown = room - widths[stop], stop + 1, True
        if first > 0 and widths[first - 1] <= room:
            room, first, grown = room - widths[first - 1], first - 1, True
    return first, stop
