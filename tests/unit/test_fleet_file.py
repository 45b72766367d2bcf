"""fleet.toml: what is read from it, and errors with their line."""

from __future__ import annotations

import json
import tomllib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llambo.fleet import schema
from llambo.fleet.model import Fleet, Scaling
from llambo.fleet.reader import KeyLines, parse
from llambo.mesh.wire.errors import Code, LlamboError

SMALL = """
[classes.tiny]
memory = "600MiB"
"""
WHOLE = """
[fleet]
name = "home"
broker = "tcp://box:7330"

[hosts.here]
memory = "8GiB"
cores = 4

[hosts.box]
provider = "systemd"
address = "root@box"
memory = "64GiB"
cores = 16
labels = ["gpu"]

[broker]
policy = "random"
host = "box"

[scale]
high_percent = 70
wait_ms = 500

[classes.tiny]
model = "smollm2"
ctx = 2048
slots = 2
threads = 3
memory = "600MiB"
min = 3
hosts = ["here"]

[classes.large]
memory = "20GiB"
cores = 7.5
gpu_layers = -1
max = 2
labels = ["gpu"]
fake.tokens_per_s = 40

[classes.large.scale]
wait_ms = 9000
"""


def wrong(text: str) -> list[str]:
    with pytest.raises(LlamboError) as caught:
        parse(text)
    assert caught.value.code is Code.BAD_SETTING
    return caught.value.text.splitlines()


# --- what it makes -------------------------------------------------------------------------------------


def test_one_class_is_a_file() -> None:
    fleet = parse(SMALL)
    tiny = fleet.classes["tiny"]
    assert list(fleet.hosts) == ["here"] and fleet.broker is None
    assert (tiny.min, tiny.max, tiny.slots, tiny.memory_bytes, tiny.cores) == (0, 1, 4, 600 << 20, 1)
    assert tiny.hosts == ("here",) and tiny.scaling == Scaling()
    # It must not use every core of a machine with other workers.
    assert tiny.settings == {"worker": {"threads": 1}}


def test_a_whole_file() -> None:
    fleet = parse(WHOLE)
    tiny, large = fleet.classes["tiny"], fleet.classes["large"]
    assert fleet.broker is not None and fleet.broker.hosts == ("box",)
    assert fleet.broker.settings == {"broker": {"policy": "random"}}
    assert tiny.settings == {"worker": {"model": "smollm2", "ctx": 2048, "slots": 2, "threads": 3}}
    assert (tiny.cores, tiny.min, tiny.max, tiny.hosts) == (3, 3, 3, ("here",))
    assert large.settings == {"worker": {"gpu_layers": -1, "threads": 8}, "fake": {"tokens_per_s": 40.0}}
    assert large.hosts == ("box",), "the only host with its label"
    assert (tiny.scaling.high_percent, tiny.scaling.wait_ms) == (70, 500)
    assert (large.scaling.high_percent, large.scaling.wait_ms) == (70, 9_000)
    assert (tiny.line, large.line, fleet.hosts["box"].line) == (25, 34, 10)


def test_a_fingerprint_changes_with_the_settings_of_a_worker_only() -> None:
    def mark(text: str, *more: str) -> str:
        return parse(text).classes["tiny"].fingerprint(*more)

    same = mark(SMALL)
    assert same == mark(SMALL + "max = 9\n") == mark(SMALL + "scale.wait_ms = 1\n")
    others = [mark(SMALL + line) for line in ("slots = 5\n", "cores = 2\n", "cpu_weight = 7\n", "fake.burst = 2\n")]
    assert len({same, *others, mark(SMALL, "release 2")}) == 6


def test_every_setting_of_a_worker_can_be_written() -> None:
    lines = [f"{name} = {json.dumps(row.default)}" for name, row in schema.WORKER_SETTINGS.items()]
    settings = parse("\n".join([SMALL, *lines])).classes["tiny"].settings["worker"]
    assert set(settings) == set(schema.WORKER_SETTINGS)


def test_defaults_of_the_tables_are_those_of_the_values() -> None:
    assert {key.name: key.setting.default for key in schema.SCALE} == {
        name: getattr(Scaling(), name) for name in Scaling.__slots__
    }
    assert set(schema.ALSO_CALLED.values()) <= {
        *schema.WORKER_SETTINGS,
        "classes",
        *(key.name for table in (schema.HOST, schema.CLASS, schema.SCALE) for key in table),
    }


