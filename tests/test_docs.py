"""The documentation, executed: every Python block of README.md and docs/ runs, and prints what the page says it prints.

Blocks of one page share a namespace, in order. A ```text block right after a ```python block is what that one prints
(`...` stands for anything). A block whose first line is a path, as `# kernels/mul_tanh.py`, is that file: later blocks
import it under its name in the package. One whose first line is `# added to` a path is run in that module.
"""

from __future__ import annotations

import contextlib
import doctest
import functools
import importlib
import importlib.util
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from retainops import registry
from retainops.fusing.registry import RULES
from retainops.ops.pointwise import BINARY, FAMILY, UNARY
from tests.conftest import HAS_TRITON

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NEEDS_TRITON = re.compile(
    r"^# added to kernels/|simulated_gpu|ro\.explain|retainops\.(kernels|testing\.ptx|testing\.driver)"
    r"|static_report|predict\("
)

PYTORCHS_TESTS = "test/test_autograd.py"  # named in docs/retain_grad.md; not ours

over_pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@dataclass
class Block:
    """A fenced block: its language, the line of its fence, its text, and for Python what it is said to print."""

    language: str
    line: int
    text: str
    prints: str | None = None

    @property
    def module(self) -> str | None:
        """The module that the block is, if its first line is a path."""
        return self._module_after("# ")

    @property
    def added_to(self) -> str | None:
        """The module that the block adds to, if its first line says so."""
        return self._module_after("# added to ")

    def _module_after(self, start: str) -> str | None:
        path = re.match(start + r"(?:retainops/)?([\w/]+)\.py\n", self.text)
        return path and "retainops." + path[1].replace("/", ".")


def blocks(markdown: str) -> list[Block]:
    """The fenced blocks of a page."""
    found: list[Block] = []
    follows = False  # only blank lines since the last Python block
    inside: Block | None = None
    for number, line in enumerate(markdown.splitlines(), 1):
        if line.startswith("```"):
            if inside is None:
                inside = Block(line[3:].strip(), number, "")
                continue
            if inside.language == "text" and follows:
                found[-1].prints = inside.text
            found.append(inside)
            follows = inside.language == "python"
            inside = None
        elif inside is not None:
            inside.text += line + "\n"
        elif line.strip():
            follows = False
    assert inside is None, f"the block at line {inside and inside.line} has no end"
    return found


