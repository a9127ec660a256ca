# Everything runs in a virtual environment of its own; uv is used where it is installed.
VENV ?= .venv
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null)
# Three processes of tests for each core, as many tests wait for programs that they start.
JOBS ?= $(shell echo $$((3 * $$(nproc 2>/dev/null || echo 2))))
LOCK = $(BIN)/uv pip compile --quiet --universal --generate-hashes --no-header \
	--no-emit-index-url --no-emit-find-links $(if $(UPGRADE),--upgrade)
LOCKED := build manual audit browser system # groups with a file of their own in packaging/

# Bytecode is kept, but not in the clone: it saves a third of the time that tests take.
export PYTHONDONTWRITEBYTECODE :=
export PYTHONPYCACHEPREFIX := $(abspath $(VENV))/bytecode

.DEFAULT_GOAL := help
.PHONY: help install demo test quick shell oracle chaos system check format lock vendor deb audit clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 10

install: $(VENV)/installed ## make the virtual environment

$(VENV)/installed: requirements.txt pyproject.toml
ifneq ($(UV),)
	@echo "installing into $(VENV): a minute or two, once"
	uv venv --quiet --clear --seed $(VENV)
	uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.txt
	uv pip install --quiet --python $(BIN)/python --no-deps -e .
else
	@echo "installing into $(VENV): a minute or two, once"
	python3 -m venv --clear $(VENV)
	$(BIN)/pip install --progress-bar off --disable-pip-version-check --require-hashes -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
endif
	touch $@

demo: install ## see it work in twenty seconds
	$(BIN)/sequencerd demo

test: install ## run the tests, or some: T=tests/core; JOBS=4 processes; THOROUGH=1 for more examples
	$(BIN)/pytest -q --numprocesses $(JOBS) --dist worksteal --durations 10 \
		$(if $(THOROUGH),--hypothesis-profile thorough) $(T)
	$(BIN)/python -m tests.oracle.replay $(ORACLE_DIR)

quick: install ## run the fast tests: without programs, chaos, and the console and imports on a database
	$(BIN)/pytest -q --numprocesses $(JOBS) --dist worksteal --durations 10 \
		--hypothesis-profile quick -m "not slow and not system" $(T)

shell: install ## open psql on a throw-away database with the schema
	@$(BIN)/python -m tests.helpers.shell

oracle: install ## compare with the answers of the original libraries (ORACLE_DIR=... for other cases)
	$(BIN)/python -m tests.oracle.replay $(ORACLE_DIR)

chaos: install ## break everything for ten minutes (CHAOS_SEED=... for other faults)
	CHAOS_SECONDS=$${CHAOS_SECONDS:-40} $(BIN)/pytest -q tests/chaos

system: $(VENV)/system ## boot Debian and build packages and images, as root: ten minutes, much disk
	$(BIN)/pytest -q -rs --durations 5 -m system tests/system

$(VENV)/system: packaging/system-requirements.txt $(VENV)/installed
	$(BIN)/python -m pip install --quiet --require-hashes -r packaging/system-requirements.txt
	touch $@

check: install ## format, lint, types, imports: all of them, and how long each takes
	@failed=; for tool in "ruff format --check" "ruff check" mypy lint-imports; do \
		begun=$$(date +%s); $(BIN)/$$tool || failed="$$failed, $${tool}"; \
		echo "--- $$tool: $$(($$(date +%s) - begun)) s"; \
	done; [ -z "$$failed" ] || { echo "failed: $${failed#, }" >&2; exit 1; }

format: install ## format, and fix what lint can fix
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

lock: install ## pin with hashes what is not pinned yet; UPGRADE=1: the newest versions of all
	$(LOCK) --all-extras --group dev -o requirements.txt pyproject.toml
	for group in $(LOCKED); do \
		$(LOCK) --group $$group -c requirements.txt -o packaging/$$group-requirements.txt || exit 1; \
	done

vendor: ## fetch the browser libraries in the versions of bin/vendor
	bin/vendor

deb: ## build a Debian package in dist/
	bin/deb

audit: $(VENV)/audit/installed ## compare requirements.txt with lists of known vulnerabilities
	$(VENV)/audit/bin/python bin/audit

$(VENV)/audit/installed: packaging/audit-requirements.txt $(VENV)/installed
	$(BIN)/python -m venv --clear $(VENV)/audit
	$(VENV)/audit/bin/pip install --quiet --require-hashes -r packaging/audit-requirements.txt
	touch $@

clean: ## remove what the other targets made
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
