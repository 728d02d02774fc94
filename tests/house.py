"""Print the size and the shape of the code: ``python tests/house.py``. The limits are those of CONTRIBUTING.md.

For each package: lines, classes, functions, functions that are long or complex, and ``Any`` per 1,000 lines. A
function's complexity is McCabe's number (T. J. McCabe, "A Complexity Measure", IEEE TSE, 1976), as ruff counts it.
"""

from __future__ import annotations

import ast
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("events", "trainer", "sinks")
MAX_LINES = {"code": 25_000, "tests": 26_000}
MAX_ATTRIBUTES, MAX_FUNCTION_LINES, MAX_COMPLEXITY, MAX_MODULE_LINES, MAX_ANY = 16, 60, 15, 400, 12.0


def sources(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


def count_lines(folder: str) -> int:
    return sum(len(path.read_text().splitlines()) for path in sources(folder))


def functions_of(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def is_struct(node: ast.ClassDef) -> bool:
    """Whether the class is an event or an argument Struct, or a dataclass: its attributes are its purpose."""
    bases = [ast.unparse(base) for base in node.bases]
    return any("Struct" in base or base in ("Event", "_Checked") for base in bases) or any(
        "dataclass" in ast.unparse(one) for one in node.decorator_list
    )


def attributes_of(node: ast.ClassDef) -> set[str]:
    return {
        target.attr
        for child in ast.walk(node)
        if isinstance(child, ast.Attribute)
        and isinstance(target := child, ast.Attribute)
        and isinstance(child.ctx, ast.Store)
        and isinstance(child.value, ast.Name)
        and child.value.id == "self"
    }


def main() -> int:
    """Print the table and each limit that is exceeded; return 1 if one is."""
    exceeded: list[str] = []
    lengths: dict[str, list[tuple[int, str]]] = {}
    classes: list[tuple[int, str]] = []
    modules: list[tuple[int, str]] = []
    names: dict[str, list[str]] = {}
    any_count = 0
    for package in PACKAGES:
        lengths[package] = []
        for path in sources(package):
            where = str(path.relative_to(ROOT))
            text = path.read_text()
            tree = ast.parse(text)
            modules.append((len(text.splitlines()), where))
            any_count += sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(tree))
            for function in functions_of(tree):
                length = (function.end_lineno or function.lineno) - function.lineno + 1
                lengths[package].append((length, f"{where}:{function.lineno} {function.name}"))
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    names.setdefault(node.name, []).append(where)
                    if not is_struct(node):
                        classes.append((len(attributes_of(node)), f"{where}:{node.lineno} {node.name}"))
    print(f"{'':10}{'lines':>8}{'functions':>11}{'median':>8}{'p90':>6}{'max':>6}")
    for package, found in lengths.items():
        sizes = sorted(length for length, _ in found)
        p90 = sizes[len(sizes) * 9 // 10]
        print(
            f"{package:10}{count_lines(package):8,}{len(sizes):11,}{statistics.median(sizes):8.0f}{p90:6}{sizes[-1]:6}"
        )
    code, tests = sum(map(count_lines, PACKAGES)), count_lines("tests")
    print(f"{'all':10}{code:8,}\n{'tests':10}{tests:8,}")
    any_rate = any_count / code * 1000
    print(f"Any per 1,000 lines: {any_rate:.1f}")
    if code > MAX_LINES["code"]:
        exceeded.append(f"{code:,} lines of code, maximum {MAX_LINES['code']:,}")
    if tests > MAX_LINES["tests"]:
        exceeded.append(f"{tests:,} lines of tests, maximum {MAX_LINES['tests']:,}")
    if any_rate > MAX_ANY:
        exceeded.append(f"{any_rate:.1f} Any per 1,000 lines, maximum {MAX_ANY}")
    long_modules = [one for one in sorted(modules, reverse=True) if one[0] > MAX_MODULE_LINES]
    if len(long_modules) > 1:
        exceeded += [
            f"{lines} lines in {where}, maximum {MAX_MODULE_LINES} in all modules but one"
            for lines, where in long_modules
        ]
    for length, where in sorted((one for found in lengths.values() for one in found), reverse=True):
        if length > MAX_FUNCTION_LINES:
            exceeded.append(f"{length} lines in {where}, maximum {MAX_FUNCTION_LINES}")
    for count, where in sorted(classes, reverse=True):
        if count > MAX_ATTRIBUTES:
            exceeded.append(f"{count} attributes in {where}, maximum {MAX_ATTRIBUTES}")
    for name, places in sorted(names.items()):
        if len(places) > 1:
            exceeded.append(f"class {name} in {', '.join(places)}: one class per name")
    exceeded += complex_functions()
    for line in exceeded:
        print(f"exceeded: {line}")
    return 1 if exceeded else 0


def complex_functions() -> list[str]:
    config = f"lint.mccabe.max-complexity={MAX_COMPLEXITY}"
    command = [
        shutil.which("ruff") or "ruff",
        "check",
        "--select",
        "C901",
        "--config",
        config,
        "--output-format",
        "json",
        *PACKAGES,
    ]
    found = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout)
    return [f"{one['message']} in {Path(one['filename']).relative_to(ROOT)}:{one['location']['row']}" for one in found]


if __name__ == "__main__":
    sys.exit(main())
