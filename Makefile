# `make eval` and `make test` set up everything they need: a virtual environment in .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: eval test lint clean

eval: .venv/installed
	$(BIN)/python eval_vbr.py --real

test: .venv/installed
	$(BIN)/python -m pytest -n auto --maxprocesses 4

lint: .venv/installed
	$(BIN)/ruff check .

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf .venv
