"""Summary reconstruction: a frozen language model must rebuild the item's summary from what the tokenizer says of it.

UniSID (arXiv 2602.10445, 2.5) reads [Z^SID ; Z^Emb] through a head f_recon into a frozen Qwen2.5-3B. Where no such model is at
hand, a small decoder of our own is trained on the catalogue's summaries as a language model, then frozen. Two things differ
from the paper there: its size, and that it learns to read its prompt. A decoder that never saw a prompt can hardly be steered
by one; so, in its own training, the prompt positions hold embeddings of random words of the text to come. f_recon then only
has to find its way into the decoder's word-embedding space.

The prompt is made from the continuous states as published (`states`), or from the vectors of the chosen codes (`codes`), which
lets the gradient reach the policy itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from mmsid.backbone.text import no_loading_bar
from mmsid.errors import ConfigError
from mmsid.progress import track
from mmsid.tokenizer.losses import sequence_nll

PAD, END, UNKNOWN = "<pad>", "<end>", "<unk>"


class FrozenDecoder(nn.Module):
    """A frozen causal language model with its text tokenizer, read through soft prompts."""

    def __init__(self, model: Any, text_tokenizer: Any, max_length: int = 48) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.text_tokenizer, self.max_length = text_tokenizer, max_length
        self.width: int = model.get_input_embeddings().weight.shape[1]
        scale = model.get_input_embeddings().weight.detach().float().std().item()
        self.embedding_scale = max(scale, 1e-4)

    @classmethod
    def from_pretrained(cls, path: str, max_length: int = 48) -> FrozenDecoder:
        """A causal language model by folder or hub id.

        Raises:
            ConfigError: it cannot be loaded.
        """
        try:
            with no_loading_bar():
                return cls(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path), max_length)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"decoder {path!r} cannot be loaded as a causal language model ({error}); name another, or leave it out"
            ) from error

    def save_pretrained(self, folder: Path) -> None:
        """Write weights (safetensors) and text tokenizer."""
        with no_loading_bar():
            self.model.save_pretrained(folder)
        self.text_tokenizer.save_pretrained(folder)

    def train(self, mode: bool = True) -> FrozenDecoder:
        """Frozen means frozen: never in training mode."""
        return super().train(False)

    def ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids (B, T), right-padded, each text closed by the end token, and their mask (B, T); an empty text has no token."""
        end = self.text_tokenizer.eos_token_id
        rows = [
            self.text_tokenizer(text, add_special_tokens=False, truncation=True, max_length=self.max_length - 1)["input_ids"] + [end]
            if text
            else []
            for text in texts
        ]
        width = max(1, *(len(row) for row in rows)) if rows else 1
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        mask = torch.zeros(len(rows), width)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
            mask[i, : len(row)] = 1
        return ids, mask

    def nll(self, prompt: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Mean negative log-likelihood per token (nats) of each text after its soft prompt (B, P, width): (B,)."""
        embedded = self.model.get_input_embeddings()(ids)
        inputs = torch.cat([prompt.to(embedded.dtype), embedded[:, :-1]], 1)
        logits = self.model(inputs_embeds=inputs, use_cache=False).logits[:, prompt.shape[1] - 1 :]
        return sequence_nll(logits.float(), ids, mask)


class ReconstructionHead(nn.Module):
    """f_recon: P vectors (B, P, size) -> soft prompt (B, P, decoder width), one linear layer per position, scaled to word embeddings."""

    def __init__(self, positions: int, size: int, decoder: FrozenDecoder) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(positions, size, decoder.width) / size**0.5)
        self.bias = nn.Parameter(torch.zeros(positions, decoder.width))
        self.scale = decoder.embedding_scale

    def forward(self, vectors: Tensor) -> Tensor:
        """Soft prompt (B, P, width)."""
        normal = nn.functional.layer_norm(vectors, vectors.shape[-1:])
        return self.scale * (torch.einsum("bps,psw->bpw", normal, self.weight) + self.bias)


def train_decoder(
    texts: Sequence[str],
    *,
    prompt_length: int,
    steps: int = 120,
    batch_size: int = 32,
    width: int = 96,
    vocabulary: int = 2000,
    seed: int = 0,
) -> FrozenDecoder:
    """A two-layer GPT-2 trained on `texts` (empty ones are left out), then frozen.

    The first `prompt_length` positions hold embeddings of random words of the text itself (one time in five: noise), so that
    the decoder learns to take a prompt at its word.

    Raises:
        ConfigError: no text to learn from.
    """
    kept = sorted({text for text in texts if text})
    if not kept:
        raise ConfigError("reconstruct: no item has the text that is to be reconstructed; choose another target, or `off`")
    text_tokenizer = _text_tokenizer(kept, vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(text_tokenizer),
                n_positions=64 + prompt_length,
                n_embd=width,
                n_layer=2,
                n_head=4,
                bos_token_id=text_tokenizer.eos_token_id,
                eos_token_id=text_tokenizer.eos_token_id,
                pad_token_id=text_tokenizer.pad_token_id,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        )
    decoder = FrozenDecoder(model, text_tokenizer)
    rng = np.random.default_rng(seed)
    noise = torch.Generator().manual_seed(seed)
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    note: dict[str, object] = {}
    for step in track(range(steps), what="summary decoder", unit="steps", note=note):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 10) * (1 - 0.9 * step / steps)
        ids, mask = decoder.ids([kept[row] for row in rng.integers(len(kept), size=min(batch_size, len(kept)))])
        picked = torch.from_numpy(rng.random((len(ids), prompt_length)))
        place = (picked * mask.sum(1, keepdim=True)).long().clamp_max(ids.shape[1] - 1)
        prompt = model.get_input_embeddings()(ids.gather(1, place))
        silent = torch.from_numpy(rng.random(len(ids)) < 0.2)[:, None, None]
        prompt = torch.where(silent, decoder.embedding_scale * torch.randn(prompt.shape, generator=noise), prompt)
        loss = (decoder.nll(prompt, ids, mask) * mask.sum(1)).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        note["nll"] = float(loss.detach())
    return FrozenDecoder(model, text_tokenizer)


def _text_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE(unk_token=UNKNOWN))
    raw.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    raw.decoder = decoders.ByteLevel()
    special = [PAD, END, UNKNOWN]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, bos_token=END)
