"""The command line: stages of a run are connected, and errors name the key, the file and the remedy."""

from pathlib import Path

import pytest

from mmsid import cli, stages
from mmsid.artifacts import writing
from mmsid.config import load_yaml
from mmsid.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_packaged_configuration_is_valid(path):
    configs = stages.stage_configs(load_yaml(path), source=str(path))
    assert configs and list(configs) == [stage for stage in stages.STAGES if stage in configs]
    if "assign" in configs and "train_tokenizer" in configs:
        assert configs["assign"].tokenizer == configs["train_tokenizer"].out


def test_inputs_of_a_stage_are_the_folders_of_earlier_stages():
    configs = stages.stage_configs(load_yaml(CONFIGS[0].with_name("demo.yaml"), ["name=x", "runs=/r"]), source="demo.yaml")
    assert configs["train_tokenizer"].captions == Path("/r/x/caption")
    assert configs["refine"].sids == Path("/r/x/assign")
    assert configs["train_recommender"].variants["ours_refined"] == Path("/r/x/refine/sids")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"name": "x", "catalog": {"items": "i"}, "captoin": {}}, "unknown section captoin"),
        ({"catalog": {"items": "i"}}, "name is missing"),
        ({"name": "x", "catalog": {"items": "i"}, "caption": {"batchsize": 3}}, "caption.batchsize; did you mean 'batch_size'"),
        ({"name": "x", "catalog": {"items": "i"}, "caption": 3}, "expected keys below it"),
        ({"name": "x", "catalog": {"itms": "i"}, "caption": {}}, "unknown key catalog.itms; did you mean 'items'"),
    ],
)
def test_errors_name_the_key(data, words):
    with pytest.raises(ConfigError, match=words):
        stages.stage_configs(data, source="run.yaml")


def test_errors_are_one_line_and_exit_code_1(capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        cli.main(["run", str(tmp_path / "none.yaml")])
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("mmsid: ") and "none.yaml" in error and error.count("\n") == 1


def test_an_unknown_command_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["recaption"])
    assert caught.value.code == 2 and "caption" in capsys.readouterr().err


def test_every_stage_but_the_report_has_a_script():
    scripts = {path.stem for path in SCRIPTS.glob("*.py")}
    script_of = {"refine": "train_rl", "text_quality": "train_reward", "sid_reward": "train_reward"}
    assert {script_of.get(stage, stage) for stage in stages.STAGES} - {"report"} <= scripts


@pytest.mark.parametrize("stage", ["assign", "baselines", "stability", "recommend", "report"])
def test_stages_of_one_process_take_the_folder_of_rank_0_under_a_launcher(stage, tmp_path, monkeypatch):
    with writing(tmp_path / "out", stage=stage, config={}):
        pass
    monkeypatch.setenv("RANK", "1")
    config = stages.config_class(stage).model_construct(out=tmp_path / "out")
    assert stages._run_function(stage, config)(config) == tmp_path / "out"
