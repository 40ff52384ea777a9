"""The folder of generated files: several processes, damage, permissions."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import retainops as ro
from retainops.elementwise import cache
from tests.conftest import HAS_TRITON

ROOT = Path(__file__).parent.parent.parent
SOURCE = "def made():\n    return {}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RETAINOPS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_modules", {})
    return tmp_path / "cache"


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_where_files_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RETAINOPS_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "retainops" / "fused"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the standard says to ignore
    assert cache.folder() == tmp_path / ".cache" / "retainops" / "fused"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache.folder() == tmp_path / "x" / "retainops" / "fused"
    monkeypatch.setenv("RETAINOPS_CACHE_DIR", "~/mine")
    assert cache.folder() == tmp_path / "mine"


def test_one_file_for_one_content(folder: Path) -> None:
    one, two = SOURCE.format(1), SOURCE.format(2)
    assert cache.load("f", one).made() == 1
    assert cache.load("f", two).made() == 2
    assert cache.load("f", one) is cache.load("f", one)
    found = files(folder)
    assert sorted(path.read_text() for path in found) == [one, two]
    assert all(path.name.startswith("f_") and len(path.stem) == len("f_") + 64 for path in found)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in found)


def test_a_long_name_still_makes_a_file(folder: Path) -> None:
    assert cache.load("f" * 300, SOURCE.format(1)).made() == 1


@pytest.mark.parametrize("content", ["", SOURCE.format(1)[:-3], "raise SystemExit('foreign')\n", "\x00\xff"])
def test_a_file_that_is_damaged_or_foreign_is_written_anew(folder: Path, content: str) -> None:
    cache.load("f", SOURCE.format(1))
    (path,) = files(folder)
    path.write_text(content)
    cache._modules.clear()
    assert cache.load("f", SOURCE.format(1)).made() == 1
    assert path.read_text() == SOURCE.format(1)


def test_bytecode_that_lies_beside_a_file_is_not_run(folder: Path) -> None:
    import importlib.util
    import py_compile

    cache.load("f", SOURCE.format(1))
    (path,) = files(folder)
    path.write_text(SOURCE.format(7))
    planted = importlib.util.cache_from_source(str(path))
    py_compile.compile(
        str(path), planted, doraise=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )
    cache._modules.clear()
    assert cache.load("f", SOURCE.format(1)).made() == 1


def test_a_file_that_cannot_be_read_is_replaced(folder: Path) -> None:
    cache.load("f", SOURCE.format(1))
    (path,) = files(folder)
    path.unlink()
    path.symlink_to(folder / "nowhere")
    cache._modules.clear()
    assert cache.load("f", SOURCE.format(1)).made() == 1
    assert not path.is_symlink()


def test_a_folder_that_cannot_be_written(folder: Path) -> None:
    folder.write_text("a file is in its place")
    module = cache.load("f", SOURCE.format(3))
    assert module.made() == 3
    path = Path(module.__file__)
    assert path.exists()
    assert folder not in path.parents
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(folder: Path) -> None:
    folder.mkdir(mode=0o500)
    assert cache.load("f", SOURCE.format(4)).made() == 4


def test_no_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETAINOPS_CACHE_DIR", "~nobody-of-this-name/cache")
    assert cache.load("f", SOURCE.format(5)).made() == 5
    assert not Path("~nobody-of-this-name").exists()


def test_the_folder_of_a_process_goes_with_it(folder: Path) -> None:
    folder.write_text("a file is in its place")
    code = f"from retainops.elementwise import cache; print(cache.load('f', {SOURCE.format(1)!r}).__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not Path(done.stdout.strip()).parent.exists()


def test_threads(folder: Path) -> None:
    sources = [SOURCE.format(i % 3) for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda source: cache.load("f", source).made(), sources))
    assert found == [i % 3 for i in range(24)]
    assert len(files(folder)) == 3


RACE = """
import importlib.util, os, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("cache", "retainops/elementwise/cache.py")  # without torch
cache = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cache)
go, source, takes_away = Path(sys.argv[1]), sys.argv[2] + "# long\\n" * 5000, sys.argv[3] == "0"
go.with_suffix(f".{os.getpid()}").touch()
while not go.exists():
    time.sleep(0.001)
for _ in range(200):
    cache._modules.clear()
    module = cache.load("f", source)
    assert module.made() == 1
    found = cache._read(Path(module.__file__))
    assert found in (None, source.encode()), found
    if takes_away:
        Path(module.__file__).unlink(missing_ok=True)
"""


def test_several_processes_at_once(folder: Path, tmp_path: Path) -> None:
    """Whoever reads sees a whole file or none, though others write it and take it away all the time."""
    go = tmp_path / "go"
    commands = [[sys.executable, "-c", RACE, str(go), SOURCE.format(1), str(i)] for i in range(3)]
    running = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for command in commands]
    while len(list(tmp_path.glob("go.*"))) < 3 and all(p.poll() is None for p in running):
        time.sleep(0.01)
    go.touch()
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert all(not path.name.startswith(".") for path in files(folder))  # nothing half-written is left behind


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed: there are no kernels")
def test_kernels_come_from_the_file(folder: Path) -> None:
    from retainops.testing import simulated_gpu

    @ro.fuse_pointwise
    def f(x):
        c = x * 2
        return torch.tanh(c)

    with simulated_gpu(compiles=False) as launches:
        f(torch.ones(3, requires_grad=True)).sum().backward()
    assert [launch.name for launch in launches] == ["f_fwd_kernel", "f_bwd_kernel"]
    (path,) = files(folder)
    assert path.read_text() == f.source
    assert launches[0].fn.fn.__code__.co_filename == str(path)
    assert "def f_fwd_kernel" in launches[0].fn.src
