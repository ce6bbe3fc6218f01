"""Odd images train and compress, bad ones raise or are skipped and counted. Opener: ``test_images.py``."""

# ruff: noqa: F811  (the fixtures of other test files)

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Image, List
from PIL import Image as PILImage

import voco_plugin as vp
from commands import error_of, out_of
from odd_images import BAD, ODD, RED, collator, rows_of, talk
from trainers import losses, trainer
from voco_plugin.cli import main
from voco_plugin.data.images import BadImageError
from voco_plugin.data.lazy_images import name_rows, undecoded
from voco_plugin.training.bad_rows import NothingToLearn

# -- the collator


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("embed", [False, True])
def test_a_bad_sample_raises_or_another_row_takes_its_place(name, embed, odd, bad, caplog) -> None:
    path, why = bad[name]
    if embed and name == "missing.png":
        pytest.skip("a missing file has no bytes")
    good = [odd[n][0] for n in ("cmyk.tif", "palette.png", "turned.png", "alpha.png")]
    rows = undecoded(rows_of([good[0], path, *good[1:]], embed=embed))
    batch = [rows[0], rows[1]]
    with pytest.raises(
        BadImageError,
        match=rf"sample 1 \(id 'row-1'\): image .*({'is empty' if embed and name == 'empty.png' else why})",
    ):
        collator()(batch)
    with caplog.at_level("WARNING"):
        made = collator(on_bad_sample="skip", pool=rows, count_skipped=True)
        found = made(batch)
        again = made(batch)
    assert found.pop("skipped_samples").tolist() == [0, 1] == again.pop("skipped_samples").tolist()
    (line,) = {r.message for r in caplog.records if "Skipped" in r.message}
    other = int(re.search(r"Skipped; row (\d)", line)[1])
    assert other != 1 and "id 'row-1'" in line
    assert embed or str(path) in line
    wanted = collator()([rows[0], rows[other]])
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[k], wanted[k]) and torch.equal(again[k], wanted[k]) for k in wanted)


def test_a_data_set_of_bad_images_raises_in_spite_of_skip(bad) -> None:
    rows = undecoded(rows_of([bad["text.jpg"][0], bad["empty.png"][0]]))
    with pytest.raises(BadImageError, match=r"row-0.*16 rows drawn are bad too"):
        collator(on_bad_sample="skip", pool=rows)([rows[0]])
    with pytest.raises(BadImageError, match="every other row of its batch"):
        collator(on_bad_sample="skip")([rows[0], rows[1]])


def test_a_fault_of_format_raises_in_spite_of_skip() -> None:
    rows = [{"messages": talk(), "images": []}]
    with pytest.raises(ValueError, match="placeholder"):
        collator(on_bad_sample="skip", pool=rows)(rows)


def test_an_unknown_value_is_refused(tmp_path) -> None:
    for make in (
        lambda: collator(on_bad_sample="ignore"),
        lambda: vp.VoCoSFTConfig(str(tmp_path), on_bad_sample="x"),
    ):
        with pytest.raises(ValueError, match="use raise or skip"):
            make()


# -- the trainer


def test_undecoded_rows_hold_what_is_stored_and_nothing_is_copied(odd) -> None:
    rows = rows_of([path for path, *_ in odd.values()], with_id=False)
    plain = name_rows(undecoded(rows))
    assert plain[3]["images"] == [{"bytes": None, "path": str(odd[ODD[3]][0])}] and plain[3]["row"] == 3
    assert isinstance(rows[0]["images"][0], PILImage.Image), "the caller's data set decodes as before"
    assert plain.features["images"] == List(Image(decode=False))
    assert not undecoded(rows).cache_files
    single = Dataset.from_dict({"image": [str(odd[ODD[0]][0])]}).cast_column("image", Image())
    assert undecoded(single)[0]["image"]["path"] == str(odd[ODD[0]][0])
    assert isinstance(undecoded(single.cast_column("image", Image(mode="L")))[0]["image"], PILImage.Image)


@pytest.mark.parametrize("streamed", [False, True])
def test_every_odd_image_trains(streamed, odd, bases, tmp_path) -> None:
    rows = rows_of([path for path, *_ in odd.values()])
    options = {"max_steps": len(ODD), "per_device_train_batch_size": 1}
    made = trainer(
        bases("llava_llama"), tmp_path, rows.to_iterable_dataset() if streamed else rows, **options
    )
    made.train()
    assert len(losses(made)) == len(ODD) and all(np.isfinite(losses(made)))


