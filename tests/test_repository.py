"""Laws of the repository: what may import what, what is installed, what an import costs."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import nettrace

ROOT = Path(__file__).parents[1]
#: What each part may import of the project, itself included.
MAY_IMPORT = {
    "kernels": ["nettrace.kernels"],
    "nettrace": ["nettrace"],
    "callbacks": ["nettrace"],
    "examples": ["nettrace", "figure"],
}
MAY_NOT_IMPORT = {
    "kernels": ["pytorch_lightning", "lightning", "wandb"],
    "nettrace": ["nettrace.callbacks", "pytorch_lightning", "lightning", "wandb"],
    "callbacks": ["nettrace.kernels"],
    "examples": ["nettrace.kernels"],
}


def sources(part):
    return [p for p in (ROOT / part).rglob("*.py") if not (part == "nettrace" and linked(p))]


def linked(path):
    return any(parent.is_symlink() for parent in path.parents)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name, packages):
    return any(name == p or name.startswith(p + ".") for p in packages)


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_go_one_way(part):
    assert sources(part)
    for path in sources(part):
        for name in imports(path):
            assert not within(name, MAY_NOT_IMPORT[part]), f"{path} imports {name}"
            if name.partition(".")[0] in ("nettrace", "callbacks", "kernels", "tests"):
                assert within(name, MAY_IMPORT[part]), f"{path} imports {name}"


def test_every_package_is_installed_under_one_name():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {p.parent for part in ("nettrace", "callbacks", "kernels") for p in sources(part)}
    expected = {
        ".".join(("nettrace", *f.relative_to(ROOT).parts)).replace("nettrace.nettrace", "nettrace")
        for f in folders
    }
    assert set(settings["packages"]) == expected
    for name in ("callbacks", "kernels"):
        assert settings["package-dir"][f"nettrace.{name}"] == name
        link = ROOT / "nettrace" / name
        assert link.is_symlink()
        assert link.resolve() == ROOT / name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["callbacks", "kernels"])
def test_the_repository_root_may_be_on_the_path(name):
    """Others look for a package `kernels` of their own there, transformers for one."""
    code = f"""import importlib, sys; sys.path.insert(0, {str(ROOT)!r})
    one, other = map(importlib.import_module, ["{name}", "nettrace.{name}"])
    assert one.__all__ and all(getattr(one, n) is getattr(other, n) for n in other.__all__)"""
    subprocess.run([sys.executable, "-c", code.replace("    ", "")], check=True)


def test_import_is_light():
    heavy = "arviz pytorch_lightning lightning wandb triton xarray pandas scipy.stats plotly dask"
    code = f"import sys, nettrace; print([m for m in {heavy.split()} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_public_names_exist_and_are_documented():
    for name in nettrace.__all__:
        assert getattr(nettrace, name).__doc__, name
    assert sorted(nettrace.__all__) == nettrace.__all__


def test_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert nettrace.__version__ == project["version"]
    assert f"version: {project['version']}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_measures_are_all_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    listed = set(re.findall(r"`([a-z]+/[a-z0-9_]+)`", readme))
    own = [
        m
        for m in nettrace.measures.available()
        if str(m.function.__module__).startswith("nettrace.")
    ]
    assert {m.name for m in own} <= listed


def test_source_files_are_few_and_short():
    files = [p for part in ("nettrace", "callbacks", "kernels") for p in sources(part)]
    assert len(files) < 290
    long = {p.name: n for p in files if (n := len(p.read_text().splitlines())) > 500}
    assert not long
