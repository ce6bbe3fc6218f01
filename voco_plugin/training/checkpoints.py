"""Saves that are whole or not there, whenever the process dies.

A checkpoint is written into ``_saving/checkpoint-N``, flushed, renamed to ``checkpoint-N``, and only then are
older ones rotated. A model is written into ``_saving-model`` and moved file by file, its config last: a
folder in between has no config and does not load.

    _saving/                  being written; removed at the next start
    _replaced-checkpoint-N    whole, gives way to a new save of the same step; put back if that one is missing
    _discarded-checkpoint-N   rotated out, being deleted
    _saving-model             being written; removed at the next start
    _saved-model              whole, being moved to its place; the next start finishes that

None of these names is one that ``get_last_checkpoint`` reads, and uploads leave out what begins with ``_``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, sort_checkpoints

from ..config import CONFIG_NAME, VoCoConfig
from ..core.attachment import attachment
from .load_weights import check_resumable

if TYPE_CHECKING:
    from trl import SFTTrainer as _Base
else:
    _Base = object

logger = logging.getLogger(__name__)

STAGING = "_saving"
REPLACED = "_replaced-"
DISCARDED = "_discarded-"
MODEL_STAGING = "_saving-model"
MODEL_WHOLE = "_saved-model"
MODEL_FILES = "_files.json"
STATE_NAME = "trainer_state.json"
INCOMPLETE = "checkpoint-is-incomplete.txt"
"""What transformers puts into a checkpoint's place before it saves on SIGTERM."""
CONFIGS = (CONFIG_NAME, "config.json", "adapter_config.json")
"""Without these a folder does not load; written last, in this order."""
_WEIGHTS = re.compile(
    r"(model|pytorch_model|adapter_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?"
)


