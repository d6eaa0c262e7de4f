"""Which of PyTorch's attention kernels runs the expanded form under "sdpa", and how padding and packing reach it.

On a GPU a mask is dear: at unequal widths of keys and values (192/128) cuDNN, PyTorch's first choice on Hopper,
returns NaN in dQ under an explicit one, and the memory-efficient kernel, the next that takes one, trains 5 to 13 times
slower than causal attention. So padding and packing are told by where documents begin and end, and each is plain
causal attention. Elsewhere, and under other masks, all is as Transformers has it, but for cuDNN.
Letters: B batch, T tokens a row, M tokens of all documents, H heads, P + R width of a query and key, V of a value.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Mean tokens of a document from which one causal call for each is taken to be faster than one FlashAttention call for
# all. H100, 16 heads, causal, forward + backward: cuDNN 340 TFLOP/s at 4k tokens, FlashAttention with padded values
# 171 to 243 at any. `lamoe benchmark --suite documents` measures both ways at document lengths around it.
LONG_DOCUMENT = 2048
FEW_DOCUMENTS = 16  # one causal call for each beats a dense mask at any length
FLASH_WIDTH = 256  # the widest head that FlashAttention trains
_HALF = (torch.float16, torch.bfloat16)


class Case(NamedTuple):
    """What the choice depends on.

    device: "cuda", "cpu", …; capability: (major, minor) of an NVIDIA GPU, None of anything else.
    widths: P + R and V. dropout: whether weights are dropped.
    mask: "none"; "right", padding behind one document a row; "documents", any other rows of whole documents;
    "other", whatever else hides keys. documents, tokens: how many there are in the batch.
    """

    device: str
    capability: tuple[int, int] | None
    dtype: torch.dtype
    widths: tuple[int, int]
    dropout: bool = False
    mask: str = "none"
    documents: int = 1
    tokens: int = 1


def choose_attention(case: Case) -> str:
    """The way that this attention takes.

    Returns:
        "torch": Transformers' function and PyTorch's choice, with the mask as it is.
        "causal": the same without a mask; what stands behind a row's document attends to it, and nobody looks.
        "padded": FlashAttention with values padded to the keys' width.
        "each": "causal" for one document after another.
        "varlen": FlashAttention over all documents at once, values padded.
        "masked": PyTorch's choice under a dense mask, with gradients but for cuDNN; slow.
    """
    if case.device != "cuda" or case.capability is None:
        return "torch"
    unequal = case.widths[0] != case.widths[1]
    flash = case.dtype in _HALF and case.widths[1] <= case.widths[0] <= FLASH_WIDTH
    cudnn = case.dtype in _HALF and case.capability[0] in (9, 10)
    if case.mask in ("none", "right"):
        if unequal and flash and not cudnn:
            return "padded"  # else the memory-efficient kernel would run
        return "torch" if case.mask == "none" else "causal"
    if case.mask == "documents":
        has_varlen = find_spec("torch.nn.attention.varlen") is not None
        mean = case.tokens / max(case.documents, 1)
        if flash and has_varlen and not case.dropout and not (cudnn and mean >= LONG_DOCUMENT):
            return "varlen"
        if mean >= LONG_DOCUMENT or case.documents <= FEW_DOCUMENTS:
            return "each"
    return "masked" if unequal else "torch"


@dataclass(frozen=True)
class Documents:
    """Where the documents of a batch [B, T] lie: what the attention gets in place of a mask.

    spans: (row, first, end) of each, in order; what no span covers is padding. way: of `choose_attention`.
    """

    spans: tuple[tuple[int, int, int], ...]
    batch: int
    length: int
    way: str = "each"
    _on_device: dict = field(default_factory=dict, compare=False, repr=False)

    @property
    def tokens(self) -> int:
        """Tokens that are no padding."""
        return sum(end - first for _, first, end in self.spans)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max((end - first for _, first, end in self.spans), default=0)

    @property
    def pattern(self) -> str:
        """ "none", "right" or "documents", as `Case.mask` has it."""
        if any(first for _, first, _ in self.spans):
            return "documents"
        return "none" if self.tokens == self.batch * self.length else "right"

    def on(self, device: torch.device) -> tuple[Tensor | None, Tensor]:
        """Positions of all documents' tokens in the flattened batch [M], None if that is all of it; ends [1 + n]."""
        if device not in self._on_device:
            index = None
            if self.tokens < self.batch * self.length:
                starts = [(row * self.length + first, row * self.length + end) for row, first, end in self.spans]
                index = torch.cat([torch.arange(*start) for start in starts]).to(device)
            lengths = torch.tensor([0] + [end - first for _, first, end in self.spans])
            self._on_device[device] = index, lengths.cumsum(0).to(torch.int32).to(device)
        return self._on_device[device]


