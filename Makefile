# Everything that this repository can do for you. Each target builds what it needs.
#
# torch comes first and alone in every environment: resolved together with other packages, pip may
# take another build of it.

PYTHON ?= python3
TORCH := torch==2.13.0
FMS := ibm-fms==1.13.1
RECORD := .venv-record
NEWER := .venv-record-4.57
CHECK := .venv-check
CHECKOUT := build/fms-checkout
EMBEDDED := tests/checkpoints/tiny-idefics3

.DEFAULT_GOAL := help
.PHONY: help setup fms-checkout demo test check goldens families drift pictures clean

help:
	@echo "make setup         build both environments, $(RECORD) and $(CHECK)"
	@echo "make fms-checkout  lay out an FMS checkout with idefics3 in $(CHECKOUT)"
	@echo "make demo          record, check, and see a broken port fail"
	@echo "make test          the whole test suite, in both environments"
	@echo "make check         format, lint, types, layers"
	@echo "make families      record and check every family, write docs/families.md"
	@echo "make drift         show what transformers 4.57 computes otherwise than 4.51"
	@echo "make goldens       record the committed golden set again (REASON=..., YES=--yes not to be asked)"
	@echo "make pictures      take the pictures of the documentation again"
	@echo "make clean         remove what the other targets built"

setup: $(RECORD)/.ready $(CHECK)/.ready

$(RECORD)/.ready: pyproject.toml .ci/record.txt Makefile
	$(call new_environment,$(RECORD))
	$(RECORD)/bin/python -m pip install --quiet -r .ci/record.txt
	$(RECORD)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# The release of transformers that ibm-fms asks for; not needed for make test.
$(NEWER)/.ready: pyproject.toml .ci/record.txt .ci/record-4.57.txt Makefile
	$(call new_environment,$(NEWER))
	$(NEWER)/bin/python -m pip install --quiet -r .ci/record.txt
	$(NEWER)/bin/python -m pip install --quiet --no-deps -r .ci/record-4.57.txt
	$(NEWER)/bin/python -m pip install --quiet --no-deps --editable .
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

families: setup $(NEWER)/.ready fms-checkout
	rm -rf build/families
	$(RECORD)/bin/python -m tests.families.record
	$(NEWER)/bin/python -m tests.families.record
	$(CHECK)/bin/python -m tests.families.table

# The fixed cases of the embedded checkpoint, answered by both releases: variants may be refused by
# either. The answers do differ: snap diff exits with 1, and so it should.
drift: setup $(NEWER)/.ready
	rm -rf build/drift
	$(RECORD)/bin/snap record --checkpoint $(EMBEDDED) --variants 0 --goldens build/drift/4.51
	$(NEWER)/bin/snap record --checkpoint $(EMBEDDED) --variants 0 --goldens build/drift/4.57
	! $(CHECK)/bin/snap diff build/drift/4.51/*/*/cpu-* build/drift/4.57/*/*/cpu-*

pictures: fms-checkout
	.ci/browser
	$(CHECK)/bin/python tests/screenshots.py

clean:
	rm -rf $(RECORD) $(NEWER) $(CHECK) build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