# --- what is wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[classes.tiny]\nmemory = 5\n", "fleet.toml:2: memory is 5, expected a size, as \"600MiB\""),
        (SMALL + "slots = 'many'\n", "fleet.toml:4: slots is 'many', expected a whole number"),
        (SMALL + "context = 9\n", "fleet.toml:4: unknown key 'context' in [classes.tiny]; did you mean ctx?"),
        (SMALL + "modl = 'x'\n", "fleet.toml:4: unknown key 'modl' in [classes.tiny]; did you mean model or models?"),
        (SMALL + "name = 'x'\n", "fleet.toml:4: unknown key 'name' in [classes.tiny]; there are min, "),
        (SMALL + "min = 4\nmax = 3\n", "fleet.toml:5: max is 3, which is less than min, 4"),
        (SMALL + "hosts = ['box']\n", "fleet.toml:4: there is no host 'box'; there are here"),
        (SMALL + "labels = ['gpu', 'big']\n", "fleet.toml:4: labels: no host of [classes.tiny] has big and gpu"),
        (SMALL + "hosts = 'here'\n", "fleet.toml:4: hosts is 'here', expected a list of texts"),
        (SMALL + "fake.brust = 2\n", "fleet.toml:4: unknown key 'brust' in [classes.tiny.fake]; did you mean burst?"),
        (SMALL + "scale = 3\n", "fleet.toml:4: scale: expected a table, [classes.tiny.scale]"),
        (SMALL + "[classes.tiny.scale]\nlow_percent = 60\n", "fleet.toml:4: low_percent, aim_percent and high_percent"),
        (SMALL + "[hosts.box]\nprovider = 'systemd'\naddress = 'root@box'\ncores = 2\n",
         "fleet.toml:4: [hosts.box] needs memory: what another machine has is not detected"),
        (SMALL + "[hosts.box]\naddress = 'box'\nmemory = 1\ncores = 1\n",
         'fleet.toml:5: address: processes are started on this machine only; use provider = "systemd" for another one'),
        (SMALL + "[hosts.box]\nprovider = 'systemd'\naddress = '-oProxyCommand=x'\nmemory = 1\ncores = 1\n",
         "fleet.toml:6: address is '-oProxyCommand=x', expected user@host"),
        (SMALL + "[classes.Big_One]\nmemory = '1GiB'\n",
         "fleet.toml:4: 'Big_One' is not a valid name: at most 32 of a-z, 0-9 and inner dashes"),
        (SMALL + "[classes.broker]\nmemory = '1GiB'\n", "fleet.toml:4: [classes.broker]: that name is reserved"),
        (SMALL + "[broker]\nhost = 'bx'\n", "fleet.toml:5: there is no host 'bx'; there are here"),
        (SMALL + "[classes]\nbig = 3\n", "fleet.toml:5: big in [classes]: expected a table, as [classes.big]"),
        *[("[fleet]\nname = " + json.dumps(name) + "\n" + SMALL, f"fleet.toml:2: name is {name!r}, expected at most 32")
          for name in ("../../../x", "/x", "", ".", "a\nEnvironment=X=1", "A", "a b", "x" * 33)],
        ("[fleet]\n", "fleet.toml: it has no class of workers: begin with [classes.tiny]"),
        ("[class.tiny]\n", "fleet.toml:1: unknown key 'class'; did you mean classes?"),
        ("hosts = 3\n" + SMALL, "fleet.toml:1: hosts: expected tables, as [hosts.NAME]"),
        ("[classes.tiny]\n\nmin = 3\n", "fleet.toml:1: [classes.tiny] needs memory"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_reported_with_its_line(text: str, problem: str) -> None:
    found = wrong(text.lstrip("\n") if text.startswith("\n[hosts") else text)
    assert any(line.startswith(problem) for line in found), found


def test_all_errors_are_reported_at_once_in_the_order_of_the_file() -> None:
    found = wrong(
        WHOLE.replace("ctx =", "ctz =").replace("cores = 16", "cores = -1").replace('["gpu"]\nfake', '["x"]\nfake')
    )
    assert [int(line.split(":")[1]) for line in found] == [14, 27, 39]


def test_what_is_no_toml_is_reported_with_its_line_too() -> None:
    assert "line 3" in wrong("[fleet]\n\nname = \n")[0]


# --- lines ---------------------------------------------------------------------------------------------


def test_lines_of_every_layout() -> None:
    text = """\
# [no.table]
[a]            # 2
x = '[b]'
y."z w".'q' = "\\"]#"    # 4
long = \"\"\"
[c]
k = 1 \\""\"\"\"\"
after = [ 1,     # 8
  {p = 1, q = { r = [ ] } },  # ]

  ''']
  ''', 1979-05-27 07:32:00,
]
[[rows]]         # 14
n = 1
  [rows.sub]     # 16
  m = { a.b = 1 }
[[rows]]         # 18
\t"n\\u0041" = -1.5e3
[[rows.deep]]
v = ''''two'''''   # 21
[ a . more ]
last = true"""
    known = KeyLines(text).all_lines()
    assert {path: line for path, line in known.items() if line in (2, 3, 4, 5, 8, 9, 11, 12)} == {
        ("a",): 2, ("a", "x"): 3, ("a", "y"): 4, ("a", "y", "z w"): 4, ("a", "y", "z w", "q"): 4, ("a", "long"): 5,
        ("a", "after"): 8, ("a", "after", 0): 8, ("a", "after", 1): 9, ("a", "after", 1, "p"): 9,
        ("a", "after", 1, "q"): 9, ("a", "after", 1, "q", "r"): 9, ("a", "after", 2): 11, ("a", "after", 3): 12,
    }  # fmt: skip
    assert {path: line for path, line in known.items() if line > 12} == {
        ("rows",): 14, ("rows", 0): 14, ("rows", 0, "n"): 15, ("rows", 0, "sub"): 16, ("rows", 0, "sub", "m"): 17,
        ("rows", 0, "sub", "m", "a"): 17, ("rows", 0, "sub", "m", "a", "b"): 17, ("rows", 1): 18,
        ("rows", 1, "nA"): 19, ("rows", 1, "deep"): 20, ("rows", 1, "deep", 0): 20, ("rows", 1, "deep", 0, "v"): 21,
        ("a", "more"): 22, ("a", "more", "last"): 23,
    }  # fmt: skip
    assert set(known) == set(paths(tomllib.loads(text)))


def paths(value: Any, above: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    found = [above] if above else []
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [path for key, one in inside for path in paths(one, (*above, key))]


KEYS = st.one_of(st.from_regex(r"[a-c]{1,2}", fullmatch=True), st.sampled_from(["x y", "#", "é", "]", 'q"', "a.b", ""]))
SCALARS = st.one_of(
    st.integers(), st.booleans(), st.text("ab]}#=,\"'\\\n[", max_size=6), st.just("''"), st.just('"""')
)  # fmt: skip
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))
TABLES = st.dictionaries(KEYS, st.recursive(VALUES, lambda inner: st.dictionaries(KEYS, inner, max_size=3)), max_size=4)


