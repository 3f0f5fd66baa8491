# make setup | demo | serve | test | test-quick | compat | lint | bench. CPU set-up; with CUDA, `pip install vllm-avl` is all.
PYTHON_BIN := .venv/bin/python
VLLM := 0.33.0
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder
# No server, and one small engine: what a change of a module breaks first.
QUICK := $(wildcard tests/test_*.py) tests/worker/test_view.py tests/worker/test_text.py \
	tests/worker/test_selection.py tests/worker/test_core_lists.py tests/scheduler tests/front_end tests/metrics \
	tests/policies tests/kernels/cpu tests/compat/test_refusals.py tests/engine/test_chunks.py \
	tests/engine/test_replay.py
# Every process of the tests would compile all of vLLM anew.
unexport PYTHONDONTWRITEBYTECODE
.PHONY: help setup demo serve test test-quick compat lint bench clean

help:
	@echo "make setup  build .venv with vLLM's CPU build and this plug-in"
	@echo "make demo   serve a demo model, ask about a picture, show what was kept and freed"
	@echo "make serve  the same server, left running on port 8000"
	@echo "make test   the whole test suite (what CI runs)"
	@echo "make test-quick  what needs no server, in a few minutes"
	@echo "make compat VLLM=0.33.0  the engine's and the stand-in's tests on another vLLM's Python"
	@echo "make lint   ruff and mypy"
	@echo "make bench  benchmarks/concurrency.py with its defaults"

setup:
	@deploy/cpu/setup.sh

demo: setup
	@$(PYTHON_BIN) -m vllm_avl.demo

serve: setup
	@$(PYTHON_BIN) -m vllm_avl.demo --serve

test: setup
	@$(PYTHON_BIN) -m pytest $(WORKERS) --durations 40

test-quick: setup
	@$(PYTHON_BIN) -m pytest $(WORKERS) $(QUICK)

compat: setup
	@python=$$($(PYTHON_BIN) deploy/cpu/compat.py $(VLLM)) && \
	$$python -m pytest $(WORKERS) tests/compat tests/engine tests/standin

lint: setup
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

bench: setup
	@$(PYTHON_BIN) benchmarks/concurrency.py

clean:
	rm -rf .venv .compat .cache build dist *.egg-info
