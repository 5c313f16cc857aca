"""Control arms of refinement: other ways to move codes, on the same evidence, with the same number of scored paths or steps.

`ppo` is refinement itself, published whatever the gate says, so that the bench compares what it did and not what was kept. The
others show what of its gain comes from where: `best_of_n` needs no gradient, `per_item` no shared weights (a row of logits per item: it
says nothing of new items), `shuffled` reads other items' rewards, `random` moves as many items as far, but the wrong ones, `gumbel` trains
the head through Gumbel-softmax samples on the co-engagement itself (after DIGER, 2601.19711), without any reward. What is a setting of
the loop (group-normalised GRPO, reward-weighted steps, the exact gradient) needs nothing here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mmsid.accelerator import make_accelerator
from mmsid.artifacts import write_json, writing
from mmsid.catalog import read_catalog, split_histories
from mmsid.config import build
from mmsid.errors import ConfigError, MmsidError
from mmsid.progress import track
from mmsid.refine import ppo
from mmsid.refine.config import RefineConfig
from mmsid.refine.evidence import Codes
from mmsid.refine.loop import LoopConfig, Scorer
from mmsid.refine.outputs import write_sids
from mmsid.refine.policy import Reference
from mmsid.refine.publish import make_table
from mmsid.refine.stage import Job
from mmsid.refine.tracking import RunLog
from mmsid.tokenizer.heads import ResidualHead

Control = Literal["ppo", "per_item", "best_of_n", "shuffled", "random", "gumbel"]
ROW_LR = 100.0  # learning rate of per_item over the head's; `step_kl` bounds its steps as everybody's
SAMPLES = 24  # of best_of_n, per item and round


def control_arm(control: Control, settings: dict[str, Any]) -> Path:
    """`run_control` with the settings of the stage as a bench's suite gives them.

    Raises:
        ConfigError: a setting that the stage does not know, and what `run_control` raises.
    """
    return run_control(build(RefineConfig, settings, source="suite", section="refine"), control)


def run_control(config: RefineConfig, control: Control) -> Path:
    """Move the codes of `config.tokenizer` by `control` and write them as a SID folder to `config.out`. -> the folder.

    Raises:
        MmsidError: the reward of this catalogue is not usable (controls that need none do not ask), or what the stage raises.
        ConfigError: `gumbel` of a head without code vectors.
    """
    accelerator = make_accelerator()
    catalog = read_catalog(config.catalog)
    split = split_histories(catalog, config.catalog.split)
    inputs = {"tokenizer": config.tokenizer, "sids": config.sids, "items": config.catalog.items}
    with writing(config.out, stage="refine_control", config=config.model_dump(mode="json") | {"control": control}, inputs=inputs) as draft:
        job = Job(config, accelerator, catalog, split, draft, None)
        codes = _gumbel(job) if control == "gumbel" else _rewarded(job, control)
        table = make_table(job.tokenizer, job.reference.states, job.inputs, catalog, config.collisions, codes)
        write_sids(draft.path, table, job.embedding, catalog, job.held_out, config.seed)
        draft.counts["moved"] = int((codes != job.reference.greedy).any(axis=1).sum())
        write_json(
            draft.path / "moved.json", {"items": draft.counts["moved"], "per_level": (codes != job.reference.greedy).mean(0).tolist()}
        )
    return config.out


def _rewarded(job: Job, control: Control) -> Codes:
    """Controls that are paid by the reward model; -> raw codes (N, L)."""
    config, reference = job.config, job.reference
    reward, report = job.learn_reward()
    if not report["usable"]:
        raise MmsidError(f"refinement and its controls have no reward here: {report['reason']}")
    scorer = job.scorer(reward)
    if control == "best_of_n":
        return best_of_n(reference, scorer, config.loop, config.seed)
    if control == "shuffled":
        scorer = shuffled(scorer, config.seed)
    policy = job.policy()
    if control == "per_item":
        policy = TablePolicy(reference)
    log = RunLog(job.accelerator, job.draft.path, None, {})
    codes = job.loop(policy, scorer).run(log)
    return displaced_at_random(reference, codes, config.seed) if control == "random" else codes


class TablePolicy:
    """A categorical policy per item: the reference's log-probabilities plus a trained row of P numbers each."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.logits = nn.Parameter(torch.zeros_like(reference.tree.log_prob))
        self.parameters = [self.logits]
        self.rates = [ROW_LR]  # the rows are log-probabilities themselves, and each is moved only where its item is drawn
        # the greedy path is the best level by level, not always the best as a whole: without this lead items would move before any step
        self.lead = torch.zeros_like(reference.tree.log_prob)
        self.lead[:, 0] = reference.tree.log_prob.amax(1) - reference.tree.log_prob[:, 0]

    def log_prob(self, rows: Tensor) -> Tensor:
        """(B,) item rows -> (B, P), with gradient."""
        return (self.reference.tree.log_prob[rows] + self.logits[rows]).log_softmax(-1)

    def noisy_log_prob(self, rows: Tensor, turn: int) -> Tensor:
        """The same: a table reads nothing, so it cannot misread."""
        return self.log_prob(rows)

    @torch.no_grad()
    def greedy(self) -> Codes:
        """Each item's best path of its tree, (N, L)."""
        best = (self.reference.tree.log_prob + self.lead + self.logits).argmax(-1)
        return self.reference.tree.codes[torch.arange(len(best), device=best.device), best].cpu().numpy()


