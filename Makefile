# Everything a newcomer needs: `make demo`, `make test`.  Needs Python 3.11+ and make, nothing else.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test lint format protos bench floods fuzz sim crash chaos clean

help:
	@echo "make demo    train on three agents of this machine, kill one, let one rejoin"
	@echo "make test    every test that needs no GPU"
	@echo "make lint    ruff and mypy --strict"
	@echo "make protos  regenerate the gRPC code"
	@echo "make sim     simulated fleets that fail in every way: SEEDS=10000 FIRST=1"
	@echo "make floods  a real musterd under floods on loopback: CONNECTIONS=10000"
	@echo "make fuzz    every reader of foreign bytes under atheris: SECONDS_EACH=60"
	@echo "make chaos   real fleets struck at random: MINUTES=60 SEED=1"
	@echo "make crash   SIGKILL a coordinator under load: KILLS=200"
	@echo "make bench   every benchmark that needs no GPU (takes an hour)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Muster needs Python 3.11 or newer; found " + sys.version.split()[0] + ". Say which to use: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable .
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/installed

demo: $(VENV)/installed
	$(BIN)/muster local --agents 3 --kill-after 20 --rejoin-after 10 --out out/demo configs/demo.yaml

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 10

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(VENV)/installed-dev
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. protos/agent.proto protos/admin.proto

bench: $(VENV)/installed-dev
	$(BIN)/python -m bench.recovery
	$(BIN)/python -m bench.overhead
	$(BIN)/python -m bench.churn
	$(BIN)/python -m bench.checkpoint
	$(BIN)/python -m bench.coordinator

CONNECTIONS ?= 10000
floods: $(VENV)/installed-dev
	$(BIN)/python -m tests.coordinator.floods --connections $(CONNECTIONS)

SECONDS_EACH ?= 60
fuzz: $(VENV)/installed-dev
	$(PIP) --editable '.[fuzz]'
	$(BIN)/python -m tests.fuzz all $(SECONDS_EACH)

SEEDS ?= 1000
FIRST ?= 1
sim: $(VENV)/installed-dev
	$(BIN)/python -m tests.sim --first $(FIRST) --seeds $(SEEDS)

MINUTES ?= 60
SEED    ?= 1
chaos: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m long tests/chaos
	$(BIN)/python -m tests.chaos --minutes $(MINUTES) --seed $(SEED)

KILLS ?= 200
crash: $(VENV)/installed-dev
	$(BIN)/python -m tests.crash --kills $(KILLS)

clean:
	rm -rf $(VENV) out build *.egg-info .mypy_cache .ruff_cache .hypothesis
