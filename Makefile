# Two commands on a fresh machine: `make demo` and `make test`. Each sets up .venv once; a second call installs nothing.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: fast bench-eval bench-train bench-loader help setup demo test check lint types layers format bench-mining bench-fusion bench-fusion-claims bench-features bench-llava bench-moe bench-moe-memory bench-moe-claims bench-nlvr bench-mome bench-continual bench-search clean

help: ## What there is to make
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: .venv/.ready ## Make .venv and install everything (2-4 minutes, 6 GB, once)

.venv/.ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "needs Python 3.11 or newer: make PYTHON=python3.12 …" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	@touch $@

demo: .venv/.ready ## Train, judge and ask a small model: five minutes, no download
	$(BIN)/vlmix demo

test: .venv/.ready ## Everything that must hold: lint, types, layers, all tests
	$(BIN)/ruff format --check --quiet src tests benchmarks
	$(BIN)/ruff check --quiet src tests benchmarks
	$(BIN)/pytest -n 2 --dist worksteal

check: lint ## Before a commit: lint, then types and layers beside the fast tests (two minutes)
	@$(MAKE) --no-print-directory --jobs 2 types fast

fast: .venv/.ready ## The tests that take moments, without comparisons
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow and not flow and not parity" -q

lint: .venv/.ready ## Formatting and lint
	$(BIN)/ruff format --check --quiet src tests benchmarks
	$(BIN)/ruff check --quiet src tests benchmarks

types: .venv/.ready ## Static types
	$(BIN)/pyright

layers: .venv/.ready ## Imports point down
	$(BIN)/lint-imports

format: .venv/.ready ## Bring every file into shape
	$(BIN)/ruff format src tests benchmarks
	$(BIN)/ruff check --fix src tests benchmarks

bench-mining: .venv/.ready ## Patch mining: what it sees more, and what the absorbed form saves
	$(BIN)/python benchmarks/mining_cost.py --out runs/bench-mining/mining_cost.json
	$(BIN)/python benchmarks/mining_claim.py --out runs/bench-mining

bench-fusion: .venv/.ready ## Every fusion beside the others: tokens, parameters, time, memory
	$(BIN)/python benchmarks/fusion_cost.py --out runs/bench-fusion/fusion_cost.json

bench-fusion-claims: .venv/.ready ## Eagle's four findings on six fusions, frozen or not, aligned or not (half an hour)
	$(BIN)/python benchmarks/fusion_claims.py --out runs/bench-fusion-claims

bench-features: .venv/.ready ## An epoch on features that are kept beside one that computes them
	$(BIN)/python benchmarks/feature_cache.py --out runs/bench-features/feature_cache.json

bench-llava: .venv/.ready ## LLaVA-1.5 here beside transformers' own model: time, memory, equal logits
	$(BIN)/python benchmarks/llava_peer.py --out runs/bench-llava/llava_peer.json

bench-moe: .venv/.ready ## Experts beside transformers' eager loop and a dense network: time, memory
	$(BIN)/python benchmarks/moe_speed.py --out runs/bench-moe/moe_speed.json

bench-moe-memory: .venv/.ready ## Gradients of experts in mapped memory: what whoever reads them pays
	$(BIN)/python benchmarks/gradient_memory.py --out runs/bench-moe/gradient_memory.json

bench-moe-claims: .venv/.ready ## Experts beside a dense model trained the same way (an hour)
	$(BIN)/python benchmarks/moe_claims.py --out runs/bench-moe-claims

bench-mome: .venv/.ready ## Encoders weighed by what is asked against added, and how a router of adapters learns
	$(BIN)/python benchmarks/mome_claims.py --out runs/bench-mome/mome_claims.json

bench-continual: .venv/.ready ## What learning to see makes a language model forget, by method (40 minutes)
	$(BIN)/python benchmarks/continual_claims.py --out runs/bench-continual

bench-train: .venv/.ready ## Useful tokens a second beside transformers' LLaVA under its Trainer, padded and packed
	$(BIN)/python benchmarks/train_speed.py --out runs/bench-train/train_speed.json
	$(BIN)/python benchmarks/feature_cache.py --out runs/bench-train/feature_cache.json

bench-loader: .venv/.ready ## Pictures a second beside the usual path, and memory over 10,000 samples
	$(BIN)/python benchmarks/loader_speed.py --out runs/bench-loader/loader_speed.json

bench-eval: .venv/.ready ## Questions a second in judging: batches beside one by one, with the same answers
	$(BIN)/python benchmarks/eval_speed.py --out runs/bench-eval/eval_speed.json

bench-nlvr: .venv/.ready ## Human sentences: needs the NLVR data, see docs/systems/nlvr.md (up to an hour)
	$(BIN)/vlmix train recipes/nlvr.yaml --out runs/nlvr

bench-search: .venv/.ready ## The round robin over four small eyes: where it stops, and what sharing saves (6 minutes)
	$(BIN)/python benchmarks/search.py --out runs/bench-search

clean: ## Remove runs and caches, keep .venv
	rm -rf runs .pytest_cache .ruff_cache .hypothesis .import_linter_cache
