"""VoCoConfig: what contradicts itself is refused in one line that names value, reason and fix."""

from __future__ import annotations

import inspect

import pytest

import voco_plugin as vp
from voco_plugin import VoCoConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rule": "isolatd"}, r"rule='isolatd' is not known \(did you mean 'isolated'\?\)"),
        ({"num_tokens": 0}, "num_tokens=0 must be at least 1"),
        ({"num_tokens": "2"}, "num_tokens='2' must be an integer"),
        (
            {"positions": "compact", "block_context": "prefix"},
            "positions='compact' .* block_context='prefix'",
        ),
        ({"positions": "compact", "rule": "causal"}, "positions='compact' .* rule='causal'"),
        ({"block_sink": "eos"}, "block_sink='eos' is not known"),
        ({"hide_prefix": "yes"}, "hide_prefix='yes' must be true or false"),
        ({"token": " "}, "must be a non-empty string"),
        ({"token_init": "zero"}, "token_init='zero' is not known"),
    ],
)
def test_a_bad_value_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        VoCoConfig(**values)


@pytest.mark.parametrize(
    ("values", "positions"),
    [({}, "compact"), ({"block_context": "prefix"}, "sequential"), ({"rule": "causal"}, "sequential")],
)
def test_positions_default_to_what_the_rule_allows(values, positions):
    assert VoCoConfig(**values).positions == positions


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(ValueError, match=r"no field 'num_token' \(did you mean 'num_tokens'\?\)"):
        VoCoConfig.from_dict({"num_token": 2})


def test_saved_and_loaded_equal(tmp_path):
    config = VoCoConfig(num_tokens=4, rule="star", token_id=7)
    config.save(tmp_path, vocabulary={"voco_id": 7})
    again, extra = VoCoConfig.load(tmp_path)
    assert again == config and extra == {"vocabulary": {"voco_id": 7}}


def test_another_format_version_is_refused(tmp_path):
    path = VoCoConfig().save(tmp_path)
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(ValueError, match="format version 9"):
        VoCoConfig.load(tmp_path)


def test_an_unknown_argument_is_answered_with_the_nearest_name():
    from voco_plugin.models.encoders.spec import EncoderSpec
    from voco_plugin.models.llms import LLMSpec

    for kind, typed, meant in (
        (VoCoConfig, "num_token", "num_tokens"),
        (vp.VoCoSFTConfig, "learnin_rate", "learning_rate"),
        (vp.DistillConfig, "weigth", "weight"),
        (EncoderSpec, "hidden", "hidden_size"),
        (LLMSpec, "chat_templat", "chat_template"),
    ):
        said = f"{kind.__name__} has no field '{typed}' .did you mean '{meant}'"
        with pytest.raises(TypeError, match=said):
            kind(**{typed: 3})
    assert VoCoConfig(3) == VoCoConfig(num_tokens=3)
    assert "num_tokens" in inspect.signature(VoCoConfig).parameters
