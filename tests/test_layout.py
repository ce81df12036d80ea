"""The house: five files that are the paper, plumbing for the rest, imports that run one way."""

import ast
import functools
from pathlib import Path

import pytest
from conftest import ROOT

# lines of code that each of the five may have; together 1,200
FIVE = {"losses": 250, "ptdpo": 160, "rollout": 280, "hints": 230, "train": 300}
# what each of the five may import of ours; train may import everything
ALLOWED = {
    "losses": set(),
    "ptdpo": {"losses", "plumbing.settings"},
    "rollout": {f"plumbing.{name}" for name in ("answers", "decoding", "images", "memory")},
    "hints": {
        "rollout",
        *(f"plumbing.{name}" for name in ("hint_rules", "images", "places", "spoilers")),
    },
}
# they alone know the embedded world
COMMANDS = {"train", "plumbing.build_hints", "plumbing.slow_motion"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).glob("*.py"))]


TREES = {
    module_name(path): ast.parse(path.read_text("utf-8")) for path in files(".", "plumbing", "toy")
}


def is_for_annotations(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"


def statements(tree: ast.AST):
    """All nodes, but for imports that serve annotations alone."""
    for child in ast.iter_child_nodes(tree):
        if not is_for_annotations(child):
            yield child
            yield from statements(child)


@functools.cache
def imported(module: str) -> set[str]:
    """The modules that a module imports: ours by their name here, others by their first part."""
    names = set()
    for node in statements(TREES[module]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    ours = names & set(TREES)
    return ours | {name.partition(".")[0] for name in names - ours}


def ours(module: str) -> set[str]:
    return imported(module) & set(TREES)


def code_lines(module: str) -> list[int]:
    """Numbers of the lines that are neither blank nor comment nor docstring."""
    path = ROOT / (module.replace(".", "/") + ".py")
    text_lines = set()
    for node in ast.walk(TREES[module]):
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            text_lines |= set(range(docstring.lineno, docstring.end_lineno + 1))
    return [
        number
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if line.strip() and not line.strip().startswith("#") and number not in text_lines
    ]


def test_there_are_five_files_and_they_are_short():
    assert {path.stem for path in ROOT.glob("*.py")} == set(FIVE)
    counts = {module: len(code_lines(module)) for module in FIVE}
    assert all(counts[module] <= limit for module, limit in FIVE.items()), counts
    assert sum(counts.values()) <= 1200, counts


def test_the_readme_says_how_long_they_are():
    readme = (ROOT / "README.md").read_text("utf-8")
    for module in FIVE:
        assert f"| [{module}.py]({module}.py) | {len(code_lines(module))} |" in readme


@pytest.mark.parametrize("path", files(".", "plumbing", "toy", "tests", "bench"), ids=module_name)
def test_a_line_has_at_most_100_columns(path):
    lines = path.read_text("utf-8").splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > 100] == []


@pytest.mark.parametrize("module", TREES)
def test_a_function_has_at_most_50_lines_of_code(module):
    lines = code_lines(module)
    functions = [n for n in ast.walk(TREES[module]) if isinstance(n, ast.FunctionDef)]
    sizes = {n.name: sum(n.lineno <= line <= n.end_lineno for line in lines) for n in functions}
    assert all(size <= 50 for size in sizes.values()), sizes


@pytest.mark.parametrize("module", ALLOWED)
def test_the_five_import_one_way(module):
    assert ours(module) <= ALLOWED[module]


def test_nothing_imports_train_and_the_commands_alone_know_the_world():
    for module in TREES:
        if module != "plumbing.slow_motion":  # it shows a step of train.Trainer
            assert "train" not in ours(module), module
        if module not in COMMANDS and not module.startswith("toy"):
            assert not any(name.startswith("toy") for name in ours(module)), module


def test_no_module_imports_itself_by_a_detour():
    def reachable(module: str, seen: set[str]) -> set[str]:
        for name in ours(module) - seen:
            seen.add(name)
            reachable(name, seen)
        return seen

    assert [module for module in TREES if module in reachable(module, set())] == []


def test_losses_needs_torch_alone():
    standard = {"__future__", "dataclasses", "math"}
    assert imported("losses") - standard == {"torch"}
