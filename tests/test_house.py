"""The house rules, held by looking at the source: who may import whom, who may speak to what, and what all files owe.

The table of rooms is FLOORS. A new file in mossnano_stdio/ belongs in it before these tests pass.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from mossnano_stdio.cli import VERBS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mossnano_stdio"

# From the ground up: a room imports from lower floors only, never from its own.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "frozen"}),
    frozenset({"files", "tokens"}),
    frozenset({"pcm", "weights", "playback"}),
    frozenset({"chunks"}),
    frozenset({"codecs", "protocol"}),
    frozenset({"library", "client", "demo"}),
    frozenset({"process", "build"}),
    frozenset({"cli", "tools"}),
)
ENTRANCES = frozenset(
    {"cli", "tools", "library", "client", "demo", "process"}
)  # what users call; nobody here has to import it

# What a room shows to others is in its face, `__init__.py`. Beside it there are side doors for what few need, so that
# starting the process does not import them.
SIDE_DOORS = {
    "tokens": {"arrays", "ecdc", "packed_ecdc", "plain"},
    "pcm": {"recordings", "comparison"},
    "weights": {"checked_json", "hub"},
    "playback": {"defaults"},
    "protocol": {"connection", "decoding", "encoding", "stream"},
    "process": {"flags", "logs", "windows"},
    "build": {"arithmetic", "bundle", "extract", "nodes"},
}

# What only some rooms may speak to. Optional dependencies are imported inside functions.
ONLY_IN = {
    "onnxruntime": {"codecs", "tools"},  # the official loop, as others write it, in tools/bench/
    "sounddevice": {"playback"},
    "soundfile": {"pcm"},
    "soxr": {"playback", "pcm"},
    "matplotlib": {"tools"},
    "huggingface_hub": {"weights"},
    "tqdm": {"tools"},
    "pyarrow": {"tools"},
    "ray": {"tools"},
    "onnx": {"build", "demo", "codecs"},  # codecs: for providers that want other nodes
    "google": {"build"},  # protobuf, which comes with onnx
    "safetensors": {"build"},
    "signal": {"process", "client", "tools", "cli"},
    "select": {"process", "client"},
    "fcntl": {"process", "client", "tools", "build"},  # build locks the folder that it builds in
    "msvcrt": {"process", "weights", "build", "tools"},
    "ctypes": {"process", "weights", "client", "tools"},  # of Windows: what only its own calls tell, or can do
    "subprocess": {"client", "tools", "build"},  # build tries its graphs in a process of its own
    # process and client start threads; playback waits for a device's own thread; codecs hashes weights while they
    # load; library may be called by many; `play` shows its progress, `conformance` has a watchdog, `bench` decodes
    # many streams at once.
    "threading": {"process", "client", "playback", "codecs", "library", "tools"},
    "asyncio": {"client"},
    "multiprocessing": set(),
}
IMPORTED_LATE = {
    "onnxruntime",
    "sounddevice",
    "soundfile",
    "soxr",
    "matplotlib",
    "huggingface_hub",
    "tqdm",
    "pyarrow",
    "ray",
}
SHARED_BY_TOOLS = ("mossnano_stdio.tools.facts", "mossnano_stdio.tools.datasets")  # by tokenize and detokenize
PROGRAMS = {"mossnano_stdio/tools/bench/worker.py"}  # run as a process of its own, never imported
DESCRIPTOR_CALLS = {"dup", "dup2", "read", "write", "pipe", "set_blocking", "fdopen", "writev"}
DESCRIPTOR_ROOMS = {"process", "client", "tools", "errors"}  # errors puts stdout aside as a program's last act

VAGUE_WORDS = {"util", "utils", "common", "helper", "helpers", "base", "manager", "core", "misc"}


class Imported(NamedTuple):
    module: str
    line: int
    is_late: bool  # inside a function, or for the type checker only


class Source(NamedTuple):
    path: Path
    tree: ast.Module

    @property
    def room(self) -> str:
        room = self.path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        return "process" if room == "__main__" else room  # where that process begins

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))


@cache
def sources() -> tuple[Source, ...]:
    return tuple(Source(path, ast.parse(path.read_text("utf-8"))) for path in sorted(PACKAGE.rglob("*.py")))


def imports_of(source: Source) -> Iterator[Imported]:
    def visit(node: ast.AST, is_late: bool) -> Iterator[Imported]:
        is_typing = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        is_late = is_late or is_typing or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        match node:
            case ast.Import():
                yield from (Imported(alias.name, node.lineno, is_late) for alias in node.names)
            case ast.ImportFrom():
                assert not node.level, f"{source.name}:{node.lineno}: imports are absolute here"
                for alias in node.names:
                    is_module = f"{node.module}.{alias.name}" in module_names()
                    module = f"{node.module}.{alias.name}" if is_module else str(node.module)
                    yield Imported(module, node.lineno, is_late)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, is_late)

    return visit(source.tree, is_late=False)


def module_of(source: Source) -> str:
    return ".".join(source.path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def module_names() -> frozenset[str]:
    return frozenset(map(module_of, sources()))


def floor_of(room: str) -> int:
    floors = [number for number, rooms in enumerate(FLOORS) if room in rooms]
    assert floors, f"{room} has no place in FLOORS"
    return floors[0]


def all_imports() -> Iterator[tuple[Source, Imported]]:
    return ((source, imported) for source in sources() for imported in imports_of(source))


def our_imports() -> Iterator[tuple[Source, str, Imported]]:
    """From one room to another."""
    for source, imported in all_imports():
        package, _, rest = imported.module.partition(".")
        room = rest.partition(".")[0]
        if package == "mossnano_stdio" and room not in ("", "__version__", source.room):
            yield source, room, imported


def test_the_look_sees_something() -> None:
    assert len(sources()) > 40
    assert sum(1 for _ in our_imports()) > 150
    assert any(imported.is_late for _, imported in all_imports())


def test_every_room_has_its_place() -> None:
    on_disk = {source.room for source in sources()} - {"__init__"}
    assert on_disk == frozenset[str]().union(*FLOORS), "put it into FLOORS, where it belongs"
    assert sum(map(len, FLOORS)) == len(on_disk), "one place each"


def test_imports_go_down() -> None:
    wrong = [
        f"{source.name}:{imported.line} imports {room}"
        for source, room, imported in our_imports()
        if source.room != "__init__" and floor_of(room) >= floor_of(source.room)
    ]
    assert not wrong


def test_rooms_are_entered_by_their_doors() -> None:
    doors = {f"mossnano_stdio.{room}.{door}" for room, names in SIDE_DOORS.items() for door in names}
    inside = {name for name in module_names() if name.count(".") > 1} - doors
    wrong = [
        f"{source.name}:{imported.line} imports {imported.module}"
        for source, _, imported in our_imports()
        if imported.module in inside
    ]
    assert not wrong
    assert doors <= {imported.module for _, imported in all_imports()}, "a door that nobody uses"


def test_a_room_that_one_room_needs_lies_in_it() -> None:
    importers: dict[str, set[str]] = {room: set() for rooms in FLOORS for room in rooms}
    for source, room, _ in our_imports():
        importers[room].add(verb_of(source) or source.room)
    assert [room for room, by in importers.items() if len(by) < 2 and room not in ENTRANCES] == []


def test_no_circles_inside_a_room() -> None:
    """Nor anywhere else, as imports between rooms go down."""
    below: dict[str, set[str]] = {module_of(source): set() for source in sources()}
    for source, imported in all_imports():
        below[module_of(source)] |= {name for name in below if name == imported.module} - {module_of(source)}
    while leaves := [name for name, needed in below.items() if not needed]:
        for name in leaves:
            del below[name]
        for needed in below.values():
            needed.difference_update(leaves)
    assert not below


def test_no_name_means_two_things() -> None:
    """But for verbs, which are called what a user types, the cases, which are called after sections of protocol.md, and
    the names of the Python client, which are public."""
    modules = Counter(
        source.path.parent.name if source.path.name == "__init__.py" else source.path.stem
        for source in sources()
        if not is_tool(source) and "cases" not in source.path.parts
    )
    classes = Counter(
        node.name
        for source in sources()
        if source.room != "client"
        for node in source.tree.body
        if isinstance(node, ast.ClassDef)
    )
    assert [name for counts in (modules, classes) for name, count in counts.items() if count > 1] == []


def test_tools_do_not_import_each_other() -> None:
    wrong = [
        f"{source.name}:{imported.line} imports {imported.module}"
        for source, imported in all_imports()
        if imported.module.startswith("mossnano_stdio.tools.")
        and not imported.module.startswith((*SHARED_BY_TOOLS, f"mossnano_stdio.tools.{verb_of(source)}"))
    ]
    assert not wrong


def test_the_world_outside_is_spoken_to_where_it_may_be() -> None:
    wrong = [
        f"{source.name}:{imported.line} imports {imported.module}"
        for source, imported in all_imports()
        if source.room not in ONLY_IN.get(imported.module.partition(".")[0], {source.room})
    ]
    assert not wrong


def test_onnxruntime_is_imported_where_its_telemetry_is_turned_off() -> None:
    importers = {source.name for source, imported in all_imports() if imported.module.startswith("onnxruntime")}
    assert importers == {"mossnano_stdio/codecs/engine.py", *PROGRAMS}
    assert all("ORT_DISABLE_TELEMETRY" in (ROOT / name).read_text("utf-8") for name in importers)


def test_optional_dependencies_are_imported_late() -> None:
    wrong = [
        f"{source.name}:{imported.line} imports {imported.module} early"
        for source, imported in all_imports()
        if imported.module.partition(".")[0] in IMPORTED_LATE and not imported.is_late and source.name not in PROGRAMS
    ]
    assert not wrong


def test_descriptors_are_touched_where_they_may_be() -> None:
    wrong = []
    for source in sources():
        for node in ast.walk(source.tree):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="os"), attr=name)) if name in DESCRIPTOR_CALLS:
                    if source.room not in DESCRIPTOR_ROOMS:
                        wrong.append(f"{source.name}:{node.lineno} calls os.{name}")
    assert not wrong


def test_every_module_says_what_it_is_and_what_its_rules_are() -> None:
    wrong = []
    for source in sources():
        docstring = ast.get_docstring(source.tree) or ""
        first_line = docstring.partition("\n")[0]
        is_marker = source.path.name == "__init__.py" and len(source.tree.body) <= 1
        if is_marker or source.path.name == "__main__.py" or source.path == PACKAGE / "__init__.py":
            continue
        if not first_line.endswith((".", ":", "?")):
            wrong.append(f"{source.name}: the first line of its docstring is {first_line!r}, which is no sentence")
        if source.room != "tools" and not any(
            "Rules of this room" in text for text in [docstring, *_packages_of(source)]
        ):
            wrong.append(f"{source.name}: its docstring has no rules")
    assert not wrong


def _packages_of(source: Source) -> list[str]:
    """The docstrings of the packages that a module lies in: their rules hold in all of it."""
    return [
        ast.get_docstring(other.tree) or ""
        for other in sources()
        if other.path.name == "__init__.py" and other.path.parent in source.path.parents
    ]


def test_no_parser_takes_options_that_are_cut_short() -> None:
    wrong = []
    for source in sources():
        for node in ast.walk(source.tree):
            match node:
                case ast.Call(func=ast.Attribute(attr="ArgumentParser" | "add_parser"), keywords=keywords):
                    if not any(word.arg == "allow_abbrev" and _is_false(word.value) for word in keywords):
                        wrong.append(f"{source.name}:{node.lineno}")
    assert not wrong


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def test_names_say_something() -> None:
    wrong = []
    for source in sources():
        names = [source.path.stem] + [
            node.name
            for node in ast.walk(source.tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        ]
        for name in names:
            words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}
            if words & VAGUE_WORDS:
                wrong.append(f"{source.name}: {name}")
    assert not wrong


def test_every_code_and_exit_status_stands_with_the_errors() -> None:
    wrong = [
        f"{source.name}:{node.lineno} defines {ast.unparse(target)}"
        for source in sources()
        if source.room != "errors"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ClassDef)
        for line in node.body
        if isinstance(line, ast.Assign)
        for target in line.targets
        if ast.unparse(target) in ("code", "exit_status")
    ]
    assert not wrong


def test_no_state_hides_in_a_module() -> None:
    wrong = [
        f"{source.name}:{node.lineno}"
        for source in sources()
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Global)
    ]
    assert not wrong


# --- verbs -------------------------------------------------------------------------------------------------------


def verb_of(source: Source) -> str:
    """The tool that a file in tools/ is, or is a part of."""
    parts = source.path.relative_to(PACKAGE).parts
    return parts[1].removesuffix(".py") if parts[0] == "tools" else ""


def is_tool(source: Source) -> bool:
    """Is it the tool itself: a file, or the face of a folder?"""
    return verb_of(source) in VERBS and source.path in (
        PACKAGE / "tools" / f"{verb_of(source)}.py",
        PACKAGE / "tools" / verb_of(source) / "__init__.py",
    )


def test_every_verb_has_its_tool_and_every_tool_its_verb() -> None:
    assert {verb_of(source) for source in sources() if is_tool(source)} == set(VERBS)
    assert {verb_of(source) for source in sources() if source.room == "tools"} - set(VERBS) == {
        "__init__",
        "facts",
        "datasets",
    }


def test_every_tool_can_be_run() -> None:
    for source in sources():
        if is_tool(source):
            functions = {node.name: node for node in source.tree.body if isinstance(node, ast.FunctionDef)}
            assert [argument.arg for argument in functions["add_arguments"].args.args] == ["parser"], source.name
            assert [argument.arg for argument in functions["run"].args.args] == ["args"], source.name


HELP = """
import contextlib, io, json, sys
from mossnano_stdio import cli
loaded = {}
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as page, contextlib.suppress(SystemExit):
        cli.main([*words, "--help"])
    loaded[" ".join(words)] = [bool(page.getvalue()), sorted(name for name in sys.modules if "." not in name)]
