"""Theorems of fuzzing: it finds what is planted, finds nothing where nothing is, and tells bits apart."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from attrs import evolve, frozen
from hypothesis import example, given, settings
from hypothesis import strategies as st

from picotron.runtime.fuzz import PREEMPT, digest, fuzz
from picotron.runtime.messages import SEMANTICS, Semantics
from picotron.runtime.simulated import simulation
from picotron.runtime.world import World
from property_tests.strategies_programs import Call, Program, lay_out, programs, run, sketches
from tests.runtime import races


@st.composite
def raced_programs(draw: st.DrawFn) -> tuple[races.Race, Program]:
    """A right program in which all ranks, somewhere between two joint operations, begin a race."""
    sketch = draw(sketches(max_joints=6, hoist=False))
    race, key = draw(st.sampled_from(races.RACES)), len(sketch.joints)
    before = draw(st.integers(0, key))
    call = Call(key, races.planted(race))
    program = lay_out(sketch)
    for rank, acts in enumerate(program.acts):
        done = [i for i, act in enumerate(acts, start=1) if act.key < before]
        at = max(done, default=0)
        program = program.changed(rank, [*acts[:at], call, *acts[at:]])
    return race, program


@settings(deadline=None, max_examples=max(120, settings().max_examples))
@given(raced_programs(), st.sampled_from(("rendezvous", "batched")))
def test_a_planted_race_is_found(drawn: tuple[races.Race, Program], semantics: Semantics) -> None:
    """Within 100 seeds, wherever in whatever program; its seed shows it again."""
    _, program = drawn
    report = fuzz(lambda backend: run(backend, program), program.world_size, semantics=semantics)
    assert not report.ok
    if report.seed is not None:
        world = World(seed=report.seed, preempt=PREEMPT, semantics=semantics)
        again = simulation(lambda backend: run(backend, program), program.world_size, world)
        if again.failure is not None:
            assert str(again.failure) in report.difference
        else:
            assert "another result on rank" in report.difference or "no error" in report.difference


@settings(deadline=None, max_examples=max(60, settings().max_examples))
@given(st.sampled_from(SEMANTICS).flatmap(lambda s: st.tuples(st.just(s), programs(s))))
def test_a_right_program_has_no_race(drawn: tuple[Semantics, Program]) -> None:
    """The same bits under many seeds."""
    semantics, program = drawn
    report = fuzz(
        lambda backend: run(backend, program), program.world_size, seeds=range(12), semantics=semantics
    )
    report.check()
    assert (report.ok, report.num_seeds) == (True, 12)


@frozen
class Pair:
    """A value of a class of one's own."""

    one: Any
    other: Any


numbers = st.one_of(
    st.integers(-3, 300),
    st.floats(width=16, allow_nan=False),
    st.booleans(),
    st.none(),
    st.sampled_from(("", "1", "ab")),
)
_shapes = st.sampled_from(((), (0,), (1,), (2,), (1, 2), (2, 1)))


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor | np.ndarray:
    """A tensor or an array of few elements, contiguous or not."""
    name = draw(st.sampled_from(("float32", "float16", "int32", "uint8")))
    shape = draw(_shapes)
    count = int(np.prod(shape)) * np.dtype(name).itemsize
    bits = draw(st.sampled_from((0, 1, 128, 255)))
    array = np.frombuffer(bytes([bits] + [0] * count)[:count], dtype=name).reshape(shape)
    if draw(st.booleans()):
        array = np.asfortranarray(np.stack([array, array], axis=-1))[..., 0]
    return torch.from_numpy(array.copy()) if draw(st.booleans()) else array


leaves = numbers | tensors()
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from(("a", "b", 1)), inner, max_size=2),
        st.builds(Pair, inner, inner),
    ),
    max_leaves=6,
)


def bits(value: object) -> object:
    """Plain data that is equal for two values if and only if these are, type by type and bit by bit."""
    if isinstance(value, torch.Tensor | np.ndarray):
        name = str(value.dtype)
        array = value.numpy() if isinstance(value, torch.Tensor) else value
        return type(value).__name__, name, array.shape, array.tobytes()
    if isinstance(value, Mapping):
        return "mapping", tuple((bits(key), bits(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value).__name__, tuple(map(bits, value))
    if isinstance(value, Pair):
        return "Pair", bits(value.one), bits(value.other)
    return type(value).__name__, struct.pack("d", value) if isinstance(value, float) else value


@st.composite
def likenesses(draw: st.DrawFn) -> tuple[object, object]:
    """A value, and the same again or one much like it."""
    value = draw(values)
    alike = draw(st.sampled_from(("same", "other", "nested", "nudged", "recast", "reshaped")))
    if alike in ("same", "other"):
        return value, value if alike == "same" else draw(values)
    return value, [value] if alike == "nested" else _changed(value, alike)


def _changed(value: object, how: str) -> object:
    """The value with one bit changed, or the same bits as another type or shape."""
    if isinstance(value, list):
        return [_changed(value[0], how), *value[1:]] if value else ()
    if isinstance(value, Pair):
        return evolve(value, one=_changed(value.one, how))
    if isinstance(value, float):
        return -value if how == "nudged" else float(np.nextafter(value, 1.0))
    if isinstance(value, torch.Tensor) and value.numel():
        flat = value.clone().view(-1).view(torch.uint8)
        if how == "nudged":
            flat[0] ^= 1
        dtypes = {1: torch.int8, 2: torch.int16, 4: torch.int32}
        dtype = dtypes[value.element_size()] if how == "recast" else value.dtype
        return flat.view(dtype).view((*value.shape, *([1] if how == "reshaped" else [])))
    return value


@settings(deadline=None, max_examples=max(400, settings().max_examples))
@given(likenesses())
def test_digests_are_equal_iff_bits_are(drawn: tuple[object, object]) -> None:
    """Whatever the nesting; a tensor's strides, and which object it is, are not among its bits."""
    one, other = drawn
    assert (digest(one) == digest(other)) == (bits(one) == bits(other))


@example([1, 23], [12, 3])
@given(st.lists(st.integers(0, 1000)), st.lists(st.integers(0, 1000)))
def test_digests_of_lists_of_numbers(one: list[int], other: list[int]) -> None:
    """Equal if and only if the lists are."""
    assert (digest(one) == digest(other)) == (one == other)
