"""Latents in float8_e4m3fn with one scale a token, as a GrowingCache of that `latent_dtype` holds them.

Letters as in attention.py: a token's latent c [C] and rotated key k [R]. What is cached is c8 [C] = c / scale in
float8, and behind the key, which stays as it is, COLUMNS more columns, of which the first four bytes are the scale in
float32: C + (R + 8) * 2 bytes a token in bfloat16, in rows of whole 16 bytes. The scale is the least power of two that
lets c8 end at 448, so c8 * scale is exact in the model's dtype, and only the rounding to float8 is an error: at most
one part in 16 of each number, or 2**-17 of the token's largest.
"""

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
COLUMNS = 8


def quantised(c: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """`c` [..., C] in float8, and `k` [..., R] with its token's scale behind, [..., R + 8].

    A token whose latent is not finite gets the scale NaN, and so stays what it was to whoever looks at it.
    """
    exact = c.float()
    largest = exact.abs().amax(dim=-1, keepdim=True)
    # 2^ceil(log2(largest / 448)): the exponent, one more if the mantissa is beyond that of 448 = 1.75 * 2^8
    exponent = ((largest.view(torch.int32) + 0x1FFFFF) >> 23) - 8
    scale = (exponent.clamp(min=1) << 23).view(torch.float32)
    limit = largest_of(c.dtype)
    c8 = (exact.clamp(-limit, limit) / scale).to(FLOAT8)
    scale = scale.where(largest.isfinite(), float("nan"))
    columns = k.new_zeros((*k.shape[:-1], COLUMNS))
    columns.view(torch.float32)[..., :1] = scale
    return c8, torch.cat((k, columns), dim=-1)


def dequantised(c8: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """c8 * scale [..., C] in the dtype of `values` [..., R + 8], and the key [..., R] in these."""
    R = values.shape[-1] - COLUMNS
    return c8.to(values.dtype).mul_(scales_of(values, R).unsqueeze(-1)), values[..., :R]


def scales_of(values: Tensor, R: int) -> Tensor:
    """The scales [...] float32 behind the keys of `values` [..., R + 8]; a view."""
    return values.view(torch.float32)[..., R * values.itemsize // 4]


def largest_of(dtype: torch.dtype) -> float:
    """The largest number of `dtype` that has a mantissa of float8's four bits."""
    return 61440.0 if dtype == torch.float16 else 1.875 * 2.0**127


def as_bytes(x: Tensor) -> Tensor:
    """`x`, or a view of float8 as uint8, for what PyTorch does to all dtypes but those."""
    return x.view(torch.uint8) if x.dtype == FLOAT8 else x
