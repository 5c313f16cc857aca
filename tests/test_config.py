"""Strict configuration: every mistake is answered with the key, the file and the remedy."""

from pathlib import Path

import pytest

from mmsid.config import Section, build, load_yaml
from mmsid.errors import ConfigError


class Inner(Section):
    rate: float = 0.1


class Outer(Section):
    steps: int
    inner: Inner = Inner()
    maybe: Inner | None = None


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_overrides_are_dotted_and_typed(tmp_path):
    path = write(tmp_path, "a:\n  b: 1\nname: x\n")
    data = load_yaml(path, ["a.b=2.5", "a.c=[1, 2]", "d.e=true", "name=null"])
    assert data == {"a": {"b": 2.5, "c": [1, 2]}, "d": {"e": True}, "name": None}


def test_environment_with_default(tmp_path, monkeypatch):
    path = write(tmp_path, "a: ${MMSID_TEST_ROOT:-../data}/x\n")
    assert load_yaml(path)["a"] == "../data/x"
    monkeypatch.setenv("MMSID_TEST_ROOT", "/else")
    assert load_yaml(path)["a"] == "/else/x"


def test_environment_without_default_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="MMSID_TEST_UNSET"):
        load_yaml(write(tmp_path, "a: ${MMSID_TEST_UNSET}\n"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"steps": 1, "stepz": 2}, ["unknown key stage.stepz", "did you mean 'steps'", "run.yaml"]),
        ({"steps": 1, "inner": {"rat": 2}}, ["unknown key stage.inner.rat", "did you mean 'rate'"]),
        ({"steps": 1, "maybe": {"rat": 2}}, ["did you mean 'rate'"]),
        ({"steps": "many"}, ["stage.steps", "'many'", "integer"]),
        ({}, ["stage.steps is missing"]),
    ],
)
def test_build_names_key_file_and_remedy(data, words):
    with pytest.raises(ConfigError) as caught:
        build(Outer, data, source="run.yaml", section="stage")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2\n", "stands twice"),
        ("- 1\n", "expected sections"),
        ("a: [1\n", "not valid YAML"),
        ("!!python/object:os.system {}", "not valid YAML"),
    ],
)
def test_broken_yaml_is_told(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words):
        load_yaml(write(tmp_path, text))


def test_missing_file_and_bad_overrides(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_yaml(tmp_path / "none.yaml")
    path = write(tmp_path, "a: 1\n")
    with pytest.raises(ConfigError, match="of the form section"):
        load_yaml(path, ["a"])
    with pytest.raises(ConfigError, match="not a section"):
        load_yaml(path, ["a.b=1"])
