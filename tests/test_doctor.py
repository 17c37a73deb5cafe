import dataclasses
import io
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from rich.console import Console

from lightning_hpu_infer import _habana, doctor
from lightning_hpu_infer.cli import main
from lightning_hpu_infer.doctor import Diagnosis, Facts, Level, examine, gather_facts
from lightning_hpu_infer.recipes import FolderState

GAUDI = Facts(
    python="3.10.12",
    torch="2.6.0+hpu_1.20.0-543.git4952fce",
    lightning="2.5.5",
    lightning_habana="1.6.0",
    bridge="1.20.0.543",
    device_count=8,
    device_name="GAUDI2",
    lazy=True,
    environment={"PT_HPU_LAZY_MODE": "1", "PT_HPU_RECIPE_CACHE_CONFIG": "/var/tmp/recipes,false,4096"},
    recipe_folder=FolderState.USABLE,
)
CACHED = {"PT_HPU_RECIPE_CACHE_CONFIG": "/var/tmp/recipes"}
LIGHTNING = "pip install 'lightning!=2.6.2,!=2.6.3,<2.7,>=2.4'"
LAPTOP = Facts(python="3.13.1", torch="2.13.0+cpu", lightning="2.6.6")


def levels(diagnosis: Diagnosis) -> set[Level]:
    return {finding.level for finding in diagnosis.findings}


def printed(diagnosis: Diagnosis) -> str:
    console = Console(file=io.StringIO(), width=300)
    console.print(diagnosis)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_gaudi_in_order_has_no_findings() -> None:
    diagnosis = examine(GAUDI)
    assert diagnosis.healthy
    assert levels(diagnosis) == {Level.OK}
    text = printed(diagnosis)
    assert "would run on an HPU" in text
    assert "8 found, GAUDI2" in text
    assert "PT_HPU_LAZY_MODE" in text


def test_an_emulated_device_is_called_emulated() -> None:
    diagnosis = examine(dataclasses.replace(LAPTOP, bridge="unknown", emulated=True, device_count=1, lazy=True))
    assert diagnosis.healthy
    assert "would run on an emulated HPU" in printed(diagnosis)


