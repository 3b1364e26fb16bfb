# `make demo` and `make test` set up what they need; PYTHON=python3.12 does the same on another Python.
PYTHON ?= python3
VENV ?= .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
DATA := data/world
RUN := runs/demo

# The CPU build of JAX, unless an NVIDIA GPU or a TPU is here. JAX_EXTRA=cpu forces it.
JAX_EXTRA ?= $(shell if nvidia-smi -L 2>/dev/null | grep -q GPU; then echo cuda13; \
	elif ls /dev/accel* >/dev/null 2>&1 || [ -n "$$TPU_NAME$$TPU_WORKER_ID" ]; then echo tpu; else echo cpu; fi)
EXTRA := $(if $(filter-out cpu,$(JAX_EXTRA)),"jax[$(JAX_EXTRA)]")

.PHONY: help setup demo test test-all check test-beam libtpu lint clean

help:
	@echo "make demo   the whole way on a synthetic world: data, training, evaluation, publishing, report"
	@echo "make test   the tests: every contract and numeric reference, in 20 processor minutes or less"
	@echo "make check  while writing: lint, and the tests of what is changed (or FILES=\"vmm/losses.py …\")"
	@echo "make test-all  with every combination of cases, PyTorch and transformers: 60 processor minutes or less"
	@echo "make test-beam those of the optional Apache Beam extra"
	@echo "make libtpu what vmm plan compiles for TPUs with (make test does it too)"
	@echo "make lint   what pre-commit runs"
	@echo "make clean  removes the environment, the demo's data and run"

# One environment per Python; made again only when what it is made of changes.
$(BIN)/.ready-$(JAX_EXTRA): requirements.txt requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "vmm needs Python 3.11 to 3.13, $(PYTHON) is %d.%d: use make PYTHON=python3.12" % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "no venv module: install python3-venv (Debian) and run make again"; exit 1; }
	@echo "installing into $(VENV) (JAX for $(JAX_EXTRA))"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt -r requirements-dev.txt $(EXTRA) -e .
	@touch $@

setup: $(BIN)/.ready-$(JAX_EXTRA)

demo: setup
	@$(BIN)/vmm data world $(DATA)
	@$(BIN)/vmm train configs/demo.py --workdir $(RUN)
	@$(BIN)/vmm eval $(RUN)
	@$(BIN)/vmm publish $(RUN) $(RUN)/published
	@$(BIN)/vmm report $(RUN) $(foreach study,$(wildcard runs/0001-fusion*/table.json),--ablation $(dir $(study)))

# What makes tests/references, and what exhaustive tests run beside ours; `make test` does without.
$(BIN)/.ready-peers: $(BIN)/.ready-$(JAX_EXTRA) requirements-peers.txt
	@echo "installing PyTorch and transformers into $(VENV), for exhaustive tests"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-peers.txt
	@touch $@

# libtpu, of the version that this JAX names, for `vmm plan`: in a folder of its own, where no other command loads it.
$(VENV)/libtpu/.ready: $(BIN)/.ready-$(JAX_EXTRA) requirements-plan.txt
	@echo "installing libtpu into $(VENV)/libtpu, to compile for TPUs that are not here"
	@rm -rf $(VENV)/libtpu && mkdir -p $(VENV)/libtpu
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $(VENV)/libtpu \
		"$$($(BIN)/python -c 'from importlib.metadata import requires; print(next(r.split(";")[0] for r in requires("jax") if r.startswith("libtpu")))')" \
		|| echo "no libtpu for this machine: vmm plan knows no TPUs here, and their tests are skipped"
	@touch $@

libtpu: $(VENV)/libtpu/.ready

PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test: $(VENV)/libtpu/.ready lint
	@$(PYTEST) $(PYTEST_ARGS)

test-all: $(BIN)/.ready-peers $(VENV)/libtpu/.ready lint
	@$(PYTEST) --exhaustive $(PYTEST_ARGS)

check: lint
	@TESTS="$$($(BIN)/python tests/support/own.py $(FILES))"; \
	if [ -n "$$TESTS" ]; then $(BIN)/python -m pytest $$TESTS $(PYTEST_ARGS); else echo "nothing is changed that has tests"; fi

# Beam wants other versions of common libraries: it has an environment of its own.
.venv-beam/.ready: requirements.txt requirements-dev.txt requirements-beam.txt pyproject.toml
	@$(PYTHON) -m venv .venv-beam
	@.venv-beam/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt -r requirements-dev.txt -e ".[beam]"
	@touch $@

test-beam: .venv-beam/.ready
	@.venv-beam/bin/python -m pytest -p no:xdist tests/test_beam.py

lint: setup
	@$(BIN)/ruff check -q .
	@$(BIN)/ruff format -q --check . || { echo "run: $(BIN)/ruff format ."; exit 1; }

clean:
	rm -rf .venv* $(DATA) $(RUN)
