"""Residual codebooks as a policy: log pi of codes given a prefix, in the form that collision handling asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from mmsid.quantize.codebooks import ResidualCodebooks, row_blocks

_BEAMS = (16, 1024)


def best_first(values: torch.Tensor, count: int) -> torch.Tensor:
    """Places of the `count` greatest of (n,) values, greatest first, equal ones in their order: a stable sort without sorting all."""
    if len(values) > count:
        places = (values >= torch.topk(values, count, sorted=False).values.min()).nonzero().flatten()
        return places[torch.argsort(values[places], descending=True, stable=True)[:count]]
    return torch.argsort(values, descending=True, stable=True)


class CodebookScores:
    """log pi(c_l | x, c_<l) = log softmax(-|r_l - e|^2 / t_l) of a set of items, r_l = x - the vectors chosen before.

    Both methods are what `mmsid.sids.collisions.relocate` takes; a tokenizer head offers the same two.

    Args:
        codebooks: L levels of K codes.
        x: (N, D) item vectors, row i = item i of the table.
        temperature: one per level, in squared distance; default: the mean squared residual that the level leaves behind.
    """

    def __init__(self, codebooks: ResidualCodebooks, x: np.ndarray | torch.Tensor, temperature: Sequence[float] | None = None) -> None:
        self.codebooks = codebooks
        self.x = codebooks._checked(x)
        self._vectors = codebooks.vectors.double()
        self._norms = self._vectors.square().sum(-1)
        if temperature is None:
            temperature = self._default_temperature()
        if len(temperature) != codebooks.num_levels or min(temperature) <= 0:
            raise ValueError(f"need one positive temperature for each of {codebooks.num_levels} levels, got {list(temperature)}")
        self.temperature = [float(value) for value in temperature]

    def last_scores(self, rows: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
        """(n,) item rows and (n, L-1) prefixes -> (n, K) float64 log pi of the last code."""
        prefixes = torch.as_tensor(np.asarray(prefixes, dtype=np.int64))
        residual = self.x[torch.as_tensor(np.asarray(rows, dtype=np.int64))].double()
        if prefixes.shape[1]:
            residual = residual - self.codebooks.decode(prefixes).double()
        return self._log_pi(residual, self.codebooks.num_levels - 1).numpy()

    def prefix_candidates(self, row: int) -> Iterator[tuple[tuple[int, ...], float]]:
        """The item's prefixes (L-1 codes) with their joint log probability, best first, found by beam.

        Lazily: a narrow beam answers nearly always; a wide one is run only for a caller who finds all of those full.
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

    def margin(self, codes: np.ndarray | torch.Tensor) -> np.ndarray:
        """(N, L) codes -> (N,) float32: the least, over levels, of log pi(code) - log pi(best other code).

        Negative where another code fits better than the chosen one.
        """
        codes = torch.as_tensor(codes).long()
        result = np.empty(len(codes), dtype=np.float32)
        for rows in row_blocks(len(codes)):
            residual = self.x[rows].double()
            least = torch.full((len(residual),), torch.inf, dtype=torch.float64)
            for level in range(self.codebooks.num_levels if self.codebooks.codebook_size > 1 else 0):
                chosen = codes[rows, level : level + 1]
                log_pi = self._log_pi(residual, level)
                own = log_pi.gather(1, chosen)[:, 0]
                least = torch.minimum(least, own - log_pi.scatter(1, chosen, -torch.inf).max(dim=1).values)
                residual = residual - self._vectors[level][chosen[:, 0]]
            result[rows] = least.numpy()
        return result

    def _log_pi(self, residual: torch.Tensor, level: int) -> torch.Tensor:
        scores = (2 * residual @ self._vectors[level].T - self._norms[level]) / self.temperature[level]
        return torch.log_softmax(scores, dim=1)

    def _default_temperature(self) -> list[float]:
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
