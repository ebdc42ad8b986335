"""Makes `tiny`, which the tests and their second processes share, importable; one set of tiny data and models for all tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import tiny


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> tiny.House:
    return tiny.build(tmp_path_factory.mktemp("house"))
