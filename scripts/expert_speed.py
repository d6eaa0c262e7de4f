"""What the experts cost: shapes, routings, rivals, and how they are timed. Used by benchmark.py."""

import gc
import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lamoe.moe import LamoeExperts

# tokens, hidden width, expert width, experts, experts a token
SHAPES = {
    "v2-lite-8k": (8192, 2048, 1408, 64, 6),
    "v2-lite-32k": (32768, 2048, 1408, 64, 6),
    "v3-slice": (8192, 7168, 2048, 64, 8),
    "mixtral": (4096, 4096, 14336, 8, 2),
    "olmoe-32k": (32768, 2048, 1024, 64, 8),
    "qwen3-32k": (32768, 2048, 768, 128, 8),
}
# milliseconds are per call over COLD calls in a row, each with other tokens, another routing and the other weights
COLD = 8
# The clock of a GPU at its power limit follows what runs by some 0.1 s: what is timed sooner has the clock of what ran
# before it, up to 8 % less behind dense products than behind gathers and sums.
SETTLED = 0.3


class Layer:
    """One layer of experts with random weights, its tokens and routing, and everybody who can compute it."""

    def __init__(self, shape: str, routing: str, device: str, dtype: torch.dtype):
        """`routing` is uniform, or skewed: expert 0 gets half the rows."""
        self.N, self.D, self.F, self.E, self.K = SHAPES[shape]
        self.device, self.dtype = device, dtype
        self.experts = make_experts(self.D, self.F, self.E, self.K, device, dtype)
        self.x, self.index, self.weights = self.draw(routing)
        self.dy = torch.randn_like(self.x)

    def draw(self, routing: str = "uniform") -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [N, D], experts [N, K] and weights [N, K]."""
        x = torch.randn(self.N, self.D, device=self.device, dtype=self.dtype)
        index = torch.rand(self.N, self.E, device=self.device).topk(self.K, dim=-1).indices.contiguous()
        if routing == "skewed":
            index[torch.rand(self.N, self.K, device=self.device) < 0.5] = 0
        weights = torch.randn(self.N, self.K, device=self.device).softmax(dim=-1)
        return x, index, weights

    @property
    def forward_flops(self) -> float:
        """Floating-point operations of a forward; a backward has twice as many."""
        return 6.0 * self.N * self.K * self.D * self.F

    def rivals(self) -> Iterator[tuple[str, Callable[[], Tensor], list[Tensor], Tensor]]:
        """Name, forward, the tensors that want gradients, and the gradient of the output."""
        x, index, weights, experts = self.x.requires_grad_(), self.index, self.weights.requires_grad_(), self.experts
        leaves = [x, weights, experts.gate_up_proj, experts.down_proj]
        for name, implementation in (("lamoe", "lamoe"), ("transformers grouped_mm", "grouped_mm")):
            forward = ALL_EXPERTS_FUNCTIONS[implementation]
            yield name, lambda forward=forward: forward(experts, x, index, weights), leaves, self.dy
        yield "torch grouped_mm", lambda: lean_grouped_mm(experts, x, index, weights), leaves, self.dy
        try:
            from liger_kernel.ops.fused_moe import LigerFusedMoEFunction as Liger
        except ImportError:
            pass
        else:
            projections = experts.gate_up_proj, experts.down_proj
            yield "liger", lambda: Liger.apply(x, *projections, index, weights.to(x.dtype)), leaves, self.dy
        if ALL_EXPERTS_FUNCTIONS.get("sonicmoe") and sonicmoe_loads():
            sonic = ALL_EXPERTS_FUNCTIONS["sonicmoe"]
            yield "sonicmoe", lambda: sonic(experts, x, index, weights), leaves, self.dy
        yield self.dense()

    def dense(self) -> tuple[str, Callable[[], Tensor], list[Tensor], Tensor]:
        """The same arithmetic as one dense layer of N * K rows, by cuBLAS: no routing, one weight for all."""
        rows = torch.randn(self.N * self.K, self.D, device=self.device, dtype=self.dtype, requires_grad=True)
        gate_up, down = (p[0].detach().clone().requires_grad_() for p in self.experts.parameters())

        def forward():
            gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)
            return F.linear(F.silu(gate) * up, down)

        return "dense cuBLAS", forward, [rows, gate_up, down], torch.randn_like(rows)


def make_experts(D: int, width: int, E: int, K: int, device: str, dtype: torch.dtype) -> LamoeExperts:
    """Experts with random weights."""
    config = SimpleNamespace(
        n_routed_experts=E,
        hidden_size=D,
        moe_intermediate_size=width,
        hidden_act="silu",
        _experts_implementation="lamoe",
    )
    with torch.device("meta"):
        experts = LamoeExperts(config)
    experts = experts.to(dtype).to_empty(device=device)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    return experts


def lean_grouped_mm(experts: LamoeExperts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The shortest correct experts around torch.nn.functional.grouped_mm."""
    (N, K), D = index.shape, x.shape[1]
    expert, order = index.flatten().sort(stable=True)
    ends = torch.searchsorted(expert, torch.arange(1, len(experts.down_proj) + 1, device=x.device), out_int32=True)
    gate, up = F.grouped_mm(x[order // K], experts.gate_up_proj.mT, offs=ends).chunk(2, dim=-1)
    rows = F.grouped_mm(F.silu(gate) * up, experts.down_proj.mT, offs=ends) * weights.flatten()[order, None].to(
        x.dtype
    )
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(N * K, device=x.device))
    return rows[inverse].view(N, K, D).sum(dim=1)


def sonicmoe_loads() -> bool:
    """Whether Transformers finds SonicMoE's kernels; fetching them needs the Hub."""
    try:
        from transformers.integrations.sonicmoe import load_sonicmoe_kernel

        load_sonicmoe_kernel()
    except Exception as reason:  # whatever a download or a missing build raises
        print(f"sonicmoe is not here: {reason}")
        return False
    return True


def train_cost(shape: str, routing: str, who: list[str], rounds: int = 3) -> list[dict]:
    """Forward without gradients, forward + backward, bytes held and peak of everybody, in rounds of random order, each
    alone until its clock has settled.

    `who` names the rivals; none is all that are installed. The dense layer is always among them.
    """
    layer = Layer(shape, routing, "cuda", torch.bfloat16)
    rivals = {
        name: (forward, stepper(forward, leaves, dy))
        for name, forward, leaves, dy in layer.rivals()
        if not who or name in (*who, "dense cuBLAS")
    }
    rows = {}
    for name, (forward, step) in rivals.items():
        step()  # compiles
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = forward()
        held = torch.cuda.memory_allocated() - before - out.nbytes
        del out
        step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        rows[name] = {
            "shape": shape,
            "routing": routing,
            "who": name,
            "held_mib": held / 2**20,
            "peak_mib": peak / 2**20,
        }
    times = {name: ([], []) for name in rivals}
    turns = random.Random(0)
    for name in [name for _ in range(rounds) for name in turns.sample(list(rivals), len(rivals))]:
        forward, step = rivals[name]
        with torch.no_grad():
            times[name][0].append(settled_milliseconds(forward))
        times[name][1].append(settled_milliseconds(step))
    dense = statistics.median(times["dense cuBLAS"][1])
    for name, (inference, step) in times.items():
        forward_ms, step_ms = statistics.median(inference), statistics.median(step)
        rows[name] |= {
            "forward_ms": forward_ms,
            "forward_tflops": layer.forward_flops / forward_ms / 1e9,
            "step_ms": step_ms,
            "step_tflops": 3 * layer.forward_flops / step_ms / 1e9,
            "over_dense": dense / step_ms,
        }
    return list(rows.values())


def stepper(forward: Callable[[], Tensor], leaves: list[Tensor], dy: Tensor) -> Callable[[], None]:
    """A forward and a backward, with fresh gradients."""

    def step():
        for leaf in leaves:
            leaf.grad = None
        forward().backward(dy)

    return step


def milliseconds(call: Callable[[], object], times: int) -> float:
    """Device milliseconds of one of `times` calls in a row, after one that warms up."""
    call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / times


def settled_milliseconds(call: Callable[[], object]) -> float:
    """As `milliseconds`, of SETTLED seconds of calls, after as many that nobody times."""
    times = math.ceil(SETTLED * 1e3 / milliseconds(call, 1))
    milliseconds(call, times)
    return milliseconds(call, times)


@torch.no_grad()
def decode_cost(shape: str, tokens: list[int]) -> list[dict]:
    """Microseconds of a forward of few tokens, eager and by CUDA graph, with cold weights, beside the memory floor."""
    layer = Layer(shape, "uniform", "cuda", torch.bfloat16)
    layers = [layer.experts, make_experts(layer.D, layer.F, layer.E, layer.K, "cuda", torch.bfloat16)]
    speed = copy_speed()
    rows = []
    for layer.N in tokens:
        calls = [(layers[i % 2], *layer.draw()) for i in range(COLD)]
        active = statistics.mean(len(index.unique()) for _, _, index, _ in calls)
        floor = active * 6 * layer.D * layer.F / speed * 1e6
        for name, implementation in (("lamoe", "lamoe"), ("transformers grouped_mm", "grouped_mm")):
            forward = ALL_EXPERTS_FUNCTIONS[implementation]

            def run(forward=forward, calls=calls):
                for experts, x, index, weights in calls:
                    forward(experts, x, index, weights)

            eager = statistics.median(milliseconds(run, 2) for _ in range(5)) / COLD * 1e3
            graph = statistics.median(milliseconds(captured(run).replay, 3) for _ in range(5)) / COLD * 1e3
            rows.append(
                {
                    "shape": shape, "tokens": layer.N, "who": name, "graph_us": graph, "eager_us": eager,
                    "floor_us": floor, "share_of_floor": floor / graph,
                }
            )  # fmt: skip
    return rows


def captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """`run` as a CUDA graph, after a call on a side stream, as capturing wants."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def copy_speed() -> float:
    """Bytes a second of a large copy on the device, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (min(milliseconds(lambda: target.copy_(source), 10) for _ in range(3)) / 1e3)


def model_step_cost(models: dict[str, tuple], batch: int, length: int, rounds: int = 3) -> list[dict]:
    """Tokens a second and peak memory of forward + backward of whole models, in alternating rounds.

    `models`: of each name, the model, and what to call before its turn.
    """
    vocabulary = next(iter(models.values()))[0].config.vocab_size
    ids = torch.randint(5, vocabulary, (batch, length), device="cuda")
    times, peaks = {name: [] for name in models}, dict.fromkeys(models, 0.0)

    def step(model):
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    for _, (name, (model, prepare)) in itertools.product(range(rounds), models.items()):
        prepare()
        model.train()
        step(model)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        times[name].append(milliseconds(lambda model=model: step(model), 3))
        peaks[name] = torch.cuda.max_memory_allocated() / 2**30
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
    return [
        {
            "model": name,
            "layers": model.config.num_hidden_layers,
            "tokens": batch * length,
            "step_ms": statistics.median(times[name]),
            "tokens_per_second": batch * length / statistics.median(times[name]) * 1e3,
            "peak_gib": peaks[name],
        }
        for name, (model, _) in models.items()
    ]
