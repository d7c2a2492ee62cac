"""Runs a GDScript class without Godot: its text is made Python, and the parts of the engine it asks for are played.

Only as much of the language as clients/godot/mossnano.gd is written in. What is played does what Godot's class
reference says, on Linux: JSON numbers are floats, a read of a pipe gives what is there, a write waits until all of it
is taken, and deferred calls are made by `run_deferred`, which stands for the next frame of the main loop.
"""

from __future__ import annotations

import ast
import functools
import json
import math
import os
import re
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class Script:
    """An instance of the class in a file: its functions, variables and signals are attributes."""

    def __init__(self, path: Path, cwd: Path) -> None:
        self._engine = Engine(cwd)
        names: dict[str, Any] = {**BUILTINS, "OS": self._engine, "print": self._engine.printed.append}
        names["push_error"] = lambda *parts: self._engine.pushed_errors.append("".join(map(str, parts)))
        exec(compile(as_python(path.read_text()), path.name, "exec"), names)
        self._instance = names["Script"]()
        self.engine = self._engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._instance, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or name == "engine":
            super().__setattr__(name, value)
        else:
            setattr(self._instance, name, value)

    def run_deferred(self) -> None:
        while DEFERRED:
            DEFERRED.pop(0)()


# --- the language ----------------------------------------------------------------------------------------------------


def as_python(gdscript: str) -> ast.Module:
    """A module with one class, Script, and those that lie in it. Their method `initialize` sets their variables."""
    text = re.sub(r"^\t*(class_name|extends) .*$|^\t*@\w+\(.*\)$", "", gdscript, flags=re.M)
    text = re.sub(r"^(\t*)signal (\w+).*$", r"\1\2 = Signal()", text, flags=re.M)
    text = re.sub(r"^enum (\w+) \{(.*?)\}", lambda found: enumeration(*found.groups()), text, flags=re.M | re.S)
    text = re.sub(r"^(\t*)(?:static )?func (\w+)\(", r"\1def \2(self, ", text, flags=re.M)
    text = re.sub(r"^const (\w+)(?:: [^=]+=| :=) ", r"\1: const = ", text, flags=re.M)
    text = re.sub(r"^(\t*)(?:var|const) (\w+) := ", r"\1\2: _ = ", text, flags=re.M)
    text = re.sub(r"^(\t*)(?:var|const) (\w+) = ", r"\1\2: _ = ", text, flags=re.M)
    text = re.sub(r"^(\t*)(?:var|const) (\w+: )", r"\1\2", text, flags=re.M)
    text = re.sub(r"(def .*)\bvoid:", r"\1None:", text)
    text = re.sub(r"(\(|, )(\w+) := ", r"\1\2=", text)  # parameters with a default
    module = ast.parse(text)
    return ast.fix_missing_locations(Translation("Script", module.body).made())


def enumeration(name: str, members: str) -> str:
    value, values = -1, []
    for member in filter(str.strip, re.sub(r"#.*", "", members).split(",")):
        word, _, number = member.partition("=")
        value = int(number) if number else value + 1
        values.append(f"{word.strip()}={value}")
    return f"{name}: const = Enumeration({', '.join(values)})"


def called_by_name(function: str, arguments: list[ast.expr]) -> ast.Call:
    return ast.Call(ast.Name(function, ast.Load()), arguments, [])


def is_constant(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "const"


class Translation(ast.NodeTransformer):
    """Of the body of one class."""

    def __init__(self, name: str, body: list[ast.stmt]) -> None:
        self._name = name
        self._body = body
        self._members = {node.name for node in body if isinstance(node, ast.FunctionDef)}
        for node in body:
            if isinstance(node, ast.AnnAssign | ast.Assign) and not is_constant(node):
                target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
                assert isinstance(target, ast.Name)
                self._members.add(target.id)

    def made(self) -> ast.Module:
        """Its constants, the classes inside, which may name them too, and itself."""
        made = ast.parse(f"class {self._name}(Instance): pass")
        made_class = made.body[0]
        assert isinstance(made_class, ast.ClassDef)
        setter = ast.parse("def initialize(self): pass").body[0]
        assert isinstance(setter, ast.FunctionDef)
        for node in self._body:
            if isinstance(node, ast.ClassDef):
                made.body[:0] = Translation(node.name, node.body).made().body
            elif is_constant(node):
                made.body.insert(0, self.visit(node))
            elif isinstance(node, ast.AnnAssign):
                setter.body.append(self.visit(node))
            elif not isinstance(node, ast.Pass):
                made_class.body.append(node if isinstance(node, ast.Assign) else self.visit(node))
        made_class.body.append(setter)
        return made

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id in ("true", "false", "null"):
            return ast.Constant({"true": True, "false": False, "null": None}[node.id])
        if node.id in self._members:
            return ast.Attribute(ast.Name("self", ast.Load()), node.id, node.ctx)
        return node

    def visit_arguments(self, node: ast.arguments) -> ast.arguments:
        for argument in node.args:
            argument.annotation = None
        node.defaults = [self.visit(default) for default in node.defaults]
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        self.generic_visit(node)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.Assign:
        unset = called_by_name("default", [ast.Constant(ast.unparse(node.annotation))])
        value = self.visit(node.value) if node.value else unset
        return ast.Assign([self.visit(node.target)], value)

    def visit_List(self, node: ast.List) -> ast.expr:
        self.generic_visit(node)
        return called_by_name("Array", [node]) if isinstance(node.ctx, ast.Load) else node

    def visit_Dict(self, node: ast.Dict) -> ast.expr:
        self.generic_visit(node)
        return called_by_name("Dictionary", [node])

    def visit_For(self, node: ast.For) -> ast.For:
        self.generic_visit(node)
        node.iter = called_by_name("iterated", [node.iter])
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        names = {ast.Div: "divided", ast.Mod: "formatted"}
        if type(node.op) in names:
            return called_by_name(names[type(node.op)], [node.left, node.right])
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) != "self":
            return called_by_name("called", [node.func.value, ast.Constant(node.func.attr), *node.args])
        return node


