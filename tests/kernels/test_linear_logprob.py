"""linear_logprob's Triton kernels: values, gradients, slabs, bits, bad values, memory.

Tiles are small, so that small shapes have several of everything; a few tests, most of them on a GPU, run the table's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from checking import captured, equal, same_bits
from torch import Tensor

from pyrlhf.ops import linear_logprob, linear_logprob_ref
from pyrlhf.ops._core import fault_flags, raise_faults

GPU = torch.cuda.is_available()
module = sys.modules["pyrlhf.ops.linear_logprob"]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy tells of every NaN
SMALL = (64, 64, 32, 4, 3) if GPU else (16, 32, 16, 4, 1)


@pytest.fixture
def kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of the kernels: with small tiles, at most 4 splits, slabs of 2 tiles of the vocabulary by 3 of rows."""
    from pyrlhf.kernels import linear_logprob as found

    for key in found._TILES:
        monkeypatch.setitem(found._TILES, key, found.Tiles(*SMALL))
    slabs(found, monkeypatch, torch.float32)
    monkeypatch.setattr(found, "_MAX_SPLITS", 4)
    yield found
    raise_faults(device)  # what a test expects it has raised itself


def slabs(kernels: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int = 3) -> None:
    """Slabs of 2 tiles of the vocabulary by ``rows`` tiles of rows."""
    tiles = kernels.tiles_of(torch.empty(0, dtype=dtype, device="cuda" if GPU else "cpu"))
    monkeypatch.setattr(kernels, "_SLAB_COLUMNS", (2 * tiles.columns, 2 * tiles.columns))
    monkeypatch.setattr(kernels, "_SLAB_BYTES", dtype.itemsize * 2 * tiles.columns * rows * tiles.rows)


Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs(device: torch.device, rows: int, dim: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """hidden, weight, bias, targets."""
    generator = torch.Generator().manual_seed(rows + vocabulary)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator).to(device, dtype)
        for shape in ((rows, dim), (vocabulary, dim), (vocabulary,))
    )
    return hidden, weight, bias, torch.randint(0, vocabulary, (rows,), generator=generator).to(device)


def all_logits(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The usual way, in the dtype of hidden."""
    logprobs = (torch.nn.functional.linear(hidden, weight, bias) / temperature).log_softmax(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def with_grads(function: Callable[..., Any], given: Sequence[Tensor | None], targets: Tensor, **options: float) -> Any:
    """logprob, entropy, and their gradients by what is given of hidden, weight and bias, for fixed random cotangents."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in given]
    outs = function(*leaves[:2], targets, bias=leaves[2], **options)
    generator = torch.Generator().manual_seed(5)
    grads = [torch.randn(o.shape, generator=generator).to(o) for o in outs]
    torch.autograd.backward(outs, grads)
    return [o.detach() for o in outs] + [x.grad for x in leaves if x is not None]


def assert_as_good_as(ours: Sequence[Tensor], peers: Sequence[Tensor], truth: Sequence[Tensor], tiny: float) -> None:
    """The 2x rule; tiny comes on top of what rounding the truth to the result's dtype would cost."""
    for i, (a, b, t) in enumerate(zip(ours, peers, truth, strict=True)):
        assert a.shape == t.shape
        error, peer_error = ((x.double() - t).abs().max().item() if t.numel() else 0.0 for x in (a, b))
        last_bit = (t.to(a.dtype).double() - t).abs().max().item() if t.numel() else 0.0
        assert error <= 2 * peer_error + last_bit + tiny, f"result {i}: error {error:.3g}, the peer's {peer_error:.3g}"


SHAPES = [(1, 1, 1), (2, 5, 1), (3, 1, 7), (17, 16, 32), (37, 24, 131), (65, 33, 257), (130, 48, 97)]


@pytest.mark.parametrize(("bias", "temperature"), [(False, 1.0), (True, 0.7)])
@pytest.mark.parametrize(("rows", "dim", "vocabulary"), SHAPES)
def test_as_good_as_torch(rows, dim, vocabulary, bias, temperature, dtype, device, kernels):
    hidden, weight, offset, targets = inputs(device, rows, dim, vocabulary, dtype)
    given = (hidden, weight, offset if bias else None)
    exact = with_grads(all_logits, [None if x is None else x.double() for x in given], targets, temperature=temperature)
    peers = with_grads(all_logits, given, targets, temperature=temperature)
    ours = with_grads(linear_logprob, given, targets, temperature=temperature)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    assert all(x.dtype == dtype for x in ours[2:])
    assert_as_good_as(ours, peers, exact, tiny=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "dim", "vocabulary"), [(8, 2000, 40), (4, 8, 3000), (600, 4, 33)])
