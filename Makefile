# `make demo`, `demo-detection` and `demo-segmentation` train, evaluate and draw predictions; `make test` runs the CPU
# suite; `make check` lints and types. Each installs what it needs into .venv first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := output/demo
WORKERS ?= 2

.PHONY: install demo demo-detection demo-segmentation test test-full test-gpu test-timm check format docs table configs bench clean

install: $(VENV)/installed

# Stale as soon as the build file or the versions change. torch comes first and alone, so that the torch which
# torchvision and timm find is the one that constraints.txt names.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch torchvision
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: export VISIONZOO_CACHE = $(CURDIR)/output/cache
demo: install
	$(BIN)/python tools/train.py configs/classification/digits_biformer.yaml --output $(DEMO) --experiment digits --resume auto
	$(BIN)/python tools/eval.py --checkpoint $(DEMO)/digits/model_best.pth.tar --recorded-data
	$(BIN)/python tools/predict.py $(VISIONZOO_CACHE)/digits/validation/[0369]/*00*.png \
		--checkpoint $(DEMO)/digits/model_best.pth.tar --output $(DEMO)/predictions
	@echo "Look at $(DEMO)/digits/curves.png and $(DEMO)/predictions"

# A small detector and a small segmentor on scenes of the same digits, seven to twelve minutes each on two cores. One thread: with the
# maps of 128 pixels more threads wait for one another more than they compute.
demo-detection demo-segmentation: export VISIONZOO_CACHE = $(CURDIR)/output/cache
demo-detection demo-segmentation: export OMP_NUM_THREADS = 1
demo-detection: CONFIG := configs/detection/mask-rcnn_zoo-biformer_fpn_digits.py
demo-segmentation: CONFIG := configs/segmentation/semantic-fpn_zoo-biformer_digits.py
demo-detection demo-segmentation: install
	$(BIN)/python tools/train.py $(CONFIG) --work-dir $(DEMO)/$@ --seed 0 --resume
	checkpoint=$$(cat $(DEMO)/$@/last_checkpoint) && \
		$(BIN)/python tools/eval.py $(CONFIG) --checkpoint $$checkpoint --work-dir $(DEMO)/$@/eval && \
		$(BIN)/python tools/predict.py $(CONFIG) $(VISIONZOO_CACHE)/scenes/images/validation/000*.png \
			--checkpoint $$checkpoint --output $(DEMO)/$@/predictions
	@echo "Look at $(DEMO)/$@/predictions/vis"

# One thread a worker: the workers share the cores.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

# Also what smaller tests stand for: models of every size, exports and mixers in every family; takes long on two cores.
test-full: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --full -n $(WORKERS) --dist loadgroup

# The whole suite on a GPU, with compiled kernels; refuses to start without one.
test-gpu: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --gpu --full -n $(WORKERS) --dist loadgroup

# timm's own model tests, those of the installed release, over every zoo_* model; takes hours on two cores.
test-timm: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/run_timm_suite.py

check: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The documentation, into site/; a broken link or a page outside the navigation fails. `mkdocs serve` shows it while you write.
docs: export NO_MKDOCS_2_WARNING = 1
docs: install
	$(BIN)/mkdocs build --quiet

# The tables of docs/: models and mixers from the registries, parity from the records that have no row yet.
table: install
	$(BIN)/visionzoo models --write docs/models.md
	$(BIN)/python -m visionzoo.benchmark.gallery --write docs/mixers.md
	$(BIN)/python tests/parity_table.py

# The configs of detection and segmentation, from configs/dense.yaml.
configs: install
	$(BIN)/python tests/make_configs.py

# Everything on this machine's GPU, into benchmarks/; goes on where it was stopped. BiFormer's authors take part if
# BASELINES names a checkout of their repository: make bench BASELINES=path/to/BiFormer
bench: install
	for suite in operations models training memory reducers host; do \
		$(BIN)/python tools/benchmark.py $$suite --missing $(if $(BASELINES),--baselines $(BASELINES)) || exit 1; done

clean:
	rm -rf $(VENV) output build dist site *.egg-info
