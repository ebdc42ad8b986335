"""linear_logprob: values, both gradients, memory that does not grow with N x V, independence of rows."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyrlhf.ops import linear_logprob, linear_logprob_ref

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


@pytest.fixture(params=[False, True], ids=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    """The vocabulary in one piece, and in pieces of 64."""
    if request.param:
        monkeypatch.setattr(module, "_CHUNK_BYTES", 1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "dim", "vocabulary"), [(1, 1, 1), (130, 24, 301), (256, 16, 64), (0, 8, 10)])
def test_as_good_as_torch(rows, dim, vocabulary, dtype, temperature, bias, chunks, values_and_grads, assert_as_good_as):
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


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 200),
    dim=st.integers(1, 20),
    vocabulary=st.integers(1, 200),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    chunk_bytes=st.sampled_from([1, 1 << 30]),
)
def test_any_shape(rows, dim, vocabulary, scale, chunk_bytes):
    hidden, weight, _, targets = inputs(rows, dim, vocabulary)
    kept, module._CHUNK_BYTES = module._CHUNK_BYTES, chunk_bytes
    try:
        logprob, entropy = linear_logprob(hidden * scale, weight, targets)
    finally:
        module._CHUNK_BYTES = kept
    exact = (hidden * scale).double() @ weight.double().T
    exact = exact - exact.logsumexp(-1, keepdim=True)
    limit = 1e-5 * (1 + scale * dim)
    torch.testing.assert_close(logprob.double(), exact[torch.arange(rows), targets], rtol=1e-5, atol=limit)
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(-1), rtol=1e-5, atol=limit)


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


def test_extreme_logits_stay_finite(chunks):
    weight = torch.zeros(200, 4)
    weight[7], weight[130] = 1.0, -1.0
    hidden = torch.full((3, 4), 2e4).requires_grad_()
    logprob, entropy = linear_logprob(hidden, weight, torch.tensor([7, 130, 0]))
    torch.testing.assert_close(logprob, torch.tensor([0.0, -1.6e5, -8e4]))
    torch.testing.assert_close(entropy, torch.zeros(3))
    (logprob.sum() + entropy.sum()).backward()
    assert hidden.grad.isfinite().all()


def test_gradcheck(chunks):
    hidden, weight, bias, targets = inputs(3, 4, 70, torch.float64)
    given = [x.requires_grad_() for x in (hidden, weight, bias)]
    op = torch.ops.pyrlhf.linear_logprob
    assert torch.autograd.gradcheck(lambda h, w, b: op(h, w, targets, b, 0.8)[:2], given)
    assert torch.autograd.gradcheck(lambda h, w, b: linear_logprob_ref(h, w, targets, bias=b, temperature=0.8), given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "vocabulary"), [(64, 512), (33, 1001)])
def test_bits_do_not_depend_on_other_rows(dim, vocabulary, dtype, chunks):
    hidden, weight, _, targets = inputs(300, dim, vocabulary, dtype)

    def run(rows: Tensor) -> list[Tensor]:
        leaf = hidden[rows].requires_grad_()
        logprob, entropy = linear_logprob(leaf, weight, targets[rows], temperature=0.9)
        return [logprob, entropy, *torch.autograd.grad(logprob.sum() - 0.1 * entropy.sum(), leaf)]

    every = run(torch.arange(300))
    shuffled = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    for rows in (torch.tensor([0]), torch.tensor([131]), torch.arange(100, 237), shuffled):
        assert all(torch.equal(a, b[rows]) for a, b in zip(run(rows), every, strict=True))


def test_a_bad_row_stays_alone():
    hidden, weight, _, targets = inputs(5, 8, 20)
    clean = linear_logprob(hidden, weight, targets)
    hidden[2] = torch.nan
    for a, b in zip(linear_logprob(hidden, weight, targets), clean, strict=True):
        assert a[2].isnan()
        assert torch.equal(a[[0, 1, 3, 4]], b[[0, 1, 3, 4]])


def test_same_bits_on_repeat(values_and_grads):
    hidden, weight, _, targets = inputs(130, 16, 301)
    runs = [values_and_grads(lambda h, w: linear_logprob(h, w, targets), (hidden, weight)) for _ in range(1000)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_weight_gradient_is_summed_in_float32():
    """4096 rows that each add the same little: a bfloat16 running sum would stop growing at 256 of them."""
    hidden = torch.ones(4096, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    linear_logprob(hidden, weight, torch.zeros(4096, dtype=torch.int64))[0].sum().backward()
    assert weight.grad[:, 0].tolist() == [2048.0, -2048.0]


@pytest.mark.parametrize(("rows", "dim", "vocabulary"), [(2000, 8, 5000), (64, 8, 200_000), (600, 512, 9000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slabs_are_bounded(rows, dim, vocabulary, dtype, largest_tensor):
    hidden, weight, bias, targets = inputs(rows, dim, vocabulary, dtype)
    with largest_tensor() as seen:
        logprob, entropy, lse = module._forward_impl(hidden, weight, targets, bias, 1.0)
        module._backward_impl(logprob, entropy, hidden, weight, targets, bias, entropy, lse, 1.0)
    assert seen.elements * 4 <= max(module._CHUNK_BYTES, weight.numel() * 4, hidden.numel() * 4)
    assert seen.elements < rows * vocabulary


PEAK = """
import resource, torch
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
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(hidden, weight, targets)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_peak_memory_of_a_step():
    """The logits alone would be 393 MiB; the contract's 64 MiB and the gradients are allowed."""
    out = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    gradients = (50257 * 32 + 2048 * 32) * 4 / 2**20
    assert float(out.stdout) <= 64 + gradients


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
