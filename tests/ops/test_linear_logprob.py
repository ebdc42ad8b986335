"""linear_logprob: values, gradients, memory that does not grow with N x V, independence of rows and of threads."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import pytest
import torch
from checking import equal, lines_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyrlhf.ops import linear_logprob, linear_logprob_ref
from pyrlhf.ops._core import CORE_DTYPES, core

module = sys.modules["pyrlhf.ops.linear_logprob"]


def inputs(rows: int, dim: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rows + vocabulary)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((rows, dim), (vocabulary, dim), (vocabulary,))
    )
    return hidden, weight, bias, torch.randint(0, vocabulary, (rows,), generator=generator)


def with_logits(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The usual way: all logits, torch's distribution, in the dtype of hidden."""
    logits = torch.nn.functional.linear(hidden, weight, bias) / temperature
    distribution = torch.distributions.Categorical(logits=logits, validate_args=False)
    return distribution.log_prob(targets), distribution.entropy()


@pytest.fixture(params=["core", "one chunk", "many chunks"])
def way(request, monkeypatch):
    """The C++ core, and torch with the vocabulary in one piece and in pieces of 64."""
    if request.param != "core":
        monkeypatch.setenv("PYRLHF_BACKEND", "ref")
    if request.param == "many chunks":
        monkeypatch.setattr(module, "_CHUNK_BYTES", 1)


def gradients(given: Sequence[Tensor], targets: Tensor, **options: float) -> list[Tensor]:
    """Both outputs, then the gradients by hidden, weight and bias of logprob - 0.1 entropy, weighted row by row."""
    leaves = [x.detach().clone().requires_grad_() for x in given]
    logprob, entropy = linear_logprob(*leaves[:2], targets, bias=leaves[2], **options)
    weights = torch.linspace(0.5, 1.5, len(targets))
    grads = torch.autograd.grad((weights * (logprob - 0.1 * entropy)).sum(), leaves)
    return [logprob.detach(), entropy.detach(), *grads]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "dim", "vocabulary"), [(1, 1, 1), (130, 24, 301), (256, 16, 64), (0, 8, 10)])
def test_as_good_as_torch(rows, dim, vocabulary, dtype, temperature, bias, way, values_and_grads, assert_as_good_as):
    hidden, weight, offset, targets = inputs(rows, dim, vocabulary, dtype)
    given = (hidden, weight, offset)[: 3 if bias else 2]

    def run(function, tensors):
        return values_and_grads(lambda h, w, b=None: function(h, w, targets, bias=b, temperature=temperature), tensors)

    exact = run(with_logits, [x.double() for x in given]) if rows else run(linear_logprob_ref, given)
    peers = run(with_logits, given) if rows else exact
    ours = run(linear_logprob, given)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    assert_as_good_as(ours, peers, exact, tiny=2e-5)
    assert_as_good_as(run(linear_logprob_ref, given), peers, exact, tiny=2e-5)


SHAPES = [(1, 1, 1), (3, 1, 7), (2, 5, 1), (65, 33, 129), (130, 24, 301), (64, 64, 1024), (67, 257, 1031)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "dim", "vocabulary"), SHAPES)
def test_every_instruction_set(isa, rows, dim, vocabulary, dtype, values_and_grads, assert_as_good_as):
    given = inputs(rows, dim, vocabulary, dtype)

    def run(function, tensors):
        return values_and_grads(lambda h, w, b: function(h / 4, w, given[3], bias=b, temperature=1.3), tensors)

    exact = run(with_logits, [x.double() for x in given[:3]])
    assert_as_good_as(run(linear_logprob, given[:3]), run(with_logits, given[:3]), exact, tiny=5e-6)


