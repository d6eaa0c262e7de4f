"""Stand-ins for the modules that Transformers' test mixins import and its source distribution lacks.

They are our own, written from how the mixins call them. Ranks are gloo processes on the CPU.
"""

import functools
import os
import sys
import tempfile
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch
import torch.distributed
import torch.multiprocessing

# What a rank process imports before the fork, so that it is paid once in a session and not for every rank.
PRELOADED = f"{__package__}.mixins"


class ExportTesterMixin:
    """ModelTesterMixin's base; the tests themselves are not published."""


class GenerationTesterMixin:
    """Demanded of every class that can generate; the tests themselves are not published. Ours: test_generation.py."""


# Values that are no defaults, for the fields that every PreTrainedConfig has.
config_common_kwargs = {
    "architectures": ["LamoeModel"],
    "chunk_size_feed_forward": 5,
    "dtype": "float16",
    "id2label": {0: "negative", 1: "neutral", 2: "positive"},
    "label2id": {"negative": 0, "neutral": 1, "positive": 2},
    "output_attentions": True,
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}


def run_distributed(world_size):
    """Decorate `implementation(rank, *args)` to run on `world_size` ranks; the first error of any rank is raised."""

    def decorate(implementation):
        @functools.wraps(implementation)
        def run(*args):
            with tempfile.TemporaryDirectory() as folder:
                rendezvous = (Path(folder) / "rendezvous").as_uri()
                _start_rank_processes(_run_rank, (implementation, world_size, rendezvous, args), world_size)

        return run

    return decorate


def _run_rank(rank, implementation, world_size, rendezvous, args):
    # from_pretrained reads its place from torchrun's variables
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.distributed.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=world_size, timeout=timedelta(minutes=2)
    )
    implementation(rank, *args)
    torch.distributed.destroy_process_group()


def _start_rank_processes(function, args, nprocs):
    """Run `function(rank, *args)` in `nprocs` processes, forked from a server that has only imported."""
    forkserver.set_forkserver_preload([PRELOADED])
    environment = {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),  # before Python 3.12.4 the server does not take over sys.path
    }
    with mock.patch.dict(os.environ, environment):
        forkserver.ensure_running()
    torch.multiprocessing.start_processes(function, args, nprocs, start_method="forkserver")


def _get_distributed_device_type():
    return "cpu"


def _get_distributed_backend():
    return "gloo"


def _get_rank_device(rank):
    return torch.device("cpu")


def _set_rank_device(rank):
    pass
