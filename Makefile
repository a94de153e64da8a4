# make run    execute the notebooks and build the gallery      make test   all tests
# make lab    JupyterLab on the notebooks                      make help   the rest
# Without make: python -m venv .venv; .venv/bin/pip install -e ".[test]"; .venv/bin/smoothkit run

PYTHON ?= python3
VENV   ?= .venv
PRESET ?= digits
JOBS   ?= 1
WORKERS ?= 2
BIN     = $(VENV)/bin
READY   = $(VENV)/.ready

.PHONY: run test lab figures records starters readme lint format clean help

run: $(READY)
	$(BIN)/smoothkit run --preset $(PRESET) --jobs $(JOBS)

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --junitxml=runs/tests.xml

lab: $(READY)
	$(BIN)/jupyter lab notebooks

figures: $(READY)
	$(BIN)/smoothkit run 60_paper_figures --preset $(PRESET)

records: $(READY)
	$(BIN)/python data/make_records.py
	$(BIN)/python data/make_rows.py noise-training
	$(BIN)/python data/make_rows.py peft

readme: $(READY)
	$(BIN)/python data/make_readme.py

starters: $(READY)
	$(BIN)/python data/make_starters.py

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format . ; $(BIN)/nbstripout notebooks/*.ipynb

clean:
	rm -rf $(VENV) runs

help:
	@echo "make run [PRESET=digits] [JOBS=1]   execute the notebooks, build runs/PRESET/index.html"
	@echo "make test                           all tests"
	@echo "make lab                            JupyterLab on notebooks/"
	@echo "make figures [PRESET=digits]        regenerate the figures and tables of 60_paper_figures"
	@echo "make records                        sample the committed vote records again, make missing rows (an hour or two)"
	@echo "make starters                       train the starter models again (about ten minutes)"
	@echo "make readme                         numbers and figure of the READMEs from records"
	@echo "make lint, make format, make clean"

# A virtual environment with everything; uv is used when it is there, for speed.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed; name one with make PYTHON=python3.12"; exit 1; }
	@echo "setting up $(VENV) (about 6 GB; minutes the first time)"
	@if command -v uv >/dev/null 2>&1; then \
	  uv venv --quiet --allow-existing --seed -p $(PYTHON) $(VENV) && uv pip install --quiet -p $(BIN)/python -e ".[test]"; \
	else \
	  $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"; \
	fi
	@touch $(READY)
