# Everything a user or CI runs. `make demo` and `make test` need Python 3.11 or newer, make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo check test lint format docs docs-serve benchmark bench peers gpu families soak versions dist clean

setup: $(VENV)/.installed

# torch first and alone: the pin finds the CPU build where one is offered, a range may not
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	HF_HUB_OFFLINE=1 $(BIN)/fastkd distill recipes/demo.yaml --resume

# what to run while writing: every test that is not slow, see tests/conftest.py
check: setup lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --quiet --numprocesses 2 --dist worksteal -m "not slow"

test: setup lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# the documentation, into site/; a link that leads nowhere is an error
docs: setup
	$(BIN)/mkdocs build --strict

docs-serve: setup
	$(BIN)/mkdocs serve

benchmark: setup
	$(BIN)/python -m pytest benchmarks --benchmark-enable

# steps and ops of README and docs/measured.md again, on the CPU, against the committed figures
bench: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.rerun

# fastkd against TextBrewer, torchdistill, TRL, Liger-Kernel and sentence-transformers, in an
# environment of their own; on a GPU: PEERS_DEVICE=cuda
PEERS := .venv-peers
PEERS_PINS := --constraint constraints.txt --constraint benchmarks/peers/constraints.txt
PEERS_DEVICE ?= cpu
peers: $(PEERS)/.installed
	HF_HUB_OFFLINE=1 $(PEERS)/bin/python -m benchmarks.peers --page --device $(PEERS_DEVICE)

$(PEERS)/.installed: pyproject.toml constraints.txt benchmarks/peers/constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(PEERS)/bin/python -m pip install --quiet $(PEERS_PINS) --editable '.[demo,peers]' py-cpuinfo
	touch $@

# everything that needs a GPU, in eight minutes and one page; without one: GPU_DEVICE=cpu
GPU_DEVICE ?= cuda
gpu: setup
	$(BIN)/python -m benchmarks.gpu --out gpu-results --budget 480 --device $(GPU_DEVICE)

# every family of transformers through fastkd, about ten minutes
families: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.families --output benchmarks/results/families.md

# runs that are killed or short of disk at random moments, and continued; about five minutes
soak: setup
	HF_HUB_OFFLINE=1 $(BIN)/python tests/soak/soak.py --seed 0 --minutes 5 --output tests/soak/results.md

# both wheels on every Python that is here, with the lowest and the newest packages
versions: setup
	$(BIN)/python tests/versions/versions.py --output tests/versions/results.md

# sdist and wheel of both distributions; PYTHON has build and twine
dist:
	rm -rf dist
	$(PYTHON) -m build --outdir dist/kernels kernels
	$(PYTHON) -m build --outdir dist/fastkd .
	$(PYTHON) -m twine check --strict dist/*/*

clean:
	rm -rf $(VENV) $(PEERS) dist build site .pytest_cache .mypy_cache .ruff_cache
