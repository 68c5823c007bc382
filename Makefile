# Two commands do everything on a fresh machine: make demo, make test.
PYTHON ?= python3
# Test processes; what a file's tests share is made once, so a file stays in one of them.
WORKERS ?= 2
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test readme lint types check-built format build bench clean

demo: .venv/.installed
	$(BIN)/stepcache demo

test: .venv/.installed-dev lint types check-built
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --ignore tests/test_docs.py
	$(MAKE) --no-print-directory readme

# Every block of README and docs, and every example, in order, as written.
readme: .venv/.installed-dev
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist load tests/test_docs.py

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed-dev
	$(BIN)/mypy

check-built: .venv/.installed-dev
	$(BIN)/python tools/bundle.py --check

format: .venv/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Build the drop-in scripts from src/stepcache/dropin.
build: .venv/.installed-dev
	$(BIN)/python tools/bundle.py

# Costs of computed and skipped steps, loop speed-up, cache memory on the embedded model (bench/).
bench: .venv/.installed-dev
	$(BIN)/python bench/overhead.py --out bench/overhead.json

clean:
	rm -rf .venv outputs build dist .pytest_cache .mypy_cache .ruff_cache

# torch first and pinned: whatever else asks for it is then content, and no other build is fetched.
.venv/.torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	touch $@

.venv/.installed: .venv/.torch pyproject.toml
	$(PIP) --editable '.[all]'
	touch $@

.venv/.installed-dev: .venv/.torch pyproject.toml
	$(PIP) --editable '.[dev]'
	touch $@ .venv/.installed
