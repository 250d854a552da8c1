"""The worked example of CONTRIBUTING.md is a working encoder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_encoder_of_the_worked_example_passes_the_conformance_suite(tmp_path):
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    name, code = re.findall(
        r"<!-- example: src/vlmix/encoders/(\w+)\.py -->\n```python\n(.*?)```", page, re.S
    )[0]
    # The suite finds parts by looking into the package's folders; one more folder stands in for ours.
    folder = tmp_path / "encoders"
    folder.mkdir()
    (folder / f"{name}.py").write_text(code, encoding="utf-8")
    (tmp_path / "conftest.py").write_text("", encoding="utf-8")
    (tmp_path / "plugin.py").write_text(
        f"import vlmix.encoders\nvlmix.encoders.__path__.append({str(folder)!r})\n", encoding="utf-8"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "plugin", "-q", "tests/conformance/test_parts.py", "-k", name],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    passed = int(re.findall(r"(\d+) passed", run.stdout)[0])
    assert passed >= 5
    lint = [sys.executable, "-m", "ruff", "check", "--quiet", "--config", str(ROOT / "pyproject.toml")]
    assert subprocess.run([*lint, str(folder)], check=False).returncode == 0