@pytest.mark.parametrize(("rows", "dim", "vocabulary"), [(16, 8192, 512), (16, 64, 40_000), (8192, 16, 300)])
def test_long_sums_lose_no_more_than_torchs(rows, dim, vocabulary, values_and_grads, assert_as_good_as):
    """Sums over dim, over the vocabulary (hidden's gradient) and over the rows (the weight's), in float32."""
    hidden, weight, _, targets = inputs(rows, dim, vocabulary)
    given = (hidden * 2 / dim**0.5, weight)

    def run(function, tensors):
        return values_and_grads(lambda h, w: function(h, w, targets), tensors)

    exact = run(with_logits, [x.double() for x in given])
    assert_as_good_as(run(linear_logprob, given), run(with_logits, given), exact, tiny=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 200),
    dim=st.integers(1, 40),
    vocabulary=st.integers(1, 400),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bias=st.booleans(),
)
def test_any_shape(rows, dim, vocabulary, scale, dtype, bias):
    hidden, weight, offset, targets = inputs(rows, dim, vocabulary, dtype)
    hidden, offset = hidden * scale, offset if bias else None
    logprob, entropy = linear_logprob(hidden, weight, targets, bias=offset)
    exact = hidden.double() @ weight.double().T + (offset.double() if bias else 0)
    exact = exact - exact.logsumexp(-1, keepdim=True)
    limit = 1e-5 * (1 + scale * dim)
    torch.testing.assert_close(logprob.double(), exact[torch.arange(rows), targets], rtol=1e-5, atol=limit)
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(-1), rtol=1e-5, atol=limit)


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 30])
def test_torchs_slabs_at_any_size(chunk_bytes, monkeypatch):
    monkeypatch.setenv("PYRLHF_BACKEND", "ref")
    monkeypatch.setattr(module, "_CHUNK_BYTES", chunk_bytes)
    for rows, dim, vocabulary in ((1, 1, 1), (127, 3, 63), (129, 20, 65), (200, 7, 130)):
        hidden, weight, _, targets = inputs(rows, dim, vocabulary)
        expected = linear_logprob_ref(hidden.double(), weight.double(), targets)
        for a, b in zip(linear_logprob(hidden, weight, targets), expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5 * dim)


@pytest.mark.parametrize("function", [linear_logprob, linear_logprob_ref])
def test_golden_values_of_rlax(function, shared_data):
    """Softmax at a temperature, entropy loss and policy gradient loss; the identity as weight makes hidden the logits."""
    golden = json.loads((shared_data("golden_rl") / "golden_rl.json").read_text())

    def of(logits: list[list[float]], targets: list[int], **options: float) -> tuple[Tensor, Tensor]:
        hidden = torch.tensor(logits, dtype=torch.float32)
        return function(hidden, torch.eye(hidden.shape[1]), torch.tensor(targets), **options)

    case = golden["rlax_softmax_T10"]
    for target in range(3):
        found = of(case["logits"], [target] * 2, temperature=case["temperature"])[0].exp()
        torch.testing.assert_close(found, torch.tensor(case["expected"])[:, target])
    case = golden["rlax_entropy_loss"]
    entropy = of(case["logits"], [0] * 3)[1]
    losses = [-(torch.tensor(weights) * entropy).mean().item() for weights in case["weights"]]
    assert losses == pytest.approx(case["expected"], abs=case["atol"])
    case = golden["rlax_policy_gradient_loss"]
    losses = [
        -(torch.tensor(w) * torch.tensor(a) * of(case["logits"], actions)[0]).mean().item()
        for w, a, actions in zip(case["weights"], case["advantages"], case["actions"], strict=True)
    ]
    assert losses == pytest.approx(case["expected"], abs=case["atol"])


def test_extreme_logits_stay_finite(way):
    weight = torch.zeros(200, 4)
    weight[7], weight[130] = 1.0, -1.0
    hidden = torch.full((3, 4), 2e4).requires_grad_()
    logprob, entropy = linear_logprob(hidden, weight, torch.tensor([7, 130, 0]))
    torch.testing.assert_close(logprob, torch.tensor([0.0, -1.6e5, -8e4]))
    torch.testing.assert_close(entropy, torch.zeros(3))
    (logprob.sum() + entropy.sum()).backward()
    assert hidden.grad.isfinite().all()


def test_gradcheck(way):
    hidden, weight, bias, targets = inputs(3, 4, 70, torch.float64)
    given = [x.requires_grad_() for x in (hidden, weight, bias)]
    op = torch.ops.pyrlhf.linear_logprob
    assert torch.autograd.gradcheck(lambda h, w, b: op(h, w, targets, b, 0.8)[:2], given)
    assert torch.autograd.gradcheck(lambda h, w, b: linear_logprob_ref(h, w, targets, bias=b, temperature=0.8), given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "vocabulary"), [(64, 512), (33, 1001)])
