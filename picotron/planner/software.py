"""Software profiles: the era of kernels, overlaps and graphs that separates published runs of equal layout.

A profile is stated by name or written by the user; the presets are in ``presets/profiles.json``. What differs
between devices (the attention kernel that a release picks, the clock that a power cap leaves) is by
architecture, with ``default`` for those not listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from attrs import Attribute, field, fields, frozen

from picotron.errors import PlanError
from picotron.planner.architectures import ARCHITECTURES
from picotron.planner.cases import ATTENTIONS, EXPERT_KERNELS, KERNEL_SETS, LOSSES, SoftwareColumns, columns
from picotron.planner.records import preset, preset_table
from picotron.planner.validators import FLAG, NAME, as_float, is_between, is_positive, must_be, shown

_SHARE = must_be("a share in [0, 1]", lambda value: is_between(value, 0, 1))
_POSITIVE = must_be("a positive number", is_positive)
_KERNELS = must_be(f"one of {KERNEL_SETS}", lambda value: value in KERNEL_SETS)
_EXPERTS = must_be(f"one of {EXPERT_KERNELS}", lambda value: value in EXPERT_KERNELS)
_LOSS = must_be(f"one of {LOSSES}", lambda value: value in LOSSES)
_BYTES = must_be("bytes of an element, 1 to 8", lambda value: is_between(value, 1, 8))


def _by_architecture(value: Any) -> Any:
    table = value if isinstance(value, Mapping) else {"default": value}
    return {key: as_float(inner) for key, inner in table.items()}


def _table(meaning: str, accepts: Any) -> Any:
    def check(instance: object, attribute: Attribute[Any], value: Mapping[str, Any]) -> None:
        known = ("default", *ARCHITECTURES)
        if "default" not in value or any(key not in known for key in value):
            raise PlanError(
                f"{attribute.name} must have a default and may name {ARCHITECTURES}, got {shown(value)}"
            )
        if bad := [inner for inner in value.values() if not accepts(inner)]:
            raise PlanError(f"{attribute.name} must be {meaning}, got {shown(bad[0])}")

    return field(converter=_by_architecture, validator=check, hash=False)


@frozen(kw_only=True)
class SoftwareProfile:
    """What a training framework of some year does beyond the layout.

    ``attention`` and ``clock`` may differ by architecture. ``wire_bytes`` and ``gradient_bytes`` are what the
    framework sends and accumulates by default where a workload does not say.
    """

    name: str = field(validator=NAME)
    source: str = field(validator=NAME)
    attention: Mapping[str, str] = _table(f"one of {ATTENTIONS}", lambda value: value in ATTENTIONS)
    kernels: str = field(validator=_KERNELS)
    tensor_overlap: float = field(default=0.0, converter=as_float, validator=_SHARE)
    reduce_overlap: bool = field(default=False, validator=FLAG)
    gather_overlap: bool = field(default=False, validator=FLAG)
    pipeline_overlap: bool = field(default=False, validator=FLAG)
    expert_overlap: float = field(default=0.0, converter=as_float, validator=_SHARE)
    expert_dedup: bool = field(default=False, validator=FLAG)
    expert_neighbours: bool = field(default=False, validator=FLAG)
    expert_kernels: str = field(default="looped", validator=_EXPERTS)
    expert_graphs: bool = field(default=False, validator=FLAG)
    loss: str = field(default="copy", validator=_LOSS)
    graphs: bool = field(default=False, validator=FLAG)
    optimizer_on_host: bool = field(default=False, validator=FLAG)
    recompute_stops_early: bool = field(default=False, validator=FLAG)
    far_adapters: bool = field(default=False, validator=FLAG)
    checkpoint_waits: bool = field(default=False, validator=FLAG)
    bucket_bytes: float = field(default=2e8, converter=as_float, validator=_POSITIVE)
    clock: Mapping[str, float] = _table("a share in (0, 1.2]", lambda value: is_between(value, 0.1, 1.2))
    wire_bytes: float = field(default=4.0, converter=as_float, validator=_BYTES)
    gradient_bytes: float = field(default=4.0, converter=as_float, validator=_BYTES)


def software_columns(profile: SoftwareProfile, architecture: str) -> SoftwareColumns:
    """The columns of one profile on one architecture, each of shape ().

    Raises PlanError if ``architecture`` is not one of ARCHITECTURES.
    """
    if architecture not in ARCHITECTURES:
        raise PlanError(f"architecture must be one of {ARCHITECTURES}, got {shown(architecture)}")
    attention = profile.attention.get(architecture, profile.attention["default"])
    return columns(
        SoftwareColumns,
        {
            "attention": ATTENTIONS.index(attention),
            "kernels": KERNEL_SETS.index(profile.kernels),
            "loss": LOSSES.index(profile.loss),
            "expert_kernels": EXPERT_KERNELS.index(profile.expert_kernels),
            "clock": profile.clock.get(architecture, profile.clock["default"]),
            **{
                name: getattr(profile, name)
                for name in (f.name for f in fields(SoftwareColumns))
                if name not in ("attention", "kernels", "loss", "expert_kernels", "clock")
            },
        },
    )


def profile_names() -> tuple[str, ...]:
    """The names that ``software_profile`` knows, in the table's order."""
    return tuple(_presets())


def software_profile(name: str) -> SoftwareProfile:
    """The preset of that name. Raises PlanError for an unknown one, with the closest known ones."""
    return preset(_presets(), name, "a software profile")


def preset_name(profile: SoftwareProfile) -> str | None:
    """The name by which ``software_profile`` gives this profile, if it is a preset."""
    return profile.name if _presets().get(profile.name) == profile else None


@cache
def _presets() -> Mapping[str, SoftwareProfile]:
    return {name: SoftwareProfile(name=name, **row) for name, row in preset_table("profiles").items()}
