"""The package as others get it: a wheel, installed elsewhere, finds its configuration and runs the smoke experiment."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.timeout(900)
def test_a_wheel_installed_elsewhere_runs_the_smoke_experiment(tmp_path: Path) -> None:
    python = [sys.executable, "-m"]
    subprocess.run([*python, "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)], check=True, capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert "transfer_cli/conf/config.yaml" in names and "transfer_cli/conf/method/dann.yaml" in names
    assert "hydra_plugins/transfer_launcher.py" in names and "transfer_cli/conf/hydra/launcher/slurm.yaml" in names
    assert not [n for n in names if n.startswith(("tests/", "benchmarks/", "outputs/", "conf/"))]
    # A venv of its own that borrows this one's libraries: the wheel and its configuration are what is under test.
    subprocess.run([*python, "venv", str(tmp_path / "venv")], check=True)
    own = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    borrowed = next(p for p in sys.path if p.endswith("site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(own)
    (own / "borrowed.pth").write_text(borrowed + "\n")
    (tmp_path / "elsewhere").mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRANSFER_DATA")}
    run = subprocess.run(
        [str(tmp_path / "venv/bin/python"), "-m", "transfer_cli", "run", "experiment=smoke", "threads=1"],
        cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    where = "import transfer_cli.config.folders as f; print(f.packaged_folder())"
    shown = subprocess.run(
        [str(tmp_path / "venv/bin/python"), "-c", where],
        cwd=tmp_path / "elsewhere",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert shown.stdout.strip() == str((own / "transfer_cli" / "conf").resolve())
    assert list((tmp_path / "elsewhere" / "outputs").rglob("result.json"))
