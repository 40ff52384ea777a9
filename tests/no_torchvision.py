"""timm without torchvision, whose builds on the package index need a CUDA build of torch.

timm imports it for its data loading and for functions that its models do not call. So while timm is imported, whatever
it asks torchvision for is an empty class.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any


class Nothing(type):
    """A class that has whatever it is asked for: another one."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing(name, (), {})


class Empty(ModuleType):
    """A module of such classes."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing(name, (), {})


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes every module of torchvision."""

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] == "torchvision" else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def import_timm() -> Any:
    """timm; torchvision is the installed one where there is one that works."""
    if "timm" in sys.modules:
        return sys.modules["timm"]
    finder = Finder()
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(finder)
    try:
        return importlib.import_module("timm")
    finally:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]  # transformers asks whether there is one
