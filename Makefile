# make demo: set up, run the whole pipeline on the demo corpus, show the metrics.   make test: the tests.
# make tables: the paper's Tables 1 and 2 on the current corpus, in reports/tables.md.
# make release: the trained models as one folder for other machines, models/release.
# `export` puts the environment's python and dvc first, so nothing need be activated.
SHELL := /bin/bash
SYSTEM_PATH := $(subst $(CURDIR)/.venv/bin:,,$(PATH))
export PATH := $(CURDIR)/.venv/bin:$(SYSTEM_PATH)
export DVC_NO_ANALYTICS := 1
READY := .venv/ready

.PHONY: setup demo tables release test lint lock clean

demo: $(READY)
	dvc repro
	@echo
	dvc metrics show
	@echo
	@echo "Report: $(CURDIR)/reports/report.html"

tables: $(READY)
	mer tables

release: $(READY)
	mer release

test: $(READY)
	pytest -q -n auto --dist loadfile --no-loadscope-reorder -m "not slow"

lint: $(READY)
	ruff check .
	mypy

setup: $(READY)

# --without-pip and pip's --python: a bare Debian has neither ensurepip nor a writable system Python.
# uv, because pip picks a CPU torch that torchvision can't load with, and takes ten times as long.
# The project itself comes last, since sync removes what constraints.txt does not list; it needs nothing from the network.
$(READY): constraints.txt pyproject.toml
	test -x .venv/bin/python || PATH="$(SYSTEM_PATH)" python3 -m venv --without-pip .venv
	PATH="$(SYSTEM_PATH)" python3 -m pip --python .venv/bin/python install --quiet --disable-pip-version-check "$$(grep '^uv==' constraints.txt)"
	.venv/bin/uv pip sync --quiet --compile-bytecode --python .venv/bin/python constraints.txt
	.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable .
	.venv/bin/python -m compileall -q stages
	touch $(READY)

# After a change of pyproject.toml's dependencies: pin them anew, for every Python from 3.11 on.
lock:
	uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --no-annotate --no-header \
		--group dev pyproject.toml -o constraints.txt

clean:
	rm -rf .cache/parts .pytest_cache .mypy_cache .ruff_cache