def default(type_name: str) -> Any:
    plain = {"int": 0, "float": 0.0, "bool": False, "String": ""}
    made = {"Dictionary": Dictionary, "PackedByteArray": PackedByteArray, "PackedVector2Array": PackedVector2Array}
    if type_name in plain:
        return plain[type_name]
    return Array() if type_name.startswith("Array") else made.get(type_name, lambda: None)()


def iterated(value: Any) -> Any:
    return range(value) if isinstance(value, int) else value


def divided(left: Any, right: Any) -> Any:
    return int(left / right) if isinstance(left, int) and isinstance(right, int) else left / right


def formatted(left: Any, right: Any) -> Any:
    if isinstance(left, str):
        return left % (tuple(right) if isinstance(right, Array) else right)
    assert isinstance(left, int)
    assert isinstance(right, int)
    return int(left - right * int(left / right))  # the sign of the left one, as in C


def called(receiver: Any, name: str, *arguments: Any) -> Any:
    """A method, also of what Python has no such method for."""
    if name == "call_deferred":
        return DEFERRED.append(functools.partial(receiver, *arguments))
    if name == "bind":
        return lambda *first: receiver(*first, *arguments)
    if isinstance(receiver, str):
        return STRING_METHODS[name](receiver, *arguments)
    if name == "new":
        return receiver(*arguments)
    return getattr(receiver, name)(*arguments)


DEFERRED: list[Callable[[], None]] = []
STRING_METHODS: dict[str, Callable[..., Any]] = {
    "to_ascii_buffer": lambda text: PackedByteArray(text.encode("ascii")),
    "to_utf8_buffer": lambda text: PackedByteArray(text.encode()),
    "trim_suffix": str.removesuffix,
}


class Instance:
    """Of a class of the script."""

    def __init__(self, *arguments: Any) -> None:
        for name, value in vars(type(self)).items():
            if isinstance(value, Signal):  # one for each instance
                setattr(self, name, Signal())
        self.initialize()
        getattr(self, "_init", lambda: None)(*arguments)

    def initialize(self) -> None:
        """Its variables, as they are before `_init`."""


# --- its types -------------------------------------------------------------------------------------------------------


class Enumeration:
    def __init__(self, **members: int) -> None:
        self.__dict__.update(members)


class Array(list[Any]):
    def size(self) -> int:
        return len(self)

    def is_empty(self) -> bool:
        return not self

    def pop_front(self) -> Any:
        return self.pop(0) if self else None

    def slice(self, begin: int, end: int = 1 << 40) -> Array:
        return Array(self[begin:end])


class Dictionary(dict[Any, Any]):
    def is_empty(self) -> bool:
        return not self

    def values(self) -> Array:  # type: ignore[override]
        """A copy, as in Godot."""
        return Array(super().values())

    def erase(self, key: Any) -> bool:
        return self.pop(key, None) is not None


class PackedByteArray(bytearray):
    def size(self) -> int:
        return len(self)

    def is_empty(self) -> bool:
        return not self

    def resize(self, size: int) -> None:
        self[:] = bytes(self[:size]).ljust(size, b"\0")

    def append_array(self, more: PackedByteArray) -> None:
        self.extend(more)

    def slice(self, begin: int, end: int = 1 << 40) -> PackedByteArray:
        return PackedByteArray(self[begin:end])

    def decode_s16(self, at: int) -> int:
        return int(struct.unpack_from("<h", self, at)[0])

    def decode_u32(self, at: int) -> int:
        return int(struct.unpack_from("<I", self, at)[0])

    def decode_s64(self, at: int) -> int:
        return int(struct.unpack_from("<q", self, at)[0])

    def encode_u64(self, at: int, value: int) -> None:
        struct.pack_into("<Q", self, at, value)

    def encode_u32(self, at: int, value: int) -> None:
        struct.pack_into("<I", self, at, value)

    def get_string_from_utf8(self) -> str:
        return bytes(self).decode("utf-8", "replace")


