"""What `share-hf env` tells of the environment."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from share_hf.cli import environment, main


ROOT = Path(__file__).parents[1]


def test_it_has_the_versions_that_are_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    for name in ("torch", "transformers", "peft", "accelerate"):
        assert f"- {name}: {metadata.version(name)}" in lines
    assert f"- Python: {platform.python_version()}" in lines
    assert all(line.startswith("- ") for line in lines)


def test_a_package_that_is_missing_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PACKAGES", ("peft", "no-such-package"))
    outcome = environment.env()
    assert outcome.facts["packages"] == {"peft": metadata.version("peft"), "no-such-package": None}
    assert "- no-such-package: not installed" in outcome.text.splitlines()


@pytest.mark.parametrize(
    ("version", "built_for"),
    [({"cuda": "12.8"}, "CUDA 12.8"), ({"hip": "6.4"}, "ROCm 6.4"), ({}, "CPU")],
)
def test_it_tells_what_torch_was_built_for(
    version: dict[str, Any], built_for: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "version", SimpleNamespace(**{"cuda": None, "hip": None, "xpu": None} | version))
    assert environment.env().facts["built_for"] == built_for


@pytest.mark.parametrize(
    ("accelerator", "devices"),
    [(None, []), (torch.device("cuda"), ["GPU 0", "GPU 1"]), (torch.device("mps"), ["mps"])],
)
def test_it_names_the_devices(
    accelerator: torch.device | None, devices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: accelerator)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    outcome = environment.env()
    assert outcome.facts["devices"] == devices
    assert f"- devices: {', '.join(devices) or 'CPU only'}" in outcome.text.splitlines()


def test_it_runs_where_neither_torch_nor_peft_can_be_imported(tmp_path: Path) -> None:
    for name in ("torch", "peft"):
        (tmp_path / f"{name}.py").write_text("raise OSError('/opt/libcudart.so: cannot open shared object file')\n")
    (tmp_path / "share_hf_cli").symlink_to(ROOT / "share_hf" / "cli", target_is_directory=True)
    run = subprocess.run(
        [sys.executable, "-m", "share_hf_cli", "env"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert "- torch cannot be imported: OSError" in run.stdout.splitlines()
    assert f"- transformers: {metadata.version('transformers')}" in run.stdout.splitlines()


def test_it_names_no_path_no_user_and_no_token(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HOME", "/somewhere/private")
    assert main(["env", "--token", "hf_other"]) == 0
    out = capsys.readouterr().out
    assert not [private for private in ("hf_", "/", "\\") if private in out]


def test_the_template_of_a_bug_report_asks_for_it() -> None:
    template = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml").read_text(encoding="utf-8"))
    assert any("`share-hf env`" in part["attributes"].get("description", "") for part in template["body"])
