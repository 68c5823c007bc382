"""Build the drop-in scripts: each main in `src/stepcache/dropin` becomes one self-contained file.

    python tools/bundle.py            write the built files
    python tools/bundle.py --check    exit 1 if one of them is not what its sources say, or is longer than it may be

A built file holds the parts of its modules that the main needs, each after those it needs itself, the method's own
first of all. Modules that end up in one file must not define a top-level name twice; that is an error here.
"""

from __future__ import annotations

import argparse
import ast
import functools
import io
import itertools
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "stepcache"


@dataclass(frozen=True)
class Target:
    """A built file: its main, the module that holds the method, and how long it may be.

    `code`: lines without blanks, comments and docstrings; `total`: all lines. `figures`: of the published tables only
    the rows of models whose names begin so.
    """

    main: str
    method: str
    code: int
    total: int
    figures: str = ""


BUILT = {
    "LeMiCa4Wan2.1/inference_wan.py": Target("lemica_wan", "methods.lemica", 750, 1125, "wan2.1"),
    "LeMiCa4HunyuanVideo-1.5/lemica_generate.py": Target("lemica_hunyuan", "methods.lemica", 720, 1095, "hunyuan"),
    "LeMiCa4QwenImage/inference_qwenimage.py": Target("lemica_qwenimage", "methods.lemica", 710, 1070, "qwen"),
    "EasyCache4Wan2.1/easycache_generate.py": Target("easycache_wan", "methods.easycache", 690, 1035),
    "MagCache4Wan2.1/magcache_generate.py": Target("magcache_wan", "methods.magcache", 1065, 1515),
    "Hindsight4Wan2.1/hindsight_generate.py": Target("hindsight_wan", "hindsight.corrector", 1085, 1580),
    "Hindsight4HunyuanVideo-1.5/hindsight_generate.py": Target("hindsight_hunyuan", "hindsight.corrector", 1080, 1580),
    "Hindsight4QwenImage/hindsight_generate.py": Target("hindsight_qwenimage", "hindsight.corrector", 1080, 1580),
}


@dataclass(frozen=True)
class Part:
    """A top-level statement with the comments above it and the docstring below: what it defines and what it uses."""

    text: str
    defines: frozenset[str]
    uses: frozenset[str]
    effect: bool


@dataclass(frozen=True)
class Module:
    """A source module taken apart: its docstring, its foreign imports, the modules it needs, and all the rest."""

    name: str
    doc: str
    imports: tuple[ast.Import | ast.ImportFrom, ...]
    needs: tuple[str, ...]
    parts: tuple[Part, ...]


def read_module(name: str, strict: bool = True) -> Module:
    """Take a module of the package apart; ValueError for an import that cannot be bundled, if `strict`."""
    path = ROOT / "src" / Path(*name.split(".")).with_suffix(".py")
    text = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.splitlines()
    imports: list[ast.Import | ast.ImportFrom] = []
    needs: list[str] = []
    parts: list[Part] = []
    end = 0
    for node in tree.body:
        start, end_before, end = _start(node, lines, end), end, node.end_lineno or node.lineno
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            if strict and any(alias.asname for alias in node.names):
                raise ValueError(f"{path}:{node.lineno}: 'import ... as' of the package's own names cannot be bundled.")
            needs.append(str(node.module))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            if strict and isinstance(node, ast.Import) and any(a.name.split(".")[0] == PACKAGE for a in node.names):
                raise ValueError(f"{path}:{node.lineno}: write 'from {PACKAGE}... import name' to make it bundle.")
            imports.append(node)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if parts:  # the docstring of a constant
                last = parts.pop()
                parts.append(Part(f"{last.text}\n{_cut(lines, end_before, end)}", last.defines, last.uses, last.effect))
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            parts.append(_part(node, "\n".join(lines[start:end])))
    return Module(name, ast.get_docstring(tree) or "", tuple(imports), tuple(needs), tuple(parts))


def _start(node: ast.stmt, lines: list[str], above: int) -> int:
    """Index of the statement's first line, decorators and comments included."""
    start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
    while start > above and lines[start - 1].startswith("#"):
        start -= 1
    return start


def _cut(lines: list[str], start: int, end: int) -> str:
    return "\n".join(lines[start:end]).strip("\n")


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """The node and what is below it, annotations excepted: they are never evaluated."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _running(child)


def _part(node: ast.stmt, text: str) -> Part:
    uses = frozenset(n.id for n in _running(node) if isinstance(n, ast.Name))
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return Part(text, frozenset({node.name}), uses, False)
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    flat = [t for target in targets for t in (target.elts if isinstance(target, ast.Tuple) else [target])]
    names = frozenset(t.id for t in flat if isinstance(t, ast.Name))
    return Part(text, names, uses, not names)


def in_order(target: Target) -> list[Module]:
    """The main and all it needs, every module after those it imports, the method's as early as that allows."""
    done: dict[str, Module] = {}

    def visit(name: str) -> None:
        if name not in done:
            module = read_module(name)
            for need in module.needs:
                visit(need)
            done[name] = module

    main = f"{PACKAGE}.dropin.{target.main}"
    visit(f"{PACKAGE}.{target.method}")
    visit(main)
    return list(done.values())