@pytest.mark.parametrize(
    ("changes", "level", "text", "remedy"),
    [
        ({"lightning": "2.6.2", "lightning_habana": None}, Level.ERROR, "compromised", "2.6.6"),
        ({"lightning": "2.6.3", "lightning_habana": None}, Level.ERROR, "compromised", "2.6.6"),
        ({"lightning": "2.3.3"}, Level.ERROR, "Lightning 2.3.3 is not supported", LIGHTNING),
        ({"lightning": "2.7.0", "lightning_habana": None}, Level.ERROR, "Lightning 2.7.0 is not supported", LIGHTNING),
        ({"lightning": "of mine", "lightning_habana": None}, Level.ERROR, "of mine is not supported", LIGHTNING),
        ({"lightning": None}, Level.ERROR, "Lightning is not installed", LIGHTNING),
        ({"torch": "2.1.0+hpu"}, Level.ERROR, "PyTorch 2.1.0+hpu is not supported", "torch>=2.6"),
        ({"torch": "2.3.1a0+git4952fce"}, Level.ERROR, "PyTorch 2.3.1a0+git4952fce is not supported", "torch>=2.6"),
        ({"torch": "parrot"}, Level.ERROR, "PyTorch parrot is not supported", "Gaudi image"),
        ({"python": "3.8.0"}, Level.ERROR, "Python 3.8.0 is not supported", ">=3.10"),
        ({"lightning": "2.6.6"}, Level.WARNING, "cannot be imported beside Lightning 2.6.6", "lightning==2.5.5"),
        ({"bridge": None, "device_count": 0, "lazy": None}, Level.ERROR, "is not installed", "EMULATOR=1"),
        ({"device_count": 0}, Level.ERROR, "finds no device", "hl-smi"),
        (
            {"torch": "2.6.0+cu124", "error": "AssertionError: no fork", "device_count": 0, "lazy": None},
            Level.ERROR,
            "refuses stock PyTorch in lazy mode",
            "PT_HPU_LAZY_MODE=0",
        ),
        ({"error": "OSError: libSynapse.so", "device_count": 0, "lazy": None}, Level.ERROR, "libSynapse.so", "hl-smi"),
        ({"lazy": False}, Level.ADVICE, "eager mode, Intel's default", "PT_HPU_LAZY_MODE=1"),
        ({"environment": {}}, Level.ADVICE, "Compiled recipes are not kept", "PT_HPU_RECIPE_CACHE_CONFIG=FOLDER"),
        (
            {"environment": CACHED | {"PT_COMPILE_ONLY_MODE": "True"}},
            Level.ERROR,
            "predictions are garbage",
            "Unset it",
        ),
        ({"recipe_folder": FolderState.IMPOSSIBLE}, Level.ERROR, "/var/tmp/recipes, which is no folder", "local disk"),
        ({"recipe_folder": FolderState.READ_ONLY}, Level.WARNING, "/var/tmp/recipes, which cannot", "local disk"),
        *(
            ({"environment": {"PT_HPU_RECIPE_CACHE_CONFIG": value}}, level, text, remedy)
            for value, level, text, remedy in (
                ("/r,true", Level.ADVICE, "empties /r when a process starts", "false"),
                (",false,1024", Level.ADVICE, "Compiled recipes are not kept", "FOLDER"),
                ("/r,maybe", Level.ERROR, "second field, delete, is 'maybe'", "FOLDER,DELETE,MEGABYTES,NFS"),
                ("/r,0,1 GB", Level.ERROR, "third field, megabytes, is '1 GB' and no number", "MEGABYTES"),
                ("/r,0,1,on", Level.ERROR, "fourth field, NFS, is 'on'", "NFS"),
                ("/r,0,1,0,0", Level.ERROR, "has 5 fields, and the bridge takes four at most", "NFS"),
            )
        ),
        (
            {"bridge": "1.19.0.561", "environment": {"PT_HPU_RECIPE_CACHE_CONFIG": "/r,0,1,1"}},
            Level.ERROR,
            "1.19.0.561 takes three fields at most",
            "Leave out the fourth",
        ),
        (
            {"environment": CACHED | {"PT_HPU_LAZY_MODE": "banana"}},
            Level.WARNING,
            "=banana is neither 0 nor 1",
            "Set it to 1",
        ),
        (
            {"environment": CACHED | {"PT_HPU_LAZY_MODE": ""}},
            Level.WARNING,
            "PT_HPU_LAZY_MODE= is neither",
            "Set it to 1",
        ),
        *(
            (
                {"environment": CACHED | {"PT_HPUGRAPH_DISABLE_TENSOR_CACHE": value}},
                Level.ERROR,
                f"={value} would let graphs overwrite your batches",
                "Unset it",
            )
            for value in ("0", "", "true", "01")
        ),
    ],
)
def test_what_does_not_work_together_comes_with_a_remedy(
    changes: dict[str, object], level: Level, text: str, remedy: str
) -> None:
    diagnosis = examine(dataclasses.replace(GAUDI, **changes))  # type: ignore[arg-type]
    found = [finding for finding in diagnosis.findings if finding.level != Level.OK]
    assert [finding.level for finding in found] == [level]
    assert text in found[0].text
    assert remedy in found[0].remedy
    assert diagnosis.healthy == (level != Level.ERROR)
    assert remedy in printed(diagnosis)


@pytest.mark.parametrize(
    "changes",
    [
        {"torch": "2.6.0a0+git74cd574"},  # of Habana's 1.18: an alpha by its name only
        {"torch": "2.6.0"},
        {"torch": "3.0.0+hpu"},
        {"lightning": "2.4.0"},
        {"lightning": "2.6.6", "lightning_habana": None},
        {"python": "3.10.0"},
        {"python": "3.15.0"},
        {"environment": {"PT_HPU_RECIPE_CACHE_CONFIG": "/r,,,true"}},
        {"environment": {"PT_HPU_RECIPE_CACHE_CONFIG": "/r,False,0,"}, "bridge": "1.19.0"},
        {"environment": CACHED | {"PT_COMPILE_ONLY_MODE": "0"}},
    ],
)
def test_the_bounds_are_supported(changes: dict[str, object]) -> None:
    facts = dataclasses.replace(GAUDI, **changes)  # type: ignore[arg-type]
    assert levels(examine(facts)) == {Level.OK}


