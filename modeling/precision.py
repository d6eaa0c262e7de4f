"""Modules that stay in float32 when the model around them does not."""

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


class KeepsFloat32:
    """Mixin of modules whose own float32 parameters and buffers stay so under `.to(bfloat16)` and `.half()`.

    To stand before `nn.Module` in a class's bases.
    """

    def _apply(self, fn, recurse=True):
        def exact(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return tensor.to(changed.device) if tensor.dtype == torch.float32 and changed.dtype in _HALF else changed

        return super()._apply(exact, recurse)