def test_long_sums_lose_no_more_than_torchs(rows, dim, vocabulary, dtype, device, monkeypatch):
    """With the table's own tiles and slabs: sums over dim, the vocabulary and the rows.

    tiny: torch keeps its probabilities, which add up to 1; ours are made again from lse and do so up to float32's rounding.
    """
    hidden, weight, bias, targets = inputs(device, rows, dim, vocabulary)
    given = [x.to(dtype) for x in (hidden * 2 / dim**0.5, weight, bias)]
    exact = with_grads(all_logits, [x.double() for x in given], targets)
    assert_as_good_as(
        with_grads(linear_logprob, given, targets), with_grads(all_logits, given, targets), exact, tiny=5e-6
    )


def test_no_rows(device, kernels):
    hidden, weight, bias, targets = inputs(device, 0, 8, 10)
    logprob, entropy, by_hidden, by_weight, by_bias = with_grads(linear_logprob, (hidden, weight, bias), targets)
    assert logprob.shape == entropy.shape == (0,)
    assert by_hidden.shape == (0, 8)
    assert torch.equal(by_weight, torch.zeros_like(weight))
    assert torch.equal(by_bias, torch.zeros_like(bias))


def test_one_token_is_certain(device, kernels):
    hidden, weight, bias, targets = inputs(device, 40, 24, 1, torch.float16)
    logprob, entropy, *grads = with_grads(linear_logprob, (hidden, weight, bias), targets)
    assert not any(x.any() for x in (logprob, entropy, *grads))


def test_extreme_logits_stay_finite(device, kernels):
    weight = torch.zeros(200, 4, device=device)
    weight[7], weight[130] = 1.0, -1.0
    hidden = torch.full((3, 4), 2e4, device=device).requires_grad_()
    logprob, entropy = linear_logprob(hidden, weight, torch.tensor([7, 130, 0], device=device))
    torch.testing.assert_close(logprob.cpu(), torch.tensor([0.0, -1.6e5, -8e4]))
    torch.testing.assert_close(entropy.cpu(), torch.zeros(3))
    (logprob.sum() + entropy.sum()).backward()
    assert hidden.grad.isfinite().all()


def test_a_bias_of_minus_infinity_rules_tokens_out(device, kernels):
    hidden, weight, bias, targets = inputs(device, 40, 8, 300)
    kept = torch.arange(300, device=device) % 4 != 0
    kept[64:160] = False  # whole tiles, whole splits
    allowed = kept.nonzero()[:, 0]
    place = targets % len(allowed)
    masked = with_grads(linear_logprob, (hidden, weight, bias.masked_fill(~kept, -torch.inf)), allowed[place])
    alone = with_grads(linear_logprob, (hidden, weight[kept], bias[kept]), place)
    spread = torch.zeros_like(weight).index_copy(0, allowed, alone[3])
    for a, b in zip(masked, [*alone[:3], spread], strict=False):
        torch.testing.assert_close(a, b)
    assert not masked[3][~kept].any()


def test_a_bad_row_stays_alone(dtype, device, kernels):
    *given, targets = inputs(device, 40, 24, 200, dtype)
    clean, hidden = with_grads(linear_logprob, given, targets), given[0].clone()
    hidden[2, 3] = torch.nan
    spoilt = with_grads(linear_logprob, (hidden, *given[1:]), targets)
    others = torch.arange(40, device=device) != 2
    for a, b in zip(spoilt[:3], clean[:3], strict=True):
        assert a[2].isnan().all()
        assert same_bits(a[others], b[others])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_weights_spoil_every_row(bad, device, kernels):
    hidden, weight, bias, targets = inputs(device, 20, 8, 200)
    weight[157, 3] = bad
    logprob, entropy, by_hidden, *_ = with_grads(linear_logprob, (hidden.abs(), weight, bias), targets)
    assert all(x.isnan().all() for x in (logprob, entropy, by_hidden))


