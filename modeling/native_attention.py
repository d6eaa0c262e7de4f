"""Lend the absorbed form to native classes of latent attention, through their method `expand_kv`.

Letters: B batch, T new tokens, S cached + new, H heads, C latent rank, P plain and R rotary width of a query-key head,
V value width. A class of Transformers that caches latents c [B, 1, S, C] and rotated keys k [B, 1, S, R] does so:

    query [B, H, T, P + R] = …; c, k = cache.update(…); key, value = self.expand_kv(c, k); attention(query, key, value)

For a step of few new tokens its forward runs as it stands, on a stand-in for the module: `expand_kv` gives c and k
back as they are, and the attention function that the forward finds in Transformers' registry attends over them.
Projections, rotary angles, scales, gates and the cache stay the class's own. All other calls are the class's own
altogether.
"""

import functools
import inspect
import sys
from collections.abc import Iterator
from types import MethodType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .attention import absorbed_attention
from .projections import unreadable_weight

try:
    from .kernels_attention import latent_decode, why_not
except ImportError as error:
    MISSING = f"Triton or a part of it is missing ({error.__cause__ or error})"
else:
    MISSING = None

NAME = "lamoe_latents"  # in Transformers' registry of attention functions
OWN = "LamoeAttention"  # absorbs by itself

logger = logging.get_logger(__name__)

# Arguments of attention functions that the absorbed form does not take: attention sinks are s_aux.
_FOREIGN = ("cache", "cu_seq_lens_q", "position_bias", "s_aux", "softcap")
_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All layers of latent attention, reachable or not, but for those of a Lamoe model."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "kv_b_proj", None), nn.Module) and type(module).__name__ != OWN:
            yield name, module


def lend(module: nn.Module) -> tuple[str, str]:
    """Let decode steps of a layer of latent attention be absorbed: the path that they take now, and why not a faster.

    "triton" and "absorbed" (eager) attend over the latents, "expanded" is the stock forward, and so is "not reached".
    """
    reason = _unreachable(module)
    if reason is not None:
        return "not reached", reason
    where = "_old_forward" if "_old_forward" in vars(module) else "forward"  # accelerate's hooks call the former
    setattr(module, where, functools.partial(_forward, module))
    weight = getattr(module.kv_b_proj, "weight", None)  # some quantised ones have none
    reason = _unreadable(module, weight)
    if reason is not None:
        return "expanded", f"{reason}, so its weight cannot be absorbed"
    reason = _no_kernel(module, weight.dtype, weight.device)
    return ("triton", "") if reason is None else ("absorbed", reason)


def take_back(module: nn.Module):
    """Undo `lend`."""
    if _is_ours(vars(module).get("_old_forward")):
        module._old_forward = MethodType(type(module).forward, module)
    if _is_ours(vars(module).get("forward")):
        del module.forward


def _is_ours(forward) -> bool:
    return isinstance(forward, functools.partial) and forward.func is _forward


def _unreachable(module: nn.Module) -> str | None:
    """Why the stand-in would not do for this layer; None if it does."""
    cls = type(module)
    if not hasattr(cls, "expand_kv"):
        return "its class has no expand_kv: what it caches is its own affair"
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    if code is None or not {"expand_kv", "_attn_implementation", "get_interface"} <= set(code.co_names):
        return "its forward does not call expand_kv and a function of Transformers' attention registry"
    constants = {name for value in code.co_consts for name in (value if isinstance(value, tuple) else (value,))}
    foreign = [name for name in _FOREIGN if name in constants]  # names of keyword arguments among them
    if foreign:
        return f"its attention takes {', '.join(foreign)}, which the absorbed form does not"
    missing = [name for name in ("config", *_SIZES) if not hasattr(module, name)]
    if missing:
        return f"it has no {', '.join(missing)}"
    if not _expands_as_expected(cls):
        return "its expand_kv does not make [k_nope; k_rot] and v of kv_b_proj, head by head"
    replaced = vars(module).get("_old_forward", vars(module).get("forward"))
    if not (replaced is None or _is_ours(replaced) or getattr(replaced, "__func__", None) is cls.forward):
        return "something else has replaced its forward"
    return None


@functools.cache
def _expands_as_expected(cls: type) -> bool:
    """Try the class's expand_kv with small widths that all differ: the layout of kv_b_proj is known by its result."""
    B, S, H, C, P, R, V = 2, 3, 2, 6, 5, 4, 7
    numbers = torch.arange(1000, dtype=torch.float64, device="cpu").sin()
    weight_HXC, c, k = numbers[: H * (P + V) * C].view(H, P + V, C), numbers[200 : 200 + B * S * C], numbers[400:424]
    c, k = c.view(B, 1, S, C), k.view(B, 1, S, R)
    projection = functools.partial(F.linear, weight=weight_HXC.flatten(0, 1))
    sizes = dict(zip(_SIZES, (C, P, R, V), strict=True))
    try:
        key, value = cls.expand_kv(SimpleNamespace(kv_b_proj=projection, num_heads=H, **sizes), c, k)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    plain, expected = (c @ weight_HXC.mT).split((P, V), dim=-1)
    expected_key = torch.cat((plain, k.expand(-1, H, -1, -1)), dim=-1)
    pairs = ((key, expected_key), (value, expected))
    return all(got.shape == want.shape and torch.allclose(got, want) for got, want in pairs)


