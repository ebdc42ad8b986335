"""attention: values, gradients, masks, independence of neighbours, memory, errors."""

from __future__ import annotations

import sys

import pytest
import torch
from checking import equal, lines_of, masks_drawn, offsets, running_on
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pyrlhf.ops import attention, attention_ref
from pyrlhf.ops._core import core

module = sys.modules["pyrlhf.ops.attention"]


def visible(cu: Tensor, causal: bool, window: int | None, prefix: Tensor | None) -> Tensor:
    """bool [T, T], token by token as the contract says it."""
    total = int(cu[-1])
    sees = torch.zeros(total, total, dtype=torch.bool)
    for s in range(len(cu) - 1):
        start, end = int(cu[s]), int(cu[s + 1])
        for t in range(start, end):
            last = t + 1 if causal else end
            first = start if window is None else max(start, t + 1 - window)
            sees[t, first:last] = True
            if prefix is not None:
                sees[t, int(prefix[s, 0]) : int(prefix[s, 1])] = True
    return sees


def dense(q: Tensor, k: Tensor, v: Tensor, sees: Tensor, scale: float | None = None) -> Tensor:
    """Attention as one T x T softmax in the dtype of q, with sums written out; a row that sees nothing gives 0."""
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(group, 1)) * (scale or q.shape[2] ** -0.5)
    scores = scores.masked_fill(~sees, -torch.inf)
    top = scores.amax(-1, keepdim=True).clamp_min(-1e30)
    weights = (scores - top).exp()
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
    return torch.einsum("hts,shd->thd", weights, v.repeat_interleave(group, 1))


def sdpa(q: Tensor, k: Tensor, v: Tensor, sees: Tensor) -> Tensor:
    heads = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return scaled_dot_product_attention(*heads, attn_mask=sees, enable_gqa=True)[0].transpose(0, 1)


def inputs(total: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(total * 31 + heads)
    return [torch.randn(total, h, dim, generator=generator).to(dtype) for h in (heads, kv_heads, kv_heads)]


def prefix_for(lengths: list[int]) -> Tensor:
    """Every second sequence sees the one before it, the last one a range across sequences."""
    cu = offsets(lengths)
    prefix = torch.zeros(len(lengths), 2, dtype=torch.int32)
    for s in range(1, len(lengths), 2):
        prefix[s] = cu[s - 1 : s + 1]
    if len(lengths) > 2:
        prefix[-1] = torch.tensor([min(1, int(cu[-2])), int(cu[-2])])
    return prefix


MASKS = {
    "causal": {},
    "bidirectional": {"causal": False},
    "window": {"window": 3},
    "window of one": {"window": 1},
    "window of none": {"window": 0},
    "prefix": {"prefix": True},
    "prefix, bidirectional": {"prefix": True, "causal": False},
}


def arguments(mask: dict, lengths: list[int]) -> tuple[dict, Tensor]:
    keywords = dict(mask)
    if mask.get("prefix"):
        keywords["prefix"] = prefix_for(lengths)
    sees = visible(offsets(lengths), keywords.get("causal", True), keywords.get("window"), keywords.get("prefix"))
    return keywords, sees


@pytest.mark.parametrize("backend", ["auto", "ref"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 8), (6, 2, 13), (3, 1, 64)])
def test_values_and_gradients(mask, heads, kv_heads, dim, backend, values_and_grads, monkeypatch):
    monkeypatch.setenv("PYRLHF_BACKEND", backend)
    lengths = [5, 0, 1, 23, 7]
    keywords, sees = arguments(mask, lengths)
    q, k, v = inputs(sum(lengths), heads, kv_heads, dim)
    ours = values_and_grads(lambda *x: attention(*x, offsets(lengths), **keywords), (q, k, v))
    reference = values_and_grads(lambda *x: attention_ref(*x, offsets(lengths), **keywords), (q, k, v))
    truth = values_and_grads(lambda *x: dense(*x, sees), [x.double() for x in (q, k, v)])
    for a, r, t in zip(ours, reference, truth, strict=True):
        torch.testing.assert_close(a.double(), t, rtol=2e-5, atol=1e-5)
        torch.testing.assert_close(r.double(), t, rtol=2e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    dim=st.sampled_from([1, 2, 5, 8]),
    mask=st.sampled_from(list(MASKS.values())),
    scale=st.sampled_from([None, 0.3]),
)
def test_any_ragged_batch(lengths, kv_heads, group, dim, mask, scale):
    keywords, sees = arguments(mask, lengths)
    leaves = [x.requires_grad_() for x in inputs(sum(lengths), kv_heads * group, kv_heads, dim)]
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    out = attention(*leaves, offsets(lengths), scale=scale, **keywords)
    truth = dense(*doubles, sees, scale) if sum(lengths) else doubles[0] * 1.0
    torch.testing.assert_close(out.double(), truth, rtol=2e-5, atol=1e-5)
    out.square().sum().backward()
    truth.square().sum().backward()
    for a, t in zip(leaves, doubles, strict=True):
        expected = torch.zeros_like(t) if t.grad is None else t.grad
        torch.testing.assert_close(a.grad.double(), expected, rtol=5e-5, atol=2e-5)


