# Both targets do all of their set-up; `make clean` removes it again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Exact versions: with an open range, pip may take a newer torch that brings gigabytes of CUDA along.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint types notebook gpu clean

$(BIN)/activate:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/activate
	$(PIP) torch
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/activate
	$(PIP) torch
	$(PIP) -e '.[test]'
	@touch $@

# Tests need a browser for the page, a proxy to stand in front of it, a C++ compiler for torch.compile and ExifTool to
# read metadata. Where this may, it installs what is missing; elsewhere, do it by hand.
PACKAGES := chromium fonts-dejavu-core g++ libimage-exiftool-perl nginx-light
$(VENV)/.packages: Makefile | $(BIN)/activate
	@if ! { PATH=$$PATH:/usr/sbin; command -v chromium && command -v g++ && command -v exiftool && command -v nginx; } \
	    >/dev/null \
	    && command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	    apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(PACKAGES) >/dev/null; fi
	@touch $@

# Ten classes from the bundled model, and a real photograph edited.
demo: $(VENV)/.demo
	$(BIN)/maskgit generate --class airplane automobile bird cat deer dog frog horse ship truck \
	    --num-images 8 --seed 1 --batch-size 20 --out out/demo --overwrite
	$(BIN)/python -c "from PIL import Image; from skimage.data import rocket; \
	    photo = Image.fromarray(rocket()); photo.save('out/demo/photo.png'); \
	    mask = Image.new('L', photo.size); mask.paste(255, (130, 60, 290, 220)); mask.save('out/demo/mask.png')"
	$(BIN)/maskgit edit out/demo/photo.png --box 130 60 160 160 --class bird --num-images 4 --seed 1 \
	    --out out/demo/edit --overwrite

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

test: lint types $(VENV)/.packages
	# Two at a time, a file in one process, in the order of tests/conftest.py; tests compute in one thread each.
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Runs docs/demo.ipynb anew, with its pictures.
notebook: $(VENV)/.test
	$(BIN)/python docs/run_notebook.py

# What only a machine with a GPU can tell, in ten minutes, with the torch for CUDA that PYTHON has; nothing is installed.
gpu:
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py --out out/gpu

clean:
	rm -rf $(VENV) out build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
