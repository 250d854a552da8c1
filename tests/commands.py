"""``vlmix`` as a user types it, in a process of its own that need not import everything anew."""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.processes import context
from vlmix.cli.main import main

INSTALLED = Path(sys.executable).with_name("vlmix")


def vlmix(*arguments, cwd, check=None, installed=False, **environment):
    """What the command gave, ended with and wrote; ``installed`` is the one in the environment's folder."""
    arguments = [str(argument) for argument in arguments]
    environment = {"COLUMNS": "200", **environment}
    done = (_installed if installed else _forked)(arguments, cwd, environment)
    if check is not None:
        assert done.returncode == check, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def _installed(arguments, cwd, environment):
    return subprocess.run(
        [str(INSTALLED), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )


def _forked(arguments, cwd, environment):
    with TemporaryDirectory() as folder:
        told = [Path(folder, name) for name in ("stdout", "stderr")]
        process = context().Process(target=_run, args=(arguments, cwd, environment, told))
        process.start()
        process.join()
        return subprocess.CompletedProcess(
            arguments, process.exitcode, *(path.read_text(encoding="utf-8") for path in told)
        )


def _run(arguments, cwd, environment, told):
    for path, descriptor in zip(told, (1, 2), strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(cwd)
    os.environ |= environment
    sys.argv = ["vlmix", *arguments]
    main()