def documents_of(mask_BT: Tensor | None, position_ids: Tensor | None, batch: int, length: int) -> Documents | None:
    """The documents that a padding mask [B, T], or else positions [B or 1, T] that start anew, tell of.

    Looks at them on the host, so it waits for a GPU. As in Transformers, a mask outweighs what positions tell.

    Returns:
        None if a row of the mask has a gap, or holds no token at all.
    """
    if mask_BT is not None:
        real = F.pad(mask_BT.cpu().bool().to(torch.int8), (1, 1))
        edges = real.diff(dim=1)
        rows, firsts = (edges == 1).nonzero(as_tuple=True)
        ends = (edges == -1).nonzero(as_tuple=True)[1]
        if rows.tolist() != list(range(batch)):
            return None
        return Documents(tuple(zip(rows.tolist(), firsts.tolist(), ends.tolist(), strict=True)), batch, length)
    if position_ids is None:
        return Documents(tuple((row, 0, length) for row in range(batch)), batch, length)
    jumps = F.pad(position_ids.cpu().expand(batch, -1).diff(dim=1) != 1, (1, 0), value=True)
    rows, firsts = jumps.nonzero(as_tuple=True)
    spans = zip(rows.tolist(), firsts.tolist(), strict=True)
    ends = [*firsts.tolist()[1:], 0]
    return Documents(
        tuple((row, first, end or length) for (row, first), end in zip(spans, ends, strict=True)), batch, length
    )


def documents_or_mask(
    config, x_BTD: Tensor, mask, position_ids, past, form: str | None, kwargs: dict, masked: bool = False
):
    """What the attention of this forward takes for a mask: `find_documents`, or else what Transformers makes.

    Args:
        masked: leave the documents out.
    """
    found = None if masked else find_documents(config, x_BTD, mask, position_ids, past, form, kwargs)
    if found is not None:
        return found
    return create_causal_mask(
        config=config, inputs_embeds=x_BTD, attention_mask=mask, past_key_values=past, position_ids=position_ids
    )


def find_documents(
    config, x_BTD: Tensor, mask, position_ids, past, form: str | None, kwargs: dict
) -> Documents | None:
    """The documents of this forward if its attention does without a mask that it would have; None if not.

    Args:
        mask, position_ids, past, form: as `LamoeModel.forward` got them.
    """
    if not _may_choose(config, x_BTD, past, form or config.mla_form, kwargs):
        return None
    if mask is None and position_ids is None:
        return None  # causal, and nothing to look for
    B, T, _ = x_BTD.shape
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != (B, T)):
        found = None
    else:
        found = documents_of(mask, position_ids, B, T)
    seen = {"mask": "other"}
    if found is not None:
        seen = {"mask": found.pattern, "documents": len(found.spans), "tokens": found.tokens}
        if seen["mask"] == "none" and mask is None:
            return None
    way = choose_attention(case_of(config, x_BTD)._replace(**seen))
    if way == "masked" and torch.is_grad_enabled():
        warn_of_mask(case_of(config, x_BTD)._replace(**seen))
    if found is None or way in ("torch", "masked"):
        return None
    return Documents(found.spans, B, T, way)


def _may_choose(config, x_BTD: Tensor, past, form: str, kwargs: dict) -> bool:
    """Whether it is the expanded form that runs, over new tokens alone, by "sdpa", and causally."""
    if not on_gpu(x_BTD) or config._attn_implementation != "sdpa" or form == "absorbed":
        return False
    if past is not None or "cache" in kwargs:
        return False
    if kwargs.get("is_causal") is False or not getattr(config, "is_causal", True):
        return False
    if kwargs.get("output_attentions", config.output_attentions) or torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def on_gpu(x: Tensor) -> bool:
    """Whether `x` lies where masks are dear."""
    return x.is_cuda