print(json.dumps(loaded))
"""


def modules_loaded_by_help(verbs: list[list[str]]) -> dict[str, tuple[bool, set[str]]]:
    run = subprocess.run([sys.executable, "-c", HELP, json.dumps(verbs)], capture_output=True, text=True, check=True)
    return {verb: (page, set(modules)) for verb, (page, modules) in json.loads(run.stdout).items()}


def test_help_costs_next_to_nothing() -> None:
    page, modules = modules_loaded_by_help([[]])[""]
    assert page
    assert not modules & {"numpy", *IMPORTED_LATE, "onnx", "safetensors"}


def test_no_verbs_help_loads_what_it_does_not_need() -> None:
    for verb in VERBS:
        page, modules = modules_loaded_by_help([[verb]])[verb]
        assert page, verb
        assert not modules & {*IMPORTED_LATE, "onnx", "safetensors"}, verb


# --- all files ---------------------------------------------------------------------------------------------------


@cache
def tracked_texts() -> dict[str, str]:
    """What git would hand to others, as far as it is text."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("no git checkout here")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    texts = {}
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.is_file() and b"\0" not in (data := path.read_bytes()):
            texts[name] = data.decode("utf-8", "replace")
    return texts


# Written so that this file does not hold what it looks for.
ABSOLUTE_PATHS = re.compile(r"(?<![\w./~\])}\"-])/(?:home|Users|root|work|mnt|private)/\w")
HOSTS = re.compile(r"\b[a-z0-9-]+\.(?:org|com|io|co|net|dev|ai)\b(?![\w(=])")


