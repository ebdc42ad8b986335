"""The CUDA kernels of layer_norm against torch in float64, at every way a row is spread over threads."""

from __future__ import annotations

import pytest
import torch
from norms import (
    DTYPES,
    EVERY_WAY,
    Norm,
    as_good_as_torch,
    bits_do_not_depend_on_other_rows,
    bits_do_not_depend_on_the_run,
    every_input_may_be_a_view,
    not_a_number_stays_in_its_row,
    only_the_sum_is_used,
)
from torch import Tensor

from pyrlhf.ops import layer_norm

EPS = 1e-5


def ours(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    return layer_norm(x, weight, bias, eps=EPS, residual=residual)


def torchs(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    summed = x if residual is None else x + residual
    out = torch.nn.functional.layer_norm(summed, weight.shape, weight.to(x.dtype), bias.to(x.dtype), EPS)
    return out if residual is None else (out, summed)


NORM = Norm(ours, torchs, parameters=2)


@pytest.mark.parametrize(("shape", "dtype"), EVERY_WAY, ids=str)
def test_as_good_as_torch(device: torch.device, poison: None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    as_good_as_torch(NORM, device, shape, dtype)
    if shape[-1] < 2048:
        as_good_as_torch(NORM, device, shape, dtype, residual=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [7, 64, 2048])
def test_a_float32_weight(device: torch.device, poison: None, dim: int, dtype: torch.dtype) -> None:
    as_good_as_torch(NORM, device, (11, dim), dtype, weight_dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [3, 96, 1023, 2048])
def test_bits_do_not_depend_on_other_rows(device: torch.device, dim: int, dtype: torch.dtype) -> None:
    bits_do_not_depend_on_other_rows(NORM, device, dim, dtype)


@pytest.mark.parametrize("dim", [3, 96, 2048])
def test_bits_do_not_depend_on_the_run(device: torch.device, dim: int) -> None:
    bits_do_not_depend_on_the_run(NORM, device, dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_input_may_be_a_view(device: torch.device, dtype: torch.dtype) -> None:
    every_input_may_be_a_view(NORM, device, dtype)


def test_only_the_sum_is_used(device: torch.device) -> None:
    only_the_sum_is_used(NORM, device)


def test_not_a_number_stays_in_its_row(device: torch.device) -> None:
    not_a_number_stays_in_its_row(NORM, device)


@pytest.mark.parametrize("dim", [5, 96, 2048])
def test_a_mean_far_from_zero(device: torch.device, dim: int) -> None:
    """The variance is taken around the mean: as E[x^2] - E[x]^2 nothing would be left of it. What is lost is the rounding of the
    mean to float32."""
    x = torch.randn(9, dim, generator=torch.Generator().manual_seed(1)) + 3000
    weight, bias = torch.ones(dim), torch.zeros(dim)
    exact = torch.nn.functional.layer_norm(x.double(), (dim,), eps=EPS)
    found = layer_norm(x.to(device), weight.to(device), bias.to(device), eps=EPS)
    deviation = x.double().std(-1, correction=0, keepdim=True)
    assert ((found.cpu().double() - exact).abs() * deviation).max() <= 1.1 * 2**-13  # half an ulp of 3000
