"""How kernels are launched: as operators that eager calls go past, early on Hopper, and in Gluon where it compiles.

Programmatic dependent launch: on Hopper and later a kernel starts while the one before it on the stream still ends.
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


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's, which kernels may call too, takes the host ten times as long."""
    return -(-a // b)


def next_power_of_2(x: int) -> int:
    """The least power of two from x on, for x > 0."""
    return 1 << (x - 1).bit_length()


class Operator:
    """A function as an operator of `torch.library`, on the device of its first argument, whichever is current.

    A call that autograd, compilers, transforms and dispatch modes have nothing to do with goes past PyTorch's
    dispatcher, which saves the host 20 to 40 us.

    Attributes:
        registered: what `torch.library.custom_op` made of the function.
    """

    def __init__(self, function: Callable, name: str, mutates_args: tuple[str, ...]):
        @functools.wraps(function)
        def run(first: Tensor, *rest):
            with torch.cuda.device_of(first):
                return function(first, *rest)

        namespace = function.__module__.replace(".", "_")  # two revisions of a checkpoint may share a process
        self.registered = torch.library.custom_op(f"{namespace}::{name}", run, mutates_args=mutates_args)
        self.register_fake = self.registered.register_fake
        self._run = None if mutates_args else run  # the dispatcher notes that an argument has changed

    def __call__(self, *inputs, **named):
        if torch.compiler.is_compiling() or self._run is None or named or not _plain(inputs):
            return self.registered(*inputs, **named)
        return self._run(*inputs)


def operator(name: str, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable], Operator]:
    """Make a function an `Operator` of that name, in a namespace of its module's."""
    return lambda function: Operator(function, name, mutates_args)


_VALUES = {int, float, bool, str, type(None)}
_TENSORS = {Tensor, torch.nn.Parameter}
# Without public names: how many modes watch what is dispatched, and what comes before it; whether torch.func
# transforms; whether a tensor is a batch of autograd's (`is_grads_batched`).
_MODES = getattr(torch._C, "_len_torch_dispatch_stack", None)
_EARLY_MODES = getattr(torch._ops, "_len_torch_dispatch_stack_pre_dispatch", None)
_TRANSFORMED = getattr(torch._C, "_are_functorch_transforms_active", None)
_BATCHED = getattr(torch._C._functorch, "is_legacy_batchedtensor", None)
_ASKS = all((_MODES, _EARLY_MODES, _TRANSFORMED, _BATCHED))


def _plain(inputs: tuple) -> bool:
    """Whether nothing but the values of these inputs, as they lie in memory, matters to a call."""
    if not _ASKS or _MODES() or _EARLY_MODES() or _TRANSFORMED() or torch.jit.is_tracing():
        return False
    wanted = torch.is_grad_enabled()
    for x in inputs:
        kind = type(x)
        if kind in _TENSORS:
            if (wanted and x.requires_grad) or x.is_meta or x.is_neg() or _BATCHED(x):
                return False
        elif kind not in _VALUES:
            return False
    return True


def differentiable(operator: Operator, keep: Callable[..., None], differentiate: Callable[..., tuple]) -> Callable:
    """Register an operator's gradient, as `register_autograd` does; the result is called in the operator's stead.

    Eager calls that may want gradients then go through an autograd.Function around the operator: the dispatcher's own
    takes a quarter of a millisecond of the host for ten arguments.
    """
    operator.registered.register_autograd(differentiate, setup_context=keep)

    def forward(ctx, *inputs):
        output = operator(*inputs)
        keep(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    function = type(repr(operator.registered), (torch.autograd.Function,), methods)  # what a profile shows

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
