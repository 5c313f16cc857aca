# Two commands for a newcomer: `make demo` and `make test`. Each works alone on a fresh machine with Python 3.11+ and builds .venv itself.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-all lint clean

demo: .venv/installed
	$(BIN)/mmsid demo-catalog demo/catalog --items 1200 --users 1500 --seed 0
	$(BIN)/mmsid run configs/demo.yaml

test: .venv/installed
	$(BIN)/python -m pytest

# what .ci/run adds: tests of minutes, of several processes, and of the real data under MMSID_DATA
test-all: test
	$(BIN)/python -m pytest -m "slow or real_data"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# --no-compile: byte-compiling all of torch and transformers costs more than compiling what gets imported
.venv/installed: pyproject.toml constraints-cpu.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"mmsid needs Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}; run make PYTHON=python3.12"'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints-cpu.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv runs demo build dist *.egg-info
