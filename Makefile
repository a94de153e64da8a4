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

.PHONY: run test test-fast test-browser lab docs figures records starters lock audits faults coverage referee fuzz scale versions readme lint format clean help

run: $(READY)
	$(BIN)/smoothkit run $(NOTEBOOKS) --preset $(PRESET) --jobs $(JOBS)

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --junitxml=runs/tests.xml

test-fast: $(READY)  # without what is marked slow: notebooks, browsers, fuzz, faults and the slowest
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

test-browser: $(READY)
	SMOOTHKIT_BROWSER_TESTS=1 $(BIN)/python -m pytest -rs tests/browser

lab: $(READY)
	$(BIN)/jupyter lab --ip=127.0.0.1 notebooks  # this machine only, with a token

docs: $(READY)
	$(BIN)/python -m smoothbook.runner.reference runs/docs

figures: $(READY)
	$(BIN)/smoothkit run 60_paper_figures --preset $(PRESET)

records: $(READY)
	$(BIN)/python data/make_records.py
	for table in noise-training peft certifying noise-pretraining denoising sigma; do $(BIN)/python data/make_rows.py $$table || exit 1; done

lock:  # the versions of requirements.lock anew; needs uv
	uv pip compile pyproject.toml --extra test --extra distributed --extra fast --python-version 3.11 --universal \
	  --custom-compile-command "make lock" --quiet --upgrade -o requirements.lock

audits: $(READY)
	$(BIN)/python tests/trust/audit_records.py

faults: $(READY)
	$(BIN)/python tests/trust/inject_faults.py

coverage: $(READY)
	$(BIN)/python tests/trust/measure_coverage.py

referee: $(READY)
	$(BIN)/python tests/trust/referee.py

fuzz: $(READY)
	$(BIN)/python tests/trust/fuzz_inputs.py

scale: $(READY)
	$(BIN)/python tests/trust/simulate_scale.py

versions: $(READY)  # needs uv, and room for a second environment in runs/lowest
	$(BIN)/python tests/trust/try_versions.py --workers $(WORKERS)

readme: $(READY)
	$(BIN)/python data/make_readme.py

starters: $(READY)
	$(BIN)/python data/make_starters.py
	$(BIN)/python data/make_diffusion.py digits-ddpm

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format . ; $(BIN)/nbstripout notebooks/*.ipynb

clean:
	rm -rf $(VENV) runs

help:
	@echo "make run [PRESET=digits] [JOBS=1] [NOTEBOOKS='00 10']   execute them, build runs/PRESET/index.html"
	@echo "make test                           all tests"
	@echo "make test-fast                      all but notebooks, browsers, fuzz, faults and the slowest: about two minutes"
	@echo "make test-browser                   JupyterLab in Chromium: notebooks 00 and 50, sliders, a reload; minutes"
	@echo "make lab                            JupyterLab on notebooks/"
	@echo "make docs                           the API reference from the docstrings: runs/docs/index.html, linked from the gallery"
	@echo "make figures [PRESET=digits]        regenerate the figures and tables of 60_paper_figures"
	@echo "make records                        sample the committed vote records again, make missing rows (an hour or two)"
	@echo "make starters                       train the starter models of the digits again (about twenty minutes)"
	@echo "make lock                           requirements.lock: one set of versions for reproducible installs"
	@echo "make audits                         check every committed record, votes drawn again"
	@echo "make referee                        exact checks of every rule, and attacks: data/trust (minutes)"
	@echo "make faults, coverage, fuzz, scale  break it on purpose: results in data/trust, ten minutes each at most"
	@echo "make versions                       all tests with the lowest versions allowed and with yours: data/trust (an hour; needs uv)"
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
