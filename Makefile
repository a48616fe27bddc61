# make demo   the whole pipeline on the offline toy task, then a report
# make test   lint and tests, without the slow ones
# make test-all   lint and all tests: those of whole runs, kills and pods too
# make check  lint and the fast tests, while one works
# make campaign   kills, faults, bad inputs and hostile texts, by a seed (docs/reliability.md); the tests try a few of each
# make docs   the API reference and docs/ as pages, in build/docs; a broken link fails
# Each sets itself up first: .venv and what setup.py asks for, of which the demo needs less. The second call finds that
# done. perl_jax is then in .venv/bin: source .venv/bin/activate

PYTHONS := python3.11 python3.12 python3.13 python3
BIN := .venv/bin
DEMO := .venv/.ready_for_demo
READY := .venv/.ready
DOCS := .venv/.ready_for_docs

.PHONY: help demo test test-all check campaign lint docs coverage constraints.txt oldest.txt install clean

help:
	@sed -n 's/^# //p' Makefile

demo: $(DEMO)
	@launch/demo.sh $(DEMO_ARGS)

# By file, since the tests of a file share runs and programs; in the order of tests/conftest.py, and not the files of the
# most tests first. The tests of meshes need 8 (fake) devices, which JAX can only be told before it starts: a process of their own.
test: SELECTION = -m 'not slow'
test test-all: lint
	@failed=0; \
	$(BIN)/python -m pytest -n 2 --dist=loadfile --no-loadscope-reorder $(SELECTION) --ignore=tests/multidevice tests || failed=1; \
	XLA_FLAGS=--xla_force_host_platform_device_count=8 $(BIN)/python -m pytest tests/multidevice || failed=1; \
	exit $$failed

# The files that hardly compile: 1,542 tests in two minutes of CPU, 22 s the longest file.
FAST := advantages calibration chat ensembles evaluate features hf_config imports intervals judge launch_gke layout \
        lineage losses masked models oddities overoptimization reading registration report resume_settings rundir \
        schedules shapes sources splits survivor taskmaster topology toy value_ceiling winrate
check: lint
	$(BIN)/python -m pytest -n 2 $(FAST:%=tests/test_%.py)

campaign: $(READY)
	CAMPAIGN_CASES=1000 CAMPAIGN_RUNS=30 $(BIN)/python -m pytest -n 2 --dist=loadfile tests/campaign

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

docs: $(DOCS)
	$(BIN)/mkdocs build --strict

# The core, models/ and rl/, by its own tests alone, without runs, tokenizers or PyTorch.
CORE := advantages algorithms averaging decoder intercept kl layers logprobs lora losses masked rl sampling shaping steps \
        t5 unpadding
coverage: $(READY)
	$(BIN)/python -m pytest -n 2 --cov --cov-report=term $(CORE:%=tests/test_%.py)

# Both need uv (pip install uv); to install by one: PIP_CONSTRAINT=$PWD/constraints.txt make test
RESOLVE = uv pip compile -q --upgrade --python-version=3.11 --custom-compile-command='make $@'
constraints.txt: # what a release is tested with, on every Python that it runs on
	@$(RESOLVE) --universal --extra=test --extra=docs setup.py --output-file=$@
oldest.txt: # the oldest of all that setup.py declares
	@$(RESOLVE) --resolution=lowest-direct --extra=hf setup.py --output-file=$@

install: $(READY)

# Without libtpu, PyTest and what else the tests alone need.
$(DEMO): setup.py pyproject.toml
	@for python in $(PYTHON) $(PYTHONS) none; do \
	  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	done; \
	if [ $$python = none ]; then \
	  echo "perl_jax needs Python 3.11 or newer; none of these is that: $(PYTHON) $(PYTHONS)." >&2; \
	  echo "Install one, or name one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; \
	  exit 1; \
	fi; \
	echo "Setting up .venv with $$($$python --version): 3.5 GB and a few minutes, this once."; \
	$$python -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[hf]'
	@touch $@

$(READY): $(DEMO)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[test,hf]'
	@touch $@

$(DOCS): $(DEMO)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[docs]'
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
