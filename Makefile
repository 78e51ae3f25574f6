# Every target sets itself up once: an environment in $(VENV), made with $(PYTHON) (3.10 or newer), packages held to constraints.txt.
#   make demo                        the whole loop on the miniature, at most 15 minutes on two cores
#   make test                        every test; lint is separate: make lint
#   make test TESTS=tests/training   a part of the tests; ARGS="-k report" goes to pytest
#   make demo VENV=/path/to/env      use (and complete) an environment that exists
PYTHON ?= python3
VENV ?= .venv
TESTS ?= tests
ARGS ?=
# A file for pytest's exit status, since make turns every failure into 2 (.ci/run sets it).
STATUS ?=

BIN := $(VENV)/bin
RUN := $(BIN)/python
PIP := $(RUN) -m pip --disable-pip-version-check --no-input
STAMP := $(VENV)/.spatialalign

# No target asks anything of a network, once it is set up.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test lint bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   the whole loop on the miniature: demo/result.json and demo/report.html"
	@echo "make test   every test"
	@echo "make lint   ruff and mypy"
	@echo "make bench  the measurements of benchmarks/README.md (long)"
	@echo "make clean  remove what the other targets made, except the environment"

$(RUN):
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, found " + sys.version) if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)

$(STAMP)-train: pyproject.toml constraints.txt | $(RUN)
	$(PIP) install -q -c constraints.txt -e ".[train]"
	@touch $@

$(STAMP)-test: pyproject.toml constraints.txt | $(RUN)
	$(PIP) install -q -c constraints.txt -e ".[train,original,metrics,test]"
	@touch $@ $(STAMP)-train

demo: $(STAMP)-train
	$(RUN) -m training.demo --out demo $(ARGS)

test: $(STAMP)-test
	@$(RUN) -m pytest $(TESTS) $(ARGS); status=$$?; \
	if [ -n "$(STATUS)" ]; then echo $$status > "$(STATUS)"; else exit $$status; fi

lint: $(STAMP)-test
	$(RUN) -m ruff check .
	$(RUN) -m mypy -p spatialalign -p training -p benchmarks
	@# The nodes import their package relatively, and its folder may have any name: mypy meets it under one it can spell.
	@mkdir -p .mypy_cache/pack && ln -sfn "$(CURDIR)" .mypy_cache/pack/pack
	MYPYPATH=.mypy_cache/pack:tests/standin $(RUN) -m mypy -p pack.nodes

bench: $(STAMP)-train
	$(RUN) -m benchmarks.ablation --out benchmarks/out $(ARGS)

clean:
	rm -rf demo benchmarks/out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
