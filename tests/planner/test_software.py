"""Software profiles: presets, what differs by architecture, and refusals."""

import json

import pytest

from picotron.errors import PlanError
from picotron.planner.architectures import ARCHITECTURES
from picotron.planner.cases import ATTENTIONS, KERNEL_SETS
from picotron.planner.constants import constant_table, default_constants, keys_of, replaced
from picotron.planner.software import SoftwareProfile, profile_names, software_columns, software_profile

PLAIN = {"name": "mine", "source": "a test", "attention": "flash-2", "kernels": "fused", "clock": 1.0}


def test_presets_have_columns_on_every_architecture() -> None:
    """And each says where it comes from."""
    for name in profile_names():
        profile = software_profile(name)
        assert profile.source and profile.name == name
        for architecture in ARCHITECTURES:
            columns = software_columns(profile, architecture)
            assert 0 <= columns.attention < len(ATTENTIONS) and 0 <= columns.kernels < len(KERNEL_SETS)


def test_the_attention_kernel_follows_the_architecture() -> None:
    """Megatron of 2025 takes cuDNN's on H100 and flash attention elsewhere."""
    profile = software_profile("megatron-2025")
    found = [ATTENTIONS[int(software_columns(profile, name).attention)] for name in ("hopper", "ampere")]
    assert found == ["cudnn", "flash-2"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention": "flash-9"}, "attention must be one of"),
        ({"attention": {"hopper": "cudnn"}}, "attention must have a default"),
        ({"clock": {"default": 1.0, "pascal": 1.0}}, "clock must have a default and may name"),
        ({"clock": 0.0}, "clock must be a share"),
        ({"kernels": "hand-made"}, "kernels must be one of"),
        ({"expert_kernels": "lost"}, "expert_kernels must be one of"),
        ({"tensor_overlap": 2.0}, r"tensor_overlap must be a share in \[0, 1\]"),
        ({"bucket_bytes": -1.0}, "bucket_bytes must be a positive number"),
    ],
)
def test_profiles_check_themselves(changes: dict[str, object], words: str) -> None:
    """A value that no framework could have is refused with the rule."""
    with pytest.raises(PlanError, match=words):
        SoftwareProfile(**(PLAIN | changes))  # type: ignore[arg-type]


def test_unknown_names_are_answered_with_near_ones() -> None:
    """For profiles, architectures and constants."""
    with pytest.raises(PlanError, match="did you mean megatron-202"):
        software_profile("megatron-2023")
    with pytest.raises(PlanError, match="architecture must be one of"):
        software_columns(software_profile("plain"), "pascal")
    with pytest.raises(PlanError, match=r"presets/constants\.json"):
        replaced(default_constants(), {"matmul_share.pascal": 0.5})


def test_every_constant_is_documented_and_within_its_bounds() -> None:
    """Unit, meaning and source of each; values between the bounds that calibration keeps."""
    for constant in constant_table().values():
        assert constant.unit and constant.meaning and len(constant.source) > 8, constant.name
        low, high = constant.bounds
        assert all(low <= value <= high or value == 0 for value in constant.values.values()), constant.name
        assert set(constant.calibrated) <= set(constant.values), constant.name


def test_a_changed_constant_leaves_the_table_alone() -> None:
    """Every path of the table can be replaced, in a copy."""
    paths = [path for constant in constant_table().values() for path in keys_of(constant)]
    assert "attention_share.flash-2.hopper" in paths and "tile_ramp" in paths
    changed = replaced(default_constants(), {"tile_ramp": 1.0, "attention_share.flash-2.hopper": 0.5})
    assert changed["tile_ramp"] == 1.0 != default_constants()["tile_ramp"]
    assert json.dumps(float(changed["tile_ramp"])) == "1.0"
