# `make` alone says what there is.
PYTHON ?= python3
PORT ?= 8000
WORKERS ?= 3
MINUTES ?= 10
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help run install test unit torture lint check bench format requirements clean

BIN := .venv/bin
# What runs, and what also tests it: the second set has all of the first, in the same versions.
RUNS := .venv/.runs
STAMP := .venv/.installed
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --require-hashes
SOURCES := backend tests

help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(RUNS) .tools ## Make a hub under ./var if there is none, and serve on 127.0.0.1:8000 (PORT=...); Ctrl-C stops
	@exec $(BIN)/python -m backend run --port $(PORT)

install: $(RUNS) ## Make .venv with what the service needs to run, and nothing more

test: $(STAMP) .test-requirements ## Run all tests, with coverage, in some 7 minutes; as root on Debian or Ubuntu it installs what they need
	$(BIN)/pytest -n $(WORKERS) --dist worksteal --cov --cov-report=term-missing:skip-covered --cov-fail-under=97

unit: $(STAMP) ## Run the tests outside of tests/integration and tests/reliability, in about a minute, root or not
	$(BIN)/pytest -n $(WORKERS) --dist worksteal --ignore=tests/integration --ignore=tests/reliability

torture: $(STAMP) .test-requirements ## Repeat, as root, what fails only now and then, and wait in real time (MINUTES=10)
	$(BIN)/pytest -n $(WORKERS) --dist worksteal --torture=$(MINUTES)

lint: $(STAMP) ## Check style, types and the direction of imports
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test ## Run lint and test

bench: $(STAMP) ## Measure the service against the limit, as root (ARGS=--quick or --json, ARGS="--against COMMIT")
	@$(BIN)/python -m tests.benchmarks $(ARGS)

format: $(STAMP) ## Put the code into its canonical form
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

requirements: .uv/bin/uv ## Pin what pyproject.toml names, with hashes, in both requirements.txt (ARGS=--upgrade)
	$(COMPILE) --extra test $(ARGS) --output-file requirements.txt
	$(COMPILE) --constraints requirements.txt --output-file deploy/requirements.txt

# One file for each Python from 3.11 on and each system: what differs has a marker.
COMPILE := .uv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-strip-extras \
	--no-emit-index-url --no-emit-find-links --custom-compile-command "make requirements" \
	pyproject.toml --extra redis

clean: ## Take away what can be made again; ./var and the interface stay
	rm -rf .venv .uv .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find $(SOURCES) -name __pycache__ -prune -exec rm -rf {} +

$(RUNS): deploy/requirements.txt | .venv/.made
	$(PIP) -r deploy/requirements.txt
	@touch $@

$(STAMP): requirements.txt | .venv/.made
	$(PIP) -r requirements.txt
	@touch $(RUNS) $@

# Not cleared: a service may be running from it.
.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || \
		{ echo "Python 3.11 to 3.14 is needed; name one with make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(MAKE) --no-print-directory .python3-venv
	$(PYTHON) -m venv .venv
	@touch $@

.uv/bin/uv: | .venv/.made
	$(BIN)/python -m venv .uv
	.uv/bin/pip install --quiet --disable-pip-version-check 'uv>=0.9,<1'

.PHONY: .test-requirements
.test-requirements: $(STAMP)
	@$(BIN)/python -m tests.harness.requirements

# Debian's and Ubuntu's packages. wireguard-tools recommends a kernel. The lists of packages may be missing, or too old.
apt_install = export DEBIAN_FRONTEND=noninteractive; \
	install="apt-get install --yes --quiet --no-install-recommends $(1)"; $$install || { apt-get update --quiet && $$install; }

# The standard library's venv has a package of its own.
.PHONY: .python3-venv
.python3-venv:
	@if [ "$$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then \
		$(call apt_install,python3-venv); \
	else \
		echo "$(PYTHON) can't make a virtual environment; install python3-venv (on Debian and Ubuntu:" \
			"sudo apt-get install python3-venv)" >&2; exit 1; \
	fi

# What an interface takes. Where it can't be installed `run` goes on without an interface, and says what is missing.
# wireguard-go is for a kernel without WireGuard.
TOOL_PATH := $(PATH):/usr/sbin:/sbin
.PHONY: .tools
.tools:
	@export PATH="$(TOOL_PATH)"; missing=""; \
	if [ "$$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then exit 0; fi; \
	if [ "$$WIREGUARD_RELOAD" = off ] || grep -qs "^WIREGUARD_RELOAD=off" .env; then exit 0; fi; \
	command -v wg >/dev/null || missing="wireguard-tools"; \
	command -v ip >/dev/null || missing="$$missing iproute2"; \
	[ -e /sys/module/wireguard ] || modprobe --dry-run --quiet wireguard 2>/dev/null || \
		command -v wireguard-go >/dev/null || missing="$$missing wireguard-go"; \
	if [ -n "$$missing" ]; then { $(call apt_install,$$missing); } || true; fi
