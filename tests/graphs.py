"""CUDA graphs in tests: the real ones on a GPU, and without one a stand-in that calls what was recorded."""

import torch
import torch.nn.functional as F

from lamoe import decode_graph, modeling_lamoe
from lamoe.attention import absorbed_attention, rotate_pairs
from lamoe.float8 import FLOAT8, as_bytes, dequantised, quantised

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
EXPERTS = "lamoe" if GPU else "grouped_mm"  # the interpreter takes long


class EagerGraph:
    """Replays by calling; what the recording returned is written in place, as a graph does."""

    def __init__(self, step):
        self.step, self.outputs = step, step()

    @torch.no_grad()
    def replay(self):
        for old, new in zip(self.outputs, self.step(), strict=True):
            if old is not None:
                old.copy_(new)


def watch_recordings(monkeypatch) -> list:
    """What `decode_graph.record` returns from now on, on a GPU by the real thing."""
    made, real = [], decode_graph.record

    def record(step, device):
        if GPU:
            made.append(real(step, device))
        else:
            graph = EagerGraph(step)
            made.append((graph, *graph.outputs))
        return made[-1]

    monkeypatch.setattr(decode_graph, "record", record)
    if not GPU:
        monkeypatch.setattr(decode_graph, "can_record", lambda device: True)
        monkeypatch.setattr(decode_graph, "_waits", lambda m: m.config._experts_implementation != EXPERTS)
        monkeypatch.setattr(modeling_lamoe, "fuses", lambda *arguments: False)  # test_kernels_step.py looks at these
    return made


def replace_kernels(monkeypatch):
    """PyTorch in place of a step's kernels where these would be interpreted, which takes long."""
    if GPU:
        return
    from lamoe import kernels_attention, kernels_step

    def latent_decode(q_HBTC, r_HBTR, c_BSC, k_BSR, lengths_B, seen_BS=None, *, scaling):
        T, S = q_HBTC.shape[2], c_BSC.shape[1]
        if c_BSC.dtype == FLOAT8:
            c_BSC, k_BSR = dequantised(c_BSC, k_BSR)
        limit = lengths_B.view(-1, 1, 1) - T + torch.arange(T).view(-1, 1)
        mask = torch.arange(S) <= limit
        if seen_BS is not None:
            mask &= F.pad(seen_BS.bool(), (0, S - seen_BS.shape[1])).unsqueeze(1)
        written = (torch.arange(S) < lengths_B.view(-1, 1)).unsqueeze(2)
        c, k = (x.where(written, 0.0) for x in (c_BSC, k_BSR))
        out, _ = absorbed_attention(q_HBTC.transpose(0, 1), r_HBTR.transpose(0, 1), c, k, mask.unsqueeze(1), scaling)
        return out.transpose(0, 1).contiguous(), None

    def write_latents(kv, norm, eps, q, cos, sin, lengths, c, k, interleaved):
        C, T = norm.shape[0], kv.shape[1]
        at = (lengths.view(-1, 1) - T + torch.arange(T)).long().unsqueeze(2)
        turned = rotate_pairs(torch.cat((q, kv[:, None, :, C:]), dim=1), cos, sin, interleaved)
        new = F.rms_norm(kv[..., :C], (C,), norm, eps), turned[:, -1]
        for part, states in zip((c, k), quantised(*new) if c.dtype == FLOAT8 else new, strict=True):
            as_bytes(part).scatter_(1, at.expand_as(states), as_bytes(states))
        return turned[:, :-1].transpose(0, 1).contiguous(), None

    monkeypatch.setattr(kernels_attention, "latent_decode", latent_decode)
    monkeypatch.setattr(kernels_step, "write_latents", write_latents)
