# Everything runs in .venv, made from requirements.lock; the stamp makes the set-up run once.
PYTHON ?= python3
PYTHONS := 3.11 3.12 3.13
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-all test-faults test-cluster test-gpu foreign bench lint audit models map platforms clean

# Ends make before a recipe's first command where PYTHON is none of PYTHONS.
found = $(shell $(PYTHON) -c "import sys; print('%d.%d' % sys.version_info[:2])")
checked = $(if $(filter $(found),$(PYTHONS)),,$(error $(PYTHON) is $(if $(found),Python $(found),no Python); \
  ctp runs on Python $(PYTHONS): make PYTHON=python$(lastword $(PYTHONS))))

demo: $(STAMP) ## the whole path on a small real model, then its report and the transfer matrix, read from MLflow
	$(BIN)/python -m ctp.grid demo
	$(BIN)/python -m analysis.report demo --log
	$(BIN)/python -m analysis.transfer_matrix demo

# Python's bytecode is kept, whatever the environment says: the tests start some dozen processes, which import the same.
test: lint ## all tests but the slow ones, in two processes: most of them use one core
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: lint foreign ## and the slow ones, against the real GPTQModel and llm-compressor too
	$(BIN)/python -m pytest -m "not faults and not cluster and not gpu"

test-faults: $(STAMP) ## kill -9 of drivers, workers, raylets; servers that go away; nine minutes on two cores
	$(BIN)/python -m pytest tests/faults -m faults

test-cluster: .cluster/.installed ## `ray up` on three machines made of namespaces; needs root, openssh-server and rsync
	.cluster/bin/python -m pytest -m cluster tests/cluster

# .venv's packages and, on top, what a cluster needs; in .venv itself it would slow every start of Ray.
.cluster/.installed: requirements-cluster.lock $(STAMP)
	$(PYTHON) -m venv .cluster
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  > "$$(.cluster/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/ctp.pth"
	.cluster/bin/pip install --quiet --disable-pip-version-check --no-deps --ignore-installed "$$(grep '^ray==' requirements.lock)"
	.cluster/bin/pip install --quiet --disable-pip-version-check -c requirements.lock -r requirements-cluster.lock "moto[server]==5.2.5"
	touch $@

test-gpu: ## what needs a GPU, with $(PYTHON)'s own torch, which must be a build for CUDA; skips where there is no GPU
	$(PYTHON) -m pytest -m gpu -rs tests/gpu

foreign: $(patsubst %,.foreign/%/.installed,gptqmodel llmcompressor autoawq bitsandbytes) ## their environments; they do not fit into ctp's

.foreign/%/.installed: tests/foreign/%.txt requirements.lock
	$(PYTHON) -m venv .foreign/$*
	.foreign/$*/bin/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.lock)"
	.foreign/$*/bin/pip install --quiet --disable-pip-version-check -r $<
	touch $@

bench: $(STAMP) foreign ## speed next to named peers on a CPU; fails where a claim does not hold, once all have run
	@failed=; for part in learning compression transfer grid; do \
	  echo "== benchmarks.$$part"; $(BIN)/python -m benchmarks.$$part || failed="$$failed $$part"; done; \
	  test -z "$$failed" || { echo "claims that do not hold:$$failed"; exit 1; }

lint: $(STAMP) ## style, formatting, which package may import which, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

audit: .audit/.installed ## known vulnerabilities of all pinned packages; needs a network, and fails without one
	.audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r requirements.lock

.audit/.installed:
	$(PYTHON) -m venv .audit
	.audit/bin/pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	touch $@

models: $(STAMP) ## docs/models.md anew: what works on which architecture
	$(BIN)/python -m tools.models

map: $(STAMP) ## the map of CONTRIBUTING.md anew: every module with the first sentence of its docstring
	$(BIN)/python -m tools.map

platforms: $(STAMP) ## wheels of all pins for every Python and platform; needs a package index
	$(BIN)/python -m tools.platforms

# pip first: an old one takes twice as long. torch with its dependencies: those of a build for CUDA are not in the lock.
# All else without, for the lock is complete. Nothing is compiled while it is installed: pip would compile 25,000 files,
# one after the other, of which a run imports 3,500. The import compiles these, and tells whether they can be imported.
$(STAMP): requirements.lock pyproject.toml
	$(checked)
	rm -f $@
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^pip==' requirements.lock)"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c requirements.lock "$$(grep '^torch==' requirements.lock)"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --no-deps --no-build-isolation -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -c "import ctp.api, ctp.grid, lm_eval, mlflow, peft, ray.tune"
	touch $@

clean:
	rm -rf $(VENV) .foreign .audit .cluster results
