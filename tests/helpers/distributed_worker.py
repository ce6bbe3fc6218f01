"""One process of tests/training/test_distributed.py: trains as SPEC.json says, and writes what it saw.

    torchrun --nproc_per_node 2 tests/helpers/distributed_worker.py SPEC.json

SPEC: model, data (folders), out (prefix of what it writes), args (of VoCoSFTConfig), lora, resume, fsdp (tell
accelerate that the processes have GPUs, without which it drops FSDP).
Rank R writes OUT.R.json (log, world, engine), OUT.R.pt (logits of the trained model on three rows), and all
of them OUT.saved (the model).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import load_from_disk
from peft import LoraConfig

import voco_plugin as vp

ARGS = {
    "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "max_steps": 4, "save_strategy": "no",
    "disable_tqdm": True, "use_cpu": True, "bf16": False,
}  # fmt: skip
LORA = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.0}
PROBE = (0, 1, 5)
"""Rows whose logits are compared; the last has no image."""


def main(spec: dict) -> None:
    torch.set_num_threads(1)
    args = vp.VoCoSFTConfig(
        f"{spec['out']}.run", voco=vp.VoCoConfig(num_tokens=2), **{**ARGS, **spec.get("args", {})}
    )
    if spec.get("fsdp"):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    data = load_from_disk(spec["data"])
    peft = LoraConfig(**LORA) if spec.get("lora") else None
    trainer = vp.VoCoSFTTrainer(spec["model"], args=args, train_dataset=data, peft_config=peft)
    trainer.train(resume_from_checkpoint=spec.get("resume"))
    trainer.save_model(f"{spec['out']}.saved")
    rank = args.process_index
    batch = trainer._eval_collator([data[i] for i in PROBE])
    trainer.model_wrapped.eval()
    if args.stage1 != "frozen":  # it reads images in two stages only
        with torch.no_grad():
            torch.save(trainer.model_wrapped(**batch).logits, f"{spec['out']}.{rank}.pt")
    found = {
        "world": args.world_size,
        "kind": trainer.accelerator.distributed_type.value,
        "engine": type(trainer.model_wrapped).__name__,
        "attached": vp.is_attached(trainer.model_wrapped),
        "report": trainer.trainable_report,
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
    Path(f"{spec['out']}.{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
