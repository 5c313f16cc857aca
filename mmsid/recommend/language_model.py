"""The causal model of the flat decoder: a GPT-2 from scratch, or the body of a pretrained language model with SID tokens for words."""

from __future__ import annotations

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from mmsid.backbone.text import no_loading_bar
from mmsid.backbone.weight_files import check_weight_files
from mmsid.errors import ConfigError


def small_gpt2(tokens: int, positions: int, *, width: int, layers: int, heads: int, hidden: int, dropout: float) -> GPT2LMHeadModel:
    """An untrained GPT-2 over `tokens` tokens, of which the last one begins every sequence."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=tokens,
            n_positions=positions,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            n_inner=hidden,
            activation_function="relu",
            embd_pdrop=dropout,
            resid_pdrop=dropout,
            attn_pdrop=0.0,  # attention dropout would disable the fused kernel
            bos_token_id=tokens - 1,
            eos_token_id=None,
            pad_token_id=None,
        )
    )


def pretrained_body(path: str, tokens: int, positions: int) -> PreTrainedModel:
    """A pretrained causal model whose words are replaced by `tokens` new tokens, of which the last one begins every sequence.

    The new table is drawn at the scale of the old one, and is shared by input and output.

    Raises:
        ConfigError: the model cannot be loaded, or has fewer than `positions` positions.
    """
    check_weight_files(path)
    try:
        with no_loading_bar():
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"model.language_model {path!r} cannot be loaded as a causal language model ({error}); give another folder"
        ) from error
    limit = getattr(model.config, "max_position_embeddings", positions)
    if limit < positions:
        raise ConfigError(f"model.language_model {path!r} reads {limit} tokens, but model.max_history needs {positions}; lower max_history")
    scale = float(model.get_input_embeddings().weight.detach().std())
    with no_loading_bar():
        model.resize_token_embeddings(tokens, mean_resizing=False)
    table = model.get_input_embeddings().weight
    nn.init.normal_(table, std=scale)
    model.get_output_embeddings().weight = table
    model.config.tie_word_embeddings = True
    for name, token in {"bos_token_id": tokens - 1, "eos_token_id": None, "pad_token_id": None}.items():
        setattr(model.config, name, token)
    model.generation_config = GenerationConfig.from_model_config(model.config)
    return model