class PackedInt32Array(Array):
    pass


class PackedStringArray(Array):
    pass


class Vector2:
    def __init__(self, x: float = 0.0, y: float = 0.0) -> None:
        self.x, self.y = float(x), float(y)

    def __truediv__(self, by: float) -> Vector2:
        return Vector2(self.x / by, self.y / by)

    def __mul__(self, by: float) -> Vector2:
        return Vector2(self.x * by, self.y * by)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vector2) and (self.x, self.y) == (other.x, other.y)

    __hash__ = None  # type: ignore[assignment]


class PackedVector2Array(Array):
    def append_array(self, more: PackedVector2Array) -> None:
        self.extend(more)

    def slice(self, begin: int, end: int = 1 << 40) -> PackedVector2Array:
        return PackedVector2Array(self[begin:end])

    def resize(self, size: int) -> None:
        self[size:] = [Vector2() for _ in range(size - len(self))]


# --- the engine ------------------------------------------------------------------------------------------------------


class Signal:
    def __init__(self) -> None:
        self._connected: list[Callable[..., Any]] = []

    def connect(self, receiver: Callable[..., Any]) -> None:
        self._connected.append(receiver)

    def get_connections(self) -> Array:
        return Array(self._connected)

    def emit(self, *arguments: Any) -> None:
        for receiver in self._connected:
            receiver(*arguments)


class Thread:
    def start(self, run: Callable[[], None]) -> None:
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=[run], daemon=True)
        self._thread.start()

    def _run(self, run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as failure:
            self._failure = failure
            raise

    def wait_to_finish(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive(), "a thread did not end within a minute"
        assert self._failure is None, self._failure


class Mutex:
    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.lock = self._lock.acquire
        self.unlock = self._lock.release


class Semaphore:
    def __init__(self) -> None:
        self._semaphore = threading.Semaphore(0)
        self.post = self._semaphore.release
        self.wait = self._semaphore.acquire


class Pipe:
    """What execute_with_pipe gives: on Linux, one read or one write of the pipe for each call."""

    def __init__(self, reading: Any, writing: Any = None) -> None:
        self._reading, self._writing = reading, writing
        self._failed = False

    def get_buffer(self, size: int) -> PackedByteArray:
        data = os.read(self._reading.fileno(), size)
        self._failed = len(data) != size
        return PackedByteArray(data)

    def store_buffer(self, data: PackedByteArray) -> bool:
        try:
            self._failed = os.write(self._writing.fileno(), data) != len(data)
        except BrokenPipeError:
            self._failed = True
        return not self._failed

    def get_error(self) -> int:
        return 14 if self._failed else 0

    def close(self) -> None:
        for stream in (self._reading, self._writing):
            if stream is not None:
                stream.close()


class Engine:
    """OS, and what the engine's console would show."""

    def __init__(self, cwd: Path) -> None:
        self._cwd = cwd
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self.printed: list[str] = []
        self.pushed_errors: list[str] = []

    def execute_with_pipe(self, program: str, arguments: Sequence[str]) -> Dictionary:
        shell = [
            "sh",
            "-c",
            'exec "$0" "$@"',
            program,
            *arguments,
        ]  # a missing program is 127 of the child, as in Godot
        pipe = subprocess.PIPE
        child = subprocess.Popen(shell, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, cwd=self._cwd)
        self._children[child.pid] = child
        return Dictionary(pid=child.pid, stdio=Pipe(child.stdout, child.stdin), stderr=Pipe(child.stderr))

    def is_process_running(self, pid: int) -> bool:
        return self._children[pid].poll() is None

    def get_process_exit_code(self, pid: int) -> int:
        maybe_status = self._children[pid].poll()
        return -1 if maybe_status is None else maybe_status

    def kill(self, pid: int) -> None:
        self._children[pid].kill()  # which knows whether it is gone already
        self._children[pid].wait()

    def delay_msec(self, milliseconds: int) -> None:
        time.sleep(milliseconds / 1000)


class JSON:
    @staticmethod
    def parse_string(text: str) -> Any:
        return json.loads(text, parse_int=float, object_hook=Dictionary)


class Time:
    @staticmethod
    def get_ticks_msec() -> int:
        return time.monotonic_ns() // 1_000_000


BUILTINS: dict[str, Any] = {
    **{made.__name__: made for made in (Array, Dictionary, PackedByteArray, PackedVector2Array, PackedInt32Array)},
    "PackedStringArray": PackedStringArray,
    **{made.__name__: made for made in (Vector2, Enumeration, Instance, Signal, Thread, Mutex, Semaphore, JSON, Time)},
    **{function.__name__: function for function in (default, iterated, divided, formatted, called)},
    "range": lambda *bounds: Array(range(*bounds)),
    "maxi": max,
    "mini": min,
    "ceili": math.ceil,
    "floori": lambda number: int(number // 1),
    "minf": lambda *numbers: float(min(numbers)),
}