def test_bits_do_not_depend_on_other_rows(dim, vocabulary, dtype, way):
    hidden, weight, _, targets = inputs(300, dim, vocabulary, dtype)

    def run(rows: Tensor) -> list[Tensor]:
        leaf = hidden[rows].requires_grad_()
        logprob, entropy = linear_logprob(leaf, weight, targets[rows], temperature=0.9)
        return [logprob, entropy, *torch.autograd.grad(logprob.sum() - 0.1 * entropy.sum(), leaf)]

    every = run(torch.arange(300))
    shuffled = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    for rows in (torch.tensor([0]), torch.tensor([131]), torch.arange(100, 237), shuffled):
        assert equal(run(rows), [x[rows] for x in every])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "vocabulary"), [(64, 2100), (33, 1001)])
def test_a_rows_bits_are_its_own(isa, dim, vocabulary, dtype):
    hidden, weight, bias, targets = inputs(203, dim, vocabulary, dtype)

    def run(rows: Tensor) -> list[Tensor]:
        leaf = hidden[rows].requires_grad_()
        logprob, entropy = linear_logprob(leaf, weight, targets[rows], bias=bias, temperature=0.9)
        return [logprob, entropy, *torch.autograd.grad(logprob.sum() - 0.1 * entropy.sum(), leaf)]

    every = run(torch.arange(203))
    for rows in (torch.tensor([0]), torch.tensor([131]), torch.arange(100, 167), torch.arange(202, -1, -1)):
        assert equal(run(rows), [x[rows] for x in every])


CHUNKED = (8000, 8, 1100)  # more rows, and more tokens, than the core's backward takes at a time


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "dim", "vocabulary"), [(150, 40, 3001), (1, 300, 5000), CHUNKED])
def test_bits_do_not_depend_on_threads(isa, rows, dim, vocabulary, dtype, same_bits_for_any_threads):
    *given, targets = inputs(rows, dim, vocabulary, dtype)
    same_bits_for_any_threads(lambda: gradients(given, targets, temperature=0.9), repeats=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_rows_than_the_backward_takes_at_a_time(dtype, values_and_grads, assert_as_good_as):
    *given, targets = inputs(*CHUNKED, dtype)
    whole = core().linear_logprob_scratch(CORE_DTYPES.index(dtype), *CHUNKED, True)
    assert whole < 1.5 * core().linear_logprob_scratch(CORE_DTYPES.index(dtype), CHUNKED[0] // 2, *CHUNKED[1:], True)

    def run(function, tensors):
        return values_and_grads(lambda h, w, b: function(h, w, targets, bias=b), tensors)

    exact = run(with_logits, [x.double() for x in given])
    assert_as_good_as(run(linear_logprob, given), run(with_logits, given), exact, tiny=1e-5)


def test_more_rows_than_the_forward_takes_at_a_time():
    hidden, weight, _, targets = inputs(11_000, 1, 32_768)
    scratch = core().linear_logprob_scratch
    assert scratch(0, 11_000, 1, 32_768, False) == scratch(0, 12_000, 1, 32_768, False)  # the rows of one time
    every = linear_logprob(hidden, weight, targets)
    for at in (slice(0, 70), slice(10_800, 11_000)):
        assert equal(linear_logprob(hidden[at], weight, targets[at]), [x[at] for x in every])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bad_row_stays_alone(isa, dtype):
    *given, targets = inputs(70, 8, 200, dtype)
    clean, hidden = gradients(given, targets), given[0].clone()
    hidden[2] = torch.nan
    spoilt = gradients((hidden, *given[1:]), targets)
    others = torch.arange(70) != 2
    for a, b in zip(spoilt[:3], clean[:3], strict=True):  # of the rows; every row has a part in the other gradients
        assert a[2].isnan().all()
        assert torch.equal(a[others], b[others])


def test_bad_weights_spoil_every_row_and_only_their_own_gradient(isa):
    hidden, weight, bias, targets = inputs(5, 8, 300)
    weight[257, 3] = torch.nan
    logprob, entropy, *_ = gradients((hidden, weight, bias), targets)
    assert logprob.isnan().all()
    assert entropy.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_upstream_gradient_are_left_out(isa, dtype):
    hidden, weight, bias, targets = inputs(150, 24, 301, dtype)
    kept = torch.arange(150) % 3 == 0
    hidden[1] = torch.nan  # not even looked at

    def run(hidden: Tensor, targets: Tensor, weights: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        logprob, entropy = linear_logprob(leaves[0], leaves[1], targets, bias=leaves[2])
        return list(torch.autograd.grad((logprob, entropy), leaves, (weights, 0.1 * weights)))

    weights = torch.linspace(0.5, 1.5, 150)
    masked, alone = run(hidden, targets, weights * kept), run(hidden[kept], targets[kept], weights[kept])
    assert torch.equal(masked[0][kept], alone[0])
    assert not masked[0][~kept].any()
    assert equal(masked[1:], alone[1:])
    assert not any(x.any() for x in run(hidden, targets, torch.zeros(150)))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_wanted_gradients_are_made(wanted, dtype, way):
    *given, targets = inputs(130, 24, 301, dtype)
    every = gradients(given, targets)[2:]
    leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(given)]
    logprob, entropy = linear_logprob(*leaves[:2], targets, bias=leaves[2])
    (torch.linspace(0.5, 1.5, 130) * (logprob - 0.1 * entropy)).sum().backward()
    for i, (leaf, expected) in enumerate(zip(leaves, every, strict=True)):
        assert torch.equal(leaf.grad, expected) if i in wanted else leaf.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "dim", "vocabulary"), [(1, 1, 1), (67, 33, 1031), (0, 5, 9)])
