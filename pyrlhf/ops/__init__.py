"""The ops: packed tensors in, packed tensors out, a plain-PyTorch ``<op>_ref`` of the same signature beside each."""

from __future__ import annotations

__all__: list[str] = []
