# Each target sets up what it needs: a virtual environment in .venv with this package, editable.
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
BENCH := .venv-bench/bin
SOURCES := ppl_vae models guides tests tutorials benchmarks

.PHONY: demo test check test-slow lint types clean bench

demo: .venv/ready
	$(BIN)/ppl-vae fit vae-digits --out $(DEMO)
	$(BIN)/ppl-vae evaluate $(DEMO) --samples 500
	$(BIN)/ppl-vae check $(DEMO)
	$(BIN)/ppl-vae sample $(DEMO)

# Format, lint, types, doctests and every fast test, in parallel.
test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m "not slow"

# The quick part: no training, no subprocesses.
check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m "not slow" tests/test_contract.py tests/test_doctests.py

test-slow: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m slow

lint: .venv/ready
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)

# Type checkers resolve ppl_vae.models only from a normal install: see docs/decisions/001.
types: .venv/ready
	rm -rf build
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation --target build/typed .
	$(BIN)/basedpyright

.venv/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip "setuptools>=77"
	$(BIN)/python -m pip install -q -e ".[test]"
	touch $@

# Side by side with NumPyro and pythae, in an environment of their own; leave the machine alone meanwhile.
bench: .venv-bench/ready
	$(BENCH)/python -m benchmarks.step --save
	$(BENCH)/python -m benchmarks.evidence --save
	$(BENCH)/python -m benchmarks.memory --save
	$(BENCH)/python -m benchmarks.seeds --save

.venv-bench/ready: pyproject.toml
	test -x $(BENCH)/python || $(PYTHON) -m venv .venv-bench
	$(BENCH)/python -m pip install -q --upgrade pip "setuptools>=77"
	$(BENCH)/python -m pip install -q -e ".[bench]"
	touch $@

clean:
	rm -rf .venv .venv-bench build *.egg-info .pytest_cache .ruff_cache

# The zoo's tables in the README, from the docstrings.
.PHONY: readme
readme: .venv/ready
	$(BIN)/python -c "from pathlib import Path; from ppl_vae.zoo import with_table; \
	p = Path('README.md'); p.write_text(with_table(p.read_text('utf-8')), 'utf-8')"
