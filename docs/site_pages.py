"""What the documentation's site shows besides docs/: the README, the results of benchmarks, and the public API.

Pages link to files of the repository as they lie there, so that links work where the repository is read. Here those
files become pages and downloads beside the pages of docs/, and links to them lose the step out of docs/.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
OUTSIDE = ["CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "bench/README.md", "bench/results/*/*", "examples/*.p[ny]*"]
INDEX = "index.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that lie outside docs/."""
    for path in (path for pattern in OUTSIDE for path in sorted(ROOT.glob(pattern))):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    files.append(File.generated(config, INDEX, content=(ROOT / "README.md").read_text()))
    files.append(File.generated(config, "api.md", content=api()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Links as they are in the site."""
    if page.file.src_uri in (INDEX, "CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md"):
        return re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", markdown)
    return re.sub(r"\]\(\.\./((?:\.\./)*)(bench|examples|CONTRIBUTING)", r"](\1\2", markdown)


def api() -> str:
    """A page of all public names, by the groups in which a reader looks for them."""
    import retainops as ro

    public = {name: getattr(ro, name) for name in ro.__all__ if not name.startswith("_")}
    groups: dict[str, list[Any]] = {"Requests and their answers": [], "Functions": [], "Ops": []}
    for name, thing in public.items():
        if isinstance(thing, type):
            groups["Requests and their answers"].append(thing)
        elif callable(thing) and thing.__name__ == name:  # and not another name of one
            of_ops = thing.__module__.startswith(("retainops.ops.", "retainops.pointwise"))
            groups["Ops" if of_ops else "Functions"].append(thing)
    groups["Modules: `ro.nn`"] = [getattr(ro.nn, name) for name in ro.nn.__all__]
    lines = ["# Reference", "", "`import retainops as ro`. Each name below is an attribute of `ro`, or of `ro.nn`.", ""]
    for title, things in groups.items():
        lines += [f"## {title}", "", *(f"::: {thing.__module__}.{thing.__qualname__}\n" for thing in things)]
    return "\n".join(lines)


class AsWritten(griffe.Extension):
    """An "Example:" of a docstring is code, and "Returns:" is a sentence: no name or type stands before its colons."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"^(\s*)Returns:$", r"\1**Returns:**", text, flags=re.MULTILINE)
