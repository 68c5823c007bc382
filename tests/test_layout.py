"""Imports run one way: core <- methods, hindsight <- named <- hosts <- dropin; instruments on top, commands last."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "src" / "stepcache"
INSTRUMENTS = ("planning", "measure", "bench", "fleet")
RUNTIME = {  # package -> packages it may import
    "core": ("core", "files"),
    "methods": ("core", "files", "methods"),
    "hindsight": ("core", "files", "hindsight"),
    "named": ("core", "methods", "hindsight", "planning"),
    "hosts": ("core", "files", "methods", "hindsight", "named", "hosts"),
}
BARE = ("core", "methods", "hindsight")
"""What fits into a drop-in: only the standard library, torch, and each other."""
SHARED = {"stepcache.commands.flags"}
"""What the commands share."""
ENTRANCE = "stepcache.commands.main"


def name_of(path):
    parts = path.relative_to(SOURCES.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path):
    """All modules a file imports, wherever in it: of the package with the submodule where it names one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            for alias in node.names:
                inside = SOURCES.parent.joinpath(*module.split("."), alias.name)
                is_module = inside.is_dir() or inside.with_suffix(".py").is_file()
                yield f"{module}.{alias.name}" if is_module else module


GRAPH = {name_of(path): sorted(set(imported(path))) for path in sorted(SOURCES.rglob("*.py"))}


def package(module):
    """The package below stepcache; "files" is a module of its own, "" is stepcache itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "stepcache" and len(parts) > 1 else ""


def edges(*packages):
    """(module, import) for what the modules of these packages import."""
    return [(m, i) for m, names in GRAPH.items() if package(m) in packages for i in names]


def test_the_graph_is_seen():
    assert "stepcache.core.plan" in GRAPH["stepcache.methods.lemica"]
    assert "stepcache.measure.generation" in GRAPH["stepcache.commands.generate"]


@pytest.mark.parametrize("name", RUNTIME)
def test_the_runtime_imports_downwards(name):
    assert [e for e in edges(name) if e[1].startswith("stepcache") and package(e[1]) not in RUNTIME[name]] == []


@pytest.mark.parametrize("name", BARE)
def test_what_goes_into_a_drop_in_needs_torch_only(name):
    foreign = {i.split(".")[0] for _, i in edges(name)} - {"stepcache", "torch"}
    assert foreign <= sys.stdlib_module_names


def test_files_import_the_standard_library_only():
    assert {i.split(".")[0] for i in GRAPH["stepcache.files"]} <= sys.stdlib_module_names


def test_instruments_import_no_drop_in_and_no_command():
    assert [e for e in edges(*INSTRUMENTS) if package(e[1]) in ("dropin", "commands")] == []


def test_drop_ins_import_no_instrument():
    allowed = {  # a calibration, and the plan it is for, are what --lemica_calibration and --plan are about
        "stepcache.planning.calibration",
        "stepcache.planning.plan_file",
    }
    found = [e for e in edges("dropin") if package(e[1]) in (*INSTRUMENTS, "commands") and e[1] not in allowed]
    assert found == []


def test_commands_are_imported_by_the_entrance_only():
    """Also not by the scripts beside the package, which may enter where users do."""
    scripts = [*(ROOT / "tools").glob("*.py"), *(ROOT / "bench").glob("*.py")]
    outside = [(path.name, i) for path in scripts for i in imported(path)]
    found = [
        (who, what)
        for who, what in [*((m, i) for m, names in GRAPH.items() for i in names), *outside]
        if package(what) == "commands" and what not in (*SHARED, ENTRANCE) and who != ENTRANCE
    ]
    assert found == []


def test_what_commands_share_is_imported_by_commands_only():
    assert {m for m, names in GRAPH.items() if SHARED & set(names) and package(m) != "commands"} == set()


def test_there_is_no_circle():
    seen, path = set(), []

    def walk(module):
        if module in path:
            raise AssertionError(" -> ".join([*path[path.index(module) :], module]))
        if module in seen or module not in GRAPH:
            return
        path.append(module)
        for other in GRAPH[module]:
            if not module.startswith(other):  # a package's own __init__ comes first anyway
                walk(other)
        seen.add(path.pop())

    for module in GRAPH:
        walk(module)


def test_help_and_version_need_no_torch():
    code = (
        "import sys; from stepcache.commands.main import main\n"
        "try: main([sys.argv[1]])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules"
    )
    for flag in ("--version", "--help"):
        done = subprocess.run([sys.executable, "-c", code, flag], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_what_the_package_offers_is_there():
    import stepcache

    for name in stepcache.__all__:
        assert getattr(stepcache, name).__module__.startswith("stepcache")
    assert set(stepcache.__all__) <= set(dir(stepcache))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        stepcache.nothing  # noqa: B018
