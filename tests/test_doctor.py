"""The doctor: what it lists, and that each ailment gives one line with its cure and exit code 1."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from pyrlhf import doctor, ops
from pyrlhf.ops import _core


@pytest.fixture
def built() -> Any:
    try:
        return _core.core()
    except ImportError:
        pytest.skip("the C++ core is not built")


def test_a_sound_installation(built: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main() == 0
    text = capsys.readouterr().out
    for part in ("torch ", "deepspeed ", "instruction set", "threads", "CUDA half", "CUDA devices", "a world of 1"):
        assert part in text
    for op in doctor.op_names():
        assert f"op {op}" in text
    assert f"{built.isa()} in use" in text
    assert text.splitlines()[-1] == "nothing prevents running"


def test_every_public_op_is_listed() -> None:
    assert {"attention", "gae", "ppo_loss", "sample"} <= set(doctor.op_names())
    assert all(callable(getattr(ops, name)) for name in doctor.op_names())


def test_backends(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert doctor._backend("gae", built, torch).startswith(f"C++ ({built.isa()})")
    assert doctor._backend("gae", None, torch).startswith("torch")
    monkeypatch.setenv("PYRLHF_BACKEND", "ref")
    assert doctor._backend("gae", built, torch) == "torch (PYRLHF_BACKEND=ref)"


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    known = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "safetensors" else known(name))
    assert doctor.main() == 1
    text = capsys.readouterr().out
    assert "wrong: safetensors is not installed: pip install safetensors" in text
    assert text.splitlines()[-1] == "1 to mend before pyrlhf runs"


def test_a_package_that_is_too_old(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if not doctor._asked():
        pytest.skip("pyrlhf is not installed here, so nothing states its requirements")
    known = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "0.0.1" if name == "safetensors" else known(name))
    assert doctor.main() == 1
    assert (
        "wrong: safetensors 0.0.1 does not do, pyrlhf needs it >=0.6: pip install 'safetensors"
        in capsys.readouterr().out
    )


def test_a_torch_that_does_not_see_the_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for driver, told in ((tmp_path, True), (tmp_path / "absent", False)):
        monkeypatch.setattr(doctor, "NVIDIA_DRIVER", driver)
        doctor.main()
        assert ("note: an NVIDIA driver is here but torch sees no GPU" in capsys.readouterr().out) == told


def test_a_core_that_is_not_built(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing() -> Any:
        raise ImportError("pyrlhf's C++ core cannot be loaded: build it with `pip install .`")

    monkeypatch.setattr(_core, "core", missing)
    assert doctor.main() == 1
    text = capsys.readouterr().out
    assert "wrong: C++ core: pyrlhf's C++ core cannot be loaded: build it with `pip install .`" in text
    assert "op gae" in text


def test_a_core_that_computes_something_else(
    built: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = ops.gae_ref
    monkeypatch.setattr(ops, "gae_ref", lambda *a, **kw: tuple(x + 1 for x in reference(*a, **kw)))
    assert doctor.main() == 1
    assert "wrong: C++ core: gae fails or differs from plain PyTorch" in capsys.readouterr().out


def test_a_torch_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = importlib.import_module

    def broken(name: str, *rest: Any) -> Any:
        if name == "torch":
            raise OSError("libtorch.so: undefined symbol")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", broken)
    assert doctor.main() == 1
    assert "wrong: torch is installed but cannot be imported (libtorch.so: undefined symbol)" in capsys.readouterr().out


def test_deepspeed_that_does_not_start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from pyrlhf import engine

    def broken(*_: Any) -> Any:
        raise RuntimeError("no backend")

    monkeypatch.setattr(engine, "init_world", broken)
    assert doctor.main() == 1
    assert "wrong: DeepSpeed: no backend" in capsys.readouterr().out
