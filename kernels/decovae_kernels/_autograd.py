"""One way to make a registered operator differentiable in eager mode, under torch.func and under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class _Last(torch.autograd.Function):
    """The first argument, as something that depends on the others and has no derivative with respect to them."""

    @staticmethod
    def forward(grad: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """Nothing is needed for a backward that only refuses."""

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, ...]:
        raise RuntimeError("the operators of decovae can be differentiated once, not twice")


def differentiable(
    operator: Any, save: Callable[[Any, tuple[Any, ...], Any], None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """Register `backward` for `operator` and return the function to call it by.

    A registered operator's own autograd is what torch.compile traces, but torch.func refuses it, and in eager mode it
    costs as much as a small latent's whole loss. So the call goes through a torch.autograd.Function there; torch.func
    asks for one with a separate `setup_context`, which is slower again.

    Args:
        operator: a `torch.library.custom_op`.
        save: (ctx, inputs, output) → None, keeps on `ctx` what `backward` needs.
        backward: (ctx, *grads) → one gradient or None for every input.
    """

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = operator(*inputs)
        save(ctx, inputs, output)
        return output

    def once(ctx: Any, *grads: torch.Tensor | None) -> Any:
        with torch.no_grad():
            found = backward(ctx, *grads)
        sources = [x for x in (*ctx.saved_tensors, *grads) if x is not None]
        return tuple(None if grad is None else _Last.apply(grad, *sources) for grad in found)

    name = operator._name.partition("::")[2]
    eager = type(
        name,
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )
    functional = type(
        name,
        (torch.autograd.Function,),
        {
            "forward": staticmethod(lambda *inputs: operator(*inputs)),
            "setup_context": staticmethod(save),
            "backward": staticmethod(once),
        },
    )
    operator.register_autograd(backward, setup_context=lambda ctx, inputs, output: save(ctx, inputs, output))

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return operator(*inputs)
        if torch._C._are_functorch_transforms_active():
            return functional.apply(*inputs)  # type: ignore[attr-defined]
        return eager.apply(*inputs)  # type: ignore[attr-defined]

    return call
