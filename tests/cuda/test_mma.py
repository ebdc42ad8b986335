"""The layout of the tensor cores' operands that csrc/cuda/mma.h states, against products of whole matrices.

On a GPU the instructions themselves are tested by decode_attention, whose kernel stands on the same statement.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from pyrlhf.ops._core import CUDA_DTYPES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_fragments_are_products_of_matrices(emulated: ModuleType, dtype: torch.dtype) -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        a, keys, values = (torch.randn(16, 16, generator=generator).to(dtype) for _ in range(3))
        c, scores, out = torch.randn(16, 16, generator=generator), torch.empty(16, 16), torch.empty(16, 16)
        emulated.multiply_fragments(
            *(x.data_ptr() for x in (a, keys, values, c, scores, out)), CUDA_DTYPES.index(dtype)
        )
        torch.testing.assert_close(scores.double(), c.double() + a.double() @ keys.double().T, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out.double(), scores.to(dtype).double() @ values.double(), rtol=1e-5, atol=1e-4)
