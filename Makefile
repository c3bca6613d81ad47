# make demo: set up, train PPO on CartPole until solved, evaluate, draw the learning curve; then a small language model
# by GRPO on arithmetic.
# make test: set up, then formatting, lint, types and all tests.
# make test-portable: all tests under another instruction set, and with two threads: other machines sum in another order.
# make test-numerical: the part of it that continuous integration runs.
# VENV=... points both at another environment.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
DEMO := runs/demo
# What the tests use. Not here, for their size: envpool, jax, ray, mlflow, trackio, quantize, verifiers. Their tests are then skipped.
EXTRAS := dev,mujoco,box2d,atari,minigrid,pettingzoo,minari,language,reasoning,video,wandb,tune,export

# Tests of whole runs. They go without the check of every shape, as users' runs do; the others are checked.
WHOLE := tests/train tests/test_cli.py tests/test_documentation.py tests/verify/test_faults.py

# The oldest instruction set that torch has kernels for.
PORTABLE := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2
# Idle threads sleep, because two processes of two threads share the cores.
THREADS := TEST_THREADS=2 OMP_WAIT_POLICY=passive
PYTEST := $(BIN)/pytest -o addopts="-q --strict-markers"

.PHONY: demo test test-numerical test-portable format
demo: $(VENV)/.installed
	@rm -rf $(DEMO)
	@$(BIN)/policygrad train ppo CartPole-v1 --steps 200000 --stop-at-return 475 --out $(DEMO)
	@$(BIN)/policygrad eval $(DEMO) --episodes 20
	@echo "learning curve: $(DEMO)/curve.png"
	@rm -rf $(DEMO)-language
	@$(BIN)/policygrad train grpo arithmetic --out $(DEMO)-language

test: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 $(WHOLE:%=--ignore=%)
	$(PYTEST) -n 2 $(WHOLE)

test-numerical: $(VENV)/.installed
	$(PORTABLE) $(PYTEST) -n 2 $(WHOLE:%=--ignore=%)

test-portable: $(VENV)/.installed
	$(THREADS) $(PYTEST) -n 2
	$(PORTABLE) $(PYTEST) -n 2
	$(PORTABLE) $(THREADS) $(PYTEST) -n 2

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "setting up $(VENV): once, some minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@
