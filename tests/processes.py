"""Several gloo processes on this machine, each running one function, as torchrun would start them.

They are forked from a server that has imported everything once: an import costs more than most of them do.
"""

import os
import queue
import socket
import time
import traceback

import torch
import torch.multiprocessing as mp

_METHOD = "forkserver"
IMPORTED = [
    "tests.runs",
    "vlmix.train.run",
    "vlmix.train.parallel.sharding",
    "vlmix.models.modeling",
    # What these import when they are first used.
    "timm",
    "matplotlib.backends.backend_agg",
    "torch.utils.tensorboard",
    # The commands, which import the rest once they are called.
    "vlmix.cli.main",
    "vlmix.cli.flow",
    "vlmix.cli.judging",
    "vlmix.evals.cost",
    "vlmix.models.plan",
    "vlmix.train.costs",
]


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
    return start_ranks(_begin, function, world, free_port(), arguments, world=world)


def context():
    """Where processes come from that have imported everything."""
    forkserver = mp.get_context(_METHOD)
    forkserver.set_forkserver_preload(IMPORTED)
    return forkserver


def start_ranks(function, *arguments, world=2):
    """Start ``function``, whose first argument is the rank, on ``world`` processes and return them."""
    context()
    return mp.start_processes(function, arguments, nprocs=world, join=False, start_method=_METHOD)


def run(function, *arguments, world=2):
    """Run ``function`` on ``world`` processes to the end."""
    _wait(start(function, *arguments, world=world))


def run_ranks(function, *arguments, world=2):
    """Run ``function``, whose first argument is the rank, on ``world`` processes to the end."""
    _wait(start_ranks(function, *arguments, world=world))


def _wait(context):
    while not context.join():
        pass


class Crew:
    """Processes that wait for work: many small runs pay for one start.

    ``run`` gives what ``function`` returns on each, or says what it raised there; processes that ended
    meanwhile are started again for the next.
    """

    def __init__(self, world=2):
        self.world, self._context = world, None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._end()

    def run(self, function, *arguments, seconds=300):
        if self._context is None:
            make = mp.get_context(_METHOD).Queue
            self._orders, self._answers = [make() for _ in range(self.world)], make()
            self._context = start(_work, self._orders, self._answers, world=self.world)
        port = free_port()
        for orders in self._orders:
            orders.put((port, function, arguments))
        found, last = {}, time.monotonic() + seconds
        while len(found) < self.world:
            try:
                rank, *answer = self._answers.get(timeout=0.2)
                found[rank] = answer
            except queue.Empty:
                gone = [p.exitcode for p in self._context.processes if not p.is_alive()]
                if gone or time.monotonic() > last:
                    self._end()
                    raise AssertionError(f"exit codes {gone}, answers {found}") from None
        if problems := [problem for _, problem in found.values() if problem]:
            raise FailedError("\n".join(problems))
        return [found[rank][0] for rank in range(self.world)]

    def _end(self):
        if self._context is not None:
            for process in self._context.processes:
                process.kill()
                process.join()
        self._context = None


class FailedError(AssertionError):
    """A function raised on some process."""


def _work(orders, answers):
    rank = int(os.environ["RANK"])
    while True:
        port, function, arguments = orders[rank].get()
        os.environ["MASTER_PORT"] = str(port)
        try:
            answers.put((rank, function(*arguments), ""))
        except Exception as error:  # noqa: BLE001  (the parent is told)
            told = "".join(traceback.format_tb(error.__traceback__)[-4:])
            answers.put((rank, None, f"process {rank}: {type(error).__name__}: {error}\n{told}"))
