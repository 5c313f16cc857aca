"""One accelerator per stage, in the precision that the stage asked for."""

import pytest

from mmsid import accelerator
from mmsid.accelerator import make_accelerator
from mmsid.errors import ConfigError


def test_a_stage_does_not_inherit_the_precision_of_the_one_before(monkeypatch):
    monkeypatch.setattr(accelerator, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(accelerator.torch.cuda, "is_available", lambda: False)
    assert make_accelerator("auto").mixed_precision == "bf16"
    assert make_accelerator().mixed_precision == "no"


def test_bf16_that_the_hardware_only_emulates_is_refused(monkeypatch):
    monkeypatch.setattr(accelerator, "cpu_has_bf16", lambda: False)
    monkeypatch.setattr(accelerator.torch.cuda, "is_available", lambda: False)
    assert make_accelerator("auto").mixed_precision == "no"
    with pytest.raises(ConfigError, match="emulates"):
        make_accelerator("bf16")