@pytest.mark.parametrize(("dim", "vocabulary"), [(32, 200), (33, 131)])
def test_a_rows_bits_are_its_own(dim, vocabulary, dtype, device, kernels):
    hidden, weight, bias, targets = inputs(device, 90, dim, vocabulary, dtype)

    def run(rows: Tensor) -> list[Tensor]:
        leaf = hidden[rows].requires_grad_()
        logprob, entropy = linear_logprob(leaf, weight, targets[rows], bias=bias, temperature=0.9)
        return [logprob, entropy, *torch.autograd.grad(logprob.sum() - 0.1 * entropy.sum(), leaf)]

    every = run(torch.arange(90, device=device))
    for rows in ([0], [77], list(range(10, 47)), list(range(89, -1, -1))):
        at = torch.tensor(rows, device=device)
        assert all(map(same_bits, run(at), [x[at] for x in every]))


def test_blocks_of_rows_change_no_bits_of_a_row_and_little_of_the_sums(dtype, device, kernels, monkeypatch):
    *given, targets = inputs(device, 500 if GPU else 100, 40, 150, dtype)
    results = []
    for rows in (1, 2, 1000):
        slabs(kernels, monkeypatch, dtype, rows)
        results.append(with_grads(linear_logprob, given, targets))
    exact = with_grads(all_logits, [x.double() for x in given], targets)
    peers = with_grads(all_logits, given, targets)
    for result in results:
        assert all(map(same_bits, result[:3], results[0][:3]))
        assert_as_good_as(result, peers, exact, tiny=1e-5)


@pytest.mark.parametrize(("rows", "dim", "vocabulary"), [(1, 8, 1), (37, 24, 131), (100, 40, 64), (65, 72, 203)])
def test_tma_changes_no_bits(rows, dim, vocabulary, device, kernels, monkeypatch):
    """Operands by descriptors, and by pointers as where D or an address does not suit TMA, or the GPU has none."""
    *given, targets = inputs(device, rows, dim, vocabulary, torch.float16)
    slabs(kernels, monkeypatch, torch.float16)
    taken, results = [], []
    operands = kernels._operands
    monkeypatch.setattr(kernels, "_operands", lambda *a: taken.append(operands(*a)) or taken[-1])
    for tma in (True, False):
        monkeypatch.setattr(kernels, "_large", lambda t, tma=tma: tma)
        results.append(with_grads(linear_logprob, given, targets, temperature=0.9))
        assert {x[0] for x in taken} == {tma}
        taken.clear()
    assert all(map(same_bits, *results))


def test_same_bits_on_repeat(dtype, device, kernels):
    *given, targets = inputs(device, 70, 24, 131, dtype)
    runs = [with_grads(linear_logprob, given, targets) for _ in range(1000 if GPU else 3)]
    assert all(equal(run, runs[0]) for run in runs[1:])


def test_weight_gradient_is_summed_in_float32(device, monkeypatch):
    """4096 rows that each add the same little: a 16-bit running sum would stop growing."""
    from pyrlhf.kernels import linear_logprob as kernels

    slabs(kernels, monkeypatch, torch.float16)
    hidden = torch.full((4096, 1), 0.25, dtype=torch.float16, device=device)
    weight = torch.zeros(2, 1, dtype=torch.float16, device=device, requires_grad=True)
    linear_logprob(hidden, weight, torch.zeros(4096, dtype=torch.int64, device=device))[0].sum().backward()
    assert weight.grad[:, 0].tolist() == [512.0, -512.0]