def _unreadable(module: nn.Module, x: Tensor | None) -> str | None:
    reason = unreadable_weight(module.kv_b_proj, x)
    if reason is None and module.kv_b_proj.bias is not None:
        reason = "has a bias"
    return None if reason is None else f"kv_b_proj {reason}"


def _no_kernel(module: nn.Module, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the Triton kernel does not run a step of one token; None if it does."""
    if module.config._attn_implementation == "eager":
        return "attn_implementation='eager' returns the weights, and the decode kernel does not"
    if MISSING is not None:
        return MISSING
    return why_not(1, module.kv_lora_rank, module.qk_rope_head_dim, dtype, device)


class _LatentConfig:
    """A configuration, but for the name of the attention function."""

    _attn_implementation = NAME

    def __init__(self, config):
        self._config = config

    def __getattr__(self, name: str):
        return getattr(self._config, name)


class _LatentModule:
    """The stand-in for a layer during one call: the layer, but for `expand_kv` and its configuration."""

    def __init__(self, module: nn.Module):
        self.module, self.config = module, _LatentConfig(module.config)
        self.latents: tuple[Tensor, Tensor] | None = None

    def __getattr__(self, name: str):
        return getattr(self.module, name)

    def expand_kv(self, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        """Both as they are: [B, 1, S, C] and [B, 1, S, R]."""
        self.latents = (kv_nope, k_rot)
        return self.latents


def _forward(module: nn.Module, *args, **kwargs):
    """What the class's forward promises."""
    absorbed = _absorbs(module, args, kwargs)
    return type(module).forward(_LatentModule(module) if absorbed else module, *args, **kwargs)


def _absorbs(module: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether this call is a step of few new tokens over a cache that the absorbed form takes."""
    if torch.is_grad_enabled() or module.training:
        return False
    hidden_states = args[0] if args else kwargs.get("hidden_states")
    if kwargs.get("past_key_values") is None or not isinstance(hidden_states, Tensor):
        return False
    if kwargs.get("is_causal") is False or any(kwargs.get(name) is not None for name in _FOREIGN):
        return False
    T, mask = hidden_states.shape[1], kwargs.get("attention_mask")
    if _absorb_limit(module) < T or torch.is_autocast_enabled(hidden_states.device.type):
        return False
    if not isinstance(mask, Tensor | None):
        return False  # flex attention's
    whole = mask is not None and mask.dim() == 4
    if not whole and (T > 1 or getattr(module, "sliding_window", None) is not None):
        return False  # what is hidden is the attention function's own business
    if T > 1 and mask.shape[-1] == T:
        return False  # nothing is cached
    reason = _unreadable(module, hidden_states)
    if reason is not None and not torch.compiler.is_compiling():
        logger.warning_once(
            f"{type(module).__name__}'s {reason}, so its weight cannot be absorbed: each step expands the whole "
            "context. Merge the adapter or dequantise kv_b_proj to decode without expansion."
        )
    return reason is None


def _absorb_limit(module: nn.Module) -> int:
    """The most new tokens for which absorbing is cheaper, C(P + V) / (2C - P - V); any if C is small."""
    C, expanded = module.kv_lora_rank, module.qk_nope_head_dim + module.v_head_dim
    return C * expanded // (2 * C - expanded) if expanded < 2 * C else sys.maxsize


def attend_over_latents(
    module: _LatentModule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    indices: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of Transformers' registry, for a stand-in that `lend` has made.

    Args:
        query: [B, H, T, P + R].
        key, value: latents [B, 1, S, C] and rotated keys [B, 1, S, R], as `expand_kv` gave them.
        attention_mask: [B or 1, 1, T, S], boolean (True is seen) or additive, or [B, S] or None if T = 1.
        dropout: 0, since training takes the stock forward.
        indices: [B, T, n], the only keys that sparse attention lets a token see.

    Returns:
        [B, T, H, V], and the weights [B, H, T, S] where the stock form returns them, for attn_implementation="eager".

    Raises:
        ValueError: the module is not such a stand-in.
        RuntimeError: its class's forward does something else with keys and values than to attend over them.
    """
    if not isinstance(module, _LatentModule):
        raise ValueError(
            f"attn_implementation={NAME!r} is for lamoe.boost alone; load the model with another one and call "
            "lamoe.boost(model)."
        )
    foreign = [name for name in _FOREIGN if kwargs.get(name) is not None]
    if foreign or module.latents is None or key is not module.latents[0] or value is not module.latents[1]:
        why = f"it wants {', '.join(foreign)}" if foreign else "it changes what expand_kv returns"
        raise RuntimeError(
            f"{type(module.module).__name__} cannot attend over latents: {why}. Call lamoe.unboost(model), and report "
            "the version of Transformers."
        )
    layer = module.module
    B, _, T, _ = query.shape
    c_BSC, k_BSR = key.squeeze(1), value.squeeze(1).to(key.dtype)
    S, C = c_BSC.shape[1:]
    with_weights = layer.config._attn_implementation == "eager"
    mask = attention_mask
    if mask is not None:
        mask = (mask[:, None, None].bool() if mask.dim() == 2 else mask)[..., :S]
    if indices is not None and indices.shape[-1] < S:
        if T == 1 and not with_weights:
            c_BSC, k_BSR, mask = _selected(c_BSC, k_BSR, mask, indices[:, 0].long())
        else:
            chosen = torch.zeros(B, T, S, dtype=torch.bool, device=query.device)
            mask = _hide(mask, chosen.scatter_(-1, indices.long(), True).unsqueeze(1))

    widths = (layer.qk_nope_head_dim, layer.qk_rope_head_dim)
    q_HBTP, r_HBTR = query.transpose(0, 1).split(widths, dim=-1)
    weight = layer.kv_b_proj.weight.to(query.dtype).view(-1, layer.qk_nope_head_dim + layer.v_head_dim, C)
    up_key_HPC, up_value_HVC = weight.split((layer.qk_nope_head_dim, layer.v_head_dim), dim=1)
    # Heads come first, so that both are read in place, as strided views.
    q_HBTC = torch.bmm(q_HBTP.reshape(len(weight), B * T, -1), up_key_HPC).view(-1, B, T, C)
    if _takes_kernel(layer, q_HBTC, mask):
        lengths, seen = _seen_keys(mask, B, c_BSC)
        out, _ = latent_decode(q_HBTC, r_HBTR, c_BSC, k_BSR, lengths, seen, scaling=scaling)
        weights = None
    else:
        q_BHTC, r_BHTR = q_HBTC.transpose(0, 1), r_HBTR.transpose(0, 1)
        out, weights = absorbed_attention(q_BHTC, r_BHTR, c_BSC, k_BSR, mask, scaling, dropout, with_weights)
        out = out.transpose(0, 1)
    out_HXV = torch.bmm(out.reshape(len(weight), B * T, C), up_value_HVC.mT)
    return out_HXV.view(-1, B, T, layer.v_head_dim).permute(1, 2, 0, 3).contiguous(), weights


def _takes_kernel(layer: nn.Module, q_HBTC: Tensor, mask: Tensor | None) -> bool:
    """Whether the Triton kernel does it: only of one new token is it known which keys of the cache it sees."""
    if q_HBTC.shape[2] > 1 or (mask is not None and mask.is_floating_point()):
        return False
    return _no_kernel(layer, q_HBTC.dtype, q_HBTC.device) is None


def _seen_keys(mask: Tensor | None, B: int, c_BSC: Tensor) -> tuple[Tensor, Tensor | None]:
    """For one new token: keys up to the last that is seen [B] int32, and which of them are seen [B, S] int32."""
    S = c_BSC.shape[1]
    if mask is None:
        return torch.full((B,), S, dtype=torch.int32, device=c_BSC.device), None
    seen = mask[:, 0, 0].to(torch.int32).expand(B, -1)
    ends = torch.arange(1, S + 1, dtype=torch.int32, device=seen.device)
    return (seen * ends).amax(dim=-1), seen.contiguous()


def _hide(mask: Tensor | None, chosen: Tensor) -> Tensor:
    """The mask without the keys that were not chosen [B, 1, T, S]."""
    if mask is None:
        return chosen
    if mask.dtype == torch.bool:
        return mask & chosen
    return mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)


def _selected(c_BSC, k_BSR, mask: Tensor | None, index_Bn: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Latents, keys and mask [B, 1, 1, n] of the chosen keys alone: n of them are read, however long the context."""
    c, k = (x.gather(1, index_Bn.unsqueeze(-1).expand(-1, -1, x.shape[-1])) for x in (c_BSC, k_BSR))
    if mask is not None:
        mask = mask.expand(len(index_Bn), -1, -1, -1).gather(-1, index_Bn[:, None, None])
    return c, k, mask


ALL_ATTENTION_FUNCTIONS.register(NAME, attend_over_latents)
