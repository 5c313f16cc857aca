"""Speed of trie-constrained beam search with the flat decoder (2 layers, d = 128), as ratios within one run on one thread.

    OMP_NUM_THREADS=1 python benchmarks/decoding.py
    python benchmarks/decoding.py --device cuda

Compares `beam_search` with the same search without a trie, with Hugging Face `generate` + `TrieLogitsProcessor`, and with
`generate` + `prefix_allowed_tokens_fn`. Both `generate` runs must return the beams of `beam_search`. Prints Markdown and
writes benchmarks/results/decoding.json (on a GPU decoding_cuda.json).
"""

# The catalogue is synthetic: random unique SIDs of 3 x 256 codes, an untrained model, and random histories of 20 items. The
# masking step is also measured alone, against `rectokens` if it is installed. Seconds are CPU time of the one thread, so
# that other work on the machine does not count; on a GPU they are wall time until the device is idle.

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessorList

from mmsid.artifacts import write_json
from mmsid.recommend.beam_search import Beams, LevelDecoder, beam_search
from mmsid.recommend.flat import FlatRecommender, FlatShape
from mmsid.recommend.paths import PathTrie, item_paths
from mmsid.recommend.training import build
from mmsid.recommend.trie_constraint import TrieLogitsProcessor
from mmsid.sids.trie import Trie

SIZES, HISTORY = (256, 256, 256), 20
PROMPT = 1 + HISTORY * len(SIZES)  # tokens: begin, then the history


