"""Runs one vLLM engine in a process of its own: ``python tests/helpers/vllm_worker.py JOB.json OUT.json``.

A job is ``{"engine": {arguments of vllm.LLM}, "store": folder or None, "memory": bytes or None,
"steps": [{"requests": […], "at_once": bool, "keep": bool, "delete": [keys]}], "patch": name or None}``. A
request has ``ids``, and may have ``salt``, ``params`` (kv_transfer_params) and ``sampling`` (arguments of
SamplingParams). The prefix cache is emptied before a step unless it says ``keep``; ``delete`` takes keys out
of the store before it. ``patch`` breaks the connector on purpose.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE=os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
    HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", OMP_NUM_THREADS="1",
)  # fmt: skip

CONNECTOR = "voco_plugin.integrations.vllm.connector"
ALLOWED = (
    *("_compat", "_moved", "cache", "config", "core", "data", "files", "integrations", "registry", "store"),
    *("models", "models.encoders", "models.model_paths", "models.registration"),
)
"""What of the package is needed; `import voco_plugin` tells transformers of its one class, in `models`."""
FORBIDDEN = ("accelerate", "datasets", "peft", "timm", "torchvision", "trl")


class OnlyWhatIsNeeded:
    """An import hook: of the package the cache and the store with what they stand on, and nothing heavy."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        top, _, rest = name.partition(".")
        if top in FORBIDDEN and "voco" in _importer():
            raise ImportError(f"{name} is not for vLLM's environment")
        known = rest in ALLOWED or any(rest.startswith(f"{part}.") for part in ALLOWED if part != "models")
        if top == "voco_plugin" and rest and not known:
            raise ImportError(f"{name} is not for vLLM's environment")


def _importer() -> str:
    """The module whose import statement runs."""
    frame = sys._getframe(2)
    while frame is not None and "importlib" in frame.f_code.co_filename:
        frame = frame.f_back  # type: ignore[assignment]
    return "" if frame is None else frame.f_globals.get("__name__", "")


def transfer_config(store: str, memory: int | None = None) -> dict[str, Any]:
    """``--kv-transfer-config``."""
    extra = {"store": store} if memory is None else {"store": store, "memory": memory}
    return {
        "kv_connector": "VoCoConnector", "kv_connector_module_path": CONNECTOR, "kv_role": "kv_consumer",
        "kv_connector_extra_config": extra,
    }  # fmt: skip


def break_it(name: str) -> None:
    """Leave out one thing, so that a test can be seen to fail."""
    from voco_plugin.integrations.vllm import placing, request, scheduler

    if name == "relocation":
        placing._moved = lambda keys, engine, delta: keys
    elif name == "salt":
        request._check_salt = lambda placed, salt: None
    elif name == "writing":
        from voco_plugin.integrations.vllm import worker

        worker.WorkerSide.write = lambda self, name: None  # type: ignore[method-assign]
    elif name == "chunks":  # only what a prompt's first step computes is written
        whole = placing.PromptBlocks.within
        placing.PromptBlocks.within = (  # type: ignore[method-assign]
            lambda self, start, end: whole(self, start, end) if start == 0 else ((), self.data[:, :, :0])
        )
    elif name == "tokens":
        placing.check_tokens = lambda *given: None
    elif name == "suppress":
        scheduler.SchedulerSide._suppress = lambda self, request: None  # type: ignore[method-assign]
    else:
        raise ValueError(name)


def run_step(llm: Any, step: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    prompts, params = [], []
    for request in step["requests"]:
        prompt = {"prompt_token_ids": request["ids"]}
        if request.get("salt"):
            prompt["cache_salt"] = request["salt"]
        extra = {"kv_transfer_params": request["params"]} if request.get("params") else None
        given = {"temperature": 0.0, "max_tokens": 24, "logprobs": 0, **request.get("sampling", {})}
        if "logit_bias" in given:  # JSON has no integer keys
            given["logit_bias"] = {int(token): bias for token, bias in given["logit_bias"].items()}
        prompts.append(prompt)
        params.append(SamplingParams(**given, extra_args=extra))
    if step.get("at_once", True):
        outputs = llm.generate(prompts, params, use_tqdm=False)
    else:
        outputs = [llm.generate([a], [b], use_tqdm=False)[0] for a, b in zip(prompts, params, strict=True)]
    return [_answer(output) for output in outputs]


def _answer(output: Any) -> dict[str, Any]:
    one = output.outputs[0]
    tokens = list(one.token_ids)
    scores = [step[token].logprob for step, token in zip(one.logprobs or [], tokens, strict=False)]
    return {
        "tokens": tokens, "logprobs": scores, "finish": one.finish_reason, "cached": output.num_cached_tokens,
    }  # fmt: skip


def main(job: dict[str, Any]) -> dict[str, Any]:
    sys.meta_path.insert(0, OnlyWhatIsNeeded())  # type: ignore[arg-type]
    from vllm import LLM

    arguments = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 16, **job["engine"]}
    if job.get("store"):
        arguments["kv_transfer_config"] = transfer_config(job["store"], job.get("memory"))
    if job.get("patch"):
        break_it(job["patch"])
    began = time.perf_counter()
    llm = LLM(**arguments)
    ready = time.perf_counter()
    steps = []
    for step in job["steps"]:
        if not step.get("keep"):
            assert llm.reset_prefix_cache()
        for key in step.get("delete", []):
            delete(job["store"], key)
        steps.append(run_step(llm, step))
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    made: dict[str, Any] = {"steps": steps, "seconds": [ready - began, time.perf_counter() - ready]}
    made["preemptions"] = PREEMPTED[0]
    if scheduler.connector is not None:
        side = scheduler.connector.scheduler
        made["memory"] = {
            "hits": side.memory.hits,
            "misses": side.memory.misses,
            "nbytes": side.memory.nbytes,
        }
        made["open"] = len(side._open) + len(side._failing)
    return made


PREEMPTED = [0]


def count_preemptions() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    whole = Scheduler._preempt_request

    def counted(self: Any, *given: Any, **named: Any) -> Any:
        PREEMPTED[0] += 1
        return whole(self, *given, **named)

    Scheduler._preempt_request = counted  # type: ignore[method-assign]


def delete(store: str, key: str) -> None:
    """As another process would, while the engine has the store open."""
    import subprocess

    code = (
        "import sys; from voco_plugin import VoCoCacheStore\n"
        "with VoCoCacheStore(sys.argv[1]) as store: store.delete([sys.argv[2]])"
    )
    subprocess.run([sys.executable, "-c", code, store, key], check=True)


if __name__ == "__main__":
    count_preemptions()
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
