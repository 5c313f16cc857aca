"""Cost of a million captions, computed from the hardware's peak rates (a roofline model, not a measurement).

    python benchmarks/roofline.py --dollars-per-hour 2.5

Prefill is bound by arithmetic and decoding by bandwidth. The practical rate is 45 % and 60 % of these, as good bf16 engines reach.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

# tokens of prompt and answer, pictures in one batch, patches of the vision tower per picture token
PROMPT, ANSWER, CONCURRENT, PATCHES_PER_TOKEN = 150, 100, 256, 4
PREFILL_SHARE, DECODE_SHARE = 0.45, 0.60


@dataclass(frozen=True)
class Model:
    """`language` and `vision`: numbers of parameters. `kv_bytes`: keys and values of one token, all layers, bf16 (grouped queries)."""

    name: str
    language: float
    vision: float
    kv_bytes: int


@dataclass(frozen=True)
class Gpu:
    """Dense bf16 FLOP/s and bytes/s of the GPU's memory, from the data sheet."""

    name: str
    flops: float
    bandwidth: float


MODELS = (
    Model("Qwen3-VL-2B", 1.7e9, 0.4e9, 28 * 8 * 128 * 2 * 2),
    Model("Qwen2.5-VL-3B", 3.09e9, 0.67e9, 36 * 2 * 128 * 2 * 2),
    Model("Qwen2.5-VL-7B", 7.62e9, 0.67e9, 28 * 4 * 128 * 2 * 2),
)
GPUS = (Gpu("A100 80GB", 312e12, 2.04e12), Gpu("H100 SXM", 989e12, 3.35e12), Gpu("H200", 989e12, 4.8e12))


def pictures_per_second(model: Model, gpu: Gpu, picture_tokens: int, *, practical: bool = True) -> float:
    """Captions per second of one GPU; `practical=False` uses the peak rates."""
    prefill_flops = 2 * (model.language * (picture_tokens + PROMPT) + model.vision * PATCHES_PER_TOKEN * picture_tokens)
    mean_context = picture_tokens + PROMPT + ANSWER / 2
    bytes_per_step = 2 * model.language + CONCURRENT * model.kv_bytes * mean_context
    prefill = prefill_flops / (gpu.flops * (PREFILL_SHARE if practical else 1.0))
    decode = ANSWER * bytes_per_step / (gpu.bandwidth * (DECODE_SHARE if practical else 1.0)) / CONCURRENT
    return 1.0 / (prefill + decode)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dollars-per-hour", type=float, default=2.5, help="price of one GPU, the same for all kinds (an assumption)")
    parsed = parser.parse_args()
    print(f"| computed, per million ads | {' | '.join(gpu.name for gpu in GPUS)} |\n|" + "---|" * (1 + len(GPUS)))
    for model in MODELS:
        for tokens in (256, 1024):
            rates = [pictures_per_second(model, gpu, tokens) for gpu in GPUS]
            cells = [f"{1e6 / rate / 3600:.1f} h, ${1e6 / rate / 3600 * parsed.dollars_per_hour:.0f} ({rate:.0f}/s)" for rate in rates]
            print(f"| {model.name}, {tokens} picture tokens | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
