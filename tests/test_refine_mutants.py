"""Mutation test of ppo.py (T11): tests of test_refine_ppo.py catch every wrong sign, bound, direction or missing check."""

from pathlib import Path
from types import ModuleType

import pytest
import test_refine_ppo as tests

from mmsid.refine import ppo

SOURCE = Path(ppo.__file__).read_text(encoding="utf-8")
MUTANTS = {
    "maximum for minimum": ("torch.minimum(ratio * advantages", "torch.maximum(ratio * advantages"),
    "clip bounds exchanged": ("ratio.clamp(1.0 - clip_low, 1.0 + clip_high)", "ratio.clamp(1.0 - clip_high, 1.0 + clip_low)"),
    "ratio upside down": ("difference = new - old", "difference = old - new"),
    "ratio not clamped": ("return difference.clamp(-limit, limit)", "return difference"),
    "ratio not checked": ("torch.isfinite(difference)", "torch.isfinite(torch.zeros(1))"),
    "gradient through the bound": ("new.detach().exp()", "new.exp()"),
    "bound by the smaller": ("torch.maximum(old.exp(), 1.0 - probability)", "torch.minimum(old.exp(), 1.0 - probability)"),
    "positive advantages bounded": ("torch.where(advantages < 0", "torch.where(advantages > 0"),
    "old need not be detached": ("if old.requires_grad or advantages.requires_grad", "if advantages.requires_grad"),
    "advantages need not be detached": ("if old.requires_grad or advantages.requires_grad", "if old.requires_grad"),
    "groups of one": ("rewards.shape[1] < 2", "rewards.shape[1] < 1"),
    "rewards not checked": ("torch.isfinite(rewards)", "torch.isfinite(torch.zeros(1))"),
    "own reward in the baseline": ("(group / max(group - 1, 1))", "1.0"),
    "scale over flat groups too": ("varying = rewards[~equal]", "varying = rewards"),
    "decay on the present": ("self.decay * before + (1.0 - self.decay) * now", "self.decay * now + (1.0 - self.decay) * before"),
    "KL of the other order": ("(log_p.exp() * (log_p - log_q))", "(log_q.exp() * (log_q - log_p))"),
    "sign of the entropy": ("return -(log_p.exp() * log_p)", "return (log_p.exp() * log_p)"),
    "joint for conditional entropies": ("return torch.diff(stacked, dim=1, prepend=torch.zeros_like(stacked[:, :1]))", "return stacked"),
    "k3 without its correction": ("torch.expm1(log_r) - log_r", "torch.expm1(log_r)"),
    "approximate KL of the other order": ("log_r = log_ratio(new, old)", "log_r = log_ratio(old, new)"),
    "clip fraction of one side": ("(ratio < 1.0 - clip_low) | (ratio > 1.0 + clip_high)", "(ratio > 1.0 + clip_high)"),
    "samples of another policy": ("torch.multinomial(log_p.exp()", "torch.multinomial(torch.ones_like(log_p)"),
}


def _calls():
    """Every test as a function without arguments; a parametrised test once per case."""
    for name in [name for name in dir(tests) if name.startswith("test_")]:
        test = getattr(tests, name)
        marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
        if not marks:
            yield test
        for mark in marks:
            names, cases = mark.args
            for case in cases:
                given = {names: case} if isinstance(names, str) else dict(zip(names, case))
                yield lambda test=test, given=given: test(**given)


def _killed(source: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    mutant = ModuleType("mutant")
    exec(compile(source, "mutant", "exec"), mutant.__dict__)
    monkeypatch.setattr(tests, "ppo", mutant)
    for call in _calls():
        try:
            call()
        except (Exception, pytest.fail.Exception):
            return True
    return False


@pytest.mark.parametrize("name", MUTANTS)
def test_t11_every_mutant_is_killed(name, monkeypatch):
    original, mutant = MUTANTS[name]
    assert SOURCE.count(original) == 1, f"{original!r} occurs {SOURCE.count(original)} times in ppo.py"
    assert _killed(SOURCE.replace(original, mutant), monkeypatch)


def test_the_original_survives(monkeypatch):
    assert not _killed(SOURCE, monkeypatch)