def test_without_the_packages_metadata_nothing_is_known_of_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> None:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(doctor, "metadata", missing)
    diagnosis = examine(dataclasses.replace(GAUDI, torch="2.1.0+hpu"))
    assert diagnosis.healthy
    [unknown] = [finding for finding in diagnosis.findings if finding.level != Level.OK]
    assert "but not installed" in unknown.text
    assert "pip install" in unknown.remedy
    assert not examine(dataclasses.replace(GAUDI, lightning="2.6.2")).healthy


def test_the_page_says_what_decides_the_mode() -> None:
    for lazy in (True, False):
        unset = printed(examine(dataclasses.replace(GAUDI, lazy=lazy, environment=CACHED)))
        assert "no longer develops" in unset
        assert "PT_HPU_LAZY_MODE is unset: its release decides" in unset
        assert "its release decides" not in printed(examine(dataclasses.replace(GAUDI, lazy=lazy)))


def test_the_json_has_what_a_bug_report_needs_and_the_page_stays_readable(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json"])
    facts = json.loads(capsys.readouterr().out)["facts"]
    assert f"PyTorch version: {facts['torch']}" in facts["system"]
    assert any(line.startswith("OS: ") for line in facts["system"])
    main(["doctor"])
    page = capsys.readouterr().out
    assert "OS: " not in page
    assert "doctor --json" in page


def test_a_system_that_cannot_be_described_is_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise OSError("no lscpu")

    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", fail)
    assert gather_facts().system == ("torch.utils.collect_env failed: OSError: no lscpu",)


@pytest.mark.parametrize(
    ("value", "state"),
    [("{}/new/deep,false", "usable"), ("{}/file", "impossible"), ("", ""), (",false", ""), ("a,b", "")],
)
def test_the_folder_of_the_recipes_is_looked_at(
    value: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PT_HPU_RECIPE_CACHE_CONFIG", value.format(tmp_path))
    facts = gather_facts()
    assert facts.recipe_folder == state
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_stock_torch_is_fine_in_eager_mode() -> None:
    facts = dataclasses.replace(GAUDI, torch="2.7.1+cpu", lazy=False, environment={"PT_HPU_LAZY_MODE": "0"})
    assert examine(facts).healthy


def test_on_the_cpu_the_exit_code_is_1(capsys: pytest.CaptureFixture[str]) -> None:
    if _habana.is_installed():
        pytest.skip("this machine has Habana's bridge")
    assert main(["doctor"]) == 1
    assert "would not run on an HPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "mode", "finding"),
    [
        (None, "lazy", "captures HPU graphs"),
        pytest.param("1", "lazy", "captures HPU graphs", marks=pytest.mark.full),
        ("0", "eager", "is in eager mode"),
        pytest.param("banana", "lazy", "PT_HPU_LAZY_MODE=banana is neither 0 nor 1", marks=pytest.mark.full),
    ],
)
def test_the_emulator_of_the_environment_has_the_mode_of_the_environment(
    value: str | None, mode: str, finding: str
) -> None:
    environment = {name: text for name, text in os.environ.items() if name != "PT_HPU_LAZY_MODE"}
    environment |= {"LIGHTNING_HPU_INFER_EMULATOR": "1"} | ({"PT_HPU_LAZY_MODE": value} if value else {})
    command = [sys.executable, "-m", "lightning_hpu_infer", "doctor", "--json"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    data = json.loads(run.stdout)
    assert data["facts"]["lazy"] == (mode == "lazy")
    assert data["facts"]["environment"].get("PT_HPU_LAZY_MODE") == value
    assert any(finding in found["text"] for found in data["findings"])


@pytest.mark.usefixtures("emulated")
def test_on_the_emulator_the_exit_code_is_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["healthy"]
    assert data["facts"]["emulated"]
    assert data["facts"]["lazy"]
    assert {finding["level"] for finding in data["findings"]} == {"ok"}
    assert gather_facts().device_count == 1


def test_a_bridge_that_cannot_be_imported_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> bool:
        raise AssertionError("Stock PyTorch\nis not supported")

    monkeypatch.setattr(_habana, "is_installed", lambda: True)
    monkeypatch.setattr(_habana, "is_emulated", lambda: False)
    monkeypatch.setattr(_habana, "is_available", refuse)
    facts = gather_facts()
    assert facts.error == "AssertionError: Stock PyTorch"
    assert not examine(facts).healthy