def prose(markdown: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", markdown, flags=re.MULTILINE | re.DOTALL)


def run(found: list[Block], folder: Path) -> None:
    """Execute a page's Python blocks; line numbers in tracebacks are the page's."""
    namespace = {"__name__": "page"}
    for block in found:
        if block.language != "python":
            continue
        file = folder / f"line_{block.line}.py"  # Triton and tracebacks read the source
        file.write_text("\n" * block.line + block.text)
        if block.module is not None:
            load(block.module, file)
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            where = namespace if block.added_to is None else vars(importlib.import_module(block.added_to))
            exec(compile(file.read_text(), str(file), "exec"), where)
        if block.prints is not None:
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            if not doctest.OutputChecker().check_output(block.prints, printed.getvalue(), flags):
                pytest.fail(f"line {block.line} prints:\n{printed.getvalue()}and the page says:\n{block.prints}")


def missing_in(block: Block) -> str | None:
    """What a block needs that is not installed."""
    if NEEDS_TRITON.search(block.text) and not HAS_TRITON:
        return "triton"
    absent = importlib.util.find_spec("diffusers") is None
    return "diffusers" if absent and re.search("^import diffusers", block.text, re.MULTILINE) else None


def load(name: str, file: Path) -> None:
    """Make a file importable as a module of the package."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parent, _, stem = name.rpartition(".")
    setattr(sys.modules[parent], stem, module)


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder for a page's files; afterwards the package is as it was."""
    modules = dict(sys.modules)
    if HAS_TRITON:
        importlib.import_module("retainops.kernels.unary")
    kernels = [vars(module) for name, module in sys.modules.items() if name.startswith("retainops.kernels.")]
    added_to = [(names, dict(names)) for names in (*kernels, registry._ops, RULES, BINARY, UNARY, FAMILY)]
    yield tmp_path
    for name in set(sys.modules) - set(modules):
        if name.startswith("retainops.") and str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            parent, _, stem = name.rpartition(".")
            delattr(sys.modules[parent], stem)
            del sys.modules[name]
    for names, before in added_to:
        names.clear()
        names.update(before)


# What torch.compile does itself: instantiate a Function, look at `.grad` of an input.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@over_pages
def test_code_runs(page: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Inductor takes seconds and a C++ compiler; what the pages say of compiled code is so under any backend.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    found = blocks(page.read_text())
    missing = [(i, package) for i, block in enumerate(found) if (package := missing_in(block)) is not None]
    first, package = missing[0] if missing else (len(found), None)
    run(found[:first], scratch)
    if package is not None:
        pytest.skip(f"{package} is not installed: ran the page as far as line {found[first].line}")


@over_pages
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]+`", "", prose(page.read_text()))  # `kernel[grid](x)` is not a link
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(there.read_text()), f"{target}: no such heading"


def anchors(markdown: str) -> list[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(markdown), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@over_pages
def test_names_of_files_and_tests_exist(page: Path) -> None:
    text = page.read_text()
    made_here = {f"kernels/{b.module.rpartition('.')[2]}.py" for b in blocks(text) if b.module}
    stems = {Path(path).stem for path in made_here}
    for path in re.findall(r"`((?:[\w.]+/)+[\w.]+\.\w+)`", text):
        known = (ROOT / path).exists() or Path(path).stem.removeprefix("test_") in stems
        assert known or path == PYTORCHS_TESTS, f"{path}: no such file"
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, f"{name}: no such test"


@over_pages
def test_make_targets_exist(page: Path) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for command in re.findall(r"(?:`|^\$ )make ([^`#\n]+)", page.read_text(), flags=re.MULTILINE):
        for word in command.split():
            assert "=" in word or word in targets, f"make {word}: not in the Makefile"


QUOTE = re.compile(r"\n\n((?:[^\n]+\n)*[^\n]*:)\n\n```text\n(.*?)```", re.DOTALL)


def misquoted(markdown: str) -> list[str]:
    """Lines of a `text` block that are in none of the source files that the sentence before it names."""
    wrong = []
    for sentence, quote in QUOTE.findall(markdown):
        files = [ROOT / path for path in re.findall(r"`((?:kernels|retainops)/[\w/]+\.py)`", sentence)]
        source = {line.strip() for file in files for line in file.read_text().splitlines()}
        wrong += [line for line in quote.splitlines() if source and line.strip() not in source | {""}]
    return wrong


@over_pages
def test_quotations_of_the_source_are_exact(page: Path) -> None:
    assert not misquoted(page.read_text())


# A figure is a number with a unit that somebody measured, or a model predicted.
FIGURE = re.compile(r"(?<![\w.])\d[\d.,]*\s?(?:[TG]B/s|[mµu]s|ns|%|dB|TFLOPS|x(?=\W)|times (?:as|faster))")
SOURCE = re.compile(r"\]\(bench/results/|predict", re.IGNORECASE)


def unsourced(markdown: str) -> list[str]:
    """Figures under a heading that says neither where the results are nor that a model predicts them."""
    sections = re.split(r"^(?=#)", prose(markdown), flags=re.MULTILINE)
    return [figure for section in sections if not SOURCE.search(section) for figure in FIGURE.findall(section)]


def test_figures_in_the_readme_have_a_source() -> None:
    assert not unsourced((ROOT / "README.md").read_text())


@pytest.mark.parametrize("op", list(registry.ops()), ids=lambda op: op.name)
def test_every_op_is_on_the_page_of_its_room(op: registry.Op) -> None:
    """docs/ops/gated.md holds the ops of retainops/ops/gated.py, and so on."""
    room = op.reference.__module__.rpartition(".")[2]
    page = (ROOT / "docs" / "ops" / f"{room}.md").read_text()
    assert f"`{op.name}`" in page
    assert op.formula in page
    for point in op.points:
        assert f"{point.name} = {point.formula}" in page


# The checks themselves, on pages that are wrong.


def test_a_page_that_prints_something_else_is_caught(scratch: Path) -> None:
    page = "```python\nx = 1\n```\n\nThen:\n\n```python\nprint(x)\n```\n\n```text\n{}\n```\n"
    run(blocks(page.format(1)), scratch)
    with pytest.raises(pytest.fail.Exception, match="line 7 prints:\n1\nand the page says:\n2"):
        run(blocks(page.format(2)), scratch)


def test_code_that_fails_is_caught_at_its_line(scratch: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        run(blocks("# Page\n\n```python\nx = 0\n1 / x\n```\n"), scratch)
    assert caught.traceback[-1].lineno + 1 == 5


def test_a_misquotation_is_caught() -> None:
    page = "# Page\n\nFrom `kernels/binary.py`:\n\n```text\ndef mul(a, b):\n    return a {} b\n```\n"
    assert not misquoted(page.format("*"))
    assert misquoted(page.format("@")) == ["    return a @ b"]


@pytest.mark.parametrize("figure", ["3.9 TB/s", "12 µs", "20%", "1.2x", "3 times faster"])
def test_figures_without_a_source_are_caught(figure: str) -> None:
    assert unsourced(f"# Speed\n\nIt takes {figure}.\n")
    assert not unsourced(f"# Speed\n\nIt takes {figure} ([measured](bench/results/nvidia-h200/results.md)).\n")
    assert not unsourced(f"# Speed\n\n```text\n{figure}\n```\n")
