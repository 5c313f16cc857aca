# `make demo` runs the pipeline, `make test` the tests. Both need only Python 3.11+ and build .venv.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
# without byte code on disk every process of the tests compiles torch and transformers again, 20 s each
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all lint docs clean

demo: .venv/installed
	$(BIN)/mmsid demo

# two processes with one thread each; a file of tests runs in one of them
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test: .venv/installed
	$(PYTEST)

# slow tests, tests with several processes, tests on the data under MMSID_DATA, and tests with SmolLM2
test-all: .venv/installed .venv/torchvision/installed
	$(PYTEST) -m "slow or real_data or real_model"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# the site of docs/ in site/, built without the network; any dead link or unknown name is an error
docs: .venv/installed
	$(BIN)/python scripts/configuration_page.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# --no-compile: byte-compiling all of torch and transformers takes longer than compiling the imported modules
.venv/installed: pyproject.toml constraints-cpu.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"mmsid needs Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}; run make PYTHON=python3.12"'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints-cpu.txt -e '.[dev]'
	touch $@

# Processors are compared with those of torchvision. It lies in a folder of its own: beside a CPU build of torch, transformers cannot
# load its models while torchvision is visible (tests/torchvision_schemas.py). Without it, one test is skipped.
.venv/torchvision/installed: .venv/installed
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --target .venv/torchvision torchvision==0.28.0 && touch $@

clean:
	rm -rf .venv runs demo build dist site *.egg-info
