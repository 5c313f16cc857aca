"""Read the catalogue of a configuration once: items, pictures (headers and hashes), user histories.

Reads: the sources named in the configuration. Writes: `runs/<name>/ingest/`, which every later stage opens.
Command: python scripts/ingest.py --config configs/demo.yaml
"""

from mmsid.cli import main_stage

if __name__ == "__main__":
    main_stage("ingest")
