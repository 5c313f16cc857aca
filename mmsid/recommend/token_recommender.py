"""Base class of the token-level recommenders: vocabulary, token sequences of histories, and the loss per level.

Each level has its own token range: code c of level l is token `offsets[l] + c`. The one other token, `begin`, is last. A
history of T items with D tokens each is `begin i1_1 .. i1_D i2_1 .. iT_D`, without separators. At each node of the trie
the softmax runs over the node's children only, in training and in decoding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mmsid.recommend.paths import ItemPaths, PathTrie


class TokenRecommender(nn.Module, ABC):
    """Base of the flat decoder and of the encoder-decoder.

    Attributes:
        window: items of a train history that are read at once: `max_history` and the target after them. Histories of the
            maximum length therefore occur in training too.

    Args:
        paths: of all items.
        trie: trie that training normalises over, on the device of the model (see `SidTransformer`). None: the trie of all items.
    """

    def __init__(self, paths: ItemPaths, max_history: int, trie: PathTrie | None) -> None:
        super().__init__()
        self.trie = PathTrie.build(paths) if trie is None else trie
        self.window = max_history + 1
        self.sizes = tuple(int(size) for size in paths.sizes)
        self.offsets = [0, *np.cumsum(self.sizes)[:-1].tolist()]
        self.begin = sum(self.sizes)
        codes = torch.from_numpy(paths.tokens)
        self.register_buffer("tokens", codes + torch.tensor(self.offsets), persistent=False)

    @abstractmethod
    def level_table(self, level: int) -> torch.Tensor:
        """Output vectors (K_l, d) of one level's tokens."""

    def sequences(self, histories: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (B, 1 + T D) of histories (B, T) and the mask of real tokens. Histories are padded with -1, ids with `begin`."""
        real = histories >= 0
        ids = torch.where(real[..., None], self.tokens[histories.clamp_min(0)], self.begin).flatten(1)
        real = real[..., None].expand(*real.shape, len(self.sizes)).flatten(1)
        return F.pad(ids, (1, 0), value=self.begin), F.pad(real, (1, 0), value=True)

    def loss(self, hidden: torch.Tensor, items: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """Sum of the negative log-likelihoods of the paths of items (P,), all in `trie`. A node with one child adds nothing.

        Args:
            hidden: (P, D, d), the states that predict the levels.
            weights: (P,), factors of the items' terms, or None.
        """
        total = hidden.new_zeros(())
        for number, level in enumerate(self.trie.levels):
            node = self.trie.node_of[number][items]
            rows = level.has_siblings(node).nonzero()[:, 0]
            logits = hidden[:, number].index_select(0, rows) @ self.level_table(number).T
            log_prob = level.log_prob(logits, node[rows])
            total = total - (log_prob if weights is None else log_prob * weights[rows]).sum()
        return total
