"""What every test stands on: one thread a process, no network, and the shared folder where it is."""

import os
import socket
from pathlib import Path

import pytest

# Two processes of two threads each on two cores wait for one another; set before torch reads it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """A test that reaches for another machine fails at once; this one may talk to itself."""
    connect = socket.socket.connect

    def local_only(self, address):
        host = address[0] if isinstance(address, tuple) else ""
        if self.family != socket.AF_UNIX and host not in {"127.0.0.1", "::1", "localhost"}:
            raise AssertionError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture(scope="session")
def shared():
    """The folder of goldens and data beside the project; its tests are skipped where it is absent."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder ../shared with goldens and data, which is not here")
    return folder


WORST = pytest.StashKey[dict[str, dict[str, float]]]()


@pytest.fixture
def agree(request):
    """Compare with the authors' own tensors, and remember the worst difference of each fixture for the table.

    5e-5 is four times the authors' own noise floor (1.2e-5 with other CPU kernels).
    """
    worst = request.config.stash.setdefault(WORST, {})

    def compare(name, what, found, golden, tolerance=5e-5):
        assert found.shape == golden.shape
        difference = (found - golden).abs().max().item() if found.numel() else 0.0
        worst.setdefault(name, {})[what] = difference
        assert difference <= tolerance, f"{name} {what}: {difference:.2e}"

    return compare


def pytest_sessionfinish(session):
    """A worker's findings travel to the process that prints."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["worst"] = session.config.stash.get(WORST, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Collect what a worker found."""
    worst = node.config.stash.setdefault(WORST, {})
    for name, found in getattr(node, "workeroutput", {}).get("worst", {}).items():
        worst.setdefault(name, {}).update(found)


def pytest_terminal_summary(terminalreporter, config):
    """Name every published fixture that was compared, with its worst difference."""
    worst = config.stash.get(WORST, {})
    if worst:
        terminalreporter.section("worst difference from the authors' own code")
        for name, found in sorted(worst.items()):
            what, difference = max(found.items(), key=lambda item: item[1])
            terminalreporter.line(f"{name:24} {difference:.1e}  {what}  ({len(found)} compared)")