class AtomicCheckpoints(_Base):
    """For a ``Trainer``: its checkpoints appear whole, under their name, or not at all.

    With several processes all of them write into the staging folder; after a barrier process 0 renames it. On
    nodes that do not share a file system the first process of each renames its own.
    """

    _staging: Path | None = None
    _push_is_due = False
    voco: VoCoConfig | None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        run = self.args.output_dir
        assert run is not None  # TrainingArguments names one where none is given
        self._once_per_node(lambda: recover(run))
        resume = args[0] if args else kwargs.get("resume_from_checkpoint")
        resume = get_last_checkpoint(run) if resume is True else resume
        if resume:
            check_resumable(resume, None if self.voco is None else attachment(self.model).config)
        return super().train(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return folder if self._staging is None else os.path.join(folder, STAGING)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._once_per_node(lambda: recover(run))
        self._staging, self._push_is_due = run / STAGING, False
        try:
            super()._save_checkpoint(model, trial)
            self._name_best(run, self._staging / name)
            first = self.args.process_index == 0
            self._once_per_node(lambda: publish(run / STAGING / name, run / name, required=first))
        except BaseException:
            if self.args.world_size <= 1:  # else another process may still be writing there
                shutil.rmtree(run / STAGING, ignore_errors=True)
            raise
        finally:
            self._staging = None
        if self._push_is_due:
            self._push_from_checkpoint(str(run / name))
        if self.args.should_save:
            rotate(run, self.args.save_total_limit, newest=run / name, best=self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is not None:  # the upload reads the folder later: from its place
            self._push_is_due = True
            return
        super()._push_from_checkpoint(checkpoint_folder)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # transformers deletes here what is not the best, in place: a kill would leave half of the newest
        best = self.state.best_model_checkpoint
        if self.args.should_save and self.args.save_total_limit == 1 and best and os.path.isdir(best):
            trial = args[0] if args else kwargs.get("trial")
            for folder in sort_checkpoints(self._get_output_dir(trial)):
                if not os.path.samefile(folder, best):
                    discard(Path(folder))
        return super()._finalize_training(*args, **kwargs)

    def _name_best(self, run: Path, staged: Path) -> None:
        """``best_model_checkpoint`` as it will stand: Trainer looked next to the staged folder."""
        state, step = self.state, self.state.best_global_step
        before = state.best_model_checkpoint
        if step and self.args.save_strategy != "no":
            folder = run / f"{PREFIX_CHECKPOINT_DIR}-{step}"
            if folder.name == staged.name or folder.is_dir():
                state.best_model_checkpoint = str(folder)
        if self.args.should_save and state.best_model_checkpoint != before:
            state.save_to_json(str(staged / STATE_NAME))

    @contextlib.contextmanager
    def _whole_model(self, folder: str | os.PathLike, state_dict: dict | None) -> Iterator[str]:
        """Where to write a model whose place is ``folder``; it is moved there when the block ends."""
        target = Path(folder)
        if self._staging is not None and target.is_relative_to(self._staging):
            yield str(target)  # part of a checkpoint, which moves as a whole
            return
        staged = target / MODEL_STAGING
        if self.args.should_save:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
            with contextlib.suppress(FileNotFoundError):  # PEFT adds to the model card that is there
                shutil.copy(target / "README.md", staged / "README.md")
        yield str(staged)
        if not self.args.should_save:
            return
        if state_dict is not None and not state_dict:
            for file in _weight_files(staged):  # a dummy, where ZeRO-3 keeps the weights in its own files
                file.unlink()
        names = sorted(str(p.relative_to(staged)) for p in staged.rglob("*") if p.is_file())
        (staged / MODEL_FILES).write_text(json.dumps(names), encoding="utf-8")
        flush(staged)
        shutil.rmtree(target / MODEL_WHOLE, ignore_errors=True)
        os.rename(staged, target / MODEL_WHOLE)
        install(target)

    def _final_place(self, folder: str | os.PathLike) -> Path:
        """Where what is saved into ``folder`` will lie: a checkpoint is made in the staging folder."""
        target = Path(folder)
        if self._staging is None or not target.is_relative_to(self._staging):
            return target
        return self._staging.parent / target.relative_to(self._staging)

    def _once_per_node(self, action: Callable[[], Any]) -> None:
        """Process 0 first, then the first process of every other node, and nobody goes on before."""
        self.accelerator.wait_for_everyone()
        if self.args.process_index == 0:
            action()
        self.accelerator.wait_for_everyone()
        if self.args.process_index != 0 and self.args.local_process_index == 0:
            action()
        self.accelerator.wait_for_everyone()


class SaveAtSteps(TrainerCallback):
    """Asks for a checkpoint after each of ``steps``."""

    def __init__(self, steps: Iterable[int]) -> None:
        self.steps = set(steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            control.should_save = True


class NoteStart(TrainerCallback):
    """Notes the ``step`` that training starts from: 0, or a checkpoint's."""

    step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step


def recover(run: str | os.PathLike) -> list[str]:
    """Tidy what a killed save left in ``run``; returns (and logs) a line for each thing found."""
    run = Path(run)
    done: list[str] = []
    if not run.is_dir():
        return done
    for folder in sorted(run.glob(f"{REPLACED}*")):
        place = run / folder.name.removeprefix(REPLACED)
        if place.exists():
            shutil.rmtree(folder, ignore_errors=True)
        else:
            os.rename(folder, place)
            done.append(f"{place} was being replaced when a run was killed: the former one is put back")
    if (run / STAGING).is_dir():
        names = ", ".join(sorted(p.name for p in (run / STAGING).iterdir())) or "nothing yet"
        shutil.rmtree(run / STAGING, ignore_errors=True)
        done.append(f"{run / STAGING} held an unfinished save ({names}): removed")
    for folder in sorted(run.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        if folder.is_dir() and [p.name for p in folder.iterdir()] == [INCOMPLETE]:
            shutil.rmtree(folder, ignore_errors=True)
    for folder in sorted(run.glob(f"{DISCARDED}*")):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(run / MODEL_STAGING, ignore_errors=True)
    if (run / MODEL_WHOLE).is_dir():
        install(run)
        done.append(f"{run}: a model that was saved but not yet in its place is in place now")
    for line in done:
        logger.warning("%s", line)
    return done


def publish(staged: Path, place: Path, *, required: bool = True) -> None:
    """Flush ``staged`` and give it its name; a folder that has the name already is replaced, never merged.

    Args:
        required: whether ``staged`` must be there; on a second node that shares the file system it is not.
    """
    if staged.is_dir():
        flush(staged)
    try:
        os.rename(staged, place)
    except FileNotFoundError:
        if required:
            raise
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        former = place.with_name(REPLACED + place.name)
        os.rename(place, former)
        os.rename(staged, place)
        _sync_folder(place.parent)
        shutil.rmtree(former, ignore_errors=True)
    _sync_folder(place.parent)
    with contextlib.suppress(OSError):
        staged.parent.rmdir()


def rotate(run: Path, limit: int | None, *, newest: Path, best: str | None) -> None:
    """Delete the oldest checkpoints beyond ``limit``; the newest and the best always stay."""
    if not limit or limit < 0:
        return
    kept = {os.path.abspath(folder) for folder in (newest, best) if folder is not None}
    found = sort_checkpoints(str(run), use_mtime=True)
    excess = len(found) - max(limit, len(kept))
    for folder in [f for f in found if os.path.abspath(f) not in kept][: max(excess, 0)]:
        discard(Path(folder))


def discard(folder: Path) -> None:
    """Delete a checkpoint; its name is gone before its first file."""
    doomed = folder.with_name(DISCARDED + folder.name)
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def install(folder: Path) -> None:
    """Move the model in ``folder/_saved-model`` to its place: until its last file is there, nothing loads.

    Killed at any point, it finishes when called again.
    """
    whole = folder / MODEL_WHOLE
    names = set(json.loads((whole / MODEL_FILES).read_text(encoding="utf-8")))
    files = [name for name in names if (whole / name).is_file()]  # the others have moved already
    for name in CONFIGS:
        if name in files:
            (folder / name).unlink(missing_ok=True)
    _sync_folder(folder)
    kinds = {found[1] for found in map(_WEIGHTS.fullmatch, names) if found}
    for file in _weight_files(folder):  # a shard of a former save would be read instead of the new ones
        found = _WEIGHTS.fullmatch(file.name)
        if file.name not in names and found and found[1] in kinds:
            file.unlink()
    order = {name: number for number, name in enumerate(CONFIGS, start=1)}
    for file in sorted(files, key=lambda f: (order.get(f, 0), f)):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(whole / file, folder / file)
    _sync_folder(folder)
    shutil.rmtree(whole, ignore_errors=True)


def flush(folder: Path) -> None:
    """Everything below ``folder`` onto the disk, so that a rename never outlives what it names."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
        elif path.is_dir():
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # Windows opens no folders; some network file systems sync none
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _weight_files(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if p.is_file() and _WEIGHTS.fullmatch(p.name)]