@pytest.mark.parametrize("pattern", [ABSOLUTE_PATHS, HOSTS], ids=["absolute paths", "hosts"])
def test_files_name_no_place_of_one_machine_or_network(pattern: re.Pattern[str]) -> None:
    wrong = [
        f"{name}:{number}: {match.group()}"
        for name, text in tracked_texts().items()
        for number, line in enumerate(text.splitlines(), start=1)
        for match in pattern.finditer(line)
    ]
    assert not wrong


def test_the_patterns_find_what_they_are_for() -> None:
    assert ABSOLUTE_PATHS.search("open('/home" + "/somebody/x')")
    assert ABSOLUTE_PATHS.search("see /root" + "/x")
    assert not ABSOLUTE_PATHS.search("weights/home" + "/x, ../home" + "/x, {folder}/root" + "/x")
    assert HOSTS.search("at example." + "org, for instance")
    assert not HOSTS.search("array.dev(x)")


def test_no_checkout_of_ours_stands_in_a_file() -> None:
    places = {str(ROOT), str(ROOT.parent), str(Path.home())} - {"/"}
    wrong = [f"{name}: {place}" for name, text in tracked_texts().items() for place in places if f"{place}/" in text]
    assert not wrong


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
        ["mypy", "--platform", "win32"],
        ["mypy", "--platform", "darwin"],
    ],
    ids=["ruff check", "ruff format", "mypy --strict", "mypy for Windows", "mypy for macOS"],
)
def test_the_checkers_have_nothing_to_say(command: list[str]) -> None:
    run = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_mypy_is_strict() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["mypy"]
    assert settings["strict"] is True
    assert {"mossnano_stdio", "tests"} <= set(settings["files"])
