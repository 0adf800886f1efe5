# Two commands: `make demo` and `make test`. Both build .venv first, once; nothing is installed again while nothing changed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint slow clean

demo: .venv/installed
	$(BIN)/transfer run method=dann

test: lint
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: .venv/installed
	$(BIN)/python -m pytest -m slow

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("transfer needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	# torch first and by itself: torchvision's own requirement would choose another build of it
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
