# `make` lists what there is. On a new machine `make repro` and `make test` do everything, environment included.
# Another Python: `PYTHON=python3.12 make repro`. Another place for the environment: `make test VENV=/tmp/venv`.

VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
STAMP := $(VENV)/.requirements-installed
POLICY ?= models/best_model.safetensors
PORT ?= 5000
CHAOS ?= full

# The stages in dvc.yaml say `python`, which must be the environment's.
export PATH := $(abspath $(BIN)):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup repro demo watch timelapse report evaluate ship promote ui tensorboard test test-slow test-browser check lint types format clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## Virtual environment with the pinned requirements; done again when they change

$(STAMP): requirements.txt requirements-cluster.txt requirements-dev.txt constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10 to 3.13 found; set PYTHON=/path/to/python3" >&2; exit 2; }
	"$(PYTHON)" -m venv "$(VENV)"
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	@# OpenCV with windows needs libGL. A machine without it gets the same release without them; ours are pygame's.
	@"$(BIN)/python" -c 'import cv2' 2>/dev/null || { \
		release=$$(sed -n 's/^opencv-python==\([0-9.]*\).*/\1/p' requirements.txt); \
		echo "no libGL here: installing opencv-python-headless $$release, which needs none"; \
		"$(BIN)/python" -m pip uninstall --quiet --yes opencv-python && \
		"$(BIN)/python" -m pip install --quiet --disable-pip-version-check opencv-python-headless==$$release && \
		"$(BIN)/python" -c 'import cv2'; }
	@touch "$(STAMP)"

repro: setup ## Train, evaluate, film: what changed since the last time. CONFIG=configs/quick.yaml applies a file first
	$(if $(CONFIG),"$(BIN)/python" -m pipeline.config apply "$(CONFIG)")
	"$(BIN)/dvc" repro

demo: setup ## Watch the shipped champion drive a track it has never seen: videos/demo.mp4. TRACK=20001
	"$(BIN)/python" -m pipeline.demo $(if $(TRACK),--track "$(TRACK)")

watch: setup ## Watch the champion drive, live, with what it sees and thinks. ARGS="--human", ARGS="FILE --track 7"
	"$(BIN)/python" -m pipeline.watch $(ARGS)

timelapse: setup ## Film how the newest training learned to drive: videos/timelapse.mp4
	"$(BIN)/python" -m pipeline.timelapse $(ARGS)

report: setup ## One page about the run of this checkout, or about RUNS="a b": report.html
	"$(BIN)/python" -m pipeline.report $(RUNS)

evaluate: setup ## Score a policy file on the held-out tracks, as JSON. POLICY=models/best_model.safetensors
	"$(BIN)/python" -m pipeline.evaluate --policy "$(POLICY)" --json -

ship: setup ## Make POLICY the shipped champion: models/champion.safetensors in 16 bits, and its score
	"$(BIN)/python" -m pipeline.ship --policy "$(POLICY)"
	"$(BIN)/python" -m pipeline.evaluate --policy models/champion.safetensors --json models/champion.json

promote: setup ## Register the policy; it becomes champion if it beats the present one
	"$(BIN)/python" -m pipeline.promote

ui: setup ## MLflow's pages: runs, films, registry. PORT=5000
	@# A page elsewhere must not reach it under another name (DNS rebinding), nor anybody start jobs on this machine.
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false "$(BIN)/mlflow" ui --host 127.0.0.1 --port "$(PORT)" \
		--allowed-hosts "127.0.0.1:$(PORT),localhost:$(PORT)" \
		--cors-allowed-origins "http://127.0.0.1:$(PORT),http://localhost:$(PORT)"

tensorboard: setup ## Curves, film strips and action histograms of all runs; http://127.0.0.1:6006
	"$(BIN)/tensorboard" --logdir runs --host 127.0.0.1

sweep: setup ## Search for a better setting: configs/sweep.yaml. ARGS="--seeds 0:5", ARGS="--config configs/sweep.yaml --ray local"
	"$(BIN)/python" -m pipeline.sweep $(or $(ARGS),--config configs/sweep.yaml)

bench: setup ## Speed of every part against stock, in one run. ARGS="--peers", ARGS="--tune --apply"
	"$(BIN)/python" -m pipeline.bench $(ARGS)

bench-peers: .venv-bench/.requirements-installed ## What `bench` compares with, in an environment of its own: 2.3 GB or more

.venv-bench/.requirements-installed: requirements-bench.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10 to 3.13 found; set PYTHON=/path/to/python3" >&2; exit 2; }
	"$(PYTHON)" -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	@touch $@

.PHONY: sweep bench bench-peers

test: setup ## Tests, the slow ones excepted
	"$(BIN)/python" -m pytest

test-slow: setup ## The slow tests alone: minutes
	"$(BIN)/python" -m pytest -m slow

chaos: setup ## Kill, starve and damage trainings; hours. CHAOS=short: minutes. ARGS="-k sigkill": one row
	CHAOS="$(CHAOS)" "$(BIN)/python" -m pytest tests/chaos -m chaos $(ARGS)

audit: .venv-audit/.requirements-installed ## Known vulnerabilities of the pinned packages; needs pypi.org
	.venv-audit/bin/python .ci/audit.py

.venv-audit/.requirements-installed: requirements-audit.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10 to 3.13 found; set PYTHON=/path/to/python3" >&2; exit 2; }
	"$(PYTHON)" -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-audit.txt
	@touch $@

.PHONY: chaos audit
test-browser: setup ## The tests in a browser; need Chromium. Their pictures: .ci/artifacts/
	"$(BIN)/python" -m pytest -m browser

check: lint types test ## All that must pass before a commit

lint: setup ## Style and likely mistakes
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .

types: setup ## Types
	"$(BIN)/mypy"

format: setup ## Rewrite in the project's style
	"$(BIN)/ruff" check --fix .
	"$(BIN)/ruff" format .

clean: ## Remove caches and leftovers; runs, models and MLflow's database stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find pipeline tests -name __pycache__ -type d -prune -exec rm -rf {} +