@torch.inference_mode()
def main() -> None:
    """Run the benchmark, write the JSON and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--beam", type=int, default=50)
    parser.add_argument(
        "--repeats", type=int, default=20, help="repetitions of our search; generate is repeated a tenth as often, at least 3 times"
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path)
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    device, name = parsed.device, "decoding.json" if parsed.device.type == "cpu" else f"decoding_{parsed.device.type}.json"
    out = parsed.out or Path(__file__).parent / "results" / name
    rng = np.random.default_rng(0)
    numbers = rng.choice(256**3, parsed.items, replace=False)
    paths = item_paths(np.stack([numbers >> 16, (numbers >> 8) & 255, numbers & 255], 1), None, SIZES)
    torch.manual_seed(0)
    model = build(paths, FlatShape(max_history=HISTORY)).to(device).eval()
    # an untrained model is nearly uniform; larger weights make the scores of beams differ by more than rounding
    torch.nn.init.normal_(model.language_model.transformer.wte.weight, std=0.3)
    trie, histories = PathTrie.build(paths, device), torch.from_numpy(rng.integers(0, parsed.items, (parsed.batch, HISTORY))).to(device)
    no_items = torch.full_like(histories[:, :1], -1)
    beam, token_ids = parsed.beam, [range(offset, offset + size) for offset, size in zip(model.offsets, SIZES, strict=True)]
    processor = TrieLogitsProcessor(Trie.from_codes(paths.tokens, SIZES).to(device), token_ids, prompt_length=PROMPT)
    allowed = prefixes(paths.tokens + np.array(model.offsets))
    searches = {
        "ours": lambda: beam_search(model.steps(histories), trie, histories, beam),
        "ours, free": lambda: free_search(model.steps(histories), beam),
    }
    generates = {
        "generate + our processor": lambda: generate(model, histories, beam, logits_processor=LogitsProcessorList([processor])),
        "generate + prefix function": lambda: generate(
            model, histories, beam, prefix_allowed_tokens_fn=lambda _, ids: allowed[tuple(ids[PROMPT:].tolist())]
        ),
    }
    unmasked = beam_search(model.steps(histories), trie, no_items, beam)
    equal = {name: compare(unmasked, run(), trie, paths.tokens + np.array(model.offsets)) for name, run in generates.items()}
    search_seconds = interleaved(searches, parsed.repeats, device)
    generate_seconds = interleaved({"ours": searches["ours"]} | generates, max(3, parsed.repeats // 10), device)
    masking = masking_step(trie, paths.tokens, parsed.batch * beam, 10 * parsed.repeats)
    ratios = {
        "speed-up over generate + prefix function": ratio(generate_seconds["generate + prefix function"], generate_seconds["ours"]),
        "speed-up over generate + our processor": ratio(generate_seconds["generate + our processor"], generate_seconds["ours"]),
        "time, constrained / free": ratio(search_seconds["ours"], search_seconds["ours, free"]),
    }
    seconds = search_seconds | {name: generate_seconds[name] for name in generates}
    for level, methods in masking.items():
        seconds |= {f"masking {level}: {method}": times for method, times in methods.items()}
        for method in methods.keys() - {"ours"}:
            ratios[f"masking {level}: time, {method} / ours"] = ratio(methods[method], methods["ours"])
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    setting = {"items": parsed.items, "batch": parsed.batch, "beam": beam, "sizes": SIZES, "history": HISTORY, "threads": 1}
    setting["device"] = hardware
    result = {"setting": setting, "seconds": seconds, "ratios": ratios, "equal to generate": equal}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    print(markdown(result))


def free_search(decoder: LevelDecoder, beam: int) -> torch.Tensor:
    """Beam search without a trie: scores (B, W) of the best paths, most of which belong to no item."""
    logits = decoder.start()
    log_prob = logits.new_zeros(len(logits), 1)
    for level in range(len(SIZES)):
        scores = torch.log_softmax(logits, -1).add_(log_prob[..., None])
        log_prob, best = scores.flatten(1).topk(min(beam, scores[0].numel()), dim=1)
        if level + 1 < len(SIZES):
            logits = decoder.step(level + 1, best // scores.shape[-1], best % scores.shape[-1])
    return log_prob


def generate(model: FlatRecommender, histories: torch.Tensor, beam: int, **constraint: Any) -> Any:
    """Hugging Face beam search over the same model, with scores renormalised over the legal tokens, as in our search."""
    ids, real = model.sequences(histories)
    return model.language_model.generate(
        ids,
        attention_mask=real.long(),
        num_beams=beam,
        num_return_sequences=beam,
        max_new_tokens=len(SIZES),
        do_sample=False,
        length_penalty=0.0,
        renormalize_logits=True,
        return_dict_in_generate=True,
        output_scores=True,
        pad_token_id=model.begin,
        **constraint,
    )


def prefixes(tokens: np.ndarray) -> dict[tuple[int, ...], list[int]]:
    """Dictionary from a prefix of token ids to the sorted ids that may follow, as most published projects build it."""
    found: dict[tuple[int, ...], set[int]] = {}
    for path in tokens.tolist():
        for level, token in enumerate(path):
            found.setdefault(tuple(path[:level]), set()).add(token)
    return {prefix: sorted(following) for prefix, following in found.items()}


def compare(ours: Beams, theirs: Any, trie: PathTrie, tokens: np.ndarray) -> dict[str, float]:
    """Share of users with the same set of SIDs, share of ranks with the same SID, and the largest score difference."""
    item_of = torch.empty(trie.num_leaves, dtype=torch.long)
    item_of[trie.node_of[-1].cpu()] = torch.arange(len(tokens))
    found = torch.from_numpy(tokens)[item_of[ours.leaf.cpu()]]
    generated = theirs.sequences[:, PROMPT:].cpu().view(found.shape)
    scores = theirs.sequences_scores.view(ours.log_prob.shape)
    same = [set(map(tuple, mine.tolist())) == set(map(tuple, other.tolist())) for mine, other in zip(found, generated, strict=True)]
    return {
        "users with the same SIDs": float(np.mean(same)),
        "ranks with the same SID": float((found == generated).all(2).float().mean()),
        "largest score difference": float((scores - ours.log_prob).abs().max()),
    }


def masking_step(trie: PathTrie, codes: np.ndarray, rows: int, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of the masking step alone, for logits (rows, 256) of random existing prefixes on the second and the third level.

    `rectokens` uses a dense table on the second level and sparse rows on the third. The third level is measured with its
    PyTorch code, on a GPU also with its Triton kernel.
    """
    device = trie.node_of.device
    paths = torch.from_numpy(codes[np.random.default_rng(1).integers(0, len(codes), rows)]).to(device)
    logits = torch.randn(rows, 256, device=device)
    first = trie.levels[0].constraint.step(torch.zeros(rows, dtype=torch.long, device=device), paths[:, 0])
    second = trie.levels[1].constraint.step(first, paths[:, 1])
    methods = {
        "level 2": {"ours": lambda: trie.levels[1].constraint.mask(logits, first)},
        "level 3": {"ours": lambda: trie.levels[2].constraint.mask(logits, second)},
    }
    try:
        from rectokens.decoding.vntk import vtnk_pytorch
        from rectokens.schemas.compact_csr_trie import CompactCSRTrie
    except ImportError:
        print("rectokens is not installed; its masking step is not measured\n")
    else:
        ordered = torch.from_numpy(codes[np.lexsort(codes.T[::-1])])
        theirs = CompactCSRTrie.from_sorted_batch(ordered.to(device), 256, dense_lookup_layers=2)
        nodes = theirs.dense_states[paths[:, 0], paths[:, 1]]
        methods["level 2"]["rectokens"] = lambda: logits.clone().masked_fill_(~theirs.dense_mask_by_layer[1][paths[:, 0]], -torch.inf)
        methods["level 3"]["rectokens"] = lambda: vtnk_pytorch(logits, nodes, theirs, 2)[2]
        for name, node in (("level 2", first), ("level 3", second)):
            mine, other = methods[name]["ours"](), methods[name]["rectokens"]()
            assert torch.equal(torch.logsumexp(mine, 1).isfinite(), torch.logsumexp(other, 1).isfinite()) and len(node) == rows
            torch.testing.assert_close(torch.logsumexp(mine, 1), torch.logsumexp(other, 1))
        if device.type == "cuda":
            from rectokens.ops.constrained_node_transition import constrained_node_transition
            from rectokens.schemas.state import ConstraintState

            state = ConstraintState(step=2, trie=theirs, cur_node=nodes)
            methods["level 3"]["rectokens, Triton"] = lambda: constrained_node_transition(logits, state)
    return {name: interleaved(level_methods, repeats, device) for name, level_methods in methods.items()}


