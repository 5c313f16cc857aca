"""TRL's `GRPOTrainer` for a causal model over SID tokens, with rollouts and log-probabilities restricted to the trie.

`rollout_func` (experimental in TRL) samples with `generate` under `TrieLogitsProcessor`. TRL scores completions with a
softmax over the whole vocabulary, so `TrieGRPOTrainer` overrides the scoring method. Policy, old policy and reference
are then distributions over existing SIDs, the same that rollouts are sampled from and that beam search ranks by.
Positions count from the first real token, because prompts are padded on the left and GPT-2 was trained without padding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from mmsid.recommend.trie_constraint import TrieConstraint, TrieLogitsProcessor
from mmsid.sids.table import token
from mmsid.sids.trie import Trie

BEGIN = "<begin>"
Reward = Callable[..., list[float]]


def sid_text_tokenizer(sizes: Sequence[int]) -> PreTrainedTokenizerFast:
    """Word-level tokenizer with the vocabulary of `TokenRecommender`: codes level by level, then `<begin>`, which also pads on the left."""
    words = [token(level, code) for level, size in enumerate(sizes) for code in range(size)] + [BEGIN]
    raw = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=BEGIN, eos_token=BEGIN, pad_token=BEGIN, padding_side="left")


def path_log_probs(
    logits: torch.Tensor, codes: torch.Tensor, constraint: TrieConstraint, offsets: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each code of a path given the codes before it, over the codes that the trie allows.

    Args:
        logits: (B, D, V), at the positions that predict the levels.
        codes: int64 (B, D), complete paths of the trie.
        offsets: token id of code 0 per level.

    Returns:
        Log-probabilities (B, D) and entropies (B, D) in nats. The sum of the log-probabilities over D is the path's score
        in beam search.

    Raises:
        ValueError: a row is not a path of the trie.
    """
    node = torch.zeros(len(codes), dtype=torch.long, device=codes.device)
    log_probs, entropies = [], []
    for level, rule in enumerate(constraint.levels):
        scores = torch.log_softmax(rule.mask(logits[:, level, offsets[level] : offsets[level] + rule.size], node), -1)
        child = rule.step(node, codes[:, level])
        if bool((child < 0).any()):
            row = int((child < 0).nonzero()[0, 0])
            raise ValueError(f"row {row}: codes {codes[row].tolist()} are not a path of the trie, they leave it at level {level}")
        log_probs.append(scores.gather(1, rule.candidate(node, child)[:, None])[:, 0])
        entropies.append(-(scores.exp() * scores.masked_fill(torch.isneginf(scores), 0.0)).sum(-1))
        node = child
    return torch.stack(log_probs, 1), torch.stack(entropies, 1)


class TrieGRPOTrainer(GRPOTrainer):
    """GRPO over paths of a trie. Completions are complete paths of D tokens.

    Args:
        policy: loaded by `from_pretrained`, so that TRL can load the frozen reference from the same folder.
        rewards: TRL reward functions, summed with `args.reward_weights`. Each receives the columns of `data` and `completion_ids`.
        data: a column `prompt` with histories in the words of `sid_text_tokenizer`, and the columns that the rewards read.
        trie: of the paths of all items.
    """

    def __init__(self, policy: PreTrainedModel, rewards: list[Reward], args: GRPOConfig, data: Dataset, trie: Trie) -> None:
        trie, sizes = trie.to(args.device), trie.sizes.tolist()
        self.offsets = [sum(sizes[:level]) for level in range(len(sizes))]
        self.constraint = TrieConstraint.from_trie(trie)
        ids = [range(start, start + size) for start, size in zip(self.offsets, sizes, strict=True)]
        self.processor = TrieLogitsProcessor(trie, ids, prompt_length=0)
        text_tokenizer = sid_text_tokenizer(sizes)
        for config in (policy.config, policy.generation_config):
            config.eos_token_id = text_tokenizer.eos_token_id
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*rollout_func.*")
            super().__init__(policy, rewards, args, train_dataset=data, processing_class=text_tokenizer, rollout_func=_sample_paths)

    def _get_per_token_logps_and_entropies(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **unused: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """TRL's scoring method under the trie mask. -> log-probabilities (B, D), entropies (B, D) or None, no auxiliary loss."""
        log_probs, entropies = [], []
        for rows in torch.arange(len(input_ids), device=input_ids.device).split(batch_size or len(input_ids)):
            ids, real = input_ids[rows], attention_mask[rows]
            positions = (real.cumsum(1) - 1).clamp_min(0)
            logits = model(ids, attention_mask=real, position_ids=positions, logits_to_keep=logits_to_keep + 1).logits[:, :-1]
            codes = ids[:, -logits_to_keep:] - torch.tensor(self.offsets, device=ids.device)
            log_prob, entropy = path_log_probs(logits / self.temperature, codes, self.constraint, self.offsets)
            log_probs.append(log_prob)
            entropies.append(entropy)
        return torch.cat(log_probs), torch.cat(entropies) if compute_entropy else None, None


def _sample_paths(prompts: list[str], trainer: TrieGRPOTrainer) -> dict[str, list[list[int]]]:
    """TRL's rollout function: sample one path per prompt. TRL repeats each prompt once per rollout of its group."""
    prompt_ids = trainer.processing_class(text=prompts)["input_ids"]
    padded = trainer.processing_class.pad({"input_ids": prompt_ids}, return_tensors="pt").to(trainer.accelerator.device)
    trainer.processor.prompt_length = padded["input_ids"].shape[1]
    with torch.no_grad():
        sequences = trainer.accelerator.unwrap_model(trainer.model).generate(
            input_ids=padded["input_ids"],
            attention_mask=padded["attention_mask"],
            max_new_tokens=len(trainer.offsets),
            do_sample=True,
            temperature=trainer.temperature,
            top_k=0,
            logits_processor=LogitsProcessorList([trainer.processor]),
        )
    completions = sequences[:, trainer.processor.prompt_length :].tolist()
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": completions,
        "logprobs": None,
    }  # TRL needs log-probabilities only if another engine samples