def best_of_n(reference: Reference, scorer: Scorer, config: LoopConfig, seed: int) -> Codes:
    """Rounds in which a part of the items draws `SAMPLES` paths from the reference and takes the best, if it beats where the item is.

    As many paths are scored as the loop scores. -> codes (N, L).
    """
    order, draw = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    scale, tree, table = ppo.RunningScale(), reference.tree, reference.greedy.copy()
    for _ in track(range(max(1, round(config.rounds * config.group / SAMPLES))), what="best of n", unit="rounds"):
        rows = np.sort(order.permutation(len(table))[: max(1, round(config.moving * len(table)))])
        picks = ppo.sample_groups(tree.log_prob[torch.as_tensor(rows)].cpu(), SAMPLES, draw).numpy()
        candidates = np.concatenate([table[rows][:, None], tree.codes.cpu().numpy()[rows[:, None], picks]], axis=1)
        parts = scorer(rows, candidates, table)
        rewards = sum(weight * scale(name, torch.as_tensor(parts[name])) for name, weight in config.weights.items())
        table[rows] = candidates[np.arange(len(rows)), rewards.argmax(dim=1).numpy()]  # the first of equals: the item stays
    return table


def shuffled(scorer: Scorer, seed: int) -> Scorer:
    """Every item is paid what some other item's candidates earn: the reward's size without its meaning."""
    rng = np.random.default_rng(seed)

    def score(rows: NDArray, candidates: Codes, codes: Codes) -> dict[str, NDArray]:
        exchanged = rng.permutation(len(rows))
        return {name: part[exchanged] for name, part in scorer(rows, candidates, codes).items()}

    return score


def displaced_at_random(reference: Reference, codes: Codes, seed: int) -> Codes:
    """As many items move as `codes` (N, L) moved, to paths of the same ranks in their own trees, but other items do. -> (N, L).

    A path outside its item's tree counts as its least likely one.
    """
    tree = reference.tree.codes.cpu().numpy()
    same = (tree == codes[:, None]).all(-1)
    rank = np.where(same.any(1), same.argmax(1), tree.shape[1] - 1)
    drawn = np.random.default_rng(seed).permutation(rank)
    return tree[np.arange(len(tree)), drawn]


def _gumbel(job: Job) -> Codes:
    """Straight-through Gumbel-softmax through all levels; losses 1 : 1 : 1 as published. -> raw codes (N, L).

    The recommender's loss is replaced by the co-engagement that the reward reads too: InfoNCE between the quantised vectors of items
    engaged with together; beside it rebuilding of the frozen states and commitment. The noise falls linearly to 0. As many steps as the
    loop may take.
    """
    head, loop, config = job.tokenizer.head, job.config.loop, job.config
    if not isinstance(head, ResidualHead):
        raise ConfigError("the control `gumbel` moves code vectors; a parallel head has none")
    generator = torch.Generator().manual_seed(config.seed)
    pairs = job.neighbours.tocoo()
    chances = torch.from_numpy(pairs.data)
    target = job.reference.head.project(job.reference.states)[:, -1].detach()
    steps = loop.rounds * loop.epochs * max(1, round(loop.moving * len(target) / loop.batch))
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-4)
    for step in track(range(steps), what="gumbel", unit="steps"):
        chosen = torch.multinomial(chances, loop.batch // 2, replacement=True, generator=generator).numpy()
        rows = torch.from_numpy(np.concatenate([pairs.row[chosen], pairs.col[chosen]]).astype(np.int64)).to(target.device)
        s = head.project(job.reference.states[rows])
        quantised = _quantise(head, s, 1.0 - step / steps, generator)
        loss = _distances(quantised, s[:, -1], target[rows]) + _contrast(quantised, loop.batch // 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return job.policy().greedy()


def _quantise(head: ResidualHead, s: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """(B, L, D) -> (B, D): the sum of one sampled code vector per level, gradients those of the softmax (tau 2, as published)."""
    codes, total = torch.zeros(len(s), 0, dtype=torch.int64, device=s.device), torch.zeros_like(s[:, 0])
    for level in range(head.num_levels):
        logits = head.level_logits(s, codes).log_softmax(-1)
        uniform = torch.rand(logits.shape, generator=generator).clamp(1e-9, 1 - 1e-9).to(s.device)
        soft = ((logits - noise * (-uniform.log()).log()) / 2.0).softmax(-1)
        chosen = soft.argmax(-1)
        total = total + (nn.functional.one_hot(chosen, soft.shape[-1]) + soft - soft.detach()) @ head.vectors[level]
        codes = torch.cat([codes, chosen[:, None]], 1)
    return total


def _distances(quantised: Tensor, s: Tensor, target: Tensor) -> Tensor:
    """Rebuilding of the frozen states plus commitment, both in units of the states' mean square."""
    size = target.square().sum(-1).mean()
    return ((quantised - target).square().sum(-1).mean() + (s - quantised.detach()).square().sum(-1).mean()) / size


def _contrast(quantised: Tensor, half: int, tau: float = 0.07) -> Tensor:
    """InfoNCE of the first `half` rows against their partners in the second."""
    unit = nn.functional.normalize(quantised, dim=-1)
    return nn.functional.cross_entropy(unit[:half] @ unit[half:].T / tau, torch.arange(half, device=unit.device))
