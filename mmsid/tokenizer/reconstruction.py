"""Reconstruction of an item's summary by a frozen language model from soft prompts (UniSID, arXiv 2602.10445, section 2.5).

UniSID uses a frozen Qwen2.5-3B. Without such a model, `train_decoder` trains a small GPT-2 on the catalogue's summaries and freezes it.
During that training, the prompt positions contain embeddings of random words of the text, so that the decoder learns to use a prompt.
The prompt is made from the continuous states (as published), or from the chosen code vectors, whose gradient reaches the policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from mmsid.backbone.devices import torch_device
from mmsid.backbone.loading_bar import no_loading_bar
from mmsid.backbone.model_loading import resolve_dtype
from mmsid.backbone.weight_files import check_weight_files
from mmsid.errors import ConfigError
from mmsid.progress import track
from mmsid.tokenizer.losses import sequence_nll

PAD, END, UNKNOWN = "<pad>", "<end>", "<unk>"
MAX_LENGTH = 48  # tokens per text
BATCH_SIZE, VOCABULARY = 32, 2000  # of the decoder that is trained here


class FrozenDecoder(nn.Module):
    """A frozen causal language model with its text tokenizer, conditioned on soft prompts."""

    def __init__(self, model: Any, text_tokenizer: Any) -> None:
        super().__init__()
        self.model, self.text_tokenizer = model.eval().requires_grad_(False), text_tokenizer
        embeddings = model.get_input_embeddings().weight
        self.width: int = embeddings.shape[1]
        self.embedding_scale = max(embeddings.detach().float().std().item(), 1e-4)

    @classmethod
    def from_pretrained(cls, path: str) -> FrozenDecoder:
        """Load a causal language model from a folder or a hub id, in bf16 on a GPU (`mmsid.backbone.model_loading.resolve_dtype`).

        Raises:
            ConfigError: the model cannot be loaded.
        """
        check_weight_files(path)
        try:
            with no_loading_bar():
                return cls(
                    AutoModelForCausalLM.from_pretrained(path, dtype=resolve_dtype("auto", path, torch_device())),
                    AutoTokenizer.from_pretrained(path),
                )
        except (OSError, ValueError, SafetensorError) as error:
            raise ConfigError(
                f"train_tokenizer.decoder {path!r} cannot be loaded as a causal language model ({error}); "
                "give another folder or hub id, or leave the key out"
            ) from error

    def save_pretrained(self, folder: Path) -> None:
        """Write weights (safetensors) and text tokenizer."""
        with no_loading_bar():
            self.model.save_pretrained(folder)
        self.text_tokenizer.save_pretrained(folder)

    def train(self, mode: bool = True) -> FrozenDecoder:
        """The decoder always stays in evaluation mode."""
        return super().train(False)

    def ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids (B, T), right-padded, with an end token after each text, and their mask (B, T). An empty text has no tokens."""
        end = self.text_tokenizer.eos_token_id
        rows = [
            self.text_tokenizer(text, add_special_tokens=False, truncation=True, max_length=MAX_LENGTH - 1)["input_ids"] + [end]
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
        """Mean negative log-likelihood per token (B,), in nats, of each text after its soft prompt (B, P, width)."""
        embedded = self.model.get_input_embeddings()(ids)
        inputs = torch.cat([prompt.to(embedded.dtype), embedded[:, :-1]], 1)
        logits = self.model(inputs_embeds=inputs, use_cache=False).logits[:, prompt.shape[1] - 1 :]
        return sequence_nll(logits.float(), ids, mask)


class ReconstructionHead(nn.Module):
    """f_recon: one linear layer per position from P vectors (B, P, size) to a soft prompt at the scale of the word embeddings."""

    def __init__(self, positions: int, size: int, decoder: FrozenDecoder) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(positions, size, decoder.width) / size**0.5)
        self.bias = nn.Parameter(torch.zeros(positions, decoder.width))
        self.scale = decoder.embedding_scale

    def forward(self, vectors: Tensor) -> Tensor:
        """Soft prompt (B, P, decoder width)."""
        normal = nn.functional.layer_norm(vectors, vectors.shape[-1:])
        return self.scale * (torch.einsum("bps,psw->bpw", normal, self.weight) + self.bias)


def train_decoder(
    texts: Sequence[str],
    *,
    prompt_length: int,
    steps: int = 120,
    width: int = 96,
    seed: int = 0,
) -> FrozenDecoder:
    """Train a two-layer GPT-2 on the distinct non-empty `texts`, and freeze it.

    During training, the first `prompt_length` positions contain embeddings of random words of the text, and noise in one case of five.

    Raises:
        ConfigError: all texts are empty.
    """
    distinct = sorted({text for text in texts if text})
    if not distinct:
        raise ConfigError("train_tokenizer.reconstruct: no item has a text to reconstruct; choose another target, or set it to off")
    text_tokenizer = _text_tokenizer(distinct)
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
        ids, mask = decoder.ids([distinct[row] for row in rng.integers(len(distinct), size=min(BATCH_SIZE, len(distinct)))])
        position = torch.from_numpy(rng.random((len(ids), prompt_length))) * mask.sum(1, keepdim=True)
        prompt = model.get_input_embeddings()(ids.gather(1, position.long().clamp_max(ids.shape[1] - 1)))
        replaced = torch.from_numpy(rng.random(len(ids)) < 0.2)[:, None, None]
        prompt = torch.where(replaced, decoder.embedding_scale * torch.randn(prompt.shape, generator=noise), prompt)
        loss = (decoder.nll(prompt, ids, mask) * mask.sum(1)).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        note["nll"] = float(loss.detach())
    return FrozenDecoder(model, text_tokenizer)


def _text_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `VOCABULARY` tokens, trained on `texts`."""
    raw = Tokenizer(models.BPE(unk_token=UNKNOWN))
    raw.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    raw.decoder = decoders.ByteLevel()
    special = [PAD, END, UNKNOWN]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, bos_token=END)
