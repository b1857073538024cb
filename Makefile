# Two commands: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SLOW := tests/cluster tests/resume tests/unit/shards  # where all tests of clusters and faults lie

# threads of two processes on the same cores would wait for each other by spinning
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-launchers test-long test-unit coverage site lint clean

$(READY): pyproject.toml requirements.txt scripts/install.sh
	PYTHON=$(PYTHON) VENV=$(VENV) bash scripts/install.sh
	touch $(READY)

demo: $(READY)  ## train three blocks, merge, evaluate, compare
	$(BIN)/dbtrain compare configs/vit_digits.yaml

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports \
	  && $(BIN)/codespell

test-unit: $(READY)
	$(BIN)/pytest -n auto --maxprocesses 8

coverage: $(READY)  ## the unit tests again, a little slower, with the lines of the package that none of them runs
	$(BIN)/pytest -n auto --maxprocesses 8 --cov --cov-report=term

site: $(READY)  ## the documents as pages, in site/; fails on a link that leads nowhere
	$(BIN)/mkdocs build --strict

test: $(READY) lint  ## all tests but the long: unit, then real clusters and faults; of Docker, Slurm and SSH if they are installed
	$(BIN)/pytest -n auto --maxprocesses 8
	$(BIN)/pytest -n 3 --dist loadgroup --no-loadscope-reorder -m "(cluster or fault) and not long" $(SLOW)

test-launchers: $(READY)  ## the image, Slurm and SSH, really run; needs Debian's docker.io docker-compose mmdebstrap slurm-wlm munge openssh-server
	$(BIN)/pytest -m "docker or slurm or ssh"

test-long: $(READY)  ## what takes minutes each
	$(BIN)/pytest -m long

clean:
	rm -rf $(VENV) runs build site
