# Every target does its own set-up: `make book` or `make test` on a fresh clone is enough.
#   make book       build the book: book/_build/html/index.html
#   make test       every test and every notebook, two files at a time (WORKERS=1 for one)
#   make setup      only the environment in .venv; TORCH=cpu, here or with any other target, takes PyTorch without CUDA
#   make lab        JupyterLab on your own copy of the chapters (learn/), where you stopped
#   make fresh      a clean copy of a chapter, yours is kept beside it: make fresh NB=02-attention
#   make class      the chapters without their solutions, for a class (TO=folder; by default class/)
#   make bench      measure on the CPU, and on the GPU where there is one (`python -m benchmarks --help` picks topics)
#   make notebooks  run the notebooks again and keep their outputs (NB=notebooks/02-attention.ipynb for one)
#   make chapter    begin a chapter: make chapter NAME=22-state-spaces TITLE="State spaces"
#   make address    say where the repository is, which turns on Binder and Colab: make address URL=https://github.com/o/n
#   make lint       ruff
#   make clean      remove what was built; `make distclean` removes the environment too

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NB ?= $(wildcard notebooks/*.ipynb)
WORKERS ?= 2
# Which of PyTorch's own indexes to take it from: cpu, cu130, ...; empty for the package index's wheel.
TORCH ?=
UV := $(shell command -v uv 2>/dev/null)

# uv does not read pip's settings: hand it the folder of local wheels that pip is configured with.
export UV_FIND_LINKS ?= $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
# uv warns about a VIRTUAL_ENV that is not the project's own.
unexport VIRTUAL_ENV

.PHONY: setup book test lab fresh class bench notebooks chapter address lint clean distclean

setup: $(READY)

# The stamp is the last thing written: a set-up that was interrupted starts over with what is already there.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "TFormer Lab needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Setting up $(VENV): some minutes and 2 GB; several GB more where PyTorch brings CUDA, which TORCH=cpu leaves out."
ifneq ($(UV),)
	uv venv --quiet --allow-existing --python $(PYTHON) $(VENV)
	uv pip install --python $(BIN)/python $(if $(TORCH),--torch-backend $(TORCH)) --editable '.[test]'
else
	@test -x $(BIN)/pip && $(BIN)/python -c '' || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install $(if $(TORCH),--extra-index-url https://download.pytorch.org/whl/$(TORCH)) --editable '.[test]'
endif
	@touch $@

book: $(READY)
	$(BIN)/python -m tools.vendor
	$(BIN)/jupyter-book build book -n -W --keep-going

# One thread a file: the tensors of tests are tiny. The notebooks use two, which sleep while they wait for one another:
# two notebooks at a time on two cores took 77 seconds in place of 20 when they did not.
test: $(READY)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest --nbval --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

lab: $(READY)
	$(BIN)/python -m tools.lab

fresh: $(READY)
	@test '$(origin NB)' != file || { echo 'Which chapter? For example: make fresh NB=02-attention'; exit 2; }
	$(BIN)/python -m tools.lab --fresh '$(NB)'

class: $(READY)
	$(BIN)/python -m tools.classroom write '$(or $(TO),class)'

bench: $(READY)
	$(BIN)/python -m benchmarks

notebooks: $(READY)
	$(BIN)/ruff format --quiet $(NB)
	cd notebooks && TFORMER_PROGRESS= ../$(BIN)/jupyter nbconvert --to notebook --execute --inplace \
	  --ExecutePreprocessor.record_timing=False --ExecutePreprocessor.timeout=300 \
	  --Exporter.preprocessors='["nbconvert.preprocessors.CoalesceStreamsPreprocessor"]' $(notdir $(NB))
	$(BIN)/python -m tools.status

chapter: $(READY)
	$(BIN)/python -m tools.new_chapter $(NAME) $(if $(TITLE),--title '$(TITLE)')

address: $(READY)
	@test '$(origin URL)' != undefined || \
	  { echo 'Which address? make address URL=https://github.com/owner/name, or URL= to take it back'; exit 2; }
	$(BIN)/python -m tools.address '$(URL)'

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

clean:
	rm -rf book/_build book/vendor build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) uv.lock *.egg-info