def test_rows_without_upstream_gradient_get_zeros(dtype, device, kernels):
    """Whole blocks of them, whose products are left out, and single ones."""
    hidden, weight, bias, targets = inputs(device, 300 if GPU else 70, 24, 131, dtype)
    kept = torch.arange(len(hidden), device=device) % 3 == 0
    kept[: 260 if GPU else 40] = False
    weights = torch.linspace(0.5, 1.5, len(hidden), device=device) * kept

    def run(hidden: Tensor, kept: Tensor | slice) -> list[Tensor]:
        leaves = [hidden[kept].requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()]
        outs = linear_logprob(leaves[0], leaves[1], targets[kept], bias=leaves[2])
        return list(torch.autograd.grad(outs, leaves, (weights[kept], 0.1 * weights[kept])))

    masked, alone = run(hidden, slice(None)), run(hidden, kept)
    assert same_bits(masked[0][kept], alone[0])
    assert not masked[0][~kept].any()
    for a, b in zip(masked[1:], alone[1:], strict=True):
        torch.testing.assert_close(a, b)
    hidden = hidden.clone()
    hidden[~kept] = torch.nan
    assert same_bits(run(hidden, slice(None))[0], masked[0])


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_only_the_wanted_gradients_are_made(wanted, device, kernels):
    *given, targets = inputs(device, 70, 24, 131)
    every = with_grads(linear_logprob, given, targets)[2:]
    leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(given)]
    outs = linear_logprob(*leaves[:2], targets, bias=leaves[2])
    generator = torch.Generator().manual_seed(5)
    torch.autograd.backward(outs, [torch.randn(o.shape, generator=generator).to(o) for o in outs])
    for i, (leaf, expected) in enumerate(zip(leaves, every, strict=True)):
        assert torch.equal(leaf.grad, expected) if i in wanted else leaf.grad is None


@pytest.mark.parametrize(("rows", "dim", "vocabulary"), [(1, 1, 1), (67, 33, 131), (0, 5, 9)])
def test_nothing_is_read_before_it_is_written(rows, dim, vocabulary, dtype, device, kernels, monkeypatch):
    """Outputs and scratch memory that hold NaN at first change nothing."""
    *given, targets = inputs(device, rows, dim, vocabulary, dtype)
    expected, filled = with_grads(linear_logprob, given, targets), 0

    def new_empty(t: Tensor, shape: tuple[int, ...] | int, **options: torch.dtype) -> Tensor:
        nonlocal filled
        filled += 1
        whole = t.new_full(shape if isinstance(shape, tuple) else (shape,), 0, **options)
        return whole.fill_(torch.nan) if whole.is_floating_point() else whole

    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    assert equal(with_grads(linear_logprob, given, targets), expected)
    assert filled >= 6
    assert not any(x.isnan().any() for x in expected)


def test_a_target_outside_gives_nan_and_a_fault_and_touches_nothing(device, kernels):
    *given, targets = inputs(device, 40, 24, 131)
    clean = with_grads(linear_logprob, given, targets)
    raise_faults(device)
    others = torch.ones(40, dtype=torch.bool, device=device)
    for row, target in ((3, -1), (7, 131), (20, 2**32 + 5), (33, -(2**62))):
        targets[row], others[row] = target, False
    spoilt = with_grads(linear_logprob, given, targets)
    with pytest.raises(ValueError, match=r"linear_logprob: targets must be token ids in 0\.\.V-1"):
        raise_faults(device)
    assert spoilt[0][~others].isnan().all()
    assert same_bits(spoilt[0][others], clean[0][others])
    assert same_bits(spoilt[1], clean[1])  # no part of the entropy
    assert same_bits(spoilt[2][others], clean[2][others])
    assert not fault_flags(device).any()


def test_check_names_a_target_outside_at_once(device, kernels, monkeypatch):
    hidden, weight, _, targets = inputs(device, 5, 4, 9)
    monkeypatch.setenv("PYRLHF_CHECK", "1")
    linear_logprob(hidden, weight, targets)
    targets[3] = 9
    with pytest.raises(ValueError, match=r"^linear_logprob: targets must be token ids in 0..8 .*found 9"):
        linear_logprob(hidden, weight, targets)


