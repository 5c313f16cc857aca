"""Compare refinement with its control variants (suites/refinement.yaml, refinement_controls.py) in one table. A second call resumes.

    python benchmarks/refinement.py --dataset demo
    python benchmarks/refinement.py --dataset amazon_scientific --only start,refined,best_of_n suite.seeds=[0]

The arguments are those of `mmsid bench`; another suite is given by `--suite FILE`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from refinement_controls import CONTROLS

from mmsid.cli import main_bench

SUITE = Path(__file__).parent / "suites" / "refinement.yaml"

if __name__ == "__main__":
    main_bench(["--suite", str(SUITE), *sys.argv[1:]], CONTROLS)
