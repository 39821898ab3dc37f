from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import picotron
import picotron.planner

RUNTIME_NAMES = {"Measurement", "compare", "run"}


def python(code: str) -> str:
    """What a fresh interpreter prints; numpy's own threads are left out of its time."""
    one_thread = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], env=one_thread, check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.parametrize(
    "room",
    [
        "picotron",
        "picotron.planner",
        "picotron.planner.plan",
        "picotron.planner.predict",
        "picotron.planner.serialize",
        "picotron.cli",
    ],
)
def test_no_room_of_the_planner_loads_torch(room: str):
    """A plan is made on a laptop without torch, and without waiting for it."""
    heavy = "{'torch', 'transformers', 'safetensors', 'scipy'}"
    assert python(f"import sys, {room}; print(sorted({heavy} & set(sys.modules)))") == "[]\n"


def test_public_names_of_the_planner_load_no_torch():
    """Neither does the star, which leaves the runtime's names out."""
    code = "from picotron import *; import sys; print(callable(plan), Workload, 'torch' in sys.modules)"
    assert python(code) == "True <class 'picotron.planner.workload.Workload'> False\n"


@pytest.mark.parametrize("room", ["picotron", "picotron.planner"])
def test_importing_the_package_loads_nothing_before_it_is_used(room: str):
    """Not even numpy, which takes longer than all the rest."""
    assert (
        python(f"import sys, {room}; print({{'numpy', 'attrs', 'cattrs'}} & set(sys.modules))") == "set()\n"
    )


def test_the_rooms_load_three_libraries():
    """All that plans and predicts needs numpy, attrs and cattrs with what these need, and nothing else."""
    rooms = "picotron.planner.predict, picotron.planner.serialize"
    code = f"import sys, {rooms}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    others = set(python(code).split()) - set(python("import sys; print(*sys.modules)").split())
    others -= sys.stdlib_module_names
    assert others == {"attr", "attrs", "cattrs", "numpy", "picotron", "typing_extensions"}


@pytest.mark.parametrize("package", [picotron, picotron.planner])
def test_public_names_are_sorted_and_resolve(package):
    """Every name of ``__all__`` exists and is listed by dir()."""
    assert package.__all__ == sorted(package.__all__)
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
    assert set(package.__all__) <= set(dir(package))


def test_plan_and_predict_are_functions_here_and_rooms_in_the_planner():
    """The two uses of the names do not shadow each other, whichever is asked for first."""
    code = "import picotron{0}; print(callable(picotron.plan), type(picotron.planner.plan).__name__)"
    for first in (
        "",
        ".planner.plan",
        ".planner.predict",
        "; picotron.predict",
        "; from picotron import plan",
    ):
        assert python(code.format(first)) == "True module\n"


def test_names_of_the_runtime_wing_are_listed_and_found_when_asked_for():
    """They are known without loading torch, and are not part of the star."""
    pytest.importorskip("torch")
    assert set(dir(picotron)) >= RUNTIME_NAMES
    assert RUNTIME_NAMES.isdisjoint(picotron.__all__)
    for name in sorted(RUNTIME_NAMES):
        assert getattr(picotron, name).__name__ == name


def test_without_torch_the_runtime_wing_says_how_to_get_it():
    """The planner's names are there all the same."""
    code = """
import sys
sys.modules["torch"] = None
import picotron
picotron.plan
try:
    picotron.run
except ModuleNotFoundError as error:
    print(error)
"""
    assert python(code) == "picotron.run needs torch; install it with: pip install 'picotron[torch]'\n"


@pytest.mark.parametrize("package", [picotron, picotron.planner])
def test_an_unknown_name_is_an_attribute_error(package):
    """As of any module."""
    with pytest.raises(AttributeError, match="has no attribute 'train_fast'"):
        _ = package.train_fast


def test_the_version_is_that_of_the_project():
    """The package's number is the distribution's."""
    project = Path(__file__).parents[1] / "pyproject.toml"
    assert tomllib.loads(project.read_text())["project"]["version"] == picotron.__version__
