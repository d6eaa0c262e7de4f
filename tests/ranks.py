"""Two gloo ranks on this machine for a test."""

import os
import time
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as mp


def _enter(rank: int, function, store: str, arguments: tuple):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    function(rank, *arguments)
    dist.barrier()
    os._exit(0)  # gloo's threads can hang while the interpreter takes itself apart


def on_two_ranks(function, folder: Path, *arguments, seconds: float = 150):
    """Run `function(rank, *arguments)` in two new processes of one gloo group; `folder` holds their meeting place."""
    ranks = mp.spawn(_enter, (function, str(folder / "store"), arguments), nprocs=2, join=False)
    end = time.monotonic() + seconds
    while not ranks.join(timeout=5):
        if time.monotonic() > end:
            for process in ranks.processes:
                process.kill()
            raise TimeoutError(f"{function.__name__} did not end within {seconds} seconds on two ranks.")
