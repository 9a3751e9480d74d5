# `make help` lists the targets. PYTHON is only used to create .venv.
PYTHON ?= python3
PROFILE ?= quick
CORES ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
EXECUTOR ?= local
# Partition, account and sizes of a cluster's jobs; a copy elsewhere keeps settings of your own.
SLURM_PROFILE ?= profiles/slurm
BIN := .venv/bin
INSTALLED := .venv/.installed
CLUSTER_INSTALLED := .venv/.installed-cluster
LLAMA_CPP_INSTALLED := .venv/.installed-llama-cpp
RESULTS ?= data/results
FIGURES ?= figures
REPORT ?= runs/report.html
# PROFILE may be a file, with spaces in its path: its run has the file's name.
NAME = $(shell basename -- "$(PROFILE)" .yaml)
RUN = runs/$(NAME)
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONWARNINGS := ignore::FutureWarning,ignore::DeprecationWarning

# Without a workflow profile Snakemake takes profiles/default. With GPUS jobs that take one GPU run side by side.
SNAKEMAKE_local = --cores $(CORES) $(if $(GPUS),--resources gpu=$(GPUS) --set-threads align=1000 evolve=$(shell echo $$((($(CORES) + $(GPUS) - 1) / $(GPUS)))))
SNAKEMAKE_slurm = --workflow-profile "$(SLURM_PROFILE)" --slurm-logdir "$(CURDIR)/$(RUN)/slurm"
ifeq ($(SNAKEMAKE_$(EXECUTOR)),)
$(error EXECUTOR=$(EXECUTOR): expected local or slurm)
endif

# Outputs of these notebooks follow from committed files alone, so they must come out the same.
STRICT := 01_generate_data 07_heatmaps 08_figures 09_dose_response 10_critical_mass
# nbval hangs for ever when a kernel dies, so each cell has a time-out: generous, for machines ten times slower than ours.
# Files of tests run side by side, each process on one core.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
NBVAL := ATP_PROGRESS=/dev/null $(PYTEST) -p no:cacheprovider --timeout 0 \
	--nbval-cell-timeout 3000 --nbval-sanitize-with tests/notebooks/sanitize.cfg

.DEFAULT_GOAL := help
.PHONY: help install model pilot reproduce test soak test-cluster test-llama-cpp test-lab lab bench notebooks figures report publish clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(INSTALLED) ## create .venv with the pinned packages
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

$(CLUSTER_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,cluster]'
	@touch $@

$(LLAMA_CPP_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,llama-cpp]'
	@touch $@

model: $(INSTALLED) ## fetch and convert an embedded model (MODEL= one of data/models.yaml)
	@$(BIN)/python -m atp_utils.models $(if $(SERVERS),,"$(MODEL)")

pilot: model ## run the smallest of each kind of a profile's jobs and say what the whole takes (PROFILE=, MODEL=, DOLLARS= a GPU-hour)
	@$(BIN)/python -m atp_utils.pilot "$(PROFILE)" $(if $(MODEL),--model "$(MODEL)") $(if $(DOLLARS),--dollars "$(DOLLARS)")

# --nolock: a killed run would leave its lock behind, and each run folder has a lock of its own.
# MODEL is run in place of the profile's; ADAPTERS=train trains adapters that are published too; SERVERS, addresses with
# commas between or a file, answer in place of this machine: docs/servers.md. GPUS=8 is for one machine that has so many.
reproduce: model $(if $(filter slurm,$(EXECUTOR)),$(CLUSTER_INSTALLED)) ## run a profile (PROFILE=quick|small|small_grpo|laptop|large|paper|paper_one_gpu, MODEL=, GPUS=, EXECUTOR=local|slurm), then print its tables
	$(BIN)/snakemake $(SNAKEMAKE_$(EXECUTOR)) --config profile="$(PROFILE)" model="$(MODEL)" servers="$(SERVERS)" adapters="$(ADAPTERS)" gpus="$(GPUS)" --rerun-incomplete --nolock --quiet host reason
	@$(BIN)/python -m atp_utils.analysis.report "$(RUN)"

test: model ## ruff, pytest and the notebooks by nbval
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST)
	$(NBVAL) --nbval $(foreach book,$(STRICT),notebooks/$(book).ipynb)
	$(NBVAL) --nbval-lax $(filter-out $(foreach book,$(STRICT),notebooks/$(book).ipynb),$(wildcard notebooks/*.ipynb))

soak: model ## the long form of the tests of faults and hostile input; writes docs/reliability.json
	$(PYTEST) -m soak --hypothesis-profile=soak --counts=docs/reliability.json

test-cluster: model $(CLUSTER_INSTALLED) ## run the pipeline on a one-node Slurm that it sets up (root, Debian)
	$(BIN)/python -m pytest -p no:cacheprovider --timeout 0 -v tests/cluster/check_cluster.py

test-llama-cpp: model $(LLAMA_CPP_INSTALLED) ## evolve on a llama.cpp server that it starts (fetches 98 MB once)
	$(BIN)/python -m pytest -p no:cacheprovider -v tests/servers/check_llama_cpp.py

test-lab: model ## open every notebook in JupyterLab in a headless Chromium, and move the explorer's widgets (SCREENSHOT=)
	$(BIN)/python -m pytest -p no:cacheprovider --timeout 0 -rs -s -v tests/lab/check_lab.py

lab: model ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

bench: model ## time evolutions and trainings against the plain way and the machine's limits (MODEL=, OPTIONS=--record)
	$(BIN)/python -m benchmarks.bench $(if $(MODEL),--model "$(MODEL)") $(OPTIONS)

notebooks: model ## execute the notebooks in place, with their own defaults
	ATP_PROGRESS=/dev/null $(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False notebooks/*.ipynb

figures: $(INSTALLED) ## draw all figures of recorded results, with their numbers (RESULTS=data/results, FIGURES=figures)
	@$(BIN)/python -m atp_utils.analysis.gallery "$(RESULTS)" "$(FIGURES)"

report: $(INSTALLED) ## write one HTML file of all tables, figures, parameters and provenance (RESULTS=, REPORT=runs/report.html)
	@$(BIN)/python -m atp_utils.analysis.page "$(RESULTS)" "$(REPORT)"

publish: $(INSTALLED) ## copy a profile's complete runs to data/results (OPTIONS=--overwrite to drop runs there)
	$(BIN)/python -m atp_utils.runs.publish "$(RUN)" "data/results/$(NAME)" $(OPTIONS)

clean: ## remove what a profile's run made (PROFILE=; demo for the notebooks' own; keeps .venv and models)
	@case "$(NAME)" in "" | . | .. | /) echo "PROFILE=$(PROFILE): expected the name or file of a profile" >&2; exit 2; esac
	rm -rf -- $(foreach part,data adapters demonstration evolution figures notebooks slurm,"$(RUN)/$(part)")
	rmdir -- "$(RUN)"
