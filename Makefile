.PHONY: train test lint docs fuzz faults soak compatibility cluster slurm

VENV := .venv
PYTHON := python3

train: $(VENV)/.installed
	$(VENV)/bin/python recipes/iql_offline.py

test: $(VENV)/.installed-sweep
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile

# Damaged files, ten times as many as the tests have: each ends in a result or in one clear error.
fuzz: $(VENV)/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(VENV)/bin/python -m fuzz --cases 3000

# Runs that are killed, starved of disk, and lied to by servers and simulators: each ends as if nothing had happened.
faults: $(VENV)/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(VENV)/bin/python -m faults

# One long run, watched: memory, threads and open files stay what they were.
soak: $(VENV)/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(VENV)/bin/python -m soak

# The tests with other versions than constraints.txt: those of each file, in a venv that is gone afterwards.
compatibility:
	for file in tests/compatibility/*.txt; do tests/compatibility/run.sh $$file -n 2 --dist loadfile || exit 1; done

# 12 runs on a Ray cluster of this machine that loses two nodes; as root, its nodes have networks of their own.
cluster: $(VENV)/.installed-sweep
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(VENV)/bin/python -m cluster ray

# 6 runs on a Slurm of this machine that puts them into the queue again; as root, it installs Slurm where that is missing.
slurm: $(VENV)/.installed-sweep
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(VENV)/bin/python -m cluster slurm

lint: $(VENV)/.installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

# The tables of options in configs/README.md.
docs: $(VENV)/.installed
	$(VENV)/bin/python -m iql_torchrl.running.reference

# torch first: constraints pin the tested versions, and what is installed is not resolved again.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt "torch>=2.13"
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# What only tests, sweeps on clusters, collecting, exporting, videos, OGBench and the JAX code's files need.
$(VENV)/.installed-sweep: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,sweep,collect,export,video,msgpack,ogbench]"
	touch $@