def needed(modules: list[Module]) -> dict[str, list[Part]]:
    """Module -> those of its parts that the main (the last module) uses, directly or not."""
    home: dict[str, str] = {}
    for module in modules:
        for name in (n for part in module.parts for n in part.defines):
            if name in home:
                raise ValueError(f"{name} is defined in {home[name]} and in {module.name}; rename one of them.")
            home[name] = module.name
    by_name = {name: part for module in modules for part in module.parts for name in part.defines}
    effects = [part for module in modules for part in module.parts if part.effect]
    queue, kept = [*modules[-1].parts, *effects], set()
    while queue:
        part = queue.pop()
        if id(part) not in kept:
            kept.add(id(part))
            queue += [by_name[name] for name in part.uses if name in by_name]
    return {module.name: [part for part in module.parts if id(part) in kept] for module in modules}


TABLES = ("SCHEDULES", "RATIOS", "RECOMMENDED", "SOURCES")
"""Names of published tables: model -> figures."""


def shortened(part: Part, used: set[str], figures: str) -> Part:
    """A part without methods that nobody calls, and without rows of a table that are of other models."""
    tree, lines, drop = ast.parse(part.text), part.text.splitlines(), set[int]()
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                unused = isinstance(method, ast.FunctionDef) and method.name not in used
                if unused and not method.name.startswith("__"):  # type: ignore[attr-defined]
                    start = min([method.lineno, *(d.lineno for d in method.decorator_list)]) - 1  # type: ignore[attr-defined]
                    drop |= {*range(start, method.end_lineno or start), start - 1}
        if figures and part.defines & set(TABLES):
            for table in (n for n in ast.walk(node) if isinstance(n, ast.Dict)):
                for key, value in zip(table.keys, table.values, strict=True):
                    model = key.value if isinstance(key, ast.Constant) else None
                    if isinstance(key, ast.Constant) and isinstance(model, str) and not model.startswith(figures):
                        drop |= set(range(key.lineno - 1, value.end_lineno or key.lineno))
    text = "\n".join(line for i, line in enumerate(lines) if i not in drop)
    uses = frozenset(n.id for n in _running(ast.parse(text)) if isinstance(n, ast.Name))
    return Part(text, part.defines, uses, part.effect)


def condensed(part: Part) -> Part:
    """A part whose docstrings are cut to their first paragraph; the package has them in full."""
    lines, drop = part.text.splitlines(), set[int]()
    for node in ast.walk(ast.parse(part.text)):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or not ast.get_docstring(node):
            continue
        doc = node.body[0]
        text = lines[doc.lineno - 1 : doc.end_lineno]
        if "" in (line.strip() for line in text):
            end = doc.lineno - 1 + [line.strip() for line in text].index("")
            drop |= set(range(end, doc.end_lineno or end))
            lines[end - 1] += '"""'
    return replace(part, text="\n".join(line for i, line in enumerate(lines) if i not in drop))


@functools.cache
def package_words() -> frozenset[str]:
    """`words` of the whole package. A method that none of it asks for is there for others: upstream calls it."""
    paths = (ROOT / "src" / PACKAGE).rglob("*.py")
    names = [".".join(path.relative_to(ROOT / "src").with_suffix("").parts) for path in paths]
    return frozenset(words([read_module(name, strict=False) for name in names if not name.endswith("__")]))


def words(modules: list[Module]) -> set[str]:
    """Every attribute that is asked for, and every string that could name one."""
    found: set[str] = set()
    for part in (part for module in modules for part in module.parts):
        for node in ast.walk(ast.parse(part.text)):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                found.add(node.value)
    return found


def methods(modules: list[Module]) -> set[str]:
    """Names of all methods."""
    nodes = (n for module in modules for part in module.parts for n in ast.walk(ast.parse(part.text)))
    return {m.name for n in nodes if isinstance(n, ast.ClassDef) for m in n.body if isinstance(m, ast.FunctionDef)}


def shaken(target: Target) -> list[Module]:
    """The modules of a built file with what its main needs of them, until nothing more can go."""
    modules = in_order(target)
    size = 0
    while size != (now := sum(len(part.text) for module in modules for part in module.parts)):
        size = now
        kept = needed(modules)
        modules = [replace(module, parts=tuple(kept[module.name])) for module in modules]
        used = words(modules) | {name for name in methods(modules) if name not in package_words()}
        shorter = [tuple(shortened(part, used, target.figures) for part in module.parts) for module in modules]
        modules = [replace(module, parts=parts) for module, parts in zip(modules, shorter, strict=True)]
    return modules