class Writer:
    """Writes a document in a random layout, and notes the line of each value."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.text = ""
        self.noted: dict[tuple[str | int, ...], int] = {}

    def document(self, content: dict[str, Any], above: tuple[str | int, ...] = ()) -> None:
        # A table's own values stand before the headers of those in it.
        own = {key: one for key, one in content.items() if not self._may_be_table(one) or self.draw(st.booleans())}
        for key, one in own.items():
            self.blank()
            self.pair(key, one, above)
            self.put("\n")
        for key, one in content.items():
            if key not in own:
                path = (*above, key)
                self.blank()
                self.note(path)
                self.put(f"[{'.'.join(map(self.key, path))}]\n")
                self.document(one, path)

    def _may_be_table(self, value: Any) -> bool:
        return isinstance(value, dict)

    def pair(self, key: str, value: Any, above: tuple[str | int, ...]) -> None:
        self.note((*above, key))
        self.put(f"{self.key(key)}{self.pick('=', ' = ')}")
        self.value(value, (*above, key))

    def value(self, value: Any, path: tuple[str | int, ...]) -> None:
        if isinstance(value, dict):
            self.put("{")
            for number, (key, one) in enumerate(value.items()):
                self.put(", " if number else self.pick("", " "))
                self.pair(key, one, path)
            self.put("}")
        elif isinstance(value, list):
            self.put("[")
            for number, one in enumerate(value):
                self.blank(inside=True)
                self.note((*path, number))
                self.value(one, (*path, number))
                self.put("," if number + 1 < len(value) else self.pick("", ","))
            self.blank(inside=True)
            self.put("]")
        elif isinstance(value, str):
            self.put(self.string(value))
        else:
            self.put(json.dumps(value))

    def string(self, value: str) -> str:
        ways = [json.dumps(value, ensure_ascii=False)]
        if "'" not in value and "\n" not in value:
            ways.append(f"'{value}'")
        if "''" not in value and not value.endswith("'"):
            ways.append(f"'''\n{value}'''")
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        ways += [f'"""\n{escaped}"""']
        return self.pick(*ways)

    def key(self, key: str | int) -> str:
        text = str(key)
        bare = text.isascii() and text.isalnum()
        return self.pick(text, json.dumps(text, ensure_ascii=False)) if bare else json.dumps(text, ensure_ascii=False)

    def blank(self, *, inside: bool = False) -> None:
        self.put(self.pick("", " ", "\t", "\n", "# ] } [x] = \" '\n", *(["\n\n  "] if inside else [])))

    def pick(self, *ways: str) -> str:
        return str(self.draw(st.sampled_from(ways)))

    def put(self, text: str) -> None:
        self.text += text

    def note(self, path: tuple[str | int, ...]) -> None:
        self.noted.setdefault(path, self.text.count("\n") + 1)


@settings(derandomize=True, max_examples=80, database=None)
@given(st.data(), TABLES)
def test_lines_of_whatever_layout_hypothesis_writes(data: Any, content: dict[str, Any]) -> None:
    writer = Writer(data.draw)
    writer.document(content)
    assert tomllib.loads(writer.text) == content, "what is written is what was given"
    assert KeyLines(writer.text).all_lines() == writer.noted


def test_a_path_that_is_not_there_has_the_line_of_what_is_around_it() -> None:
    lines = KeyLines("\n[a.b]\nc = 1\n")
    assert [lines.of("a", "b", "c"), lines.of("a", "b", "x", "y"), lines.of("z")] == [3, 2, 0]


def test_the_example_in_the_documentation_is_read() -> None:
    from pathlib import Path

    text = (Path(__file__).resolve().parents[2] / "docs" / "fleets.md").read_text(encoding="utf-8")
    examples = [part.split("```")[0] for part in text.split("```toml\n")[1:]]
    fleets: list[Fleet] = [parse(example) for example in examples]
    assert list(fleets[0].classes) == ["tiny", "medium", "large"]


SEVERAL = """
[classes.several]
models = ["/srv/models/a.gguf", "hf:org/repo/b.gguf", "smollm2"]
memory = "2GiB"
"""


def test_a_class_with_several_models_has_them_as_a_worker_takes_them() -> None:
    spec = parse(SEVERAL).classes["several"]
    assert spec.is_host and spec.model_names == {"a", "b", "smollm2"}
    worker = spec.settings["worker"]
    assert (worker["models"], worker["memory_bytes"]) == ("/srv/models/a.gguf,hf:org/repo/b.gguf,smollm2", 2 << 30)
    assert not parse('[classes.one]\nmodel = "smollm2"\nmemory = "1GiB"').classes["one"].is_host


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('model = "smollm2"', "model and models: a node has one model"),
        ('memory_bytes = "1GiB"', "did you mean memory?"),
        ("models = [1]", "expected a list of texts"),
    ],
)
def test_what_a_class_with_several_models_cannot_have(line: str, problem: str) -> None:
    text = SEVERAL.replace("models = [", "mistake = [") if line.startswith("models") else SEVERAL
    with pytest.raises(LlamboError) as found:
        parse(text + line)
    assert problem in found.value.text


def test_a_folder_of_models_needs_a_node_that_lists_it() -> None:
    text = '[classes.several]\nmodels = "/srv/models"\nmemory = "2GiB"\n'
    with pytest.raises(LlamboError, match="set min = 1, or name files"):
        parse(text)
    assert parse(text + "min = 1").classes["several"].model_names == {""}
