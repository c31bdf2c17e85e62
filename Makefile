PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV_PYTHON = .venv/bin/python

.PHONY: demo test quick lint clean

demo: .venv/installed
	$(VENV_PYTHON) main.py --demo

test: lint
	$(VENV_PYTHON) -m pytest

quick: lint
	$(VENV_PYTHON) -m pytest tests/unit

lint: .venv/installed-dev
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(VENV_PYTHON) -m pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(VENV_PYTHON) -m pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv
