"""Residual codebooks as a policy: log pi of codes given a prefix, as collision handling needs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from mmsid.quantize.codebooks import ResidualCodebooks, row_blocks

_BEAMS = (16, 1024)
_MARGIN_ROWS = 2048  # the scores of one level (rows x codes) stay in the CPU cache
_BEAM_BYTES = 64 * 2**20  # float64 scores of one block of items in a beam search


def best_first(values: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest of (n,) values, largest first and stable; only the values above the threshold are sorted."""
    if len(values) > count:
        indices = (values >= torch.topk(values, count, sorted=False).values.min()).nonzero().flatten()
        return indices[torch.argsort(values[indices], descending=True, stable=True)[:count]]
    return torch.argsort(values, descending=True, stable=True)


class Beam(NamedTuple):
    """Best prefixes of n items: `prefixes` (n, b, l), best first, their joint `log_prob` (n, b), and what the last step chose: `parent`
    (n, b), the place of the prefix that was continued, and `code` (n, b)."""

    prefixes: torch.Tensor
    log_prob: torch.Tensor
    parent: torch.Tensor | None = None
    code: torch.Tensor | None = None

    @classmethod
    def start(cls, items: int) -> Beam:
        """The empty prefix of every item."""
        return cls(torch.zeros((items, 1, 0), dtype=torch.int64), torch.zeros((items, 1), dtype=torch.float64))

    def continued(self, log_pi: torch.Tensor, width: int) -> Beam:
        """The `width` best prefixes that are one code longer, by `log_pi` (n, b, K) of that code; of equal ones the lowest index first."""
        joint, size = (self.log_prob[..., None] + log_pi).flatten(1), log_pi.shape[-1]
        kept = torch.topk(joint, min(width, joint.shape[1]), dim=1, sorted=False).indices.sort(dim=1).values
        log_prob, order = joint.gather(1, kept).sort(dim=1, descending=True, stable=True)
        kept = kept.gather(1, order)
        parent, code = kept // size, kept % size
        longer = self.prefixes.gather(1, parent[..., None].expand(-1, -1, self.prefixes.shape[-1]))
        return Beam(torch.cat([longer, code[..., None]], dim=2), log_prob, parent, code)