@pytest.mark.parametrize("lengths", [[1], [1023], [1] * 1000, [127, 1, 0, 131]])
def test_sizes(lengths):
    q, k, v = inputs(sum(lengths), 2, 1, 8)
    out = attention(q, k, v, offsets(lengths))
    truth = torch.empty(q.shape, dtype=torch.float64)
    ends = offsets(lengths).tolist()
    for a, b in zip(ends[:-1], ends[1:], strict=True):
        if b > a:
            truth[a:b] = dense(*(x[a:b].double() for x in (q, k, v)), torch.ones(b - a, b - a).tril().bool())
    torch.testing.assert_close(out.double(), truth, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_good_as_torch(mask, dtype, values_and_grads, assert_as_good_as):
    lengths = [40, 0, 9, 61]
    keywords, sees = arguments(mask, lengths)
    given = inputs(sum(lengths), 4, 2, 32, dtype)
    ours = values_and_grads(lambda *x: attention(*x, offsets(lengths), **keywords), given)
    peers = values_and_grads(lambda *x: sdpa(*x, sees), given)
    truth = values_and_grads(lambda *x: dense(*x, sees), [x.double() for x in given])
    if mask.get("window") == 0:  # torch's own answer there is not ours
        peers = truth
    assert_as_good_as(ours, peers, truth)


def test_gradcheck():
    lengths = [2, 0, 1, 3]
    q, k, v = (x.requires_grad_() for x in inputs(6, 2, 1, 2, torch.float64))
    for mask in MASKS.values():
        keywords, _ = arguments(mask, lengths)
        assert torch.autograd.gradcheck(lambda *x: attention_ref(*x, offsets(lengths), **keywords), (q, k, v))  # noqa: B023
        rest = (keywords.get("prefix"), keywords.get("causal", True), keywords.get("window"), 0.5)
        op = torch.ops.pyrlhf.attention
        assert torch.autograd.gradcheck(lambda *x: op(*x, offsets(lengths), *rest)[0], (q, k, v))  # noqa: B023


def test_answers_that_share_a_prompt_equal_separate_sequences(values_and_grads):
    prompt, answers = 11, [4, 1, 6]
    q, k, v = inputs(prompt + sum(answers), 4, 2, 8)
    shared = offsets([prompt, *answers])
    prefix = torch.tensor([[0, 0]] + [[0, prompt]] * 3, dtype=torch.int32)
    rows = [[*range(prompt), *range(int(shared[i]), int(shared[i + 1]))] for i in (1, 2, 3)]
    index = torch.tensor([i for r in rows for i in r])

    def separate(*x: Tensor) -> Tensor:
        out = attention(*(y[index] for y in x), offsets([len(r) for r in rows]))
        keep, start = [*range(prompt)], 0
        for r in rows:
            keep += range(start + prompt, start + len(r))
            start += len(r)
        return out[torch.tensor(keep)]

    together = values_and_grads(lambda *x: attention(*x, shared, prefix=prefix), (q, k, v))
    for a, b in zip(together, values_and_grads(separate, (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 33), (3, 3, 1), (4, 2, 16), (2, 1, 13)])
def test_bits_do_not_depend_on_neighbours(heads, kv_heads, dim, dtype, values_and_grads):
    own = inputs(37, heads, kv_heads, dim, dtype)
    for mask in ({}, {"causal": False}, {"window": 5}):
        base = values_and_grads(lambda *x: attention(*x, offsets([37]), **mask), own)  # noqa: B023
        for before, after in ([1], []), ([3, 5, 0], [64]), ([130], [1, 2]):
            lengths = [*before, 37, *after]
            start = sum(before)
            packed = [torch.full((sum(lengths), *x.shape[1:]), torch.nan, dtype=dtype) for x in own]
            for p, x in zip(packed, own, strict=True):
                p[start : start + 37] = x
            leaves = [p.requires_grad_() for p in packed]
            out = attention(*leaves, offsets(lengths), **mask)[start : start + 37]
            cotangent = torch.randn(base[0].shape, generator=torch.Generator().manual_seed(5)).to(dtype)
            grads = torch.autograd.grad(out, leaves, cotangent)
            assert torch.equal(out, base[0])
            for g, b in zip(grads, base[1:], strict=True):
                assert torch.equal(g[start : start + 37], b)


@pytest.mark.parametrize("lengths", [[13, 7, 20], [150, 60, 190]], ids=["one thread", "all threads"])
def test_same_bits_on_repeat(lengths, values_and_grads):
    given = inputs(sum(lengths), 4, 2, 16)
    for mask in ({}, {"prefix": True}):
        keywords, _ = arguments(mask, lengths)
        runs = [values_and_grads(lambda *x: attention(*x, offsets(lengths), **keywords), given) for _ in range(1000)]  # noqa: B023
        assert all(equal(run, runs[0]) for run in runs[1:])


@pytest.mark.parametrize("backend", ["auto", "ref"])
def test_never_more_than_one_sequence_of_scores(backend, largest_tensor, monkeypatch):
    monkeypatch.setenv("PYRLHF_BACKEND", backend)
    lengths, heads = [64] * 40, 2
    q, k, v = inputs(sum(lengths), heads, heads, 1)
    args = (offsets(lengths), None, True, None, 1.0)
    with largest_tensor() as seen:
        out, lse = module._forward_impl(q, k, v, *args)
        module._backward_impl(out, q, k, v, out, lse, *args)
    assert heads * 64 < seen.elements <= heads * 64 * 64  # q itself has heads * 64 * 40
    saved = attention(q.requires_grad_(), k, v, offsets(lengths)).grad_fn.saved_tensors
    assert max(x.numel() for x in saved if x is not None) == q.numel()


def test_non_contiguous_inputs():
    fused = torch.randn(20, 3, 4, 8)
    q, k, v = fused.unbind(1)
    cu = offsets([12, 8])
    assert torch.equal(attention(q, k, v, cu), attention(*(x.contiguous() for x in (q, k, v)), cu))
    swapped = torch.randn(4, 20, 8).transpose(0, 1)
    assert torch.equal(attention(swapped, k, v, cu), attention(swapped.contiguous(), k, v, cu))


# -- every instruction set, any number of threads, and what must not matter --------------------------------------------------


@st.composite
def problems(draw):
    """Ragged lengths and what their tokens see: lengths, keywords of attention."""
    lengths = draw(st.lists(st.one_of(st.integers(0, 9), st.integers(0, 150)), min_size=1, max_size=7))
    return lengths, masks_drawn(draw, lengths, 160)


@settings(max_examples=150, deadline=None)
@given(
    problem=problems(),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    dim=st.sampled_from([1, 3, 4, 16, 33, 64, 80]),
    scale=st.sampled_from([None, 0.3, -0.2]),
    isa=st.sampled_from(core().isas_available()),
)
def test_any_ragged_batch_on_any_instruction_set(problem, kv_heads, group, dim, scale, isa):
    lengths, keywords = problem
    leaves = [x.requires_grad_() for x in inputs(sum(lengths), kv_heads * group, kv_heads, dim)]
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    cotangent = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(1))
    with running_on(isa):
        out = attention(*leaves, offsets(lengths), scale=scale, **keywords)
        out.backward(cotangent)
    truth = attention_ref(*doubles, offsets(lengths), scale=scale, **keywords)
    truth.backward(cotangent.double())
    torch.testing.assert_close(out.double(), truth, rtol=2e-5, atol=1e-5)
    for a, t in zip(leaves, doubles, strict=True):
        expected = torch.zeros_like(t) if t.grad is None else t.grad
        torch.testing.assert_close(a.grad.double(), expected, rtol=5e-5, atol=2e-5)


