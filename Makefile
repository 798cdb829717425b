# Two commands on a fresh machine do everything: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin

# Spinning threads of a busy machine's second core slow the first: let them sleep.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: setup demo test test-slow test-devices check format wheel clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mobilekit needs Python 3.11 or later: make PYTHON=python3.11 setup")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[tflite,coreml,ssh,adb,zoo,distributed,ray,dev]'
	touch $(STAMP)

demo: setup
	$(BIN)/mobilekit demo --out mobilekit-out/demo

# files in their order: the longest one does not come last
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: setup
	$(BIN)/python -m pytest -m slow
	HYPOTHESIS_PROFILE=drawn $(BIN)/python -m pytest -m hypothesis

# adb and sshd are installed where they are missing, as root or into the virtual environment
test-devices: setup
	scripts/device_tools.sh $(VENV)
	PATH="$(CURDIR)/$(VENV)/device-tools:$$PATH" $(BIN)/python -m pytest -m devices

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: setup
	$(BIN)/python -m build --wheel

clean:
	rm -rf mobilekit-out dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