def case_of(config, x_BTD: Tensor) -> Case:
    """The case of this model on this device, without a mask; of what autocast will compute in."""
    device, dtype = x_BTD.device, x_BTD.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    dropout = bool(config.attention_dropout) and torch.is_grad_enabled()
    return Case(device.type, _capability(device), dtype, (config.qk_head_dim, config.v_head_dim), dropout)


def _capability(device: torch.device) -> tuple[int, int] | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def warn_of_mask(case: Case):
    """Say once why attention is slow here, and what to do."""
    if case.mask == "other":
        why, out = (
            "it hides more than padding",
            (
                "give a mask [B, T] of whole documents, or none and position_ids that start anew, or choose "
                "attn_implementation='flex_attention'"
            ),
        )
    elif case.dropout or case.dtype not in _HALF:
        why = "attention_dropout is not 0" if case.dropout else f"the kernels for documents do not run in {case.dtype}"
        out = (
            f"{'set attention_dropout=0' if case.dropout else 'compute in bfloat16'}, or pack fewer, longer documents"
        )
    else:
        why, out = "no kernel here takes documents of these widths", "pack fewer, longer documents"
    logger.warning_once(
        "Attention runs under a dense mask, on kernels that train several times slower than causal attention, since "
        f"{why}. To be faster: {out}."
    )


def sdpa_attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask, dropout=0.0, scaling=None, **kwargs
):
    """Transformers' "sdpa" on the kernels of `choose_attention`.

    Args:
        query, key: [B, H, T or S, P + R]; value: [B, H, S, V].
        attention_mask: a dense mask, None, or `Documents` of the batch.

    Returns:
        [B, T, H, V], zero at padding where documents are taken by themselves, and None.
    """
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    plain = {"dropout": dropout, "scaling": scaling, **kwargs}
    if isinstance(attention_mask, Documents):
        if attention_mask.way in ("each", "varlen"):
            return _by_document(query, key, value, attention_mask, dropout, scaling), None
        way, attention_mask = attention_mask.way, None
    else:
        widths = (query.shape[-1], value.shape[-1])
        mask = "none" if attention_mask is None else "other"
        way = choose_attention(
            Case(query.device.type, _capability(query.device), query.dtype, widths, dropout > 0, mask)
        )
    if way == "padded" and query.shape[2] == key.shape[2]:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out, _ = attend(module, query, key, _widened(value, key.shape[-1]), None, **plain)
        return out[..., : value.shape[-1]], None
    without_cudnn = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    with without_cudnn if way == "masked" and torch.is_grad_enabled() else nullcontext():
        return attend(module, query, key, value, attention_mask, **plain)


def _by_document(query, key, value, documents: Documents, dropout: float, scaling: float | None) -> Tensor:
    """[B, T, H, V]; each document by itself, zero where there is none."""
    B, H, T, _ = query.shape
    index, ends = documents.on(query.device)
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]  # [B·T, H, width]
    if index is not None:
        rows = [x.index_select(0, index) for x in rows]
    q_MHW, k_MHW, v_MHV = rows
    if documents.way == "varlen":
        width = -(-q_MHW.shape[-1] // 8) * 8
        q_MHW, k_MHW, wide = (_widened(x, width) for x in rows)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        out_MHV = varlen_attention()(
            q_MHW, k_MHW, wide, ends, ends, documents.longest, documents.longest, scale=scaling, window_size=(-1, 0)
        )[..., : value.shape[-1]]
    else:
        lengths = [end - first for _, first, end in documents.spans]
        out_MHV = torch.cat(
            [
                F.scaled_dot_product_attention(
                    *(x.transpose(0, 1).unsqueeze(0) for x in parts), dropout_p=dropout, is_causal=True, scale=scaling
                )[0].transpose(0, 1)
                for parts in zip(*(x.split(lengths) for x in (q_MHW, k_MHW, v_MHV)), strict=True)
            ]
        )
    if index is not None:
        out_MHV = torch.zeros_like(out_MHV[:1]).expand(B * T, -1, -1).index_copy(0, index, out_MHV)
    return out_MHV.unflatten(0, (B, T))


def varlen_attention():
    """PyTorch's FlashAttention over documents beside each other; its import registers operators."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def _widened(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x