def test_nothing_is_read_before_it_is_written(isa, rows, dim, vocabulary, dtype, monkeypatch):
    """Outputs and scratch memory that hold NaN at first change nothing."""
    *given, targets = inputs(rows, dim, vocabulary, dtype)
    expected, filled = gradients(given, targets), 0

    def new_empty(t: Tensor, shape: tuple[int, ...] | int, **options: torch.dtype) -> Tensor:
        nonlocal filled
        filled += 1
        return t.new_full(shape if isinstance(shape, tuple) else (shape,), torch.nan, **options)

    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    assert equal(gradients(given, targets), expected)
    assert filled >= 8
    assert not any(x.isnan().any() for x in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_of_minus_infinity_rules_tokens_out(isa, dtype, values_and_grads):
    hidden, weight, bias, targets = inputs(40, 8, 300, dtype)
    kept = torch.arange(300) % 4 != 0
    targets = kept.nonzero()[targets % 100, 0]
    masked = values_and_grads(
        lambda h, w: linear_logprob(h, w, targets, bias=bias.masked_fill(~kept, -torch.inf)), (hidden, weight)
    )
    place = kept.cumsum(0)[targets] - 1
    alone = values_and_grads(lambda h, w: linear_logprob(h, w, place, bias=bias[kept]), (hidden, weight[kept]))
    for a, b in zip(masked, [*alone[:3], torch.zeros_like(weight).index_copy(0, kept.nonzero()[:, 0], alone[3])]):
        torch.testing.assert_close(a, b)


def test_same_bits_on_repeat(values_and_grads):
    hidden, weight, _, targets = inputs(130, 16, 301)
    runs = [values_and_grads(lambda h, w: linear_logprob(h, w, targets), (hidden, weight)) for _ in range(1000)]
    assert all(equal(run, runs[0]) for run in runs[1:])


def test_weight_gradient_is_summed_in_float32():
    """4096 rows that each add the same little: a bfloat16 running sum would stop growing at 256 of them."""
    hidden = torch.ones(4096, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    linear_logprob(hidden, weight, torch.zeros(4096, dtype=torch.int64))[0].sum().backward()
    assert weight.grad[:, 0].tolist() == [2048.0, -2048.0]


@pytest.mark.parametrize(("rows", "dim", "vocabulary"), [(2000, 8, 5000), (64, 8, 200_000), (600, 512, 9000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "ref"])
def test_slabs_are_bounded(rows, dim, vocabulary, dtype, backend, largest_tensor, monkeypatch):
    monkeypatch.setenv("PYRLHF_BACKEND", backend)
    hidden, weight, bias, targets = inputs(rows, dim, vocabulary, dtype)
    with largest_tensor() as seen:
        logprob, entropy, lse = module._forward_impl(hidden, weight, targets, bias, 1.0)
        module._backward_impl(logprob, entropy, hidden, weight, targets, bias, entropy, lse, 1.0, [True] * 3)
    assert seen.elements * 4 <= max(module._CHUNK_BYTES, weight.numel() * 4, hidden.numel() * 4)
    assert seen.elements < rows * vocabulary


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [0, 1])
def test_scratch_memory_is_bounded(isa, dtype, backward):
    for rows in (1, 1000, 10**7):
        for dim in (1, 768, 4096, 32_767, 32_768):
            for vocabulary in (1, 50_257, 10**8):
                scratch = core().linear_logprob_scratch(dtype, rows, dim, vocabulary, backward)
                assert 0 < scratch <= 62 << 20  # the rest of 64 MiB is for tiles on the threads' stacks


PEAK = """
from pyrlhf.ops import linear_logprob
torch.set_num_threads(1)
rows, dim, vocabulary = 2048, 32, 50257
hidden = torch.randn(rows, dim).requires_grad_()
weight = torch.randn(vocabulary, dim).requires_grad_()
targets = torch.randint(0, vocabulary, (rows,))
def step(hidden, weight, targets):
    logprob, entropy = linear_logprob(hidden, weight, targets)
    (logprob.sum() + entropy.sum()).backward()
weight.grad, hidden.grad = torch.zeros_like(weight), torch.zeros_like(hidden)
step(hidden[:256], weight[:500], targets[:256] % 500)  # code is paged in
before = of_this_process("VmHWM")
step(hidden, weight, targets)
print(of_this_process("VmHWM") - before)
"""


def test_peak_memory_of_a_step():
    """The logits alone would be 393 MiB; the contract's 64 MiB and the gradients are allowed."""
    (grown,) = lines_of(PEAK)
    gradients = (50257 * 32 + 2048 * 32) * 4 / 2**20
    assert gradients / 2 < float(grown) <= 64 + gradients


def test_torch_library(values_and_grads):
    hidden, weight, bias, targets = inputs(5, 4, 9)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    op = torch.ops.pyrlhf.linear_logprob.default
    torch.library.opcheck(op, (leaves[0], leaves[1], targets, leaves[2], 0.7))
    torch.library.opcheck(op, (leaves[0], leaves[1], targets, None, 1.0))

    def f(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logprob(h * 2, w, targets)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(values_and_grads(compiled, (hidden, weight)), values_and_grads(f, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b)


def test_non_contiguous():
    hidden, weight, _, targets = inputs(40, 8, 30)
    expected = linear_logprob(hidden[::2].contiguous(), weight, targets[::2].contiguous())
    got = linear_logprob(hidden[::2], weight.T.contiguous().T, targets[::2])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("function", [linear_logprob, linear_logprob_ref])
def test_wrong_calls_name_the_argument(function):
    hidden, weight, bias, targets = inputs(5, 4, 9)
    for error, message, change in (
        (TypeError, "hidden must be", {"hidden": None}),
        (TypeError, "hidden must be float32", {"hidden": hidden.int()}),
        (ValueError, "hidden must have shape", {"hidden": hidden[0]}),
        (ValueError, "weight must have shape", {"weight": weight[:, :3]}),
        (ValueError, "weight must have shape", {"weight": weight[:0]}),
        (TypeError, "weight must be float32", {"weight": weight.bfloat16()}),
        (ValueError, "bias must have shape", {"bias": bias[:8]}),
        (TypeError, "targets must be int64", {"targets": targets.int()}),
        (ValueError, "targets must have shape", {"targets": targets[:4]}),
        (ValueError, r"targets must be token ids in 0\.\.8.*found 9", {"targets": torch.tensor([0, 1, 9, 3, 4])}),
        (ValueError, r"targets must be token ids in 0\.\.8.*found -100", {"targets": torch.tensor([0, -100, 2, 3, 4])}),
        (ValueError, "temperature must be in", {"temperature": 0.0}),
        (ValueError, "temperature must be in", {"temperature": float("nan")}),
    ):
        with pytest.raises(error, match=message):
            function(**{"hidden": hidden, "weight": weight, "targets": targets, "bias": bias, **change})
