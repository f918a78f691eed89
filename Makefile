# `make help` lists the commands. Everything runs in .venv, which each of them makes when it is missing.
SHELL := /bin/bash
.DEFAULT_GOAL := help

# The environment's own Python if there is one, else the first of the supported ones that runs.
SUPPORTED = import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(firstword $(shell for p in .venv/bin/python python3.11 python3.12 python3.13 python3; do \
	$$p -c '$(SUPPORTED)' >/dev/null 2>&1 && echo $$p && break; done) python3)
EXTRA ?=
PORT ?=
PRESET ?=
NAME ?=
POOL ?=
MODEL ?=
VERSION ?= champion
ROUNDS ?=
SEED ?=

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PYTHONUNBUFFERED := 1
export GX_ANALYTICS_ENABLED := False
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export MLFLOW_DISABLE_TELEMETRY := true
export HF_HUB_DISABLE_TELEMETRY := 1
export ORT_DISABLE_TELEMETRY := 1
export DO_NOT_TRACK := 1
export NO_MKDOCS_2_WARNING := 1

.PHONY: help install repro verify reproduce dag draw sweep demo test lint coverage drills docs bench ui serve stack stack-down deploy run stop lock clean

help: ## list the commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|'

install: ## create .venv from requirements.lock (PYTHON=python3.12 picks a Python, EXTRA=demo, docs, stack, containers or tensorrt adds an extra)
	@$(PYTHON) infra/install.py $(if $(EXTRA),--extra $(EXTRA))

repro: install ## run the whole chain and print a summary; what is up to date is skipped (ARGS=... goes to dvc repro)
	@python -m infra.run $(ARGS)

verify: install ## check the champion from MLflow down to its files and hashes (MODEL=models:/NAME/2 checks another)
	@python -m tasks.verify $(MODEL) $(ARGS)

reproduce: install ## compute a registered version again in a temporary clone, and compare (VERSION=2, ARGS=--share-cache)
	@python -m infra.reproduce $(VERSION) $(ARGS)

dag: install ## list the stages, each with those it depends on
	@python -m flows.dag

draw: install ## draw images with the trained model (ARGS="--label 3 --count 4 --out three.png"; ARGS=--help)
	@python -m tasks.draw $(ARGS)

sweep: install ## train and compare the trials of a sweep in sweeps/ (NAME=timesteps, ARGS=--list lists them)
	@python -m flows.sweep $(NAME) $(ARGS)

demo: EXTRA = demo
demo: install ## a page that draws, on http://127.0.0.1:7860 (PORT=..., ARGS="--model models:/NAME@champion"); installs gradio
	@python -m infra.demo $(if $(PORT),--port $(PORT)) $(ARGS)

# The tests that `make test` and `make coverage` run: a file at a time, on three processes, as many tests wait for servers.
TESTS = python -m pytest -m "not slow and not gpu" -n 3 --dist loadfile --no-loadscope-reorder

test: install lint ## lint and all tests but the drills (ARGS=... goes to pytest, such as --durations=15)
	@$(TESTS) $(ARGS)

lint: install ## style, types, layers, import cycles, declared dependencies, spelling, vocabulary, the diagram
	ruff check
	ruff format --check
	mypy
	lint-imports
	deptry .
	codespell
	python -m infra.prose
	python -m infra.architecture --check

coverage: install ## the tests of `make test` with the lines and branches they run (slower); writes coverage.xml
	@mkdir -p .scratch/coverage
	@$(TESTS) --cov --cov-report=term --cov-report=xml $(ARGS)

drills: install ## the long tests: kills, full disks, races (hours; ROUNDS=1000 kills more often, SEED=1 at other moments)
	@$(if $(ROUNDS),AFTERIMAGE_DRILL_ROUNDS=$(ROUNDS)) $(if $(SEED),AFTERIMAGE_DRILL_SEED=$(SEED)) \
		python -m pytest -m slow $(ARGS)

docs: EXTRA = docs
docs: install ## build the documentation in site/, offline and strict (ARGS=... goes to mkdocs build)
	@python -m mkdocs build --strict $(ARGS)

bench: install ## measure speed, quality, sampling and start-up beside diffusers' loop (ARGS="--cifar cifar10.zip")
	@python -m infra.bench all $(ARGS)

ui: install ## MLflow UI of this work tree on http://127.0.0.1:5000 (PORT=... picks another port)
	@python -m infra.ui $(if $(PORT),--port $(PORT))

serve: install ## Prefect server, worker and deployments, in the background, on http://127.0.0.1:4200 (PORT=...)
	@python -m flows.serve $(if $(PORT),--port $(PORT))

stack: EXTRA = stack
stack: install ## the whole stack without containers: PostgreSQL, S3, MLflow, Prefect, worker (ARGS="--mlflow-port 5001")
	@python -m infra.stack $(if $(PORT),--port $(PORT)) $(ARGS)

stack-down: ## end what `make stack` started; its files stay
	@test ! -x .venv/bin/python || python -m infra.stack --down

deploy: install ## the flows for workers on other machines (POOL=name, ARGS="--type process"; kubernetes, docker)
	@python -m flows.deploy $(POOL) $(ARGS)

run: install ## have the worker of `make serve` run a preset now (PRESET=digits, ARGS="train.steps=1000")
	@python -m flows.on_demand $(PRESET) $(ARGS)

stop: ## end what `make serve` started
	@test ! -x .venv/bin/python || python -m flows.stop

lock: ## pin pyproject.toml and tasks/transfer/img2dataset*.in anew; writes their .lock files
	@$(PYTHON) infra/lock.py

clean: ## remove what the chain made, and caches; ALL=1 also the MLflow store and the DVC cache
	rm -rf data outputs reports site coverage.xml dvc_plots .scratch .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	$(if $(ALL),rm -rf mlflow.db mlflow.db-shm mlflow.db-wal mlruns .dvc/cache .dvc/tmp .prefect)
