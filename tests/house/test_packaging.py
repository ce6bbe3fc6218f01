"""What is installed: every package folder, recipes and integrations inside it; and importing stays light."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from paths import ROOT

HEAVY = ("trl", "timm", "open_clip", "datasets", "sklearn", "matplotlib", "deepspeed", "vllm", "lmms_eval")


def project() -> dict:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        from pip._vendor import tomli as tomllib
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_pyproject_lists_every_package_folder() -> None:
    folders = {p.parent.relative_to(ROOT) for p in (ROOT / "voco_plugin").rglob("*.py")}
    expected = {".".join(f.parts) for f in folders if "assets" not in f.parts}
    for top in ("recipes", "integrations"):
        inside = {p.parent.relative_to(ROOT) for p in (ROOT / top).rglob("*.py")}
        expected |= {".".join(("voco_plugin", *f.parts)) for f in inside}
    assert set(project()["tool"]["setuptools"]["packages"]) == expected


def test_the_version_is_stated_once_and_the_same() -> None:
    import voco_plugin

    assert voco_plugin.__version__ == project()["project"]["version"]


def test_no_generic_top_level_package_is_installed() -> None:
    assert all(p.split(".")[0] == "voco_plugin" for p in project()["tool"]["setuptools"]["packages"])


@pytest.mark.parametrize(
    "statement", ["import voco_plugin", "from voco_plugin import VoCoConfig", "import voco_plugin.cli"]
)
def test_importing_loads_nothing_heavy(statement: str) -> None:
    code = f"{statement}\nimport sys, json; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == []


def test_attaching_needs_neither_trl_nor_timm_nor_open_clip() -> None:
    code = (
        "import sys, json, voco_plugin as vp; vp.attach, vp.load, vp.VoCoCache\n"
        f"print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(out.stdout.splitlines()[-1]) == []


def test_every_public_name_loads() -> None:
    import voco_plugin

    for name in voco_plugin.__all__:
        assert getattr(voco_plugin, name) is not None
    assert set(voco_plugin.__all__) <= set(dir(voco_plugin))
    with pytest.raises(AttributeError, match="no attribute 'VoCoConfg'"):
        _ = voco_plugin.VoCoConfg


# -- the wheel -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the checkout (a build leaves folders behind)."""
    import shutil

    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    hidden = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "runs", "*.egg-info", "__pycache__", ".*_cache"
    )
    shutil.copytree(ROOT, source, ignore=hidden)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(folder),
    ]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr + built.stdout
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty environment with the wheel alone, which sees this environment's other packages."""
    folder = tmp_path_factory.mktemp("env")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    site = Path(
        subprocess.run(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()
    )  # fmt: skip
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "--no-deps",
            "--no-index",
            str(wheel),
        ],
        check=True,
        capture_output=True,
    )
    return python.parent


@pytest.mark.slow
def test_the_wheel_holds_recipes_integrations_and_assets_inside_the_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"voco_plugin"}
    for file in sorted(p.relative_to(ROOT) for p in (ROOT / "recipes").rglob("*.yaml")):
        assert f"voco_plugin/{file.as_posix()}" in names
    for file in sorted(p.relative_to(ROOT) for p in (ROOT / "integrations").glob("*/*.*")):
        if file.suffix in (".yaml", ".json"):
            assert f"voco_plugin/{file.as_posix()}" in names
    assert "voco_plugin/integrations/__init__.py" in names and "voco_plugin/py.typed" in names
    assets = [p.relative_to(ROOT).as_posix() for p in sorted((ROOT / "voco_plugin").glob("*/assets/*/*"))]
    assert any(asset.endswith("model.safetensors.xz") for asset in assets) and set(assets) <= set(names)
    compressed = {entry.filename: entry.compress_size for entry in zipfile.ZipFile(wheel).infolist()}
    assert sum(compressed[asset] for asset in assets) <= 5_000_000


@pytest.mark.slow
def test_the_installed_wheel_trains_a_shipped_recipe_outside_the_checkout(
    installed: Path, tmp_path: Path
) -> None:
    def voco(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        found = subprocess.run(
            [str(installed / "voco"), *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert found.returncode == 0, found.stderr[-4000:]
        return found

    where = subprocess.run(
        [str(installed / "python"), "-c", "import voco_plugin, voco_plugin.recipes as r; "
        "print(voco_plugin.__file__, r.__file__)"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert str(ROOT) not in where
    assert "gridworld_voco" in voco("recipes").stdout
    voco(
        "gridworld",
        "runs/gridworld",
        "--num-train",
        "16",
        "--num-test",
        "4",
        "--model",
        "runs/gridworld_base",
        "--tower-steps",
        "2",
    )
    voco("train", "gridworld_voco", "--max_steps", "2", "--per_device_train_batch_size", "2")
    assert (tmp_path / "runs" / "gridworld_voco" / "adapter_config.json").is_file()
    assert (tmp_path / "runs" / "gridworld_voco" / "voco_config.json").is_file()
    voco("compress", "runs/gridworld_voco", "runs/gridworld/images/test", "--out", "all.safetensors")
    answered = voco(
        "generate",
        "runs/gridworld_voco",
        "--cache",
        "all.safetensors",
        "--question",
        "What is at a1?",
        "--json",
    )
    assert len(json.loads(answered.stdout)) == 4
