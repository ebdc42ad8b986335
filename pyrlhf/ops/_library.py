"""Registration with torch.library, so that torch.compile(fullgraph=True) sees ops and no graph break."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

lib = torch.library.Library("pyrlhf", "DEF")


def define(
    schema: str,
    impl: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    key: str = "CompositeExplicitAutograd",
) -> Callable[..., Any]:
    """Defines ``pyrlhf::<schema>`` and returns it, ready to call.

    schema: ``"gae(Tensor rewards, ..., float gamma) -> (Tensor, Tensor)"``, arguments positional.
    impl: runs on real tensors, outputs must not alias inputs or each other; the place for checks of values.
    key: the dispatch key of impl, "CPU" for one that cannot serve other devices.
    fake: gives outputs of the right shape, dtype and device without data.
    backward(ctx, *output_grads) -> one gradient (or None) an input; setup_context(ctx, inputs, output) saves what it needs.
    """
    name = schema.split("(", 1)[0]
    lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    lib.impl(name, impl, key)
    torch.library.register_fake(f"pyrlhf::{name}", fake, lib=lib)
    if backward is not None:
        torch.library.register_autograd(f"pyrlhf::{name}", backward, setup_context=setup_context, lib=lib)
    overload: Callable[..., Any] = getattr(torch.ops.pyrlhf, name).default
    return overload


def eager_function(
    impl: Callable[..., Any], setup_context: Callable[..., Any], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """The same op without the dispatcher, for eager calls whose size does not hide 50 us: a plain autograd.Function.

    The functions are those of `define`. torch.compile cannot look inside, so callers choose by ``torch.compiler.is_compiling()``.
    """

    def forward(
        ctx: Any, *inputs: Any
    ) -> Any:  # with setup_context inside: as its own method torch binds signatures, 40 us
        output = impl(*inputs)
        setup_context(ctx, inputs, output)
        return output

    namespace = {
        "forward": staticmethod(forward),
        "backward": staticmethod(torch.autograd.function.once_differentiable(backward)),
    }
    function = type(impl.__name__.strip("_"), (torch.autograd.Function,), namespace)
    apply: Callable[..., Any] = function.apply  # type: ignore[attr-defined]

    def call(*inputs: Any) -> Any:  # 7 us less where no gradient is wanted
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
            return apply(*inputs)
        return impl(*inputs)

    return call
