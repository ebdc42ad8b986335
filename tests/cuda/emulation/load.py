"""Loads the module that CMakeLists.txt beside this file builds; ``PYRLHF_EMULATED`` says where it lies."""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType


def load_emulated() -> ModuleType:
    spec = importlib.util.spec_from_file_location("emulated", os.environ["PYRLHF_EMULATED"])
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
