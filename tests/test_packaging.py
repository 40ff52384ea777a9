"""How the package is laid out, installed and imported."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.triton_version import OLDEST

ROOT = Path(__file__).parent.parent

# The floors, from the ground. A module may import from its own floor and from those below.
FLOORS = [
    "kernels",
    "_version",
    "names",
    "untraced",
    "relevance",
    "part",
    "shards",
    "stats",
    "parcel",
    "buffers",
    "wants",
    "arrivals",
    "delivery",
    "slots",
    "ranks",
    "retained",
    "readings",
    "nonfinite",
    "samples",
    "registry",
    "points",
    "dispatch",
]
FLOORS += ["ops", "pointwise", "elementwise", "nn", "patterns", "models"]
FLOORS += ["fusing", "watcher", "testing", "integrations", "cli"]


def imports(file: Path) -> set[str]:
    """Modules imported anywhere in a file, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names}
                if node.module == "retainops"
                else {str(node.module)}
            )
    return found


@pytest.mark.parametrize("file", sorted((ROOT / "kernels").glob("*.py")), ids=lambda f: f.name)
def test_kernels_import_only_triton(file: Path) -> None:
    for name in imports(file):
        assert name.split(".")[0] in {"triton", "typing"} or name.startswith("retainops.kernels"), name


@pytest.mark.parametrize("file", sorted((ROOT / "retainops").rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_nothing_imports_upward(file: Path) -> None:
    relative = file.relative_to(ROOT / "retainops")
    own = relative.parts[0].removesuffix(".py")
    if own in {"__init__", "__main__"}:
        return
    for name in imports(file):
        if name.startswith("retainops."):
            below = name.split(".")[1]
            assert FLOORS.index(below) <= FLOORS.index(own), f"{relative} imports {name}"


def run(code: str, cwd: Path, *flags: str) -> str:
    done = subprocess.run([sys.executable, *flags, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_without_triton() -> None:
    code = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *rest):
        return None if name.split(".")[0] == "triton" else self.finder.find_spec(name, *rest)

sys.meta_path[:] = [Without(f) for f in sys.meta_path]
import torch, retainops as ro
a = torch.ones(3, requires_grad=True)
kept = ro.Retained("c")
ro.mul_sin(a, 2.0, retain=kept).sum().backward()
print(kept.c.grad is not None, ro.explain(ro.mul_sin, a, 2.0))
try:
    with ro.backend("triton"): pass
except RuntimeError as e:
    print(e)
"""
    out = run(code, ROOT)
    assert "True mul_sin takes the reference path: triton is not installed." in out
    assert 'backend: "triton" was asked for and triton is not installed; pip install triton' in out


def test_import_is_light() -> None:
    heavy = "rich typer matplotlib pytest tensorboard torch._dynamo retainops.testing retainops.cli"
    code = f"import retainops, sys; print([m for m in {heavy.split()} if m in sys.modules])"
    assert run(code, ROOT) == "[]"


def test_testing_comes_on_demand() -> None:
    code = "import retainops as ro, sys; a = 'retainops.testing' in sys.modules; ro.testing.simulated_gpu; print(a)"
    assert run(code, ROOT) == "False"


def test_plain_install(tmp_path: Path) -> None:
    """Installed, the kernels are `retainops.kernels`; there is no top-level `kernels`, another library's name."""
    source, target, elsewhere = tmp_path / "source", tmp_path / "target", tmp_path / "elsewhere"
    keep = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "tests", "docs", "bench")
    shutil.copytree(ROOT, source, symlinks=True, ignore=keep)
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--target", str(target), str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (target / "retainops/kernels/pointwise.py").is_file()
    assert (target / "retainops/pointwise.pyi").is_file()
    assert not (target / "retainops/kernels").is_symlink()
    assert not (target / "kernels").exists()
    code = f"""
import sys; sys.path.insert(0, {str(target)!r})
import retainops.kernels.pointwise as k, retainops
print(retainops.__file__, k.__file__)
"""
    assert run(code, elsewhere).count(str(target)) == 2


def test_symlink_is_relative() -> None:
    link = ROOT / "retainops" / "kernels"
    assert link.is_symlink()
    assert str(link.readlink()) == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_make_oldest_installs_the_oldest_that_is_promised() -> None:
    promised = dict(re.findall(r'"(torch|triton)>=([\d.]+)', (ROOT / "pyproject.toml").read_text()))
    installed = dict(re.findall(r"'(torch|triton)==([\d.]+)\.0'", (ROOT / "Makefile").read_text()))
    assert installed == promised
    assert promised["triton"] == ".".join(map(str, OLDEST))
