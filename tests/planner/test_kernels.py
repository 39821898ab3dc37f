"""Seconds of kernels that a reader can check by hand."""

import numpy as np
import pytest
from attrs import evolve

from picotron.planner.kernels import Rates, attention_seconds, causal_pairs, device_rates, matmul_seconds
from tests.planner.estimated import IDEAL, case

ONE = np.ones(())
DEVICE = Rates(
    wide=2.0 * ONE,
    narrow=4.0 * ONE,
    is_narrow=0 * ONE,
    operand_bytes=2.0 * ONE,
    wide_bytes=2.0 * ONE,
    bytes_per_second=1e30 * ONE,
    processors=4.0 * ONE,
    tile_ramp=0.0 * ONE,
    narrow_ramp=0.0 * ONE,
    wave_weight=1.0 * ONE,
    spill=0.0 * ONE,
)


def seconds(m: float, n: float, k: float, device: Rates = DEVICE, groups: float = 1.0) -> float:
    sizes = (np.asarray(float(size)) for size in (m, n, k))
    return float(matmul_seconds(device, *sizes, narrow=False, groups=groups))


def test_four_tiles_on_four_processors_waste_nothing() -> None:
    """1024 x 128 is four tiles of 256 x 128: all of 2 m n k FLOPs at the rate."""
    assert seconds(1024, 128, 64) == 1024 * 128 * 64


def test_a_fifth_tile_costs_a_wave() -> None:
    """Large tiles would take two waves, 8 tiles' time; small ones at 0.8 of the rate fill theirs: 5 / 0.8."""
    assert seconds(1280, 128, 64) == pytest.approx(5 / 0.8 * 256 * 128 * 64)
    gentle = evolve(DEVICE, wave_weight=np.zeros(()))
    assert seconds(1280, 128, 64, gentle) == 1280 * 128 * 64


def test_only_one_launch_shares_its_last_wave() -> None:
    """Two products of two large tiles fill 4 processors; alone each takes four small ones, at 0.94."""
    sizes = [np.asarray(float(size)) for size in (512, 128, 64)]
    together, apart = (
        float(matmul_seconds(DEVICE, *sizes, narrow=False, groups=2.0, launches=count))
        for count in (1.0, 2.0)
    )
    assert together == 4 * 256 * 128 * 64
    assert apart == pytest.approx(2 * 4 * 128 * 128 * 64 / 0.94)


def test_a_row_too_many_costs_a_row_of_tiles() -> None:
    """The cheapest cover of 129 rows by tiles of 128 or 256 is one of 256."""
    single = evolve(DEVICE, processors=ONE)
    assert seconds(129, 128, 64, single) == seconds(256, 128, 64, single)


def test_the_pipeline_fills_along_k() -> None:
    """A ramp of 64 makes a product of k = 64 half as fast as its FLOPs say."""
    assert seconds(1024, 128, 64, evolve(DEVICE, tile_ramp=64.0 * ONE)) == 2 * seconds(1024, 128, 64)


def test_thin_products_take_their_bytes() -> None:
    """At any rate of arithmetic, operands of 2 bytes are read and results of 2 written."""
    slow = evolve(DEVICE, wide=1e30 * ONE, bytes_per_second=2.0 * ONE)
    assert seconds(1, 1000, 1000, slow) == pytest.approx(1000 + 1000 * 1000 + 1000)


def test_what_the_longer_does_not_hide_is_added() -> None:
    """With a spill of a half, half of the bytes' seconds are added to the arithmetic's."""
    device = evolve(DEVICE, bytes_per_second=2.0 * ONE, spill=0.5 * ONE)
    arithmetic, moved = 1024 * 128 * 640, (1024 + 128) * 640 + 1024 * 128
    assert seconds(1024, 128, 640, device) == pytest.approx(arithmetic + moved / 2)


def test_grouped_products_share_waves() -> None:
    """Four experts with one tile each fill four processors; no rows take no time."""
    assert seconds(256, 128, 64, groups=4) == seconds(1024, 128, 64)
    assert seconds(0, 128, 64) == 0


def test_a_window_bounds_the_pairs() -> None:
    """Of 4 positions, a causal mask keeps 8 pairs (half of 16), a window of 2 keeps 6."""
    assert causal_pairs(np.asarray(4.0)) == 8
    assert causal_pairs(np.asarray(4.0), 2.0) == 6


def test_flash_attention_multiplies_half_of_the_square() -> None:
    """Both products, over s * s / 2 pairs of 32 heads of 128, at the share of peak; backward 2.5 of it."""
    cases = case(model="llama-3.1-8b", seq_len=8192)
    forward, backward = attention_seconds(cases, device_rates(cases, IDEAL), IDEAL, cases.model.heads)
    flops = 2 * 32 * 8192 * 8192 / 2 * (128 + 128)
    assert forward == pytest.approx(flops / 989e12)
    assert backward == pytest.approx(2.5 * forward)


def test_unfused_attention_pays_for_its_scores() -> None:
    """All of the square is multiplied, and heads * s * s scores cross memory."""
    flash, plain = (case(model="llama-3.1-8b", attention=name) for name in ("flash-2", "fused-softmax"))
    rates = device_rates(flash, IDEAL)
    fast = attention_seconds(flash, rates, IDEAL, flash.model.heads)[0]
    slow = attention_seconds(plain, rates, IDEAL, flash.model.heads)[0]
    passes = float(IDEAL.by("score_passes", plain.software.attention))
    moved = 0.45 * passes * 32 * 4096 * 4096 * 2 / 3.35e12
    assert slow == pytest.approx(2 * fast + moved)
