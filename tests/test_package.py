"""What is published: a wheel and an sdist that hold the package, all of it, and a command that starts from them."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import specjax

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_wheel_and_an_sdist_hold_the_package_and_the_command_starts_from_the_wheel(tmp_path):
    source, dist = tmp_path / "source", tmp_path / "dist"
    shutil.copytree(ROOT / "specjax", source / "specjax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = (
        "import sys; out = sys.argv[1]; from setuptools import build_meta as b; b.build_sdist(out); b.build_wheel(out)"
    )
    subprocess.run([sys.executable, "-c", code, dist], cwd=source, check=True, capture_output=True)
    package = {str(path.relative_to(source)) for path in (source / "specjax").rglob("*") if path.is_file()}
    [wheel], [sdist] = dist.glob("*.whl"), dist.glob("*.tar.gz")
    assert wheel.name == f"specjax-{specjax.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as held:
        assert {name for name in held.namelist() if ".dist-info/" not in name} == package
        held.extractall(tmp_path / "installed")
    with tarfile.open(sdist) as held:
        inner = {name.partition("/")[2] for name in held.getnames()}
    assert package | {"LICENSE", "README.md", "pyproject.toml"} <= inner
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "specjax", "help", "config"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "--config.lora.rank=" in done.stdout, done.stderr