LONGER = [130, 0, 65, 257, 1]
LONGER_MASKS = {name: mask for name, mask in MASKS.items() if "window" not in name} | {"window": {"window": 70}}


@pytest.mark.parametrize("mask", LONGER_MASKS.values(), ids=LONGER_MASKS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_good_as_torch_and_as_the_reference(isa, mask, dtype, values_and_grads, assert_as_good_as):
    keywords, sees = arguments(mask, LONGER)
    given = inputs(sum(LONGER), 6, 2, 64, dtype)
    ours = values_and_grads(lambda *x: attention(*x, offsets(LONGER), **keywords), given)
    truth = values_and_grads(lambda *x: dense(*x, sees), [x.double() for x in given])
    assert_as_good_as(ours, values_and_grads(lambda *x: sdpa(*x, sees), given), truth)
    reference = values_and_grads(lambda *x: attention_ref(*x, offsets(LONGER), **keywords), given)
    assert_as_good_as(ours, reference, truth)


def test_long_sums_are_as_good_as_torch(isa, values_and_grads, assert_as_good_as):
    """2048 queries are added into the first key's gradients: errors must not grow with their number."""

    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        return scaled_dot_product_attention(*heads, is_causal=True)[0].transpose(0, 1)

    given = inputs(2048, 2, 2, 64)
    ours = values_and_grads(lambda *x: attention(*x, offsets([2048])), given)
    truth = values_and_grads(lambda *x: attention_ref(*x, offsets([2048])), [x.double() for x in given])
    assert_as_good_as(ours, values_and_grads(causal, given), truth)


@pytest.mark.parametrize("mask", LONGER_MASKS.values(), ids=LONGER_MASKS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_on_any_number_of_threads(isa, mask, dtype, values_and_grads, same_bits_for_any_threads):
    keywords, _ = arguments(mask, LONGER)
    given = inputs(sum(LONGER), 4, 2, 16, dtype)
    assert given[0].numel() >= 16384, "below, one thread does it all"

    same_bits_for_any_threads(
        lambda: values_and_grads(lambda *x: attention(*x, offsets(LONGER), **keywords), given), repeats=5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_of_a_prefix_group_do_not_depend_on_neighbours(isa, dtype, values_and_grads):
    """A prompt of 70, three answers to it or to a part of it, and a sequence that sees across two of them."""
    lengths, ranges = [70, 20, 140, 3, 9], [[0, 0], [0, 70], [0, 70], [10, 66], [80, 91]]
    own = inputs(sum(lengths), 4, 2, 33, dtype)
    prefix = torch.tensor(ranges, dtype=torch.int32)
    base = values_and_grads(lambda *x: attention(*x, offsets(lengths), prefix=prefix), own)
    cotangent = torch.randn(base[0].shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    for before, after in ([1], []), ([3, 0, 129], [64, 2]):
        start, end = sum(before), sum(before) + sum(lengths)
        packed = [torch.full((end + sum(after), *x.shape[1:]), torch.nan, dtype=dtype) for x in own]
        for p, x in zip(packed, own, strict=True):
            p[start:end] = x
        moved = torch.zeros(len(before) + len(lengths) + len(after), 2, dtype=torch.int32)
        moved[len(before) : len(before) + len(lengths)] = prefix + start
        if len(after) > 1:  # neighbours that form a group of their own, around ours
            moved[0] = torch.tensor([end, end + after[0]])
        leaves = [p.requires_grad_() for p in packed]
        out = attention(*leaves, offsets([*before, *lengths, *after]), prefix=moved)[start:end]
        assert torch.equal(out, base[0])
        for g, b in zip(torch.autograd.grad(out, leaves, cotangent), base[1:], strict=True):
            assert torch.equal(g[start:end], b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
def test_a_nan_stays_in_its_sequence_and_with_those_that_see_it(isa, which, dtype, values_and_grads):
    lengths = [40, 70, 9, 33, 20]
    cu = offsets(lengths)
    prefix = torch.tensor([[0, 0], [0, 0], [40, 110], [0, 0], [0, 40]], dtype=torch.int32)  # 2 sees 1, 4 sees 0
    given = inputs(sum(lengths), 2, 1, 16, dtype)
    clean = values_and_grads(lambda *x: attention(*x, cu, prefix=prefix), given)
    given[which][50] = torch.nan  # in sequence 1
    found = values_and_grads(lambda *x: attention(*x, cu, prefix=prefix), given)
    together = torch.zeros(sum(lengths), dtype=torch.bool)
    together[40:119] = True
    for x, y in zip(found, clean, strict=True):
        assert torch.equal(x[~together], y[~together])
    out, *grads = found
    assert out[50].isnan().all()
    assert [bool(x[together].isnan().any()) for x in grads] == [True, True, which != 2]  # v does not meet its gradient
    if which > 0:  # all that see the key
        assert out[50:119].isnan().any(dim=2).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [{}, {"causal": False}, {"window": 30}], ids=["causal", "bidirectional", "window"])
def test_views_of_one_qkv_matrix_are_read_in_place(isa, mask, dtype):
    lengths, heads, kv_heads, dim = [70, 0, 13], 4, 2, 33
    qkv = torch.randn(sum(lengths), heads + 2 * kv_heads, dim, generator=torch.Generator().manual_seed(2)).to(dtype)
    cotangent = torch.randn(sum(lengths), heads, dim, generator=torch.Generator().manual_seed(3)).to(dtype)

    def run(contiguous: bool) -> tuple[Tensor, Tensor]:
        leaf = qkv.clone().requires_grad_()
        parts = leaf.split([heads, kv_heads, kv_heads], dim=1)
        out = attention(*(x.contiguous() if contiguous else x for x in parts), offsets(lengths), **mask)
        return out.detach(), torch.autograd.grad(out, leaf, cotangent)[0]

    for a, b in zip(run(contiguous=False), run(contiguous=True), strict=True):
        assert torch.equal(a, b)
    parts = qkv.split([heads, kv_heads, kv_heads], dim=1)
    (q, k, v, *_), *_ = module._core_arguments(*parts, offsets(lengths), None, True, None, 1.0)
    assert [x.data_ptr() for x in (q, k, v)] == [x.data_ptr() for x in parts]


@pytest.mark.parametrize("mask", LONGER_MASKS.values(), ids=LONGER_MASKS.keys())
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_core_and_plain_torch_agree(isa, mask, dtype, tolerance, values_and_grads, monkeypatch):
    keywords, _ = arguments(mask, LONGER)
    given = inputs(sum(LONGER), 4, 2, 40, dtype)
    found = {}
    for backend in ("auto", "ref"):
        monkeypatch.setenv("PYRLHF_BACKEND", backend)
        found[backend] = values_and_grads(lambda *x: attention(*x, offsets(LONGER), **keywords), given)
    for a, b in zip(found["auto"], found["ref"], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


PEAK = """
from pyrlhf.ops import attention

def run(tokens):
    q, k, v = (torch.randn(tokens, 1, 64).to(torch.{dtype}).requires_grad_() for _ in range(3))
    out = attention(q, k, v, torch.tensor([0, tokens], dtype=torch.int32), causal={causal})
    out.backward(torch.ones_like(out))

run(300)
before = of_this_process("VmHWM")
run(8192)
print(of_this_process("VmHWM") - before)
"""

NO_MEMORY = """
from pyrlhf.ops import attention

q, k, v = (torch.randn(8192, 1, 128, requires_grad=True) for _ in range(3))
cu_seqlens = torch.tensor([0, 8192], dtype=torch.int32)
out = attention(q, k, v, cu_seqlens).sum()
expected = torch.autograd.grad(out, (q, k, v), retain_graph=True)
for room in (0, 8, 16, 24):
    resource.setrlimit(resource.RLIMIT_AS, (int(of_this_process("VmSize") + room) << 20, resource.RLIM_INFINITY))
    try:
        torch.autograd.grad(out, (q, k, v), retain_graph=True)
    except (MemoryError, RuntimeError) as error:
        print(type(error).__name__, str(error).splitlines()[0])
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    for a, b in zip(torch.autograd.grad(out, (q, k, v), retain_graph=True), expected, strict=True):
        assert torch.equal(a, b)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("dtype", "causal"), [("float32", True), ("float32", False), ("bfloat16", True)])
def test_no_matrix_of_scores_is_ever_in_memory(dtype, causal):
    """q, k, v, the output and gradients of 8192 rows are 2 MiB each in float32; the scores would be 256 MiB."""
    (grown,) = lines_of(PEAK.format(dtype=dtype, causal=causal))
    assert 5 < float(grown) < 64, "MiB"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_that_runs_out_is_an_exception_and_no_more():
    """Little room: torch finds none for the gradients. More: the kernel finds none for 32 MiB of its own."""
    said = lines_of(NO_MEMORY)
    assert len(said) == 4, said
    assert all(line.startswith("MemoryError attention: ") or "allocate" in line for line in said), said
    assert said[-1].startswith("MemoryError attention: the kernel's scratch memory could not be allocated")


def test_torch_library():
    q, k, v = (x.requires_grad_() for x in inputs(9, 4, 2, 8))
    cu, prefix = offsets([4, 5]), torch.tensor([[0, 0], [0, 4]], dtype=torch.int32)
    for args in ((None, True, None), (None, True, 2), (None, False, None), (prefix, True, None)):
        torch.library.opcheck(torch.ops.pyrlhf.attention.default, (q, k, v, cu, *args, 0.4))


def test_compiles_without_a_break(values_and_grads):
    cu = offsets([4, 0, 5])

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q * 2, k, v, cu, window=3) + 1

    given = inputs(9, 4, 2, 8)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(values_and_grads(compiled, given), values_and_grads(f, given), strict=True):
        torch.testing.assert_close(a, b)


def test_wrong_calls_name_the_argument():
    q, k, v = inputs(9, 4, 2, 8)
    cu = offsets([4, 5])

    def prefix(*rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int32)

    wrong: list[tuple[type[Exception], str, dict]] = [
        (TypeError, "q must be", {"q": q.tolist()}),
        (TypeError, "q must be float32 or bfloat16, found float64", {"q": q.double()}),
        (TypeError, "q must be float32 or bfloat16, found float16", {"q": q.half()}),
        (ValueError, "q must have shape", {"q": q[0]}),
        (TypeError, "k must be float32", {"k": k.bfloat16()}),
        (ValueError, "k must have shape", {"k": k[:8]}),
        (ValueError, "v must have shape", {"v": v[..., :7]}),
        (ValueError, "v must have shape", {"v": v[:, :1]}),
        (ValueError, "multiple of k's", {"q": q[:, :3]}),
        (ValueError, "head size", {"q": q.repeat(1, 1, 33), "k": k.repeat(1, 1, 33), "v": v.repeat(1, 1, 33)}),
        (TypeError, "cu_seqlens must be int32", {"cu_seqlens": cu.long()}),
        (ValueError, r"cu_seqlens\[0\]", {"cu_seqlens": cu + 1}),
        (ValueError, "cu_seqlens must end", {"cu_seqlens": offsets([4, 4])}),
        (ValueError, "cu_seqlens must not decrease", {"cu_seqlens": torch.tensor([0, 10, 9], dtype=torch.int32)}),
        (ValueError, "window must be", {"window": -1}),
        (TypeError, "window must be", {"window": 2.0}),
        (ValueError, "window needs causal", {"window": 2, "causal": False}),
        (ValueError, "prefix cannot be combined with window", {"window": 2, "prefix": prefix([0, 0], [0, 4])}),
        (TypeError, "prefix must be int32", {"prefix": prefix([0, 0], [0, 4]).long()}),
        (ValueError, "prefix must have shape", {"prefix": prefix([0, 0])}),
        (ValueError, r"prefix\[1\] must be a range", {"prefix": prefix([0, 0], [0, 10])}),
        (ValueError, r"prefix\[1\] must be a range", {"prefix": prefix([0, 0], [-1, 3])}),
        (ValueError, r"prefix\[1\] must be a range", {"prefix": prefix([0, 0], [3, 1])}),
        (ValueError, r"prefix\[1\] must not overlap", {"prefix": prefix([0, 0], [0, 5])}),
        (ValueError, r"prefix\[0\] must not overlap", {"prefix": prefix([3, 9], [0, 0])}),
        (TypeError, "scale must be a number", {"scale": "big"}),
        (ValueError, "scale must be in", {"scale": float("nan")}),
    ]
    for function in (attention, attention_ref):
        for error, message, change in wrong:
            if function is attention_ref and "found float" in message:
                continue
            given = {"q": q, "k": k, "v": v, "cu_seqlens": cu, **change}
            with pytest.raises(error, match=message):
                function(**given)
