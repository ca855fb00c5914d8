"""The rules of the house: which room may know which, how long a file may be, what a wheel holds."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("converters", "trainer", "kernels")
MAX_LINES = 400
BANNED_NAMES = {"utils.py", "helpers.py", "common.py", "base.py"}

MAY_IMPORT = {
    "kernels": {"kernels"},
    "converters": {"converters"},
    "trainer": {"trainer", "converters", "kernels"},
}
"""Which rooms a room may know. The command line, which stands in ckptbridge itself, may know all of them."""


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def library() -> list[Path]:
    """Every file that the package installs: the rooms, and the front door without its links to them."""
    front = [p for p in sources("ckptbridge") if not set(ROOMS) & set(p.relative_to(ROOT / "ckptbridge").parts)]
    return front + sources(*ROOMS)


def told(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(module: ast.Module) -> Iterator[str]:
    """The dotted name of everything that is imported anywhere in a file, within functions too."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which room is meant"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def known_to(module: ast.Module) -> set[str]:
    """The parts of ckptbridge that a file imports: `ckptbridge.converters.errors` is converters."""
    return {name.split(".")[1] for name in imported(module) if name.startswith("ckptbridge.") and name.count(".")} - {
        "__version__"
    }


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_knows_only_the_rooms_below_it(room: str) -> None:
    assert sources(room), f"{room} is empty"
    for path in sources(room):
        strangers = known_to(tree(path)) - MAY_IMPORT[room]
        assert not strangers, f"{told(path)} imports ckptbridge.{strangers.pop()}"


def test_the_rule_of_rooms_sees_a_violation() -> None:
    wrong = ast.parse("def f():\n    from ckptbridge.trainer.loop import train\n    import ckptbridge.cli\n")
    assert known_to(wrong) == {"trainer", "cli"}


def test_kernels_need_torch_and_triton_only() -> None:
    allowed = {"torch", "triton", "ckptbridge", "__future__", *sys.stdlib_module_names}
    for path in sources("kernels"):
        found = {name.split(".")[0] for name in imported(tree(path))}
        assert found <= allowed, f"{told(path)} imports {sorted(found - allowed)}"


def test_converters_need_no_transformers_and_no_megatron() -> None:
    for path in sources("converters"):
        found = {name.split(".")[0] for name in imported(tree(path))}
        assert not found & {"transformers", "megatron", "typer", "rich", "pydantic", "triton"}, told(path)


def test_rooms_are_imported_by_their_one_name() -> None:
    for path in [*library(), *sources("tests", "benchmarks")]:
        found = {name.split(".")[0] for name in imported(tree(path))}
        assert not found & set(ROOMS), f"{told(path)} imports {found & set(ROOMS)}: say ckptbridge.<room>"


def test_no_file_is_too_long() -> None:
    long = {told(p): n for p in library() if (n := len(p.read_text(encoding="utf-8").splitlines())) > MAX_LINES}
    assert not long


def test_no_file_is_named_after_nothing() -> None:
    everywhere = [*library(), *sources("tests", "benchmarks")]
    assert not [told(path) for path in everywhere if path.name in BANNED_NAMES]


def test_the_rooms_are_no_packages() -> None:
    """A folder `kernels` with an `__init__.py` would hide the package of that name that transformers imports."""
    for room in ROOMS:
        assert not [told(path) for path in sources(room) if path.name == "__init__.py"]
        link = ROOT / "ckptbridge" / room
        assert link.is_symlink()
        assert link.resolve() == ROOT / room


def _calls(module: ast.Module, name: str) -> list[int]:
    return [
        node.lineno
        for node in ast.walk(module)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    ]


def test_the_library_prints_nothing() -> None:
    assert not {told(path): lines for path in library() if (lines := _calls(tree(path), "print"))}


def test_the_library_asserts_nothing() -> None:
    """`python -O` removes assertions, and a user deserves a sentence."""
    found = {told(p): [n.lineno for n in ast.walk(tree(p)) if isinstance(n, ast.Assert)] for p in library()}
    assert not {path: lines for path, lines in found.items() if lines}


def test_the_library_never_runs_a_pickle() -> None:
    """Reading goes through the restricted unpickler; only writing may use pickle and torch.save."""
    for path in library():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                spelled = f"{node.value.id}.{node.attr}"
                assert spelled not in ("torch.load", "pickle.load", "pickle.loads"), f"{told(path)}:{node.lineno}"


def test_every_public_name_says_what_it_is() -> None:
    """Files, classes and functions of the converters have a docstring, unless an abstract one stands above them."""
    missing: list[str] = []
    for path in sources("converters"):
        module = tree(path)
        if not ast.get_docstring(module):
            missing.append(told(path))
        for node in module.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                lines = (node.end_lineno or 0) - node.lineno
                if not ast.get_docstring(node) and lines > 6:
                    missing.append(f"{told(path)}: {node.name}")
    assert not missing


HELP = """
import sys
sys.argv = ["ckptbridge", "--help"]
from ckptbridge.__main__ import main
try:
    main()
except SystemExit as stopped:
    code = stopped.code
loaded = {name.split(".")[0] for name in sys.modules}
heavy = sorted(loaded & {"torch", "transformers", "numpy", "triton", "safetensors"})
sys.stderr.write(f"{code} {heavy}")
"""


def test_help_is_told_without_importing_torch() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.endswith("0 []"), done.stderr[-2000:]
    assert "hf2mcore" in done.stdout


EVERY_CONVERTER = """
import importlib, pathlib, sys
room = pathlib.Path("converters")
for path in sorted(room.rglob("*.py")):
    importlib.import_module("ckptbridge." + ".".join(path.with_suffix("").parts))
loaded = {name.split(".")[0] for name in sys.modules}
sys.stderr.write(f"imported {sorted(loaded & {'megatron', 'transformer_engine', 'transformers', 'triton'})}")
"""


def test_the_converters_need_neither_megatron_nor_transformers() -> None:
    done = subprocess.run(
        [sys.executable, "-c", EVERY_CONVERTER], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stderr.endswith("imported []"), done.stderr[-2000:]


def test_the_wheel_holds_the_rooms_as_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        table = archive.read("ckptbridge/converters/families/llama.py")
    assert table == (ROOT / "converters" / "families" / "llama.py").read_bytes()
    expected = {f"ckptbridge/{path.relative_to(ROOT)}" for path in sources(*ROOMS)}
    assert expected <= names
    assert "ckptbridge/py.typed" in names
    strangers = {name.split("/")[0] for name in names if not name.startswith("ckptbridge-")} - {"ckptbridge"}
    assert not strangers, "a top-level package of our own would collide with others"


def test_nothing_in_the_repository_tells_of_the_machine_it_was_written_on() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in listed:
        path = ROOT / name
        if path.is_symlink() or not path.is_file() or path == Path(__file__):
            continue
        text = path.read_bytes().decode(errors="replace")
        for folder in (ROOT, Path.home()):
            assert len(folder.parts) < 2 or f"{folder}/" not in text, name
