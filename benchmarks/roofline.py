"""Cost of a million captions, computed from the hardware's peak rates (a roofline model, not a measurement).

python benchmarks/roofline.py --dollars-per-hour 2.5
"""

from __future__ import annotations

import argparse

from mmsid.annotate.roofline import GPUS as KNOWN_GPUS
from mmsid.annotate.roofline import Model, pictures_per_second

MODELS = (
    Model("Qwen3-VL-2B", 1.7e9, 0.4e9, 28 * 8 * 128 * 2 * 2),
    Model("Qwen2.5-VL-3B", 3.09e9, 0.67e9, 36 * 2 * 128 * 2 * 2),
    Model("Qwen2.5-VL-7B", 7.62e9, 0.67e9, 28 * 4 * 128 * 2 * 2),
)
GPUS = KNOWN_GPUS[:3]


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
