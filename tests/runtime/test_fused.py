"""Weights side by side are one weight; apart, they are multiplied one by one to the same numbers."""

from __future__ import annotations

import pytest
import torch

from picotron.runtime.fused import EqualProjections, Projections, side_by_side


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


@pytest.mark.parametrize("kind", [Projections, EqualProjections])
@pytest.mark.parametrize("apart", [False, True])
def test_one_product_or_several(kind: type[Projections], apart: bool) -> None:
    """Outputs, input gradient and gradients of weights and biases are those of each projection by itself."""
    names, draw = ["gate_proj", "up_proj"], torch.Generator().manual_seed(0)

    def piled(*shape: int) -> list[torch.Tensor]:
        whole = torch.randn(2, *shape, generator=draw, dtype=torch.float64)
        return [each.clone() for each in whole] if apart else [*whole]

    w, b, dw, db = piled(4, 3), piled(4), piled(4, 3), piled(4)
    weights, gradients = (
        {f"{name}.{kind}": held[i] for i, name in enumerate(names) for kind, held in pair}
        for pair in ((("weight", w), ("bias", b)), (("weight", dw), ("bias", db)))
    )
    before = [each.clone() for each in (*dw, *db)]
    made = kind(names, weights, gradients)
    x, dy = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((5, 3), (2, 5, 4)))
    out = made.output(x)
    for place, each in enumerate(out.unbind() if kind is EqualProjections else out.chunk(2, dim=1)):
        torch.testing.assert_close(each, x @ w[place].T + b[place])
    torch.testing.assert_close(made.input_gradient([*dy]), dy[0] @ w[0] + dy[1] @ w[1])
    made.add_weight_gradient(dy if kind is EqualProjections else [*dy], x)
    made.add_bias_gradient([*dy])
    for place in range(2):
        torch.testing.assert_close(dw[place], before[place] + dy[place].T @ x)
        torch.testing.assert_close(db[place], before[2 + place] + dy[place].sum(0))