def build(target: Target) -> str:
    """The text of a built file."""
    modules = shaken(target)
    whole = (f"{PACKAGE}.{target.method}", modules[-1].name)
    parts = {
        module.name: [part if module.name in whole else condensed(part) for part in module.parts] for module in modules
    }
    modules = [module for module in modules if parts[module.name]]
    text = "\n".join(part.text for kept in parts.values() for part in kept)
    names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    defined = {name for kept in parts.values() for part in kept for name in part.defines}
    ours = {name for module in in_order(target) for part in module.parts for name in part.defines}
    absent = sorted((names & ours) - defined)
    bodies = []
    for module in modules:
        rule = f"# {'-' * 10} {module.name} ".ljust(119, "-")
        about = "" if module is modules[-1] else f"\n# {module.doc.splitlines()[0]}"
        texts = [part.text for part in parts[module.name]]
        if module is not modules[-1]:
            texts = [text for text in texts if not text.startswith('if __name__ == "__main__"')]
        bodies.append(rule + about + "\n\n" + _spaced(texts))
    head = f"from __future__ import annotations\n\n{_merge_imports(modules, names)}"
    if absent:
        about = "# Of the package; here they are only named, in annotations."
        head += f"\n\n{about}\n{' = '.join(absent)} = Any"
    rest = "\n\n".join(["", head]) + "\n\n\n" + "\n\n\n".join(bodies) + "\n"
    first = _header(modules, [0] * len(modules)).count("\n") + 1  # the lines do not depend on the numbers in them
    rules = [n for n, line in enumerate(rest.splitlines(), start=first) if line.startswith("# ---------- ")]
    return _header(modules, rules) + rest


def _spaced(texts: list[str]) -> str:
    """Statements with two blank lines around functions and classes, none between constants."""
    out = texts[0]
    for before, text in itertools.pairwise(texts):
        big = any("\ndef " in f"\n{t}" or "\nclass " in f"\n{t}" for t in (before, text))
        out += ("\n\n\n" if big else "\n") + text
    return out


def _header(modules: list[Module], starts: list[int]) -> str:
    """The docstring of a built file, with its parts and the lines at which they begin."""
    rows = [f"    {start:>5}  {module.name}" for module, start in zip(modules, starts, strict=True)]
    return (
        f'r"""{modules[-1].doc}\n\nGenerated by tools/bundle.py of the stepcache project (Apache-2.0). '
        "Do not edit: change the sources and build again\n"
        "(there the docstrings are in full). Its parts, and the lines at which they begin:\n\n"
        + "\n".join(rows)
        + '\n"""'
    )


def _merge_imports(modules: list[Module], used: set[str]) -> str:
    """All foreign imports that are used, once: plain ones, then `from` ones with their names joined."""
    plain: set[str] = set()
    named: dict[str, set[str]] = {}
    for node in (n for module in modules for n in module.imports):
        kept = [a for a in node.names if (a.asname or a.name.split(".")[0]) in used]
        if isinstance(node, ast.ImportFrom):
            if node.module != "__future__" and kept:
                named.setdefault(str(node.module), set()).update(_alias(a) for a in kept if a.name != "TYPE_CHECKING")
        else:
            plain |= {_alias(a) for a in kept}
    lines = [f"import {name}" for name in sorted(plain)]
    lines += [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(named.items()) if names]
    standard = [line for line in lines if line.split()[1].split(".")[0] in sys.stdlib_module_names]
    others = [line for line in lines if line not in standard]
    return "\n".join([*standard, "", *others])


def _alias(alias: ast.alias) -> str:
    return f"{alias.name} as {alias.asname}" if alias.asname else alias.name


def code_lines(text: str) -> int:
    """Lines of code: no blanks, comments or docstrings."""
    docs: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docs |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    ignored = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in ignored:
            found |= set(range(token.start[0], token.end[0] + 1))
    return len(found - docs)


def too_long(target: Target, text: str) -> str:
    """In words, by how much a built file is longer than it may be; empty if it is not."""
    code, total = code_lines(text), text.count("\n")
    if code <= target.code and total <= target.total:
        return ""
    return f"{code} lines of code, {total} in all; it may have {target.code} and {target.total}"


def main() -> int:
    """Build or check all drop-ins."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a built file is stale")
    args = parser.parse_args()
    stale, long = [], []
    for name, target in BUILT.items():
        path, text = ROOT / name, build(target)
        if found := too_long(target, text):
            long.append(f"{name} has {found}")
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not args.check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"built {name} ({code_lines(text)} lines of code, {text.count(chr(10))} in all)")
    if args.check and stale:
        print(f"stale: {', '.join(stale)}; run python tools/bundle.py and commit the result.", file=sys.stderr)
    for sentence in long:
        print(sentence, file=sys.stderr)
    return 1 if long or (args.check and stale) else 0


if __name__ == "__main__":
    sys.exit(main())
