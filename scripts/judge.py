"""Label every mined descriptor 1 (supported by the evidence, specific, usable) or 0 with a language model (QARM, arXiv 2604.20861).

Reads: the catalogue, `prompts/judge.md`, `runs/<name>/interests/`, `runs/<name>/caption/`, the model. Writes: `runs/<name>/judge/`.
Command: python scripts/judge.py --config configs/mine.yaml [judge.batch_size=32]
Departure from the paper: the answer is a JSON object `{"label": 1}` instead of a bare integer, so that one parser serves all jobs.
"""

from mmsid.cli import main_stage

if __name__ == "__main__":
    main_stage("judge")
