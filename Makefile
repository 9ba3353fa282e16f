# Two commands: `make serve` and `make test`. Both work on a fresh machine with Python 3.11+, make and gcc.
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
DEMO := models/demo
MODEL ?= $(DEMO)

VENV := .venv
BIN := $(VENV)/bin

.PHONY: serve test check fix clean

serve: $(VENV)/.installed $(if $(filter $(DEMO),$(MODEL)),$(DEMO)/config.json)
	$(BIN)/ladimo-server $(MODEL) --host $(HOST) --port $(PORT) --insecure-admin

# The tests of a file run in one process, because they share fixtures that take long to make. There is one process per core,
# so torch gets one thread in each, and a thread that waits gives its core away.
test: export OMP_NUM_THREADS = 1
test: export OMP_WAIT_POLICY = PASSIVE
# Where the environment forbids bytecode files, each of the many processes would compile all modules again.
test: export PYTHONDONTWRITEBYTECODE =
test: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy & types=$$!; $(BIN)/pytest -n auto --dist loadfile; tests=$$?; wait $$types && exit $$tests

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) models build *.egg-info

# The converter renames a finished checkpoint to its place. So if config.json exists, the checkpoint is complete. An interrupted
# conversion resumes.
$(DEMO)/config.json: | $(VENV)/.installed
	$(BIN)/ladimo convert ladimo/demo/model $(DEMO) --recipe ladimo/recipes/demo.toml

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("LaDiMo needs Python 3.11 to 3.13; set PYTHON=") if not (3, 11) <= sys.version_info[:2] <= (3, 13) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(VENV)/.installed $@

# The documentation site, in build/site. The variable silences a notice that is not about our pages.
.PHONY: docs
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.installed-docs
	$(BIN)/python -m mkdocs build --strict

$(VENV)/.installed-docs: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $(VENV)/.installed $@

# The server and Debian's Prometheus beside it; deploy/compose.yaml is the same with containers and Grafana.
.PHONY: observe
observe:
	deploy/observe.sh $(HOST):$(PORT) $(MAKE) serve
