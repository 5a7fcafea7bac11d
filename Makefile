# Everything that this repository can do for you. Each target builds what it needs.
#
# torch comes first and alone in every environment: resolved together with other packages, pip may
# take another build of it.

PYTHON ?= python3
TORCH := torch==2.13.0
FMS := ibm-fms==1.13.1
RECORD := .venv-record
CHECK := .venv-check
CHECKOUT := build/fms-checkout
EMBEDDED := tests/checkpoints/tiny-idefics3

.DEFAULT_GOAL := help
.PHONY: help setup fms-checkout demo test check goldens pictures clean

help:
	@echo "make setup         build both environments, $(RECORD) and $(CHECK)"
	@echo "make fms-checkout  lay out an FMS checkout with idefics3 in $(CHECKOUT)"
	@echo "make demo          record, check, and see a broken port fail"
	@echo "make test          the whole test suite, in both environments"
	@echo "make check         format, lint, types, layers"
	@echo "make goldens       record the committed golden set again (REASON=..., YES=--yes not to be asked)"
	@echo "make pictures      take the pictures of the documentation again"
	@echo "make clean         remove what the other targets built"

setup: $(RECORD)/.ready $(CHECK)/.ready

$(RECORD)/.ready: pyproject.toml .ci/record.txt Makefile
	$(call new_environment,$(RECORD))
	$(RECORD)/bin/python -m pip install --quiet -r .ci/record.txt
	$(RECORD)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

$(CHECK)/.ready: pyproject.toml .ci/check.txt Makefile
	$(call new_environment,$(CHECK))
	$(CHECK)/bin/python -m pip install --quiet --no-deps $(FMS)
	$(CHECK)/bin/python -m pip install --quiet -r .ci/check.txt
	$(CHECK)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

define new_environment
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || \
	{ echo "$(PYTHON) is not Python 3.11 or 3.12: try make PYTHON=python3.11" >&2; exit 1; }
@echo "building $(1)"
$(PYTHON) -m venv --clear $(1)
$(1)/bin/python -m pip install --quiet $(TORCH)
endef

fms-checkout: $(CHECK)/.ready
	$(CHECK)/bin/python tests/fms_checkout/build.py --out $(CHECKOUT)

demo: setup fms-checkout
	bash tests/demo.sh

test: setup fms-checkout
	.ci/browser
	$(CHECK)/bin/python -m pytest -m "not record and not live"
	$(RECORD)/bin/python -m pytest -m record
	bash tests/live/run.sh

check: $(CHECK)/.ready
	$(CHECK)/bin/ruff format --check .
	$(CHECK)/bin/ruff check .
	$(CHECK)/bin/mypy
	cd tests/checkpoints && ../../$(CHECK)/bin/mypy --config-file ../../pyproject.toml .
	$(CHECK)/bin/lint-imports

goldens: $(RECORD)/.ready
	$(RECORD)/bin/snap record --checkpoint $(EMBEDDED) --update --reason "$(REASON)" $(YES)

pictures: fms-checkout
	.ci/browser
	$(CHECK)/bin/python tests/screenshots.py

clean:
	rm -rf $(RECORD) $(CHECK) build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
