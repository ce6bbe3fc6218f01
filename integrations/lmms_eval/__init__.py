"""``lmms_eval --model voco``: an attached model under the harness of the field, one compression an image.

``pip install 'voco_plugin[eval]'``; README.md has the commands. Reading order: `arguments` (what stands in
``--model_args``), `messages` (the harness's prompts → ours), `reading` (prompts → answers, over a store),
`answer_log` (an interrupted run goes on), `loading`, `model` (the classes that the harness makes), `harness`
(runs one of its tasks for ``voco eval SUITE``). `tasks/` has the tasks that the harness does not ship.
"""

from typing import Any

_HERE = __name__


def manifest() -> Any:
    """What the harness asks for through the entry point ``lmms_eval.models``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="voco",
        simple_class_path=f"{_HERE}.model.VoCoSimple",
        chat_class_path=f"{_HERE}.model.VoCoChat",
    )
