"""Weights side by side are one weight; apart, they are multiplied one by one to the same numbers."""

from __future__ import annotations

from itertools import repeat

import pytest
import torch
from torch.nn import functional

from picotron.runtime.fused import Projections, side_by_side


def parts(*rows: int, gap: int = 0) -> list[torch.Tensor]:
    """Pieces of one buffer, of so many rows of three, with ``gap`` elements after each."""
    flat = torch.arange(float(sum(rows) * 3 + gap * len(rows)))
    ends = [sum(rows[: i + 1]) * 3 + gap * i for i in range(len(rows))]
    return [flat[end - 3 * count : end].view(count, 3) for count, end in zip(rows, ends, strict=True)]


def test_neighbours_are_one_tensor_without_a_copy() -> None:
    """Rows of all, in their memory."""
    found = side_by_side(own := parts(2, 1, 4))
    assert found is not None
    assert torch.equal(found, torch.cat(own))
    assert found.data_ptr() == own[0].data_ptr()


def test_others_between_them_or_another_order_leave_them_apart() -> None:
    """Nor are pieces of two buffers, of other widths, or with steps between their elements."""
    assert side_by_side(parts(2, 1, gap=1)) is None
    assert side_by_side(parts(2, 1)[::-1]) is None
    assert side_by_side([*parts(2), *parts(2)]) is None
    assert side_by_side([parts(2)[0], parts(2)[0].view(3, 2)]) is None
    assert side_by_side([parts(2)[0].t(), parts(2)[0]]) is None


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_one_product_or_several(together: bool, apart: bool) -> None:
    """Outputs, input gradient and gradients of biases are those of each projection by itself."""
    names, draw = ["gate_proj", "up_proj"], torch.Generator().manual_seed(0)

    def piled(*shape: int) -> list[torch.Tensor]:
        whole = torch.randn(2, *shape, generator=draw, dtype=torch.float64)
        return [each.clone() for each in whole] if apart else [*whole]

    w, b, db = piled(4, 3), piled(4), piled(4)
    weights = {f"{name}.weight": w[i] for i, name in enumerate(names)}
    weights |= {f"{name}.bias": b[i] for i, name in enumerate(names)}
    before = [each.clone() for each in db]
    made = Projections(names, weights, {f"{name}.bias": db[i] for i, name in enumerate(names)})
    made.together = together
    x, dy = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((5, 3), (2, 5, 4)))
    outputs = made.outputs(lambda *operands: list(map(functional.linear, repeat(x), *operands)))
    assert (outputs[0].untyped_storage()._cdata == outputs[1].untyped_storage()._cdata) == (
        together and not apart
    )
    torch.testing.assert_close(made.input_gradient([*dy]), dy[0] @ w[0] + dy[1] @ w[1])
    made.add_bias_gradients([*dy])
    for place in range(2):
        torch.testing.assert_close(outputs[place], x @ w[place].T + b[place])
        torch.testing.assert_close(db[place], before[place] + dy[place].sum(0))
