"""Trainings in processes of their own (gloo, CPU), each run once."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Image, List

import tiny
from paths import HELPERS, ROOT
from tiny import processors
from trainers import picture

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: voco_plugin[deepspeed]"
)


ENGINES = ["ddp", *(pytest.param(name, marks=needs_deepspeed) for name in ("zero2", "zero3"))]


ROWS = 12
"""Three batches of four: a checkpoint at step 2 is in the middle of the first epoch."""


@dataclasses.dataclass
class Place:
    """Base models, data and runs of this module; a run is made once."""

    folder: Path

    def base(self, name: str) -> str:
        path = self.folder / name
        if not path.is_dir():
            tiny.build(name).save_pretrained(path)
            processors.processor(name).save_pretrained(path)
        return str(path)

    def data(self) -> str:
        path = self.folder / "data"
        if not path.is_dir():
            image, ask = {"type": "image", "text": None}, {"type": "text", "text": "what is it"}
            answers = ["red", "blue circle", "green square"]
            messages = [
                [
                    {"role": "user", "content": [image, ask] if i != 5 else [ask]},
                    {"role": "assistant", "content": [{"type": "text", "text": answers[i % 3]}]},
                ]
                for i in range(ROWS)
            ]
            rows = {"messages": messages, "images": [[picture(i)] if i != 5 else [] for i in range(ROWS)]}
            Dataset.from_dict(rows).cast_column("images", List(Image())).save_to_disk(str(path))
        return str(path)

    def run(self, label: str, processes: int, **spec: Any) -> list[dict]:
        """What each process of a run wrote; with the path of the run's files in ``out``."""
        out = self.folder / label
        if not Path(f"{out}.0.json").is_file():
            file = self.folder / f"{label}.spec.json"
            file.write_text(json.dumps({"data": self.data(), "out": str(out), **spec}))
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
            command = [sys.executable, *(launcher if processes > 1 else []), str(WORKER), str(file)]
            env = environment() | (FSDP2 if spec.get("fsdp") else {})
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-6000:]
        found = [json.loads(Path(f"{out}.{rank}.json").read_text()) for rank in range(processes)]
        return [{**process, "out": str(out)} for process in found]


FSDP2 = {  # what accelerate launch sets for integrations/accelerate/fsdp2.yaml
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_OFFLOAD_PARAMS": "false",
}  # fmt: skip


WORKER = HELPERS / "distributed_worker.py"


def environment() -> dict[str, str]:
    paths = [str(ROOT), *([os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else [])]
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # ninja
    return {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths), "PATH": tools, "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip


KIND = {"ddp": ("MULTI_CPU", "DistributedDataParallel"), "zero2": ("DEEPSPEED", "DeepSpeedEngine")}
KIND["zero3"] = KIND["zero2"]
