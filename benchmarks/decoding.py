"""How fast is trie-constrained beam search? Ratios within one run, on one thread, over the 2-layer d = 128 flat decoder.

    OMP_NUM_THREADS=1 python benchmarks/decoding.py
    python benchmarks/decoding.py --device cuda

The catalogue is synthetic: random unique SIDs of 3 x 256 codes, an untrained model, random histories of 20 items (their length
decides the cost, not their content). Four ways to the same 50 beams for a batch of 32 users:

- ours: `beam_search` under the trie, seen items masked inside;
- ours, free: the same search with every code of a level allowed, nothing seen (what the constraint costs);
- ours as a logits processor inside Hugging Face `generate` (the reusable form);
- generate with `prefix_allowed_tokens_fn` over a dictionary of prefixes (what most published projects do).

The last two must return the beams of the first: SIDs and scores are compared. Beside that, the masking step alone, on as many
(users x beams) prefixes, against `rectokens` where that is installed. Seconds are those that the one thread spent computing, so that
other work on the machine does not count (on a GPU: wall time until the device is idle again, on an otherwise idle machine); repetitions
of the ways are interleaved, and a ratio is taken within each repetition.

Prints Markdown; writes benchmarks/results/decoding.json, on a GPU decoding_cuda.json.
"""

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
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--beam", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=20, help="of our own search; generate runs a tenth as often, 3 times at least")
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
    # an untrained model is nearly uniform: spread its scores, as training does, so that beams differ by more than rounding
    torch.nn.init.normal_(model.language_model.transformer.wte.weight, std=0.3)
    trie, histories = PathTrie.build(paths, device), torch.from_numpy(rng.integers(0, parsed.items, (parsed.batch, HISTORY))).to(device)
    nothing = torch.full_like(histories[:, :1], -1)
    beam, token_ids = parsed.beam, [range(offset, offset + size) for offset, size in zip(model.offsets, SIZES, strict=True)]
    processor = TrieLogitsProcessor(Trie.from_codes(paths.tokens, SIZES).to(device), token_ids, prompt_length=PROMPT)
    allowed = prefixes(paths.tokens + np.array(model.offsets))
    quick = {
        "ours": lambda: beam_search(model.steps(histories), trie, histories, beam),
        "ours, free": lambda: free_search(model.steps(histories), beam),
    }
    slow = {
        "generate + our processor": lambda: generate(model, histories, beam, logits_processor=LogitsProcessorList([processor])),
        "generate + prefix function": lambda: generate(
            model, histories, beam, prefix_allowed_tokens_fn=lambda _, ids: allowed[tuple(ids[PROMPT:].tolist())]
        ),
    }
    unmasked = beam_search(model.steps(histories), trie, nothing, beam)
    equal = {name: compare(unmasked, way(), trie, paths.tokens + np.array(model.offsets)) for name, way in slow.items()}
    often = interleaved(quick, parsed.repeats, device)
    seldom = interleaved({"ours": quick["ours"]} | slow, max(3, parsed.repeats // 10), device)
    masking = masking_step(trie, paths.tokens, parsed.batch * beam, 10 * parsed.repeats)
    ratios = {
        "speed-up over generate + prefix function": ratio(seldom["generate + prefix function"], seldom["ours"]),
        "speed-up over generate + our processor": ratio(seldom["generate + our processor"], seldom["ours"]),
        "time, constrained / free": ratio(often["ours"], often["ours, free"]),
    }
    seconds = often | {name: seldom[name] for name in slow}
    for level, ways in masking.items():
        seconds |= {f"masking {level}: {way}": times for way, times in ways.items()}
        for way in ways.keys() - {"ours"}:
            ratios[f"masking {level}: time, {way} / ours"] = ratio(ways[way], ways["ours"])
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    setting = {"items": parsed.items, "batch": parsed.batch, "beam": beam, "sizes": SIZES, "history": HISTORY, "threads": 1}
    setting["device"] = hardware
    result = {"setting": setting, "seconds": seconds, "ratios": ratios, "equal to generate": equal}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    print(markdown(result))


def free_search(decoder: LevelDecoder, beam: int) -> torch.Tensor:
    """The search of mmsid/recommend/search.py without a trie: scores (B, W) of the best paths, most of which are no item's."""
    logits = decoder.start()
    log_prob = logits.new_zeros(len(logits), 1)
    for level in range(len(SIZES)):
        scores = torch.log_softmax(logits, -1).add_(log_prob[..., None])
        log_prob, best = scores.flatten(1).topk(min(beam, scores[0].numel()), dim=1)
        if level + 1 < len(SIZES):
            logits = decoder.step(level + 1, best // scores.shape[-1], best % scores.shape[-1])
    return log_prob


def generate(model: FlatRecommender, histories: torch.Tensor, beam: int, **constraint: Any) -> Any:
    """Hugging Face beam search over the same model, its scores renormalised over the legal tokens as ours are."""
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
    """Prefix of token ids -> sorted ids that may follow: the dictionary that most published projects build."""
    found: dict[tuple[int, ...], set[int]] = {}
    for path in tokens.tolist():
        for level, token in enumerate(path):
            found.setdefault(tuple(path[:level]), set()).add(token)
    return {prefix: sorted(following) for prefix, following in found.items()}


def compare(ours: Beams, theirs: Any, trie: PathTrie, tokens: np.ndarray) -> dict[str, float]:
    """Share of users with the same set of SIDs, share of ranks with the same SID, and the largest difference of a score."""
    item_of = torch.empty(len(trie.levels[-1].token), dtype=torch.long)
    item_of[trie.node_of[-1].cpu()] = torch.arange(len(tokens))
    found = torch.from_numpy(tokens)[item_of[ours.leaf.cpu()]]
    given = theirs.sequences[:, PROMPT:].cpu().view(found.shape)
    scores = theirs.sequences_scores.view(ours.log_prob.shape)
    same = [set(map(tuple, mine.tolist())) == set(map(tuple, other.tolist())) for mine, other in zip(found, given, strict=True)]
    return {
        "users with the same SIDs": float(np.mean(same)),
        "ranks with the same SID": float((found == given).all(2).float().mean()),
        "largest score difference": float((scores - ours.log_prob).abs().max()),
    }


def masking_step(trie: PathTrie, codes: np.ndarray, rows: int, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of the masking step alone, logits (rows, 256) of random existing prefixes, on the second and the third level.

    `rectokens` takes a dense table on the second level, sparse rows on the third: there its PyTorch way, on a GPU its Triton kernel too.
    """
    device = trie.node_of.device
    paths = torch.from_numpy(codes[np.random.default_rng(1).integers(0, len(codes), rows)]).to(device)
    logits = torch.randn(rows, 256, device=device)
    first = trie.constraint.levels[0].step(torch.zeros(rows, dtype=torch.long, device=device), paths[:, 0])
    second = trie.constraint.levels[1].step(first, paths[:, 1])
    ways = {
        "level 2": {"ours": lambda: trie.constraint.levels[1].mask(logits, first)},
        "level 3": {"ours": lambda: trie.constraint.levels[2].mask(logits, second)},
    }
    try:
        from rectokens.decoding.vntk import vtnk_pytorch
        from rectokens.schemas.compact_csr_trie import CompactCSRTrie
    except ImportError:
        print("rectokens is not installed: its masking step was not measured\n")
    else:
        ordered = torch.from_numpy(codes[np.lexsort(codes.T[::-1])])
        theirs = CompactCSRTrie.from_sorted_batch(ordered.to(device), 256, dense_lookup_layers=2)
        nodes = theirs.dense_states[paths[:, 0], paths[:, 1]]
        ways["level 2"]["rectokens"] = lambda: logits.clone().masked_fill_(~theirs.dense_mask_by_layer[1][paths[:, 0]], -torch.inf)
        ways["level 3"]["rectokens"] = lambda: vtnk_pytorch(logits, nodes, theirs, 2)[2]
        for name, node in (("level 2", first), ("level 3", second)):
            mine, other = ways[name]["ours"](), ways[name]["rectokens"]()
            assert torch.equal(torch.logsumexp(mine, 1).isfinite(), torch.logsumexp(other, 1).isfinite()) and len(node) == rows
            torch.testing.assert_close(torch.logsumexp(mine, 1), torch.logsumexp(other, 1))
        if device.type == "cuda":
            from rectokens.ops.constrained_node_transition import constrained_node_transition
            from rectokens.schemas.state import ConstraintState

            state = ConstraintState(step=2, trie=theirs, cur_node=nodes)
            ways["level 3"]["rectokens, Triton"] = lambda: constrained_node_transition(logits, state)
    return {name: interleaved(both, repeats, device) for name, both in ways.items()}


def interleaved(ways: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each way, `repeats` times, one after the other within a repetition, after one run that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            started = _clock(device)
            way()
            if repeat:
                seconds[name].append(_clock(device) - started)
    return seconds


def _clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def ratio(over: list[float], under: list[float]) -> list[float]:
    """Quotients within each repetition."""
    return [above / below for above, below in zip(over, under, strict=True)]


def markdown(result: dict[str, Any]) -> str:
    """Two tables: milliseconds and ratios, as min, median and max over repetitions."""
    lines = [f"{result['setting']}", "", "| | min | median | max | n |", "|---|---|---|---|---|"]
    for name, times in result["seconds"].items():
        lines.append(f"| {name}, ms | " + " | ".join(f"{1000 * value:.2f}" for value in spread(times)) + f" | {len(times)} |")
    for name, values in result["ratios"].items():
        lines.append(f"| **{name}** | " + " | ".join(f"{value:.2f}" for value in spread(values)) + f" | {len(values)} |")
    lines.append("")
    for name, found in result["equal to generate"].items():
        lines.append(f"Against {name}: " + ", ".join(f"{what} {value:.3g}" for what, value in found.items()) + ".")
    return "\n".join(lines)


def spread(values: list[float]) -> tuple[float, float, float]:
    """Least, median, largest."""
    return min(values), float(np.median(values)), max(values)


if __name__ == "__main__":
    main()
