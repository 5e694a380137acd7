# Every target sets up what it needs: a fresh clone, Python and make are enough.
#   make demo                   the whole product on synthetic scenes
#   make test ARGS='-k masks'   ARGS goes to the program behind the target

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
STAMP := .venv/.stamp

# Demo and tests start what they need themselves: a Ray cluster that happens to run on this machine, or a
# tracking server that this shell happens to know, must not see their data.
demo test test-all poison fuzz mutants: export RAY_ADDRESS := local
ifeq ($(filter nightly,$(MAKECMDGOALS)),)
unexport MLFLOW_TRACKING_URI
unexport MLFLOW_REGISTRY_URI
endif

# What `make nightly` labels; from the environment or the command line. Its recipe finds the values in its environment as
# they were written: `value` keeps make from expanding what looks like its own variables and functions.
SOURCE ?= images
DATE ?= today
ifneq ($(filter nightly,$(MAKECMDGOALS)),)
NIGHTLY := INPUT OUTPUT MODEL SOURCE DATE SINCE ARGS
export $(NIGHTLY)
$(foreach name,$(NIGHTLY),$(eval override $(name) := $$(value $(name))))
endif
# How many rounds `make poison` plays.
ROUNDS ?= 10

.DEFAULT_GOAL := help
.PHONY: setup demo nightly test test-all chaos poison fuzz mutants lint bench s3 clean help

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## install the pinned dependencies and this project into .venv

demo: $(STAMP) ## draw scenes, train, label a bucket twice, query the labels; all of it in demo/
	@rm -rf demo
	@$(BIN)/python jobs/demo.py $(ARGS)

nightly: $(STAMP) ## label what is new: INPUT=... OUTPUT=... MODEL=...; also SOURCE, DATE, SINCE, ARGS (docs/labelling.md)
	@case "$$ARGS" in *[\"\'\\]*) \
	    echo "error: ARGS=$$ARGS: is cut at blanks and knows no quotes; leave them out, or start jobs/label.py itself" >&2; \
	    exit 2;; esac; \
	set -f; exec $(BIN)/python jobs/label.py "--input=$$INPUT" "--output=$$OUTPUT" "--model=$$MODEL" \
	    "--source=$$SOURCE" "--date=$$DATE" $${SINCE:+"--since=$$SINCE"} $$ARGS

test: $(STAMP) ## lint, types and tests: every unit, every job, one kill of each kind
	@exec $(BIN)/python -m tests.run --beside '$(MAKE) --no-print-directory lint' $(ARGS)

test-all: export SURVIVAL_SEED ?= $(shell $(PYTHON) -c 'import random; print(random.SystemRandom().randrange(2**32))')
test-all: $(STAMP) ## the same, and everything else that is tested on clusters of several nodes
	@exec $(BIN)/python -m tests.run --all --beside '$(MAKE) --no-print-directory lint' $(ARGS)

chaos: $(STAMP) ## kill, freeze and cut off labelling at random; ARGS='--rounds 20 --seed 7' for more
	@$(BIN)/python -m tests.cluster.chaos $(ARGS)

poison: $(STAMP) ## label inputs that must not stop a night, drawn at random; ROUNDS=20 ARGS='--seed 7'
	@$(BIN)/python -m tests.poison --rounds $(ROUNDS) $(ARGS)

fuzz: $(STAMP) ## label files that are damaged at random; ARGS='--images 10000 --containers 2000 --seed 7'
	@$(BIN)/python -m tests.fuzz $(ARGS)

mutants: $(STAMP) ## break the code on purpose, and count how often the tests notice; ARGS='masks --each 20'
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c requirements.lock -e '.[dev,mutants]'
	@$(BIN)/python -m tests.mutants $(ARGS)

lint: $(STAMP) ## style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

bench: $(STAMP) ## measure labelling, the network, training, its feed and post-processing
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c requirements.lock -e '.[dev,bench]'
	@$(BIN)/python -m benchmarks.run $(ARGS)

s3: $(STAMP) ## run a plain S3 server on loopback until Ctrl-C, for trying things by hand
	@$(BIN)/python -m tests.support.s3server $(ARGS)

clean: ## remove .venv, demo/, caches and build products
	rm -rf .venv demo .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is newer than the files that say what to install, or everything is installed again.
$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@test -x $(BIN)/python || { echo "Making .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv .venv; }
	@echo "Installing the pinned dependencies into .venv (some minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c requirements.lock -e '.[dev]'
	@touch $@
	@echo "Installed."
