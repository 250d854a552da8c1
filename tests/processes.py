"""Several gloo processes on this machine, each running one function, as torchrun would start them."""

import os
import socket

import torch
import torch.multiprocessing as mp


def _begin(rank, function, world, port, arguments):
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    function(*arguments)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(function, *arguments, world=2):
    """Start ``function`` on ``world`` processes and return them, running."""
    given = (function, world, free_port(), arguments)
    return mp.start_processes(_begin, given, nprocs=world, join=False, start_method="spawn")


def run(function, *arguments, world=2):
    """Run ``function`` on ``world`` processes to the end."""
    context = start(function, *arguments, world=world)
    while not context.join():
        pass
