"""Seconds of the kernels of one device, for whole columns of shapes: products, attention, moving bytes.

A product of m x k by k x n is cut in tiles that are dealt to the processors in waves (Osama et al. 2023,
arXiv:2301.03598). It takes the longer of its tiles' arithmetic and its bytes (Williams et al. 2009), and a
share of the shorter, which it does not hide; the best of a few tile shapes is taken, as the libraries choose.
Sizes may be fractions: a mean number of rows of an expert, say.
"""

from __future__ import annotations

import numpy as np
from attrs import frozen

from picotron.planner.cases import PRODUCT_FORMATS, Cases, Column
from picotron.planner.constants import Constants

TILES = (
    (256.0, 128.0, 1.0),
    (128.0, 128.0, 0.94),
    (128.0, 64.0, 0.80),
)  # rows, columns, rate beside the best
_EIGHT_BIT = tuple(PRODUCT_FORMATS.index(name) for name in ("fp8", "mxfp8", "fp8-blockwise"))
_BLOCK_SCALED = tuple(PRODUCT_FORMATS.index(name) for name in ("mxfp8", "fp8-blockwise"))
_FOUR_BIT = PRODUCT_FORMATS.index("nvfp4")
BACKWARD_ATTENTION = (
    2.5  # products of a flash backward beside its forward (Dao et al. 2022, arXiv:2205.14135)
)


@frozen(kw_only=True, eq=False)
class Rates:
    """What one device reaches: FLOP/s of products by width, bytes/s, and what its tiles are dealt to."""

    wide: Column  # of 16-bit products (or of the one format that everything runs in)
    narrow: Column  # of the layers' products
    is_narrow: Column  # 1 where the layers' products have operands of 8 or 4 bits
    operand_bytes: Column  # of an element of the layers' products
    wide_bytes: Column  # of an element of the others, and of every result
    bytes_per_second: Column
    processors: Column
    tile_ramp: Column
    narrow_ramp: Column  # longer in steps of narrow operands: the result is as wide as ever
    wave_weight: Column
    spill: Column


def device_rates(cases: Cases, constants: Constants) -> Rates:
    """The rates of every case: peaks times the shares of the table and the profile's clock."""
    machine, form = cases.machine, cases.work.product_format
    eight, four = np.isin(form, _EIGHT_BIT), form == _FOUR_BIT
    wide = constants.by("matmul_share", machine.architecture)
    slower = np.where(np.isin(form, _BLOCK_SCALED), constants["block_scale_share"], 1.0)
    slower = np.where(four, constants["four_bit_share"], slower)
    narrow = constants.by("narrow_share", machine.architecture) * slower
    is_narrow = eight | four
    clock = cases.software.clock / machine.compute_scale
    moved = machine.memory_bytes_per_second / machine.compute_scale
    return Rates(
        wide=machine.peak_16bit * wide * clock,
        narrow=machine.peak_flops * np.where(is_narrow, narrow, wide) * clock,
        is_narrow=is_narrow.astype(np.float64),
        operand_bytes=np.where(eight, 1.0, np.where(four, 0.5625, cases.work.compute_bytes)),
        wide_bytes=cases.work.compute_bytes,
        bytes_per_second=moved * constants.by("memory_share", machine.architecture),
        processors=machine.processors,
        tile_ramp=constants["tile_ramp"],
        narrow_ramp=constants["tile_ramp"]
        * np.where(is_narrow, machine.peak_flops / machine.peak_16bit, 1.0),
        wave_weight=constants["wave_weight"],
        spill=constants["spill_share"],
    )


def matmul_seconds(
    rates: Rates,
    m: Column,
    n: Column,
    k: Column,
    *,
    narrow: bool,
    groups: Column | float = 1.0,
    launches: Column | float = 1.0,
    output_bytes: Column | None = None,
) -> Column:
    """Seconds of ``groups`` products of m x k by k x n in so many ``launches``; 0 where a size is 0.

    Only tiles of one launch share its last wave. ``output_bytes`` are moved for each element of the result (8
    where it is added to 32 bits).
    """
    if not (np.any(n) and np.any(k)):
        return np.zeros(())
    rate = rates.narrow if narrow else rates.wide
    width = rates.operand_bytes if narrow else rates.wide_bytes
    result = rates.wide_bytes if output_bytes is None else output_bytes
    by_memory = groups * ((m + n) * k * width + result * m * n) / rates.bytes_per_second
    ramp = rates.narrow_ramp if narrow else rates.tile_ramp
    steps = 2.0 * (k + ramp) / rate
    busy: Column | None = None
    for rows, columns, speed in TILES:
        tiles = groups * np.ceil(m / rows) * np.ceil(n / columns)
        waves = np.ceil(tiles / (launches * rates.processors)) * (launches * rates.processors)
        seconds = (tiles + rates.wave_weight * (waves - tiles)) * (rows * columns / speed) * steps
        busy = seconds if busy is None else np.minimum(busy, seconds)
    assert busy is not None
    seconds = np.maximum(busy, by_memory) + rates.spill * np.minimum(busy, by_memory)
    return np.where(m * n * k > 0, seconds, 0.0)


def causal_pairs(seq_len: Column, window: Column | float = np.inf) -> Column:
    """Pairs of query and key that a causal mask keeps, of which none is more than ``window`` apart."""
    reach = np.minimum(window, seq_len)
    pairs: Column = seq_len * reach - reach * reach / 2
    return pairs


def attention_seconds(
    cases: Cases, rates: Rates, constants: Constants, heads: Column, window: Column | float = np.inf
) -> tuple[Column, Column]:
    """Seconds of the attention core over one microbatch, forward and backward, on ``heads`` of its heads.

    Flash kernels skip what the causal mask hides; unfused ones multiply all of it and move the scores.
    """
    model, work, layout, machine = cases.model, cases.work, cases.layout, cases.machine
    kernel = cases.software.attention
    unfused = constants.by("score_passes", kernel) > 0
    cut = work.seq_len / layout.cp
    pairs = np.where(unfused, work.seq_len * work.seq_len, causal_pairs(work.seq_len, window)) / layout.cp
    flops = 2.0 * layout.micro_batch * heads * pairs * (model.head_dim + model.value_dim)
    share = constants.by("attention_share", kernel, machine.architecture)
    width = np.minimum(model.head_dim / 128.0, 1.0) ** constants.by("head_dim_exponent", machine.architecture)
    ramp = np.where(unfused, 1.0, cut / (cut + constants["attention_ramp"]))
    peak = machine.peak_16bit * cases.software.clock / machine.compute_scale
    forward = flops / (peak * share * width * ramp)
    passes = constants.by("score_passes", kernel)
    scores = layout.micro_batch * heads * work.seq_len * cut * work.compute_bytes * passes
    moved = scores / rates.bytes_per_second
    growth = np.where(unfused, 2.0, BACKWARD_ATTENTION / constants["attention_backward_rate"])
    return forward + 0.45 * moved, forward * growth + 0.55 * moved
