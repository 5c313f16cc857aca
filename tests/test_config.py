"""Strict configuration: every error names the key, the file and the remedy."""

from pathlib import Path
from typing import ClassVar, Literal

import pytest

from mmsid.config import Section, build, load_yaml
from mmsid.errors import ConfigError
from mmsid.stages import stage_configs

CONFIGS = Path(__file__).parents[1] / "configs"


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
        ("a: 1\na: 2\n", "occurs twice"),
        ("- 1\n", "expected sections"),
        ("a: [1\n", "not valid YAML"),
        ("!!python/object:os.system {}", "not valid YAML"),
    ],
)
def test_invalid_yaml_is_refused(tmp_path, text, words):
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


class Renamed(Section):
    renamed_keys: ClassVar[dict[str, str]] = {"speed": "rate"}
    renamed_values: ClassVar[dict[str, dict[str, str]]] = {"kind": {"old": "new"}}

    rate: float = 0.1
    kind: Literal["new", "other"] = "new"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"speed": 1.0}, "key stage.speed was renamed; write rate instead of speed"),
        ({"kind": "old"}, "key stage.kind is 'old', a value that was renamed; write 'new'"),
        ({"kind": "odd"}, "key stage.kind is 'odd': .*; correct the value"),
    ],
)
def test_old_names_are_refused_with_the_new_one(data, words):
    with pytest.raises(ConfigError, match=words):
        build(Renamed, data, source="run.yaml", section="stage")


@pytest.mark.parametrize(
    ("override", "new"),
    [
        ("catalog.mend_text=true", "clean_text"),
        ("train_tokenizer.memory=false", "behaviour"),
        ("train_tokenizer.against=runs/old", "align_codes_to"),
        ("baselines.arms=[random]", "methods"),
        ("train_recommender.floors=false", "classical_baselines"),
        ("train_recommender.truth=x.json", "best_achievable"),
        ("train_recommender.architecture=instrument", "sid_transformer"),
    ],
)
def test_keys_of_earlier_versions_are_refused_with_their_new_name(override, new):
    with pytest.raises(ConfigError, match=new):
        stage_configs(load_yaml(CONFIGS / "demo.yaml", [override]), source="demo.yaml")
