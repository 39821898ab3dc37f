"""Which worker runs which tests: what one dear launch has found is found once, not once a worker."""

from __future__ import annotations

from typing import Any

import pytest

SHARED = (  # files whose tests look at what one dear fixture has found
    "tests/runtime/test_backend.py",
    "tests/runtime/test_faults.py",
    "tests/runtime/test_gloo_parity.py",
    "tests/runtime/test_run.py",
    "tests/runtime/test_torch_api.py",
    "tests/runtime/test_torch_pipelining.py",
    "tests/test_benchmark_accuracy.py",
    "tests/test_benchmark_pipeline.py",
    "tests/test_benchmark_runtime.py",
    "tests/test_benchmark_simulator.py",
    "tests/test_benchmarks.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of a file in SHARED stay together, others go to whoever is free."""
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):  # type: ignore[misc]
        """By file or by test."""

        def _split_scope(self, nodeid: str) -> str:
            path, _, _ = nodeid.partition("::")
            return path if path in SHARED else nodeid

    return Together(config, log)
