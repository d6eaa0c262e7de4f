"""The correction bias of a router: how counts of routed tokens move it (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

Letters: E routed experts of a layer; layers may differ in it, and lie on different devices.
"""

import torch
from torch import Tensor


def summed_over_ranks(counts: list[Tensor], group=None) -> list[Tensor]:
    """A copy of each layer's `counts`, summed over the ranks of `group` in one exchange; nothing waits for a device.

    Args:
        counts: for each layer [E]; all of one dtype.
        group: process group; None is the default one, if there is one.

    Returns:
        for each layer [E], each a view of one tensor on the first layer's device.
    """
    if not counts:
        return []
    flat = torch.cat([layer.to(counts[0].device) for layer in counts])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(flat, group=group)
    return list(flat.split([layer.numel() for layer in counts]))


@torch.no_grad()
def move_biases(biases: list[Tensor], counts: list[Tensor], speed: float):
    """Move each bias towards balance, in place: b += speed · sign(mean - count).

    The comparison with the mean is exact, in integers: a count at the mean leaves its bias alone at any size.

    Args:
        biases: for each layer float32, E numbers of any shape.
        counts: for each layer [E], int64.
        speed: step of the bias.
    """
    by_width: dict[int, list[int]] = {}
    for layer, count in enumerate(counts):
        by_width.setdefault(count.numel(), []).append(layer)
    for width, layers in by_width.items():
        count_LE = torch.stack([counts[layer] for layer in layers])
        shortfall_LE = torch.sign(count_LE.sum(dim=-1, keepdim=True) - width * count_LE).float()
        targets = [biases[layer] for layer in layers]
        moves = [move.view(b.shape).to(b.device) for move, b in zip(shortfall_LE.unbind(0), targets, strict=True)]
        torch._foreach_add_(targets, moves, alpha=speed)
