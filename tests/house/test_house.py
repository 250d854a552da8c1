"""The rules of the house: sizes, layers, light imports, public names, typed and documented surfaces."""

import ast
import importlib
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from importlinter.application.use_cases import lint_imports
from importlinter.configuration import configure

import vlmix
from tests import processes

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "src/vlmix").rglob("*.py"))
MODULES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def _functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_files_and_functions_are_small():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert statistics.median(lines.values()) <= 150
    assert not {str(path): n for path, n in lines.items() if n > 400}
    long = [
        f"{path}:{node.name}"
        for path, tree in MODULES.items()
        for node in _functions(tree)
        if (node.end_lineno or 0) - node.lineno + 1 > 60
    ]
    assert not long


def test_the_training_loop_fits_in_300_lines():
    assert len((ROOT / "src/vlmix/train/loop.py").read_text(encoding="utf-8").splitlines()) < 300


def test_every_public_function_is_typed_and_documented():
    bare = []
    for path, tree in MODULES.items():
        holders = [
            tree,
            *(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_"),
        ]
        for holder in holders:
            for node in holder.body:
                if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                    continue
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                arguments = [a for a in given if a.arg not in {"self", "cls"}]
                typed = node.returns is not None and all(a.annotation is not None for a in arguments)
                overrides = any("override" in ast.unparse(d) for d in node.decorator_list)
                if not typed or not (ast.get_docstring(node) or overrides):
                    bare.append(f"{path.relative_to(ROOT)}:{node.name}")
    assert not bare


def test_imports_point_down():
    configure()
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), cache_dir=None)


def _import_graph():
    names = {".".join(path.relative_to(ROOT / "src").with_suffix("").parts): path for path in SOURCES}
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    graph = {}
    for name, path in names.items():
        found = set()
        for node in ast.walk(MODULES[path]):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        graph[name] = (found & names.keys()) - {name, "vlmix"}
    return graph


def test_there_is_no_import_cycle_even_inside_functions():
    graph, done = _import_graph(), set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])
    assert len(done) == len(graph)


@pytest.mark.parametrize("statement", ["import vlmix", "import vlmix.cli.main"])
def test_importing_needs_no_torch(statement):
    heavy = "{'torch', 'transformers', 'numpy', 'PIL', 'matplotlib'}"
    code = f"{statement}; import sys; print(sorted({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_public_names_are_those_written_down():
    assert sorted(vlmix.__all__) == vlmix.__all__
    for name in vlmix.__all__:
        assert getattr(vlmix, name).__name__ == name
    with pytest.raises(AttributeError):
        _ = vlmix.nothing_of_this_name


def test_what_test_processes_start_with_is_there():
    for name in processes.IMPORTED:  # the server they are forked from would say nothing
        importlib.import_module(name)


@pytest.mark.slow
def test_auto_classes_know_vlmix_in_either_order_of_import():
    mixtral = "transformers.models.mixtral.modeling_mixtral"
    pairs = [("vlmix", "transformers"), ("transformers", "vlmix"), ("vlmix", mixtral)]
    # Both import Auto modules on their way, before peft has what adapters need.
    pairs += [("vlmix", "peft"), ("vlmix", "transformers.trainer"), ("vlmix.models.adapters", "transformers")]
    # Each pair is imported by a child of a process that has torch, which none of them is about.
    code = (
        "import os, sys, torch, torchvision\n"
        "for pair in sys.argv[1:]:\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        exec('import ' + pair)\n"
        "        from transformers import AutoConfig, AutoModelForImageTextToText as A\n"
        "        c = AutoConfig.for_model('vlmix')\n"
        "        print(pair, type(c).__name__, A._model_mapping[type(c)].__name__, flush=True)\n"
        "        os._exit(0)\n"
        "    os.waitpid(child, 0)\n"
    )
    told = [", ".join(pair) for pair in pairs]
    run = subprocess.run([sys.executable, "-W", "error", "-c", code, *told], capture_output=True, text=True)
    wanted = [f"{pair} VlmixConfig VlmixForConditionalGeneration" for pair in told]
    assert run.stdout.splitlines() == wanted, run.stderr


def test_no_file_reads_pickle_or_runs_text():
    banned = {"pickle", "eval", "exec", "torch.load", "torch.save"}
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in banned
    ]
    imports = [
        str(path)
        for path, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Import) and {alias.name for alias in node.names} & banned
    ]
    assert not calls
    assert not imports


def test_documents_point_at_files_that_exist():
    missing = [
        f"{path.relative_to(ROOT)}: {target}"
        for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8"))
        if "://" not in target and not (path.parent / target).exists()
    ]
    assert not missing


def test_the_tried_versions_satisfy_the_floors():
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    wanted = [Requirement(text) for text in project["dependencies"]]
    unfit = [r.name for r in wanted if r.name in pinned and not r.specifier.contains(pinned[r.name])]
    assert not unfit


def test_shipped_recipes_name_parts_that_exist():
    from vlmix.train.build import check_parts
    from vlmix.train.recipe_file import load_recipe, shipped_recipes

    names = shipped_recipes()
    assert {"demo", "nlvr", "eagle_like"} <= set(names)
    for name in names:
        recipe = load_recipe(name)
        check_parts(recipe)
        assert yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))
        assert importlib.import_module("vlmix.train.build").recipe_config(recipe).image_seq_length > 0


def test_commands_shown_in_documents_name_recipes_and_keys_that_exist(tmp_path, monkeypatch):
    from vlmix.train.build import check_parts
    from vlmix.train.recipe_file import load_recipe

    pages = [
        path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    ]
    recipe = re.findall(r"```yaml\n(name: two_eyes\n.*?)```", pages[0], re.S)[0]
    (tmp_path / "two_eyes.yaml").write_text(recipe, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    commands = [
        shlex.split(command.replace("\\\n", " "), comments=True)[2:]
        for page in pages
        for command in re.findall(r"^vlmix (?:train|plan) (?:.*\\\n)*.*$", page, re.M)
    ]
    assert len(commands) >= 4
    for name, *arguments in commands:
        check_parts(load_recipe(name, [word for word in arguments if "=" in word]))