class CodebookScores:
    """Scores of codes: log pi(c_l | x, c_<l) = log softmax(-|r_l - e|^2 / t_l), where r_l is x minus the vectors of the codes before l.

    `mmsid.sids.collisions.relocate` takes `last_scores`, and `prefix_candidates` or, for many items, `prefix_beams`.

    Args:
        codebooks: L levels of K codes.
        x: (N, D) item vectors; row i is item i of the table. A memory-mapped float32 array is not copied.
        temperature: t_l of each level, if known (`temperature` of the scores of a sample of the items); default: that of `x`.

    Attributes:
        temperature: t_l of each level, the mean squared residual after that level (in squared distance).
    """

    def __init__(self, codebooks: ResidualCodebooks, x: np.ndarray | torch.Tensor, temperature: Sequence[float] | None = None) -> None:
        self.codebooks = codebooks
        self.x = codebooks.check(x)
        self._vectors = codebooks.vectors.double()
        self._norms = self._vectors.square().sum(-1)
        self.temperature = self._residual_energies() if temperature is None else list(temperature)

    def last_scores(self, rows: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
        """(n,) item rows and (n, L-1) prefixes -> (n, K) float64 log pi of the last code."""
        prefixes = torch.as_tensor(np.asarray(prefixes, dtype=np.int64))
        residual = self.x[torch.as_tensor(np.asarray(rows, dtype=np.int64))].double()
        if prefixes.shape[1]:
            residual = residual - self.codebooks.decode(prefixes).double()
        return self._log_pi(residual, self.codebooks.num_levels - 1).numpy()

    def prefix_candidates(self, row: int) -> Iterator[tuple[tuple[int, ...], float]]:
        """Yield prefixes (L-1 codes) of an item with their joint log probability, best first, by beam search.

        The wide beam runs only if the caller needs more prefixes than the narrow beam finds.
        """
        seen: set[tuple[int, ...]] = set()
        for beam in _BEAMS:
            for prefix, log_prob in self._prefixes(int(row), beam):
                if prefix not in seen:
                    seen.add(prefix)
                    yield prefix, log_prob

    def _prefixes(self, row: int, beam: int) -> list[tuple[tuple[int, ...], float]]:
        residual = self.x[row][None].double()
        prefixes, log_prob = torch.zeros((1, 0), dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
        size = self.codebooks.codebook_size
        for level in range(self.codebooks.num_levels - 1):
            joint = (log_prob[:, None] + self._log_pi(residual, level)).flatten()
            kept = best_first(joint, beam)
            parent, code = kept // size, kept % size
            prefixes, log_prob = torch.cat([prefixes[parent], code[:, None]], dim=1), joint[kept]
            residual = residual[parent] - self._vectors[level][code]
        return [(tuple(codes), float(value)) for codes, value in zip(prefixes.tolist(), log_prob.tolist(), strict=True)]

    def prefix_beams(self, rows: np.ndarray, beam: int) -> np.ndarray:
        """Best prefixes of several items by one beam search: (n,) item rows -> (n, b, L-1) int64, best first, b <= beam.

        A prefix that is among the `beam` best of no earlier level is missed, as in `prefix_candidates`.
        """
        rows = torch.as_tensor(np.asarray(rows, dtype=np.int64))
        width = self.codebooks.codebook_size * min(beam, self.codebooks.codebook_size ** max(self.codebooks.num_levels - 2, 0))
        block = max(_BEAM_BYTES // (8 * (width + self.codebooks.dim * min(beam, width))), 1)
        return torch.cat([self._beams(rows[part], beam) for part in row_blocks(len(rows), block)]).numpy()

    def _beams(self, rows: torch.Tensor, beam: int) -> torch.Tensor:
        residual, found = self.x[rows][:, None].double(), Beam.start(len(rows))
        for level in range(self.codebooks.num_levels - 1):
            found = found.continued(self._log_pi(residual, level), beam)
            if level < self.codebooks.num_levels - 2:
                parents = found.parent[..., None].expand(-1, -1, residual.shape[2])
                residual = residual.gather(1, parents) - self._vectors[level][found.code]
        return found.prefixes

    def margin(self, codes: np.ndarray | torch.Tensor) -> np.ndarray:
        """Margin of (N, L) codes: the minimum over levels of log pi(code) - log pi(best other code), (N,) float32.

        It is negative where another code fits better.
        """
        return self.margin_of(self.x, torch.as_tensor(codes).long())

    def margin_of(self, x: torch.Tensor, codes: torch.Tensor, dtype: torch.dtype = torch.float64) -> np.ndarray:
        """`margin` of other vectors (n, D) with the codes (n, L). float32 takes a fifth of the time."""
        result = torch.full((len(x),), torch.inf, dtype=dtype)
        vectors = self._vectors.to(dtype)
        weights = [2 * level.T / temperature for level, temperature in zip(vectors, self.temperature, strict=True)]
        offsets = [(-norms / temperature).to(dtype) for norms, temperature in zip(self._norms, self.temperature, strict=True)]
        for rows in row_blocks(len(x), _MARGIN_ROWS):
            residual = x[rows].to(dtype)
            for level in range(self.codebooks.num_levels if self.codebooks.codebook_size > 1 else 0):
                chosen = codes[rows, level : level + 1]
                scores = torch.addmm(offsets[level], residual, weights[level])  # log pi but for a constant of the row
                own = scores.gather(1, chosen)[:, 0]
                torch.minimum(result[rows], own - scores.scatter_(1, chosen, -torch.inf).amax(dim=1), out=result[rows])
                residual = residual - vectors[level][chosen[:, 0]]
        return result.float().numpy()

    def _logits(self, residual: torch.Tensor, level: int) -> torch.Tensor:
        return (2 * residual @ self._vectors[level].T - self._norms[level]) / self.temperature[level]

    def _log_pi(self, residual: torch.Tensor, level: int) -> torch.Tensor:
        return torch.log_softmax(self._logits(residual, level), dim=-1)

    def _residual_energies(self) -> list[float]:
        codes = self.codebooks.encode(self.x)
        energy, errors = 0.0, np.zeros(codes.shape[1])
        for rows in row_blocks(len(codes)):
            residual = self.x[rows].double()
            energy += float(residual.square().sum())
            for level in range(codes.shape[1]):
                residual = residual - self._vectors[level][codes[rows, level]]
                errors[level] += float(residual.square().sum())
        energy = max(energy / len(codes), 1e-12)
        return [max(float(error) / len(codes), 1e-6 * energy) for error in errors]