def interleaved(methods: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each method, `repeats` times. Methods alternate within a repetition; one warm-up repetition is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(repeats + 1):
        for name, method in methods.items():
            started = _clock(device)
            method()
            if repeat:
                seconds[name].append(_clock(device) - started)
    return seconds


def _clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def ratio(over: list[float], under: list[float]) -> list[float]:
    """Quotient of each repetition."""
    return [above / below for above, below in zip(over, under, strict=True)]


def markdown(result: dict[str, Any]) -> str:
    """Table of milliseconds and ratios with minimum, median and maximum over repetitions."""
    lines = [f"{result['setting']}", "", "| | min | median | max | n |", "|---|---|---|---|---|"]
    for name, times in result["seconds"].items():
        lines.append(f"| {name}, ms | " + " | ".join(f"{1000 * value:.2f}" for value in spread(times)) + f" | {len(times)} |")
    for name, values in result["ratios"].items():
        lines.append(f"| **{name}** | " + " | ".join(f"{value:.2f}" for value in spread(values)) + f" | {len(values)} |")
    lines.append("")
    for name, found in result["equal to generate"].items():
        lines.append(f"Against {name}: " + ", ".join(f"{figure} {value:.3g}" for figure, value in found.items()) + ".")
    return "\n".join(lines)


def spread(values: list[float]) -> tuple[float, float, float]:
    """Minimum, median and maximum."""
    return min(values), float(np.median(values)), max(values)


if __name__ == "__main__":
    main()
