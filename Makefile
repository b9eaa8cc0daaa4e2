# make check | test | demo | demo-real: each sets up what it needs in .venv first, once. PYTHON names another interpreter.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin

# What `make check` runs, less what is marked slow: no file that trains, compiles steps or needs torch.
FAST := $(patsubst %,tests/test_%.py,cli config docs errors helpers imports launch metrics process \
	data_cache data_chat data_formats data_pack data_preference data_read data_report data_templates report)

# Of demo-real: another base (a hub name or a folder), and the pairs: python or french.
MODEL ?=
DATA ?= python

.PHONY: check test docs links newest demo demo-real demo-base bench parity torture clean

# Between two edits. Types and tests side by side; either's failure fails it.
check: $(VENV)/.test docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(BIN)/mypy & types=$$!; \
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m "not slow" $(FAST) & tests=$$!; \
	wait $$types; types=$$?; wait $$tests && exit $$types

test: $(VENV)/.test docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not real"
	AS_SHIPPED=1 PYTHONPATH=$(VENV)/cuda $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
		tests/test_real.py tests/test_golden.py tests/test_plan.py tests/test_step.py -k "real or golden or h100 or as_shipped"
	bash tests/newest.sh

# The site, into runs/site: a link, a key or a function that is not there fails it. The network is not asked.
docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -W ignore -m mkdocs build --quiet

# Three methods on a small base and the documentation of this very Python; ends with a table.
demo: $(VENV)/.run
	$(BIN)/python demo/corpus.py --out runs/demo/data
	rm -rf runs/demo/out
	$(BIN)/specjax compare --config=configs/demo.py --workdir=runs/demo/out

# LoRA and SFT of a published model on real pairs: a table, and what it answers before and after.
demo-real: $(VENV)/.real
	$(BIN)/python demo/$(if $(filter french,$(DATA)),french,corpus).py --out runs/real/$(DATA)
	$(if $(MODEL),,$(BIN)/python demo/published.py --out runs/real/smollm2)
	rm -rf runs/real/out
	$(BIN)/specjax compare --config=configs/demo_real.py --workdir=runs/real/out \
		--config.data.train=runs/real/$(DATA)/pairs_train.jsonl \
		--config.data.eval.domain=runs/real/$(DATA)/pairs_eval.jsonl \
		$(if $(filter french,$(DATA)),--config.eval.prompts="À quoi sert la commande tail ?") \
		$(if $(MODEL),--config.model.path=$(MODEL))

# The demo's base model from nothing, an hour or two; called again, it goes on where it was.
demo-base: $(VENV)/.run
	$(BIN)/python demo/corpus.py --out runs/demo/data
	$(BIN)/python demo/tokenizer.py --corpus runs/demo/data --out demo/base_config
	$(BIN)/specjax train --config=configs/demo_base.py --workdir=runs/demo/base
	@echo "To ship it: cp runs/demo/base/export/* demo/base/"

# How near to transformers and PEFT every family is: some minutes.
parity: $(VENV)/.test
	$(BIN)/python tests/parity.py --out docs/parity.md --json specjax/parity.json

# The long versions of what docs/reliability.md promises: damages, kills, faults by name, other devices, a soak.
torture: $(VENV)/.test
	$(BIN)/python tests/torture.py --minutes=20

bench: $(VENV)/.test
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/load.py
	$(BIN)/python benchmarks/generate.py

# Opens every link that leads outside, which the tests check by its form: needs a network.
links:
	$(PYTHON) tests/links.py

clean:
	rm -rf $(VENV) .venv-newest *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "specjax needs Python 3.11 or newer, which '$(PYTHON)' is not: name one, make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml | $(BIN)/python
	@echo "Installing specjax into $(VENV): some minutes, the first time."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[report]'
	@touch $@

$(VENV)/.real: $(VENV)/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[real]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	@echo "Installing specjax and its tests' tools into $(VENV): some minutes, the first time."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@$(BIN)/python tests/cuda_compiler.py $(VENV)/cuda
	@touch $@ $(VENV)/.run
