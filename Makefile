# Every target builds what it needs. One virtual environment serves them all; it is made anew when
# pyproject.toml or constraints.txt change.
PYTHON ?= python3
VENV ?= .venv
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
RUN := $(VENV)/bin

.PHONY: demo test check docs benchmarks clean

demo: $(STAMP)  ## a finished collaboration on handwritten digits, with a picture
	$(RUN)/ppdl simulate experiment=digits hydra.run.dir=outputs/demo
	@echo "Look at outputs/demo/accuracy.png"

test: $(STAMP)  ## all tests
	$(RUN)/python -m pytest

check: $(STAMP)  ## lint, format, types, documentation
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

docs: $(STAMP)
	$(RUN)/sphinx-build -W --keep-going -b html docs docs/_build/html

benchmarks: $(STAMP)  ## print what docs/benchmarks.md quotes; takes a while; 77 is for parts that were skipped
	for script in benchmarks/*.py; do echo "== $$script"; $(RUN)/python $$script || [ $$? -eq 77 ] || exit 1; done

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(RUN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[privacy,exact,simulate,network,docs,dev]'
	@rm -f $(VENV)/.installed-*
	@touch $@

clean:
	rm -rf $(VENV) build dist docs/_build outputs multirun .mypy_cache .ruff_cache .pytest_cache
