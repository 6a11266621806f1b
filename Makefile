# make frontier          the main job: a Pareto frontier of success and cost, with its report, in results/
# make test              everything CI runs: lint, types, unit tests, integration tests
# make alfworld          ALFWorld's engine, part of it compiled; make appworld: AppWorld's, in an environment of its own
# make browser          a Chromium for the report's tests, where there is none: apt-get, as root
# make audit            known vulnerabilities of the pinned dependencies, as PyPI's advisories have them
# make venv lint unit integration soak clean distclean
#
#   make frontier SCALE=tiny ENV=ScienceWorld-v0 ARGS="--lambdas 0.1,0.5"

SHELL := /bin/bash
.NOTPARALLEL:
.PHONY: frontier test lint audit unit integration browser soak venv alfworld appworld appworld-engine clean distclean

ENV = ScienceWorld-v0
SCALE = quick
ARGS =
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
ALFWORLD := $(VENV)/.alfworld
APPWORLD_VENV ?= .venv-appworld
APPWORLD_VERSION := 0.1.3.post1
APPWORLD := $(APPWORLD_VENV)/.installed-$(APPWORLD_VERSION)
export BOPO_RAY_APPWORLD ?= $(abspath $(APPWORLD_VENV))
ADVISORIES = https://pypi.org/pypi/idna/3.10/json
INSTALL = $(PY) -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt

frontier: $(STAMP) $(if $(filter ALFWorld-v0 all,$(ENV)),$(ALFWORLD)) $(if $(filter AppWorld-v0 all,$(ENV)),$(APPWORLD))
	$(PY) -m experiments.frontier --scale $(SCALE) --env $(ENV) --resume $(ARGS)

test: lint unit integration

lint: $(STAMP)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	@if $(PY) -c 'import urllib.request; urllib.request.urlopen("$(ADVISORIES)", timeout=10)' 2>/dev/null; \
	then $(MAKE) --no-print-directory audit || echo "The audit found something, or could not finish: see above. Lint itself is green."; \
	else echo "Not audited: PyPI's advisories can't be reached from here."; fi

# `lint` tells what this finds and is not failed by it: a new advisory is no fault of the checkout.
audit: $(STAMP)
	@$(INSTALL) pip-audit
	$(PY) -m pip_audit --strict --disable-pip --no-deps --progress-spinner off -r constraints.txt

unit: $(ALFWORLD)
	$(PY) -m pytest tests/unit -q --durations=10

integration: $(ALFWORLD) $(APPWORLD) browser
	$(PY) -m pytest tests/integration -q --durations=10

# The report is tested in a real browser. Only root may install one; for others its tests are skipped and say why.
browser:
	@test -n "$(CHROMIUM)" || command -v chromium chromium-browser google-chrome google-chrome-stable >/dev/null || \
	! command -v apt-get >/dev/null || test $$(id -u) != 0 || { echo "Installing Chromium (apt-get; 0.4 GB)"; \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium \
	fonts-dejavu-core >/dev/null || { echo "apt-get could not install chromium; name one: make CHROMIUM=path"; exit 2; }; }

# Minutes of real kills at every stage, a full disk, jobs and keys on a started cluster; not part of `test`.
soak: $(STAMP)
	$(PY) -m pytest tests/soak -q --durations=10

venv: $(STAMP)

appworld: $(STAMP) $(APPWORLD)
	$(PY) -m envs.appworld generate

# On a cluster's nodes, whose image has the rest.
appworld-engine: $(APPWORLD)

# AppWorld pins pydantic 1, which Ray refuses: it never shares an environment with the rest.
$(APPWORLD):
	@echo "Installing AppWorld's engine into $(APPWORLD_VENV) (0.2 GB; under a minute)"
	@test -x $(APPWORLD_VENV)/bin/python || $(PYTHON) -m venv $(APPWORLD_VENV)
	@$(APPWORLD_VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-input appworld==$(APPWORLD_VERSION)
	@$(APPWORLD_VENV)/bin/appworld install >/dev/null
	@touch $@

# PyTorch goes first: without a GPU, the package index's own build would bring gigabytes of CUDA. There a build that pip
# has at hand (find-links) is taken, else one from TORCH_INDEX, whose 2.13.0+cpu pip ranks above plain 2.13.0.
$(STAMP): setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "bopo_ray needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo "Installing into $(VENV) (about 2 GB; a few minutes)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@if nvidia-smi >/dev/null 2>&1; then $(INSTALL) torch; \
	else $(INSTALL) --no-index --no-deps torch 2>/dev/null || $(INSTALL) --extra-index-url $(TORCH_INDEX) torch; fi
	@$(INSTALL) -e '.[dev]'
	@touch $@

alfworld: $(ALFWORLD)

# Fast Downward and Jericho come as source; their builds call `python`.
$(ALFWORLD): $(STAMP)
	@for tool in gcc g++; do command -v $$tool >/dev/null || \
	{ echo "ALFWorld-v0 is built from source, which needs $$tool: apt-get install build-essential"; exit 2; }; done
	@echo "Installing ALFWorld into $(VENV) (about 280 MB; it is compiled, two minutes)"
	@PATH="$(abspath $(VENV))/bin:$$PATH" $(INSTALL) -e '.[alfworld]'
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find bopo_ray envs experiments tests -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-appworld
