PYTHON ?= python3

.PHONY: demo test

demo: .venv/installed
	.venv/bin/python -m cjepa_jax.main --config=configs/digits.py

test: .venv/installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/python -m pytest -m "not slow" -n 2 --dist loadfile

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt
	touch $@

.venv/installed-test: .venv/installed requirements-test.txt
	.venv/bin/pip install -q -r requirements-test.txt
	touch $@
