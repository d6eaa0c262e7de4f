"""Every kernel compiles ahead of time, without a GPU, for the devices we name: no spills, and shared memory that fits.

Run as a script, this file compiles the kernels of one target and prints what they use: see `compile_all`.
"""

import ast
import contextlib
import importlib
import io
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(path.stem for path in (ROOT / "modeling").glob("kernels_*.py"))
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # that one block can have
# Bytes of stack. 64 rows of sums of 512 columns are all the registers that 8 warps have; sm_100 was never timed.
# The seesaw's are addresses, stored before its loop: its warpgroups share the registers with the warp that fetches.
SPILLS = {
    "_decode_kernel": 720, "_rows_kernel": 24, "_values_kernel": 16, "_wide_kernel": 8, "_seesaw_kernel": 200,
    "_hidden_kernel": 8,
}  # fmt: skip
ONLY = dict.fromkeys(
    ("kernels_wide", "kernels_up", "kernels_hidden", "kernels_weight"), "sm_90"
)  # whose kernels are for one target
PRODUCTS = ("_decode_kernel", "_rows_kernel", "_weight_gradient_kernel", "_swapped_up_kernel", "_swapped_down_kernel")


def launched_kernels(target: str) -> set[str]:
    """Names of the Triton functions that modeling/kernels_*.py launches on a target, as in `name[grid](...)`."""
    names = set()
    for module in (module for module in MODULES if ONLY.get(module, target) == target):
        tree = ast.parse((ROOT / "modeling" / f"{module}.py").read_text())
        nodes = list(ast.walk(tree))
        jitted = {
            node.name
            for node in nodes
            if isinstance(node, ast.FunctionDef)
            and any(re.match(r"(triton|gluon)\.jit", ast.unparse(d)) for d in node.decorator_list)
        }
        launches = (n.func.value for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Subscript))
        names |= jitted & {ast.unparse(launch) for launch in launches}
    return names


@pytest.mark.parametrize("target", SHARED_KIB)
def test_every_kernel_compiles_and_fits(target, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, __file__, target], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    compiled = [json.loads(line) for line in run.stdout.splitlines()]
    assert {kernel["name"] for kernel in compiled} == launched_kernels(target)
    spilling = [kernel for kernel in compiled if kernel["spills"] > SPILLS.get(kernel["name"], 0)]
    too_big = [kernel for kernel in compiled if kernel["shared"] > 1024 * SHARED_KIB[target]]
    assert not spilling and not too_big, "\n".join(map(str, [*spilling, *too_big]))
    if target == "sm_90":
        slow = [k for k in compiled if k["name"] in PRODUCTS and "16" in k["dtype"] and not k["wgmma"]]
        assert not slow, "\n".join(map(str, slow))
        serialized = [kernel for kernel in compiled if kernel["serialized"]]
        assert not serialized, "\n".join(map(str, serialized))


def usage(compiled) -> dict:
    """Spilt registers or bytes of stack, shared memory and tensor-core instructions of a compiled kernel."""
    found = {"shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps}
    if "amdgcn" in compiled.asm:
        (spills,) = re.findall(r"\.vgpr_spill_count: *(\d+)", compiled.asm["amdgcn"])
        return {**found, "spills": int(spills), "wgmma": 0}
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    spills = re.findall(r"\b(?:STACK|LOCAL):(\d+)", text)
    assert len(spills) == 2
    return {**found, "spills": sum(map(int, spills)), "wgmma": compiled.asm["ptx"].count("wgmma.mma_async")}


def compile_all(name: str):
    """Compile for the target `name` what every public function launches, and print a line of JSON for each kernel.

    The functions run on CPU tensors; in place of a launch, Triton compiles for a driver that only names its target.
    """
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    hip = name.startswith("gfx")
    target = GPUTarget("hip", name, 64) if hip else GPUTarget("cuda", int(name[3:]), 32)

    class Driver:
        """As much of a driver as compiling needs."""

        get_current_target = staticmethod(lambda: target)
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

    driver.set_active(Driver())
    run, seen, context = JITFunction.run, set(), {}

    def compile_only(self, *arguments, grid, warmup, **options):
        start, log = time.perf_counter(), io.StringIO()
        with contextlib.redirect_stdout(log):  # ptxas warns there
            compiled = run(self, *arguments, grid=grid, warmup=True, **options)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            found = {"name": self.fn.__name__, **context, **usage(compiled)}
            found["serialized"] = "instructions are serialized" in log.getvalue()
            print(json.dumps({**found, "seconds": round(time.perf_counter() - start, 1)}), flush=True)
        return compiled

    JITFunction.run = compile_only
    triton.knobs.nvidia.dump_ptxas_log = True
    package = types.ModuleType("lamoe")  # the kernels alone: they need no Transformers, which takes long to import
    package.__path__ = [str(ROOT / "modeling")]
    sys.modules["lamoe"] = package
    modules = {module: importlib.import_module(f"lamoe.{module}") for module in MODULES}
    tiles, moe = modules["kernels_tiles"], modules["kernels_moe"]

    def device(x):
        if x.dtype == torch.float32:
            return tiles.FLOAT32
        return tiles.CDNA if hip else tiles.TABLE[max(key for key in tiles.TABLE if key <= target.arch)]

    tiles._device = device
    early = {"PDL": True, "launch_pdl": True} if not hip and target.arch >= 90 else {"PDL": False}
    for module in modules.values():
        if hasattr(module, "has_tma"):
            module.has_tma = lambda x: not hip and target.arch >= 90
        if hasattr(module, "multiprocessors"):
            module.multiprocessors = lambda x: 132
        if hasattr(module, "overlapping"):
            module.overlapping = lambda x: early
        if hasattr(module, "converts_float8"):
            module.converts_float8 = lambda x: not hip and target.arch >= 89
            module.has_ptx = lambda x: not hip

    E, K = 64, 8

    def experts(dtype, N, *, D=2048, F=1408, train=False, frozen=False, **options):
        x, shared = (torch.empty(N, D, dtype=dtype) for _ in range(2))
        weights = [torch.empty(shape, dtype=dtype) for shape in ((E, 2 * F, D), (E, D, F))]
        scales = torch.empty(N, K)
        for tensor in (x, scales, shared):
            tensor.requires_grad_(train)
        for tensor in weights:
            tensor.requires_grad_(train and not frozen)
            tensor.grad = torch.empty_like(tensor) if options.get("accumulate") else None
        index = torch.zeros(N, K, dtype=torch.int64)
        out = moe.fused_experts(x, index, scales, *weights, shared=shared, **options)
        if train:
            out.backward(out.detach())

    def with_shared(dtype, D=2048, F=1408, S=2816):
        shapes = (1, D), (E, 2 * F, D), (E, D, F), (S, D), (S, D), (D, S)
        x, gate_up, down, *shared = (torch.empty(shape, dtype=dtype) for shape in shapes)
        with torch.no_grad():
            moe.few_experts(x, torch.zeros(1, K, dtype=torch.int64), torch.ones(1, K), gate_up, down, shared, "silu")

    def grouped(dtype, N=4096, D=2048, F=1408):
        x, scales, bias = torch.empty(N, D, dtype=dtype), torch.empty(N, K), torch.empty(E, F, dtype=dtype)
        leaves = [t.requires_grad_() for t in (x, scales, bias, torch.empty(E, D, F, dtype=dtype))]
        rows = moe.GroupedRows(x, torch.zeros(N, K, dtype=torch.int64), E)
        out = rows.sum(rows.linear(x, leaves[3], bias, tokens=True, transposed=True), scales)
        torch.autograd.grad(out, leaves, out.detach())

    # the newest devices' tensor cores take both halves alike: one target compiles the second
    for dtype in (
        (torch.bfloat16, torch.float32, torch.float16) if name == "sm_90" else (torch.bfloat16, torch.float32)
    ):
        classes, few = device(torch.empty(0, dtype=dtype))
        context.update(dtype=str(dtype)[6:], case="few rows")
        experts(dtype, 1)
        with_shared(dtype)
        for way in few.swapped if dtype == torch.bfloat16 else few.swapped[:1]:
            D, F = (2048, 1408) if way.size == 0 else (4096, 8192)
            experts(dtype, way.rows * E // K, D=D, F=F)
        # neither another group of row tiles nor a kernel in Gluon in its place makes another kernel
        classes = {tuple(t._replace(group=8, specialised=False) for t in row[2]): row for row in classes}.values()
        for rows, wide, _ in list(classes)[: 1 if name == "sm_100" or dtype == torch.float16 else None]:
            context["case"] = f"from {rows} rows an expert, {wide} wide"
            N, D = max(rows, few.swapped[-1].rows + 8) * E // K, max(wide, 2048)
            if dtype == torch.bfloat16:
                experts(dtype, N, D=D)
            experts(dtype, N, D=D, train=True, accumulate=rows > 0)
    context.update(dtype="bfloat16", case="grouped rows")
    grouped(torch.bfloat16)
    context.update(dtype="bfloat16", case="a wide row")
    experts(torch.bfloat16, 1, D=4096)
    if name == "sm_90":
        up, hidden, weight = (modules[f"kernels_{name}"] for name in ("up", "hidden", "weight"))
        kernels = {"up": (up.fits, up.up_rows), "hidden": (hidden.fits, hidden.hidden_gradient)}
        kernels["weight"] = up.fits, weight.weight_gradient_ahead
        moe._hopper = lambda device: kernels
        logging.basicConfig()
        moe.logger.setLevel("DEBUG")  # why something does not compile
        for dtype, D, F, act, train in (
            (torch.bfloat16, 2048, 1408, "silu", True), (torch.bfloat16, 2048, 1408, "silu", False),
            (torch.float16, 176, 72, "gelu", True), (torch.bfloat16, 64, 64, "relu", False),
            (torch.bfloat16, 2880, 2880, "gelu_tanh", True), (torch.bfloat16, 6144, 1408, "silu", True),
        ):  # fmt: skip
            context.update(dtype=str(dtype)[6:], case=f"in Gluon, {D} x {F}, {act}, train {train}")
            experts(dtype, 8192, D=D, F=F, train=train, activation=act)
        context.update(dtype="bfloat16", case="in Gluon, frozen experts")
        experts(torch.bfloat16, 8192, train=True, frozen=True)
        context["case"] = "in Gluon, added to gradients"
        experts(torch.bfloat16, 8192, train=True, accumulate=True)
        assert len(kernels) == 3, "a kernel in Gluon does not compile: the log says why"
    context.update(dtype="int64", case="256 experts")
    modules["kernels_plan"].make_plan(torch.zeros(8192, 8, dtype=torch.int64), 256, 128, kept=False)

    attention = modules["kernels_attention"]

    def latent_tiles(x, float8):
        if x.dtype == torch.float32:
            return attention.FLOAT32
        table = attention.FLOAT8_TABLE if float8 else attention.TABLE
        return attention.CDNA if hip else table[max(key for key in table if key <= target.arch)]

    attention._device, attention._INTERPRETED = latent_tiles, True  # the latter lets CPU tensors through
    wide = modules["kernels_wide"]
    found, none = [wide.fits, wide.launch], []
    attention._wide = lambda device: none

    def cached(dtype, B, S, C, R, float8):
        if not float8:
            return torch.empty(B, S, C, dtype=dtype), torch.empty(B, S, R, dtype=dtype)
        return torch.empty(B, S, C, dtype=torch.float8_e4m3fn), torch.empty(B, S, R + 8, dtype=dtype)

    def decode(dtype, heads, B, *, T=1, C=512, R=64, S=4096, page=None, seen=False, float8=False):
        latents = "latents in float8, " if float8 else ""
        case = f"{latents}{heads} heads, batch {B}, {T} new tokens, widths {C} and {R}, page {page}"
        context.update(dtype=str(dtype)[6:], case=case)
        q, r = torch.empty(heads, B, T, C, dtype=dtype), torch.empty(heads, B, T, R, dtype=dtype)
        lengths = torch.zeros(B, dtype=torch.int32)
        if page is None:
            c, k = cached(dtype, B, S, C, R, float8)
            mask = torch.ones(B, S, dtype=torch.bool) if seen else None
            attention.latent_decode(q, r, c, k, lengths, mask, scaling=1.0)
        else:
            slots, table = torch.empty(B * S, (C + R) // 2, dtype=dtype), torch.zeros(B * S // page, dtype=torch.int64)
            starts = lengths if page == 1 else None
            table = table if page == 1 else table.view(B, -1).int()
            attention.latent_decode_pages(
                q, r, slots, slots, table, page, lengths, scaling=1.0, starts_B=starts, longest=S
            )

    step = modules["kernels_step"]
    step.INTERPRETER = step.streaming_tile(2048, 2)

    def few_tokens(dtype, every, B=2, H=16, D=2048, S=300, float8=False):
        context["case"] = "a step of few tokens, latents in float8" if float8 else "a step of few tokens"
        x, weight = torch.empty(B, D, dtype=dtype), torch.empty(576, D, dtype=dtype)
        norm, angles, lengths = torch.empty(D, dtype=dtype), torch.empty(B, 1, 32), torch.zeros(B, dtype=torch.int32)
        kv, q = torch.empty(B, 1, 576, dtype=dtype), torch.empty(B, H, 1, 64, dtype=dtype)
        up = torch.empty(H, 128, 512, dtype=dtype)
        for interleaved, absorbs in ((True, (q[..., :1].expand(-1, -1, -1, 128), up)), (False, (None, None))):
            buffers = cached(dtype, B, S, 512, 64, float8)
            step.write_latents(kv, norm[:512], 1e-6, q, angles, angles, lengths, *buffers, interleaved, *absorbs)
        latent = torch.empty(H, B, 1, 512, dtype=dtype)
        for count in (B, 200) if every else ():  # with and without splits
            queries = latent[:, :1].expand(-1, count, -1, -1), latent[:, :1, :, :64].expand(-1, count, -1, -1)
            latents = cached(dtype, count, S, 512, 64, float8)
            step.decode_values(*queries, *latents, torch.zeros(count, dtype=torch.int32), None, up, scaling=1.0)
        if float8:
            return
        step.norm_linear(x, norm, 1e-6, weight, weight)
        step.norm_router(x, norm, 1e-6, torch.empty(64, D))
        step.linear_add(x, weight, weight[:B, :576].contiguous())
        slots = torch.empty(S, 288, dtype=dtype)
        written = torch.zeros(B, dtype=torch.int64), slots, slots, True
        step.write_pages(kv.transpose(0, 1), norm[:512], 1e-6, q.permute(2, 1, 0, 3), angles, angles, *written)

    for dtype in (torch.bfloat16, torch.float32):
        context["dtype"] = str(dtype)[6:]
        every = dtype == torch.bfloat16 or name == "sm_80"  # float32's tiles are the same everywhere
        decode(dtype, 16, 8)
        for heads, B, more in ((128, 8, {}), (16, 200, {"seen": True}), (16, 8, {"page": 1})) if every else ():
            decode(dtype, heads, B, **more)
        few_tokens(dtype, every)
    decode(torch.bfloat16, 20, 8)
    decode(torch.bfloat16, 24, 200)
    decode(torch.bfloat16, 16, 8, page=64)
    decode(torch.bfloat16, 64, 8, page=64)
    for heads, float8 in ((16, False), (64, False), (64, True)) if name == "sm_90" else ((64, False),):
        decode(torch.bfloat16, heads, 8, R=128, float8=float8)
    decode(torch.bfloat16, 16, 64, page=256)
    decode(torch.bfloat16, 16, 1, T=8, C=128, R=0)
    for heads, B in ((16, 8), (16, 200), (20, 8), (24, 200), (128, 8)):
        decode(torch.bfloat16, heads, B, float8=True)
    few_tokens(torch.bfloat16, True, float8=True)
    if name == "sm_90":
        decode(torch.float16, 16, 8, float8=True)
        decode(torch.float32, 16, 8, float8=True)
    if name == "sm_90":
        attention._wide = lambda device: found
        logging.basicConfig()
        attention.logger.setLevel("DEBUG")  # why something does not compile
        decode(torch.bfloat16, 64, 8)
        decode(torch.bfloat16, 128, 70, seen=True)  # one split
        decode(torch.float16, 20, 8, T=4, page=64)
        decode(torch.bfloat16, 128, 8, page=256)
        decode(torch.bfloat16, 128, 70, C=256, R=32, page=64)
        decode(torch.bfloat16, 64, 8, C=256, R=32)
        decode(torch.bfloat16, 64, 8, C=128, R=0, page=64)
        assert found, "kernels_wide.py does not compile: the log says why"

    gate, exact = modules["kernels_gated"], modules["kernels_logits"]
    context.update(dtype="bfloat16", case="the gate and the router's logits of training")
    tokens, up = (torch.empty(512, 2048, dtype=torch.bfloat16) for _ in range(2))
    gate.gated_gradient(gate.gated(tokens, up), tokens, up)
    router_weight = torch.empty(64, 2048)
    logits = exact.router_logits(tokens, router_weight)
    exact.router_tokens_gradient(logits, router_weight, tokens)
    exact.router_gradient(logits, tokens)

    norm = modules["kernels_norm"]
    for dtype, width in ((torch.bfloat16, 2048), (torch.bfloat16, 7168), (torch.float32, 7168)):
        context.update(dtype=str(dtype)[6:], case=f"norms of {width} numbers")
        x, weight = torch.empty(64, width, dtype=dtype), torch.empty(width, dtype=dtype)
        for added in (x, None):
            total, y, rstd = norm.add_norm(x, added, weight, 1e-6)
            norm.norm_gradient(y, added, x, weight, rstd, True)
        norm.norm_gradient(y, x, x, weight, rstd, False)
        norm.sum_of_three(x, y, y)

    loss, heads = modules["kernels_loss"], modules["kernels_heads"]
    for dtype in (torch.bfloat16, torch.float32):
        context.update(dtype=str(dtype)[6:], case="the loss and the heads of training")
        logits, targets = torch.empty(8, 102400, dtype=dtype), torch.zeros(8, dtype=torch.int64)
        loss.losses_gradient(torch.ones(()), logits, targets, loss.losses(logits, targets, -100)[1], -100)
        q, kv = torch.empty(1, 8, 16, 192, dtype=dtype), torch.empty(1, 8, 16, 256, dtype=dtype)
        k, angles = torch.empty(1, 8, 64, dtype=dtype), torch.empty(1, 8, 32)
        for interleaved in (True, False):
            heads._heads(q, kv, k, angles, angles, interleaved)
            heads._heads_gradient(q, q, kv[..., :128].contiguous(), angles, angles, 64, interleaved)

    if "kernels_router" in modules:
        router = modules["kernels_router"]
        cases = (256, 8, True, 8, 4, False), (160, 6, False, 8, 3, True)
        for experts, chosen, best_two, groups, open_groups, softmax in cases if name == "sm_90" else cases[:1]:
            context.update(dtype="float32", case=f"router of {experts} in {groups} groups")
            logits, bias = torch.empty(512, experts), None if softmax else torch.empty(experts)
            weights, ids = router._route(logits, bias, chosen, best_two, groups, open_groups, softmax, True, 1.0)
            router._route_backward(weights, logits, ids, softmax, True, 1.0)


if __name__ == "__main__":
    compile_all(sys.argv[1])
