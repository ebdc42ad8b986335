"""Fixtures every test may use."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"

# A busy machine is no failure; in CI the same cases every time.
settings.register_profile(
    "pyrlhf", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("pyrlhf")


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """``shared_data("stories260k")`` is that folder of real data; the test skips where it is absent."""

    def find(name: str) -> Path:
        path = DATA / name
        if not path.exists():
            pytest.skip(f"real data not found: {path}")
        return path

    return find
