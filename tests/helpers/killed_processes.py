"""Two processes that train and save together, run by test_killed_saves.py: BASE DATA OUT [KILLED_AT_STEP].

With a step, process 1 stops before it has written its random state into that step's checkpoint, says so in
OUT.reached, and waits to be killed.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from datasets import load_from_disk
from peft import LoraConfig

import voco_plugin as vp
from voco_plugin.training import VoCoSFTConfig, VoCoSFTTrainer


class Waiting(VoCoSFTTrainer):
    def _save_rng_state(self, output_dir: str) -> None:
        step = sys.argv[4] if len(sys.argv) > 4 else None
        if str(self.state.global_step) == step and self.args.process_index == 1:
            Path(sys.argv[3] + ".reached").touch()
            time.sleep(600)
        super()._save_rng_state(output_dir)


def main() -> None:
    base, data, out = sys.argv[1:4]
    args = VoCoSFTConfig(
        out, voco=vp.VoCoConfig(num_tokens=2), per_device_train_batch_size=1, learning_rate=1e-2,
        logging_steps=1, report_to=[], max_steps=6, save_steps=2, save_total_limit=1, disable_tqdm=True,
        use_cpu=True,
        gradient_checkpointing=False, ddp_backend="gloo", ddp_find_unused_parameters=False,
    )  # fmt: skip
    peft = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, init_lora_weights="gaussian")
    made = Waiting(base, args=args, train_dataset=load_from_disk(data), peft_config=peft)
    assert args.world_size == 2
    there = any(Path(out).glob("checkpoint-*"))
    made.train(resume_from_checkpoint=there)
    if args.process_index == 0:
        found = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
        Path(out + ".losses").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
