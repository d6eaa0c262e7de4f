"""Programmatic dependent launch: on Hopper and later a kernel starts while the one before it on the stream still ends.

Chains of short kernels, as a decode step has them, lose a microsecond or two at each border without it. The rule that
keeps it right: a kernel calls `await_kernels` before it reads what another kernel has just written, or writes anything
itself; only weights may be loaded sooner. Since none lets the next one start before that, whatever ran before a
kernel's predecessor has ended when the kernel starts.

A kernel that fills nearly all multiprocessors for long keeps the next one back, with `await_kernels_alone`: blocks
that start early go where there is room, that is all to the few multiprocessors that it leaves idle, and stay there.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

try:  # inside `try`, or the Hub loader refuses the whole model where Triton is missing
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError as error:
    raise ImportError(
        "The fused kernels need Triton: pip install triton, or choose the eager implementations."
    ) from error


@triton.jit
def await_kernels(PDL: tl.constexpr):
    """Wait for the kernel before this one, if this one was started early, and let the next one start."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def await_kernels_alone(PDL: tl.constexpr):
    """Wait for the kernel before this one; the next one starts when this one has ended."""
    if PDL:
        gdc_wait()


def differentiable(
    operator: torch.library.CustomOpDef, keep: Callable[..., None], differentiate: Callable[..., tuple]
) -> Callable:
    """Register an operator's gradient, as `register_autograd` does; the result is called in the operator's stead.

    Eager calls that may want gradients then go through an autograd.Function around the operator: the dispatcher's own
    takes a quarter of a millisecond of the host for ten arguments.
    """
    operator.register_autograd(differentiate, setup_context=keep)

    def forward(ctx, *inputs):
        output = operator(*inputs)
        keep(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    function = type(repr(operator), (torch.autograd.Function,), methods)  # the name is what a profile shows

    def call(*inputs):
        plain = torch.compiler.is_compiling() or not torch.is_grad_enabled()
        return operator(*inputs) if plain else function.apply(*inputs)

    return call


def overlapping(x: Tensor) -> dict[str, bool]:
    """Options of the launch of a kernel with the parameter `PDL` that awaits others, on x's device."""
    return {"PDL": True, "launch_pdl": True} if x.is_cuda and _supported(x.device) else {"PDL": False}


def is_hopper(device: torch.device) -> bool:
    """Whether kernels in Gluon for Hopper run on the device."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


@contextlib.contextmanager
def optional_kernel(name: str, give_up: Callable[[], object], logger: logging.Logger) -> Iterator[None]:
    """Launch a kernel in Gluon, which is experimental: what its compiler raises is logged, and `give_up` called.

    Want of memory is raised on: PyTorch's, or Triton's, which loads kernels by itself.
    """
    try:
        yield
    except Exception as error:  # the compiler's, that is; whatever else fails, the next launch meets it, too
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            raise
        logger.debug("The kernel %r in Gluon does not compile with this Triton; it does without.", name, exc_info=True)
        give_up()


@functools.cache
def _supported(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9
