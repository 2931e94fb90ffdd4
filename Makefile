PYTHON ?= python3

.PHONY: demo check test soak

# The files of `make check`: the mathematics, settings and rooms; none starts a process or takes long to compile.
MATH = $(addprefix tests/test_,$(addsuffix .py,losses masking mixing optimizer evaluate_math diagnostics \
	attention tracking randaugment hlo settings methods rooms))

demo: .venv/installed
	.venv/bin/python -m cjepa_jax.main --config=configs/digits.py

check: .venv/installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/python -m pytest -q -m "not slow" -n 2 --dist loadfile $(MATH)

test: .venv/installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/python -m pytest -m "not slow" -n 2 --dist loadfile --durations=15

soak: .venv/installed-test
	.venv/bin/python -m pytest -s -m slow -n 0 tests/test_soak.py tests/test_faults.py

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt
	touch $@

.venv/installed-test: .venv/installed pyproject.toml
	.venv/bin/pip install -q -e '.[test]'
	touch $@
