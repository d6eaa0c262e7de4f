"""Next-token loss of logits that are held: without a float32 copy of them, and without their log-softmax.

Transformers' loss holds both: at a vocabulary of 102,400 that is 800 kB a token beside the 200 kB of the logits, more
than ten decoder layers of V2-Lite keep. Letters: X targets, W vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    from .kernels_loss import losses, losses_gradient
except ImportError:
    losses = losses_gradient = None  # and neither is called

CHUNK = 2**26  # logits that are in float32 at once: 256 MiB


def logits_loss(
    logits: Tensor,
    labels: Tensor,
    num_items_in_batch=None,
    shift_labels: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Transformers' causal-LM loss of half-precision `logits` [B, T, W]: float32, equal up to the order of its sum.

    Args:
        logits: differentiable, once; the gradient has its dtype, as there.
        labels: [B, T], shifted here; or `shift_labels` that are shifted already; `ignore_index` is no target.
        num_items_in_batch: what the sum is divided by; None is the number of targets.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target_X = shift_labels.reshape(-1).to(logits.device).contiguous()  # of one row, it may be a view with gaps
    total = _CrossEntropySum.apply(logits.reshape(-1, logits.shape[-1]), target_X, ignore_index)
    if num_items_in_batch is None:
        return total / target_X.ne(ignore_index).sum()
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_XW, target_X, ignore_index):
        ctx.ignore_index = ignore_index
        if _fused(logits_XW):
            loss_X, mass_X = losses(logits_XW, target_X, ignore_index)
            ctx.save_for_backward(logits_XW, target_X, mass_X)
            return loss_X.sum()
        total, masses = logits_XW.new_zeros((), dtype=torch.float32), []
        for part, target in _chunks(logits_XW, target_X):
            exact, real = part.float(), target.ne(ignore_index)
            masses.append(exact.logsumexp(dim=-1))
            chosen = exact.gather(1, target.masked_fill(~real, 0).unsqueeze(1)).squeeze(1)
            total = total + (masses[-1] - chosen).masked_fill(~real, 0.0).sum()
        ctx.save_for_backward(logits_XW, target_X, *masses)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal):
        logits_XW, target_X, *masses = ctx.saved_tensors
        if _fused(logits_XW):
            return losses_gradient(dtotal, logits_XW, target_X, *masses, ctx.ignore_index), None, None
        dlogits = torch.empty_like(logits_XW)
        pieces = dlogits.split(_rows(logits_XW))
        for piece, (part, target), mass in zip(pieces, _chunks(logits_XW, target_X), masses, strict=True):
            real = target.ne(ctx.ignore_index).unsqueeze(1)
            exact = part.float().sub_(mass.unsqueeze(1)).exp_()
            exact.scatter_add_(1, target.unsqueeze(1).masked_fill(~real, 0), exact.new_full(real.shape, -1.0))
            piece.copy_(exact.mul_(dtotal).masked_fill_(~real, 0.0))
        return dlogits, None, None


def _fused(logits_XW: Tensor) -> bool:
    """Whether the kernels do it, in two passes over the logits."""
    return losses is not None and logits_XW.is_cuda and logits_XW.is_contiguous()


def _rows(logits_XW: Tensor) -> int:
    return max(1, CHUNK // logits_XW.shape[-1])


def _chunks(logits_XW: Tensor, target_X: Tensor):
    rows = _rows(logits_XW)
    return zip(logits_XW.split(rows), target_X.split(rows), strict=True)
