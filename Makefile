# make repro: the story 01-09 and the paper · make all: the supplements, too · make test: lint, unit tests, the tiny
# pipeline · make lab: the notebooks. PROFILE=laptop chooses another profile of params.yaml, and keeps it.
PYTHON ?= python3.11
PYTHON := $(if $(shell command -v $(PYTHON)),$(PYTHON),python3)
STAMP := .venv/.ready
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export DVC_NO_ANALYTICS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Modules are compiled when first imported: pip would compile all of every package, for a minute
unexport PYTHONDONTWRITEBYTECODE

.PHONY: repro all results site test lab strip pins readme
repro: $(STAMP) strip
	python -m bonelib.repro $(if $(PROFILE),--profile $(PROFILE))

all: $(STAMP) strip
	python -m bonelib.repro --all $(if $(PROFILE),--profile $(PROFILE))

# The results of a long run that come with the repository, without running anything
results: $(STAMP)
	python -m bonelib.results

site: $(STAMP)
	python -m bonelib.site $(OUT)

test: $(STAMP)
	python -m pytest -n 2 --dist loadscope

lab: $(STAMP)
	jupyter lab --ip=127.0.0.1 --LabApp.news_url= --LabApp.extension_manager=readonly notebooks/01_preprocess.ipynb

# DVC hashes the notebooks as they lie, so saved outputs and run marks would make it run them again.
strip: $(STAMP)
	nbstripout --keep-id --extra-keys "metadata.language_info metadata.papermill cell.metadata.papermill cell.metadata.execution" notebooks/*.ipynb

readme: $(STAMP)
	python -m bonelib.views.readme

$(STAMP): requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	# By two pips at once, as one keeps one core busy; what torch needs on a GPU is not pinned, and comes in the end
	awk 'NR % 3 == 1 || /^torch==/' requirements.txt > .venv/first.txt
	awk 'NR % 3 != 1 && !/^torch==/' requirements.txt > .venv/second.txt
	python -m pip install -qq --no-compile --no-deps -r .venv/first.txt & first=$$!; \
	python -m pip install -qq --no-compile --no-deps -r .venv/second.txt; second=$$?; \
	wait $$first && exit $$second
	python -m pip install -qq --no-compile $$(grep '^torch==' requirements.txt)
	python -m pip install -qq --no-deps -e .
	touch $@

# Rebuild the pin list from requirements.in; the local suffix of a CPU build of torch must not enter it.
pins:
	$(PYTHON) -m venv .venv-pins
	.venv-pins/bin/pip install -qq -r requirements.in
	.venv-pins/bin/pip freeze | sed 's/+cpu$$//' | sort -f > requirements.txt
	rm -rf .venv-pins
