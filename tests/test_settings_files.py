"""Settings from YAML and JSON: round trips, and the line of everything wrong."""

import json
import sys
from pathlib import Path

import pytest
from corpus_files import raises, written
from hypothesis import given, settings
from hypothesis import strategies as st

from alum_kernels.corpora import read_settings


def test_settings_are_a_mapping(tmp_path):
    text = "# a comment\nmodel: {name: bert, layers: 2}\nrate: 1.0e-5\nnames: &n [a, b]\nagain: *n\n"
    found = read_settings(written(tmp_path, "a.yaml", text))
    expected = {"model": {"name": "bert", "layers": 2}, "rate": 1e-5, "names": ["a", "b"], "again": ["a", "b"]}
    assert found == expected
    assert read_settings(written(tmp_path, "a.json", json.dumps(expected, indent=1))) == expected
    merged = "base: &b {first: 1, second: 2}\nother: &o\n  <<: *b\n  second: 3\nthird: {<<: *o, first: 4}\n"
    found = read_settings(written(tmp_path, "a.yml", merged))
    assert found["third"] == {"first": 4, "second": 3}


WRONG_SETTINGS = {
    "a tab": ("a.yaml", "a: 1\nb:\n\t- 2\n", ":3: expected YAML: .*cannot start any token"),
    "a bracket": ("a.yaml", "a: 1\nb: [1, 2\nc: 3\n", ":3: expected YAML: .*flow sequence"),
    "a list": ("a.yaml", "# settings\n- a\n- b\n", r":2: expected a mapping \(key: value\), got a list"),
    "a value": ("a.yaml", "just words\n", ":1: expected a mapping .* got a single value"),
    "nothing": ("a.yaml", "# nothing\n", ":1: expected a mapping, got nothing"),
    "a set": ("a.yaml", "!!set {a, b}\n", ":1: expected a mapping .* got a tag:yaml.org,2002:set"),
    "a key twice": ("a.yaml", "a: 1\nb: 2\n'a': 3\n", ":3: expected every key once, got 'a' twice"),
    "a key twice inside": ("a.yaml", "a:\n  b: 1\n  b: 2\n", ":3: expected every key once, got 'b' twice"),
    "a key twice in a merged one": (
        "a.yaml", "a: &a {x: 1, x: 2}\nb: {<<: *a}\n",
        ":1: expected every key once, got 'x'",
    ),
    "no string": ("a.yaml", "a: 1\non: 2\n", ":2: expected keys that are strings, got 'on'"),
    "a tag": (
        "a.yaml", "a: 1\nb: !!python/object:os.system x\n",
        ":2: expected YAML: .*could not determine a constructor",
    ),
    "a bad date": ("a.yaml", "a: 1\nb: 2026-13-45\n", ":2: expected a value of the kind timestamp: "),
    "a bad number": ("a.yaml", "a: 1\nb: !!int five\n", ":2: expected a value of the kind int: "),
    "a bad boolean": ("a.yaml", "a: !!bool perhaps\n", ":1: expected a value of the kind bool: "),
    "no alias": ("a.yaml", "a: 1\nb: *c\n", ":2: expected YAML: .*undefined alias"),
    "two documents": ("a.yaml", "a: 1\n---\nb: 2\n", ":2: expected YAML: expected a single document"),
    "a control character": ("a.yaml", "a: 1\nb: \x07\n", ":2: expected YAML, got the character 0x7"),
    "depth": ("a.yaml", "a: " + "[" * 4_000, ":1: expected YAML that nests less deeply"),
    "an unhashable key": ("a.yaml", "a:\n  ? [b]\n  : 1\n", ":2: expected YAML: .*unhashable key"),
    "bad JSON": ("a.json", '{"a": 1,\n "b": }\n', ":2: expected JSON, column 7: Expecting value"),
    "JSON list": ("a.json", "[1]", ":1: expected a mapping, got an array"),
    "JSON key twice": ("a.json", '{"a": 1,\n "b": {"c": 1,\n "c": 2}}', ":3: expected every key once, got 'c' twice"),
    "JSON key thrice": ("a.json", '{"a": 1, "b": {"a": 1, "a": 2}}', ": expected every key once, got 'a' twice"),
    "JSON NaN": ("a.json", '{"a": Infinity}', ": expected a JSON number, got Infinity"),
    "JSON depth": ("a.json", "[" * 200_000, ": expected JSON that nests less deeply"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG_SETTINGS)
def test_settings_that_cannot_be_used_are_named_by_their_line(tmp_path, fault):
    name, content, message = WRONG_SETTINGS[fault]
    path = written(tmp_path, name, content)
    with raises(path, message):
        read_settings(path)


def test_without_yaml_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    monkeypatch.delitem(sys.modules, "alum_kernels.corpora.yaml_loader", raising=False)
    path = written(tmp_path, "a.yaml", "a: 1\n")
    with raises(path, ": reading YAML needs PyYAML: pip install pyyaml"):
        read_settings(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("settings")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=6), JSON, max_size=4))
@settings(max_examples=60)
def test_settings_as_their_modules_write_them(folder, value):
    import yaml

    assert read_settings(written(folder, "a.json", json.dumps(value))) == value
    assert read_settings(written(folder, "a.yaml", yaml.safe_dump(value))) == value
