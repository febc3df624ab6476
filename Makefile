# Every target sets up .venv first when it is missing or older than the requirements.
PYTHON ?= python3
BIN := .venv/bin
# Two notebooks at a time, each in order and in a kernel of its own. On two cores, threads that wait
# by spinning, as is usual, would keep the threads they wait for from running.
NBVAL := OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile --nbval notebooks

.PHONY: help run test robust try report results store verify bench lint clean

help:
	@echo 'make run      execute all notebooks with the quick profile into build/'
	@echo 'make test     unit tests, then the notebooks against their stored outputs'
	@echo 'make robust   the notebooks again, as other processors and thread counts would run them'
	@echo 'make try      the things to try at the end of each notebook'
	@echo 'make report   execute the full profile into reports/ and rebuild the tables'
	@echo 'make store    execute the notebooks in place: refresh their stored outputs'
	@echo 'make results  rebuild reports/results.json and the tables of the three READMEs'
	@echo 'make verify   test all weights in models/ again, against their cards (needs the data)'
	@echo 'make bench    print most tables of benchmarks/README.md (an hour; two need real data)'
	@echo 'make lint     ruff and the import order'
	@echo 'make clean    remove .venv, build/ and caches; runs/ stays'

# uv installs the several GB that torch brings in seconds where pip takes minutes; pip brings uv,
# and steps in where only pip knows the way to a package index.
.venv/ready: requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --constraint constraints.txt --editable '.[dev]' || \
	  $(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@

run: .venv/ready
	$(BIN)/python -m labutils run all

test: .venv/ready
	$(BIN)/python -m pytest -n 2 tests
	OMP_NUM_THREADS=1 $(NBVAL)

robust: .venv/ready
	for setting in ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 \
	    OMP_NUM_THREADS=2 OMP_NUM_THREADS=4; do \
	  echo $$setting; env OMP_NUM_THREADS=1 $$setting "LABUTILS_RUNS=$(CURDIR)/build/$$setting" \
	    $(NBVAL) -q || exit 1; \
	done

try: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python tools/try_it.py

report: .venv/ready
	$(BIN)/python -m labutils run all --profile full
	$(BIN)/python tools/results.py

results: .venv/ready
	$(BIN)/python tools/results.py

store: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m labutils run all --out notebooks

verify: .venv/ready
	$(BIN)/python tools/verify.py

bench: .venv/ready
	$(BIN)/python benchmarks/loop.py
	$(BIN)/python benchmarks/threads.py
	$(BIN)/python benchmarks/synthetic.py
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/distillation.py
	$(BIN)/python benchmarks/cam.py
	$(BIN)/python benchmarks/time_to_accuracy.py mnist
	$(BIN)/python benchmarks/time_to_accuracy.py cifar10

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

clean:
	rm -rf .venv build .pytest_cache .hypothesis .ruff_cache .import_linter_cache *.egg-info
