"""No data is ever executed: no pickles, no eval, no shell, and templates only in a sandbox."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

import pytest

from tests.unit.test_layers import NAMES, tree

#: Reading their formats executes code.
MODULES = {
    "cloudpickle", "code", "codeop", "dbm", "dill", "imp", "joblib", "jsonpickle", "marshal", "multiprocessing",
    "pickle", "pickletools", "runpy", "shelve", "xmlrpc", "yaml",
}  # fmt: skip
#: Plain names that run a text, or import what a text names.
CALLS = {"__import__", "compile", "eval", "exec", "execfile"}
#: The same by way of a module.
METHODS = {
    ("asyncio", "create_subprocess_shell"),
    ("importlib", "import_module"),
    ("os", "popen"),
    ("os", "system"),
    ("subprocess", "getoutput"),
    ("subprocess", "getstatusoutput"),
}
#: Loaded when they are used: commands, and the parts of `llambo.testing`. The names are those of a table in the file.
ALLOWED = {"cli/kit/command.py": "importlib.import_module", "testing/__init__.py": "importlib.import_module"}
#: Keywords that no call may have.
WORDS = {"allow_pickle": True, "shell": True}
#: The one file that renders templates, and what it may import of the template engine.
TEMPLATES = "worker/llama/prompt.py"
SANDBOX = {
    "jinja2",
    "jinja2.ext.Extension",
    "jinja2.ext.loopcontrols",
    "jinja2.runtime.Context",
    "jinja2.sandbox.ImmutableSandboxedEnvironment",
}
ENGINES = {"chameleon", "genshi", "jinja2", "mako", "tornado"}


def faults(source: ast.AST) -> Iterator[str]:
    """The forbidden uses in a file, with their lines."""
    for node in ast.walk(source):
        match node:
            case ast.Import(names):
                yield from _modules((alias.name for alias in names), node.lineno)
            case ast.ImportFrom(module, names):
                yield from _modules([module or ""], node.lineno)
                yield from (
                    f"{node.lineno}: {module}.{alias.name}" for alias in names if (module, alias.name) in METHODS
                )
            case ast.Call(ast.Name(name), _, keywords):
                if name in CALLS:
                    yield f"{node.lineno}: {name}"
                yield from _words(keywords, node.lineno)
            case ast.Call(ast.Attribute(owner, name), _, keywords):
                # re.compile is allowed, builtins.eval is not.
                if isinstance(owner, ast.Name) and ((owner.id, name) in METHODS or owner.id == "builtins"):
                    yield f"{node.lineno}: {owner.id}.{name}"
                yield from _words(keywords, node.lineno)
            case _:
                pass


def _modules(names: Iterable[str], line: int) -> Iterator[str]:
    yield from (f"{line}: {name}" for name in names if name.split(".")[0] in MODULES)


def _words(keywords: Iterable[ast.keyword], line: int) -> Iterator[str]:
    for keyword in keywords:
        if keyword.arg in WORDS and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False):
            yield f"{line}: {keyword.arg}"


def engines(source: ast.AST) -> set[str]:
    """What is imported of any engine for templates."""
    found: set[str] = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ENGINES}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_that_is_read_is_run(name: str) -> None:
    allowed = ALLOWED.get(name, "nothing")
    assert [fault for fault in faults(tree(name)) if not fault.endswith(f": {allowed}")] == []


@pytest.mark.parametrize("name", NAMES)
def test_templates_are_rendered_in_the_sandbox_alone(name: str) -> None:
    assert engines(tree(name)) <= (SANDBOX if name == TEMPLATES else set())


def test_the_sandbox_is_the_only_environment_there_is() -> None:
    # `jinja2` itself is imported for its errors; nothing else of it may be called.
    used = {
        node.func.attr
        for node in ast.walk(tree(TEMPLATES))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "jinja2"
    }
    assert not used
    sandboxes = [node for node in ast.walk(tree(TEMPLATES)) if isinstance(node, ast.ClassDef) and node.bases]
    assert any(
        isinstance(base, ast.Name) and base.id == "ImmutableSandboxedEnvironment"
        for sandbox in sandboxes
        for base in sandbox.bases
    )


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import marshal as m",
        "import shelve",
        "from multiprocessing import Pool",
        "import yaml",
        "from yaml import safe_load",
        "eval('1')",
        "exec(text)",
        "x = compile(text, 'f', 'exec')",
        "__import__(name)",
        "import builtins\nbuiltins.eval(text)",
        "import importlib\nimportlib.import_module(name)",
        "from importlib import import_module",
        "import os\nos.system(text)",
        "import os\nos.popen(text)",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "import subprocess\nsubprocess.Popen(text, shell=flag)",
        "from subprocess import run\nrun(text, shell=True)",
        "numpy.load(path, allow_pickle=True)",
    ],
)
def test_what_may_not_be_is_noticed(text: str) -> None:
    assert list(faults(ast.parse(text)))


@pytest.mark.parametrize(
    "text", ["import re\nre.compile('x')", "import subprocess\nsubprocess.run(['ls'], shell=False)", "import json"]
)
def test_and_nothing_else_is(text: str) -> None:
    assert not list(faults(ast.parse(text)))


def test_another_engine_for_templates_is_noticed() -> None:
    assert engines(ast.parse("from jinja2 import Environment")) - SANDBOX
    assert engines(ast.parse("import mako.template"))
