"""A Hugging Face language model that knows SID tokens: vocabulary, resized embeddings, and rows initialised from code vectors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmsid.artifacts import read_tensors, write_tensors
from mmsid.errors import ArtifactError
from mmsid.export.text_tokens import SidTokens
from mmsid.sids.code_vectors import CodeVectors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS = "sid_rows.safetensors"


def embedding_rows(levels: Sequence[CodeVectors], reference: torch.Tensor, seed: int = 0) -> list[torch.Tensor]:
    """Embedding rows for the codes, per level (K, H), in the range of a model's own embeddings.

    A row is the model's mean embedding plus the code's deviation from the mean code of its level. One linear map for all levels turns
    code space (D) into the model's space (H) and keeps distances: random orthonormal directions, or the first H principal components
    where D > H. Each level is scaled so that the median deviation has the median length of the model's own deviations.

    Args:
        levels: vectors of the codes. reference: (V, H), the embeddings that the model has.
    """
    reference = reference.detach().double().cpu()
    mean = reference.mean(dim=0)
    typical = float((reference - mean).norm(dim=1).median())
    deviations = []
    for level in levels:
        vectors = torch.from_numpy(level.vectors)
        used = torch.from_numpy(level.used)
        deviations.append((vectors - vectors[used].mean(dim=0)) * used[:, None])
    width, hidden = deviations[0].shape[1], len(mean)
    if width <= hidden:
        directions = torch.linalg.qr(torch.randn(hidden, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q.T
    else:
        directions = torch.linalg.svd(torch.cat(deviations), full_matrices=False).Vh[:hidden].T
        directions = torch.nn.functional.pad(directions, (0, hidden - directions.shape[1]))
    rows = []
    for level, deviation in zip(levels, deviations, strict=True):
        projected = deviation @ directions
        length = projected[torch.from_numpy(level.used)].norm(dim=1).median()
        rows.append(mean + projected * (typical / length if length > 0 else 0.0))
    return rows


def set_sid_rows(model: PreTrainedModel, ids: Sequence[np.ndarray], levels: Sequence[CodeVectors]) -> int:
    """Write the rows of `embedding_rows` into the input embeddings and, where the model has its own, the output embeddings.

    Args:
        ids: per level, the token id of each code. Only codes that an item has are written. Returns their number.
    """
    weights = [model.get_input_embeddings().weight]
    output = model.get_output_embeddings()
    if output is not None and output.weight.data_ptr() != weights[0].data_ptr():
        weights.append(output.weight)
    new = torch.from_numpy(np.concatenate([np.asarray(one, dtype=np.int64) for one in ids]))
    for weight in weights:
        old = torch.ones(len(weight), dtype=torch.bool)
        old[new] = False
        rows = embedding_rows(levels, weight.detach().cpu()[old])
        with torch.no_grad():
            for one, level, values in zip(ids, levels, rows):
                kept = torch.from_numpy(np.asarray(one, dtype=np.int64)[: len(values)][level.used])
                weight[kept.to(weight.device)] = values[torch.from_numpy(level.used)].to(weight)
    return int(sum(level.used.sum() for level in levels))


def initialize_sid_rows(model: PreTrainedModel, folder: str | Path) -> int:
    """Give a model of your own the SID tokens of a folder that `mmsid export --format huggingface --tokenizer` wrote.

    The embeddings are resized to the tokenizer in `folder`, and the rows of used codes are set from their code vectors.

    Returns:
        The number of rows that were set.
    Raises:
        ArtifactError: the folder has no `sid_rows.safetensors`.
    """
    from mmsid.export.text_tokens import load_text_tokenizer

    if not (Path(folder) / ROWS).is_file():
        raise ArtifactError(f"{folder}: no {ROWS}; write it by `mmsid export SIDS --format huggingface --tokenizer T --out {folder}`")
    tensors = read_tensors(Path(folder) / ROWS)
    count = sum(name.startswith("vectors.") for name in tensors)
    resize(model, load_text_tokenizer(folder))
    levels = [CodeVectors(tensors[f"vectors.{level}"].double().numpy(), tensors[f"used.{level}"].bool().numpy()) for level in range(count)]
    return set_sid_rows(model, [tensors[f"token_ids.{level}"].numpy() for level in range(count)], levels)


def write_text_tokenizer(
    folder: Path, text_tokenizer: PreTrainedTokenizerBase, tokens: SidTokens, levels: Sequence[CodeVectors] | None
) -> None:
    """Write a tokenizer with SID tokens, and beside it the code vectors of its tokens, which `initialize_sid_rows` reads."""
    text_tokenizer.save_pretrained(folder)
    if levels is None:
        return
    tensors = {}
    for level, (ids, found) in enumerate(zip(tokens.ids_in(text_tokenizer), levels)):
        tensors[f"token_ids.{level}"] = torch.from_numpy(ids[: len(found.used)])
        tensors[f"vectors.{level}"] = torch.from_numpy(found.vectors).float()
        tensors[f"used.{level}"] = torch.from_numpy(found.used.astype(np.uint8))
    write_tensors(folder / ROWS, tensors)


def write_text_model(
    folder: Path, source: str | Path, text_tokenizer: PreTrainedTokenizerBase, tokens: SidTokens, levels: Sequence[CodeVectors] | None
) -> int:
    """Write model and tokenizer with SID tokens to `folder`. Returns the number of rows that were initialised from code vectors.

    Rows without code vectors (unused codes, suffixes, further tokens) are drawn around the model's mean embedding by `transformers`.

    Raises:
        ArtifactError: `source` is no model of `transformers`.
    """
    model = load_text_model(source)
    resize(model, text_tokenizer)
    written = 0 if levels is None else set_sid_rows(model, tokens.ids_in(text_tokenizer), levels)
    model.save_pretrained(folder)
    text_tokenizer.save_pretrained(folder)
    return written


def resize(model: PreTrainedModel, text_tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the embeddings cover the tokenizer. Spare rows that the model has already are kept."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(text_tokenizer) > rows:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.resize_token_embeddings(len(text_tokenizer))


def load_text_model(source: str | Path) -> PreTrainedModel:
    """A model of a folder or a hub name, in its own class and number format. Code of the source is never run.

    Raises:
        ArtifactError: there is no model, or `transformers` does not know its class.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(str(source))
        name = (config.architectures or [""])[0]
        kind: Any = getattr(transformers, name, None) or transformers.AutoModelForCausalLM
        return kind.from_pretrained(str(source), dtype="auto")
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise ArtifactError(f"{source}: no Hugging Face model can be loaded ({reason}); correct the path") from error