def test_training_names_the_bad_row(odd, bad, bases, tmp_path) -> None:
    path = bad["short.jpg"][0]
    rows = rows_of([odd["cmyk.tif"][0], path], with_id=False)
    made = trainer(bases("llava_llama"), tmp_path, rows)
    with pytest.raises(BadImageError, match=rf"\(row 1\): image {re.escape(str(path))} cannot be read"):
        made.train()


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_is_counted_named_and_the_same_after_a_resume(
    workers, odd, bad, bases, tmp_path, capfd
) -> None:
    good = [odd[n][0] for n in ("cmyk.tif", "palette.png", "turned.png", "alpha.png", "bit.png", "clear.png")]
    rows = rows_of([bad["empty.png"][0], *good, bad["missing.png"][0]])
    options = {
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 3,
        "on_bad_sample": "skip",
    }
    options |= {"dataloader_num_workers": workers, "eval_dataset": rows, "per_device_eval_batch_size": 1}
    whole = trainer(bases("llava_llama"), tmp_path / "whole", rows, **options)
    end = whole.train()
    counted = [e["skipped_samples"] for e in whole.state.log_history if "skipped_samples" in e]
    assert counted[3] == 2 and counted[-1] == 4 == end.metrics["skipped_samples"], "two a pass, two passes"
    said = capfd.readouterr().err
    assert "on_bad_sample=skip: 4 bad samples in 8 steps" in said
    assert whole.evaluate()["eval_skipped_samples"] == 2 == whole.evaluate()["eval_skipped_samples"]
    resumed = trainer(bases("llava_llama"), tmp_path / "resumed", rows, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    again = [e["skipped_samples"] for e in resumed.state.log_history if "skipped_samples" in e]
    assert again == counted


def test_a_llava_file_with_a_missing_image_trains_from_the_command_line(here, capsys, tmp_path) -> None:
    records = json.loads((here / "runs/gridworld/train.json").read_text())
    records[0]["image"] = "gone.png"
    file = tmp_path / "train.json"
    file.write_text(json.dumps(records))
    short = [
        "--dataset_name",
        str(file),
        "--image_folder",
        str(here / "runs/gridworld/images"),
        "--max_steps",
        "6",
    ]
    short += [
        "--per_device_train_batch_size",
        "2",
        "--disable_tqdm",
        "true",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert "gone.png" in error_of(capsys, "train", "gridworld_voco", *short)
    report = json.loads(
        out_of(capsys, "train", "gridworld_voco", *short, "--on_bad_sample", "skip", "--json")
    )
    assert report["metrics"]["skipped_samples"] == 1


# -- voco compress, voco eval


def test_compress_takes_every_odd_image(here, capsys, odd, tmp_path) -> None:
    folder = next(iter(odd.values()))[0].parent
    out = json.loads(
        out_of(
            capsys,
            "compress",
            "runs/gridworld_voco",
            str(folder),
            "--out",
            str(tmp_path / "all.safetensors"),
            "--json",
        )
    )
    assert len(vp.VoCoCache.load(tmp_path / "all.safetensors")) == len(ODD) == len(out["images"])
    assert out["skipped_samples"] == 0 and out["skipped"] == []


@pytest.mark.parametrize("name", BAD)
def test_compress_names_a_bad_image_or_skips_and_counts_it(name, here, capsys, odd, bad, tmp_path) -> None:
    path, why = bad[name]
    images = [str(odd["cmyk.tif"][0]), str(path), str(odd["turned.png"][0])]
    start = ["compress", "runs/gridworld_voco", *images, "--out", str(tmp_path)]
    said = error_of(capsys, *start)
    assert str(path) in said and re.search(why, said)
    out = json.loads(out_of(capsys, *start, "--json", "--on-bad-sample", "skip"))
    assert out["images"] == [images[0], images[2]] and out["skipped_samples"] == 1
    assert out["skipped"][0]["image"] == str(path) and re.search(why, out["skipped"][0]["reason"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cmyk.safetensors", "turned.safetensors"]
    alone = tmp_path / "alone.safetensors"
    out_of(capsys, "compress", "runs/gridworld_voco", images[2], "--out", str(alone))
    (one,), (other,) = vp.VoCoCache.load(alone), vp.VoCoCache.load(tmp_path / "turned.safetensors")
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one.keys, other.keys, strict=True))


def test_compress_leaves_out_what_the_processor_refuses(here, capsys, monkeypatch, tmp_path) -> None:
    """The gridworld processor takes everything: it is made to refuse wide images, as Qwen's does."""
    from voco_plugin.cli import compress

    load = compress.load_model

    def strict(args):
        model, processor = load(args)
        kind = type(processor.image_processor)
        call = kind.__call__

        def refuse(self, images, *more, **options):
            flat = [i for entry in images for i in (entry if isinstance(entry, list) else [entry])]
            if any(i.width > 100 * i.height for i in flat):
                raise ValueError("absolute aspect ratio is too large")
            return call(self, images, *more, **options)

        monkeypatch.setattr(kind, "__call__", refuse)
        return model, processor

    monkeypatch.setattr(compress, "load_model", strict)
    names = ["a.png", "b_wide.png", "c.png"]
    for name, size in zip(names, [(30, 30), (500, 1), (40, 20)], strict=True):
        PILImage.new("RGB", size, RED).save(tmp_path / name)
    start = ["compress", "runs/gridworld_voco", str(tmp_path), "--out", str(tmp_path / "out")]
    assert "b_wide.png" in error_of(capsys, *start)
    out = json.loads(out_of(capsys, *start, "--on-bad-sample", "skip", "--json"))
    assert [Path(p).name for p in out["images"]] == ["a.png", "c.png"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.safetensors", "c.safetensors"]


def test_compress_of_nothing_but_bad_images_is_an_error(here, capsys, bad, tmp_path) -> None:
    capsys.readouterr()
    start = ["compress", "runs/gridworld_voco", str(bad["empty.png"][0]), "--out", str(tmp_path / "out")]
    assert main([*start, "--on-bad-sample", "skip"]) == 2
    assert "none of the 1 images can be used" in capsys.readouterr().err


def test_eval_names_a_bad_image_or_leaves_its_questions_out(here, capsys, tmp_path) -> None:
    records = json.loads((here / "runs/gridworld/test.json").read_text())
    (tmp_path / "half.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(30))
    asked = sum(turn["from"] == "gpt" for turn in records[1]["conversations"])
    records[1]["image"] = str(tmp_path / "half.png")
    file = tmp_path / "test.json"
    file.write_text(json.dumps(records))
    start = [
        "eval",
        "runs/gridworld_voco",
        "--data",
        str(file),
        "--image-folder",
        str(here / "runs/gridworld/images"),
    ]
    start += ["--max-new-tokens", "1"]
    said = error_of(capsys, *start)
    assert "half.png" in said and str(records[1]["id"]) in said
    whole = [
        "eval",
        "runs/gridworld_voco",
        "--data",
        "runs/gridworld/test.json",
        "--max-new-tokens",
        "1",
        "--json",
    ]
    every = json.loads(out_of(capsys, *whole))
    left = json.loads(out_of(capsys, *start, "--on-bad-sample", "skip", "--json"))
    assert left["skipped_samples"] == 1 and "half.png" in left["skipped"][0]
    assert 0 < every["questions"] - left["questions"] <= asked


# -- rows of which nothing is learnt


def spoken(number: int, answer: str, words: int = 1) -> dict:
    """A row whose question has ``words`` words."""
    return {
        "id": f"row-{number}",
        "prompt": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is " * words}]}
        ],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": answer}]}],
        "images": [PILImage.new("RGB", (32, 32), (40 * number, 0, 0))],
    }


@pytest.mark.parametrize("voco", [vp.VoCoConfig(num_tokens=2), None])
def test_a_row_whose_answer_is_cut_off_raises_or_another_takes_its_place(voco, caplog) -> None:
    rows = [spoken(0, "yes"), spoken(1, "no", words=40), spoken(2, "no")]
    short = {"max_length": 60, "voco": voco, "completion_only_loss": True}
    with pytest.raises(NothingToLearn, match=r"sample 1 \(id 'row-1'\): no token of it.*max_length=60"):
        collator(**short)(rows[:2])
    with caplog.at_level("WARNING"):
        made = collator(**short, on_bad_sample="skip", pool=rows, count_skipped=True)(rows[:2])
    assert made["skipped_samples"].sum() >= 1 and (made["labels"] != -100).any(dim=1).all()
    assert any("row-1" in r.message and "takes its place" in r.message for r in caplog.records)


@pytest.mark.parametrize("how", ["raise", "skip"])
def test_a_run_that_would_learn_nothing_is_an_error(how, tmp_path, bases) -> None:
    rows = Dataset.from_list([spoken(n, "yes", words=40) for n in range(4)])
    made = trainer(bases("llava_llama"), tmp_path, rows, max_length=40, on_bad_sample=how)
    with pytest.raises(NothingToLearn, match="no token of it has a label"):
        made.train()
