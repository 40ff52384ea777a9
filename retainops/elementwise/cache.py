"""Generated kernels on disk: Triton, debuggers and profilers read source from files.

A file's name has the hash of its content. What is there is never trusted: its content is compared before it is used,
and what is executed is the text in memory.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import importlib.machinery
import importlib.util
import linecache
import os
import shutil
import tempfile
import threading
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

_one_at_a_time = threading.Lock()
_modules: dict[Path, ModuleType] = {}


def folder() -> Path:
    """Where files go: RETAINOPS_CACHE_DIR, or retainops/fused under XDG_CACHE_HOME or ~/.cache."""
    chosen = os.environ.get("RETAINOPS_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    above = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(above) if os.path.isabs(above) else Path("~/.cache").expanduser()) / "retainops" / "fused"


def load(name: str, source: str) -> ModuleType:
    """The module of a generated source, from its file; made once in a process."""
    stem = f"{name[:100]}_{hashlib.sha256(source.encode()).hexdigest()}"
    with _one_at_a_time:
        try:
            path = _placed(folder(), stem, source)
        except (OSError, RuntimeError):  # RuntimeError: nobody knows where home is
            path = _placed(_own_folder(), stem, source)
        if path not in _modules:
            _modules[path] = _imported(stem, path, source)
        return _modules[path]


def _placed(where: Path, stem: str, source: str) -> Path:
    """The file of a source, written unless it is there and whole."""
    where.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = where / f"{stem}.py"
    if _read(path) != source.encode():
        handle, new = tempfile.mkstemp(prefix=f".{stem[-16:]}_", suffix=".py", dir=where)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(source.encode())
            os.replace(new, path)  # at once: another process sees the old file or the new one, and both are whole
        except BaseException:
            os.unlink(new)
            raise
    return path


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


@functools.cache
def _own_folder() -> Path:
    """A folder of this process, where the cache cannot be written."""
    path = tempfile.mkdtemp(prefix="retainops_")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


class _Loader(importlib.machinery.SourceFileLoader):
    """Executes the text it is given, and neither the file's nor bytecode that lies beside it."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        super().__init__(name, str(path))
        self._source = source

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self._source.encode(), self.path)

    def get_source(self, fullname: str) -> str:
        return self._source


def _imported(stem: str, path: Path, source: str) -> ModuleType:
    loader = _Loader(f"retainops.fused.{stem}", path, source)
    spec: Any = importlib.util.spec_from_file_location(loader.name, path, loader=loader)
    module = importlib.util.module_from_spec(spec)
    # With no time of writing the lines are not read anew: Triton is to compile the text that is executed here.
    linecache.cache[str(path)] = (len(source), None, source.splitlines(keepends=True), str(path))
    loader.exec_module(module)
    return module
