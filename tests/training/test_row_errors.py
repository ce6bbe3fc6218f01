"""A row that cannot be trained on is named, with what to do; so is a setting that no row can satisfy."""

from __future__ import annotations

import pytest
from datasets import Dataset
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model

import tiny
import voco_plugin as vp
from tiny import processors
from trainers import moved, picture, snapshot, trainer

VOCO = vp.VoCoConfig(num_tokens=2, token="<unused0>")
VIRTUAL = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("rows") / "base")
    tiny.build("llava_llama").save_pretrained(folder)
    processors.processor("llava_llama").save_pretrained(folder)
    return folder


def parts(*said):
    return [{"type": "image"} if part is None else {"type": "text", "text": part} for part in said]


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


GOOD = {"id": "good", "messages": talk(parts(None, "what"), parts("red")), "image": picture(0)}


def collated(row, name="llava_llama", **options):
    collator = vp.VoCoDataCollator(processors.processor(name), voco=VOCO, **options)
    return collator([GOOD, {"id": "odd", "image": picture(1), **row}])


# -- where an image may stand
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"messages": talk(parts("what"), parts(None, "red"))},
        {
            "conversations": [
                {"from": "human", "value": "what"},
                {"from": "gpt", "value": "<image>\nred"},
            ]
        },
    ],
)
@pytest.mark.parametrize("only", [True, False])
def test_an_image_in_an_answer_is_refused(row, only):
    with pytest.raises(
        ValueError, match=r"sample 1 \(id 'odd'\), turn 1 of messages: an answer holds an image"
    ):
        collated(row, assistant_only_loss=only)


def test_so_in_a_completion():
    for completion, why in (
        ([{"role": "assistant", "content": parts(None)}], "turn 0 of completion: an answer holds an image"),
        ([{"role": "assistant", "content": "<image> red"}], "turn 0 of completion: its text holds '<image>'"),
        ("<image> red", "the completion holds an image"),
    ):
        prompt = "what" if isinstance(completion, str) else [{"role": "user", "content": "what"}]
        with pytest.raises(ValueError, match=rf"sample 0 \(id 'odd'\)[,:] {why}"):
            vp.VoCoDataCollator(processors.processor("llava_llama"), voco=VOCO)(
                [{"id": "odd", "image": picture(1), "prompt": prompt, "completion": completion}]
            )


@pytest.mark.parametrize("name", ["llava_llama", "qwen2_5_vl"])
@pytest.mark.parametrize(
    "messages",
    [
        talk("<image> what", "red"), talk("what", "<image> red"),
        talk(parts(None, "what <image>"), parts("red")), talk(parts(None, "what"), parts("a <image>")),
    ],
)  # fmt: skip
def test_a_placeholder_in_a_text_is_refused(name, messages):
    """In Qwen-VL it is no token: it would be trained on as text, next to the image."""
    with pytest.raises(
        ValueError, match=r"\(id 'odd'\), turn [01] .* its text holds '<image>', .* write a part"
    ):
        collated({"messages": messages}, name)


def test_so_is_a_familys_own_mark_without_an_image():
    with pytest.raises(ValueError, match="its text holds '<start_of_image>'"):
        vp.VoCoDataCollator(processors.processor("gemma3"), voco=VOCO)(
            [{"messages": talk("the mark <start_of_image>", "red"), "images": []}]
        )


def test_packing_names_the_row_too(base, tmp_path):
    rows = [
        {"id": f"r{n}", "messages": talk("what" if n else "a <image>", "red"), "image": picture(n)}
        for n in range(3)
    ]
    with pytest.raises(ValueError, match="'r0'.* its text holds '<image>'"):
        trainer(base, tmp_path, Dataset.from_list(rows), packing=True, max_length=128)


def test_what_a_template_refuses_is_said_of_its_row():
    processor = processors.processor("llava_llama")
    roles = "{% for m in messages if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endfor %}"
    processor.chat_template = roles + processor.chat_template
    odd = {
        "id": "odd",
        "messages": [*GOOD["messages"], {"role": "tool", "content": "x"}],
        "image": picture(1),
    }
    with pytest.raises(ValueError, match=r"sample 1 \(id 'odd'\): no tools"):
        vp.VoCoDataCollator(processor, voco=VOCO)([GOOD, odd])


# -- settings
# ------------------------------------------------------------------------------------------------------------


def test_rows_are_grouped_by_a_column_of_lengths(base, data, tmp_path):
    grouped = {"train_sampling_strategy": "group_by_length", "max_steps": 4}
    with pytest.raises(ValueError, match="needs a column 'length' .* the set has messages, images, id"):
        trainer(base, tmp_path, data, **grouped)
    with pytest.raises(ValueError, match="a streamed data set is read in its order"):
        trainer(base, tmp_path, data.to_iterable_dataset(), **grouped)
    long = data.add_column("tokens", [9, 1, 9, 1, 9, 1, 9, 1])
    made = trainer(base, tmp_path, long, length_column_name="tokens", **grouped)
    sampler = made.get_train_dataloader().batch_sampler.sampler
    assert list(sampler.lengths) == [9, 1, 9, 1, 9, 1, 9, 1]
    made.train()


@pytest.mark.parametrize("method", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_train_a_plain_model_and_shift_no_blocks(base, data, tmp_path, method):
    for options in ({"peft": method(**VIRTUAL)}, {"peft": False}):
        model, processor = vp.load(base, voco=vp.VoCoConfig(num_tokens=2))
        given = model if options["peft"] else get_peft_model(model, method(**VIRTUAL))
        with pytest.raises(ValueError, match="its own tokens before the sequence, which shifts the blocks"):
            trainer(given, tmp_path, data, voco=False, processing_class=processor, **options)
    made = trainer(base, tmp_path, data, peft=method(**VIRTUAL), voco=False)
    assert made.trainable_report.startswith("training virtual tokens ")
    before = snapshot(made)
    made.train()
    assert isinstance(made.model, PeftModel) and len(moved(before, made)) == 1
    with pytest.raises(ValueError, match="trains its own tokens alone, and train_projector"):
        trainer(base, tmp_path, data, peft=method(**VIRTUAL), voco=False, train_projector=True)