def test_not_contiguous(device, kernels):
    hidden, weight, bias, targets = inputs(device, 40, 24, 60)
    expected = with_grads(linear_logprob, (hidden[::2].contiguous(), weight, bias), targets[::2].contiguous())

    def strided(hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logprob(hidden.T.contiguous().T, weight.T.contiguous().T, targets, bias=bias.repeat(2)[::1][:60])

    assert equal(with_grads(strided, (hidden[::2], weight, bias), targets[::2]), expected)


@pytest.mark.parametrize(("rows", "dim", "vocabulary"), [(100, 8, 300), (33, 8, 900), (40, 128, 300)])
def test_slabs_are_bounded(rows, dim, vocabulary, device, kernels, monkeypatch):
    """No tensor is larger than a slab, its weights' float32 gradient, a gradient, or splits x 16 bytes a row."""
    hidden, weight, bias, targets = inputs(device, rows, dim, vocabulary)
    made = []

    def new(name: str) -> None:
        whole = getattr(Tensor, name)

        def counted(t: Tensor, shape: Any, **options: Any) -> Tensor:
            made.append(whole(t, shape, **options))
            return made[-1]

        monkeypatch.setattr(Tensor, name, counted)

    new("new_empty")
    new("new_zeros")
    tiles = kernels.tiles_of(hidden)
    given = (hidden, weight, targets, bias)
    logprob, entropy, lse = module._forward_impl(*given, 1.0)
    module._backward_impl(logprob, entropy, *given, entropy, lse, 1.0, [True] * 3)
    slab_weights = 2 * tiles.columns * dim * 4
    limit = max(kernels._SLAB_BYTES, slab_weights, weight.nbytes, hidden.nbytes, kernels._MAX_SPLITS * 16 * rows)
    assert len(made) >= 8
    assert max(x.nbytes for x in made) <= limit


def test_slabs_of_the_sizes_that_matter(device, monkeypatch):
    """128 MiB a slab at most, for D up to 32768; 128 splits at most; both of whole tiles and independent of the rows."""
    from pyrlhf.kernels import linear_logprob as kernels

    for columns in (128, 256):
        for vocabulary in (1, 255, 32_000, 50_257, 128_256, 10**7):
            split = kernels._split_width(vocabulary, columns)
            assert split % columns == 0
            assert -(-vocabulary // split) <= 128
            for dim in (1, 768, 4096, 8192, 32_767, 32_768):
                width = kernels._slab_width(vocabulary, dim, columns)
                assert width % columns == 0
                assert 0 < width * dim * 4 <= 128 << 20
    assert kernels._slab_width(128_256, 4096, 256) == 8192
    assert kernels._split_width(128_256, 256) == 1024


def test_torch_library(device, kernels):
    hidden, weight, bias, targets = inputs(device, 5, 4, 9)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    op = torch.ops.pyrlhf.linear_logprob.default
    torch.library.opcheck(op, (leaves[0], leaves[1], targets, leaves[2], 0.7))
    torch.library.opcheck(op, (leaves[0], leaves[1], targets, None, 1.0))

    def f(h: Tensor, w: Tensor, t: Tensor, *, bias: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logprob(h * 2, w, t, bias=bias)

    compiled = torch.compile(f, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    expected = with_grads(f, (hidden, weight, bias), targets)
    for a, b in zip(with_grads(compiled, (hidden, weight, bias), targets), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_agrees_with_the_reference(dtype, device, kernels):
    *given, targets = inputs(device, 37, 24, 131, dtype)
    ours, reference = (with_grads(f, given, targets, temperature=1.3) for f in (linear_logprob, linear_logprob_ref))
    for i, (a, b) in enumerate(zip(ours, reference, strict=True)):
        limit = 1e-5 if i < 2 or dtype == torch.float32 else 2e-2
        torch.testing.assert_close(a, b, rtol=limit, atol=limit)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_large_head(dtype, device):
    """More rows than a slab has, the table's tiles and slabs: against float64 for some rows, float32 for the sums over rows."""
    rows, dim, vocabulary = 9000, 512, 50_257
    hidden, weight, bias, targets = inputs(device, rows, dim, vocabulary, dtype)
    given = (hidden / dim**0.5, weight, bias)
    ours = with_grads(linear_logprob, given, targets)
    exact = with_grads(all_logits, [x.float() for x in given], targets)
    peers = with_grads(all_logits, given, targets)
    assert_as_good_as(ours, peers, [x.double() for x in exact], tiny=2e-5)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_graph_capture(device):
    *given, targets = inputs(device, 300, 256, 3000, torch.bfloat16)
    hidden, weight, bias = (x.requires_grad_() for x in given)

    def step() -> list[Tensor]:
        logprob, entropy = linear_logprob(hidden, weight, targets, bias=bias)
        return [logprob, entropy, *torch.autograd.grad(logprob.sum() + entropy.sum(), (hidden, weight, bias))]

    graph, results = captured(step)
    for x in results:
        x.fill_(torch.nan)
    graph.replay()
    assert equal([x.clone() for x in results], step())
