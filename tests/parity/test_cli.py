"""LightningCLI: each way to name our accelerator and strategies, by real runs of `predict`."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_hpu_infer import (
    HPUInferenceAccelerator,
    HPUInferenceStrategy,
    InferenceConfig,
    PredictionWriter,
    emulator,
    read_predictions,
)
from tests.helpers import Net, assert_equal, predict, rows

ROOT = Path(__file__).parents[2]
ACCELERATOR = "lightning_hpu_infer.HPUInferenceAccelerator"
STRATEGY = "lightning_hpu_infer.HPUInferenceStrategy"
QUIET = [f"--trainer.{name}=false" for name in ("logger", "enable_progress_bar", "enable_model_summary")]


def as_it_is(output: Any) -> Any:
    return output


OTHER_VALUES: dict[str, Any] = {
    "hpu_graphs": False,
    "async_copy": False,
    "pipelining": "auto",
    "prefetch": 3,
    "in_flight": 2,
    "defer_hooks": False,
    "async_output": False,
    "graph_modules": ("net",),
    "max_graphs": 5,
    "graph_memory": 10**9,
    "verify_graphs": 4,
    "pad_batch": True,
    "lengths": "auto",
    "bucket_lengths": (4,),
    "num_buckets": 3,
    "bucket_multiple": 16,
    "pad_spec": {"inputs": {"": {"dim": 1, "value": 0}}, "outputs": {}, "side": "right"},
    "warm_up": True,
    "group_by_length": [3] * 10,
    "depth_memory": 10**6,
    "postprocess": as_it_is,
    "postprocess_workers": 5,
    "postprocess_backend": "process",
    "trace": str(Path(tempfile.gettempdir()) / "hpu-infer-trace"),
}
# These do nothing without one another, and say so.
TOGETHER = {
    "bucket_lengths": ("bucket_lengths", "pad_spec"),
    "pad_spec": ("bucket_lengths", "pad_spec"),
    "warm_up": ("bucket_lengths", "pad_spec", "warm_up"),
}

# A name in YAML is imported.
AS_TEXT = {"postprocess": f"{__name__}.as_it_is"}

pytestmark = [
    # Lightning uses a name of jsonargparse that was renamed since; and it warns of arguments that are not `sys.argv`.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended to run from within Python"),
]


class Data(LightningDataModule):
    def predict_dataloader(self) -> DataLoader[Tensor]:
        return rows()


class Observed(Net):
    """Remembers the device of every batch, and which there was when the module was set up."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: list[str] = []
        self.device_in_setup = ""

    def setup(self, stage: str) -> None:
        self.device_in_setup = self.device.type

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.devices.append(batch.device.type)


def run_cli(folder: Path, *arguments: str, saves_config: bool = False) -> LightningCLI:
    # Seeding would leave an environment variable behind; the module seeds itself.
    options: dict[str, Any] = {"seed_everything_default": False}
    if not saves_config:
        options["save_config_callback"] = None
    home = f"--trainer.default_root_dir={folder}"
    return LightningCLI(Observed, Data, args=["predict", *QUIET, home, *arguments], **options)


def config_of(cli: LightningCLI) -> InferenceConfig:
    assert isinstance(cli.trainer.accelerator, HPUInferenceAccelerator)
    return cli.trainer.accelerator.config


def assert_predicted_on_hpu(cli: LightningCLI) -> None:
    assert cli.trainer.strategy.root_device.type == "hpu"
    assert set(cli.model.devices) == {"hpu"}
    assert_equal(cli.trainer.predict_loop.predictions, predict("cpu", Net(), rows()))


def write(folder: Path, text: str) -> str:
    """A configuration file; returns the argument that reads it."""
    (folder / "given.yaml").write_text(text)
    return f"--config={folder / 'given.yaml'}"


def accelerator_yaml(values: dict[str, Any]) -> str:
    lines = [f"      {name}: {json.dumps(AS_TEXT.get(name, value))}\n" for name, value in values.items()]
    return f"trainer:\n  accelerator:\n    class_path: {ACCELERATOR}\n    init_args:\n" + "".join(lines)


@pytest.mark.smoke
def test_yaml_with_class_path_and_every_flag(emulated: None, tmp_path: Path) -> None:
    cli = run_cli(tmp_path, write(tmp_path, accelerator_yaml(OTHER_VALUES)))
    assert asdict(config_of(cli)) == OTHER_VALUES
    assert_predicted_on_hpu(cli)
    assert emulator.stats().replays == 0


def test_the_flags_above_are_all_there_are_and_none_is_a_default() -> None:
    defaults = asdict(InferenceConfig())
    assert sorted(OTHER_VALUES) == sorted(defaults)
    assert [name for name, value in defaults.items() if OTHER_VALUES[name] == value] == []


def test_yaml_with_the_flag_for_tokenizers_reaches_the_run(emulated: None, tmp_path: Path) -> None:
    # The rows of this file's data are no sentences.
    with pytest.raises(ValueError, match="Sample 0 has nothing with a length under 'input_ids'"):
        run_cli(tmp_path, write(tmp_path, accelerator_yaml({"lengths": "auto"})))


@pytest.mark.parametrize("name", [name for name in OTHER_VALUES if name != "lengths"])
def test_yaml_with_one_flag_leaves_the_others_at_their_defaults(emulated: None, name: str, tmp_path: Path) -> None:
    given = {each: OTHER_VALUES[each] for each in TOGETHER.get(name, (name,))}
    cli = run_cli(tmp_path, write(tmp_path, accelerator_yaml(given)))
    assert asdict(config_of(cli)) == asdict(InferenceConfig()) | given
    assert_predicted_on_hpu(cli)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param([f"--trainer.accelerator.class_path={ACCELERATOR}"], {}, id="class path"),
        pytest.param(
            [f"--trainer.accelerator.class_path={ACCELERATOR}", "--trainer.accelerator.init_args.in_flight=2"],
            {"in_flight": 2},
            id="class path and init argument",
        ),
        pytest.param(
            [f"--trainer.accelerator={ACCELERATOR}", "--trainer.accelerator.prefetch=3"],
            {"prefetch": 3},
            id="dotted argument",
        ),
        pytest.param(
            ["--trainer.accelerator", ACCELERATOR, "--trainer.accelerator.hpu_graphs", "false"],
            {"hpu_graphs": False},
            id="dotted argument that is a bool",
        ),
        pytest.param(
            ["--trainer.accelerator=HPUInferenceAccelerator", "--trainer.accelerator.prefetch=3"],
            {"prefetch": 3},
            id="class name alone",
        ),
        pytest.param(
            ["--trainer.accelerator", json.dumps({"class_path": ACCELERATOR, "init_args": {"max_graphs": 2}})],
            {"max_graphs": 2},
            id="JSON",
        ),
        pytest.param(
            [
                f"--trainer.strategy.class_path={STRATEGY}",
                f"--trainer.strategy.init_args.accelerator.class_path={ACCELERATOR}",
                "--trainer.strategy.init_args.accelerator.init_args.prefetch=3",
            ],
            {"prefetch": 3},
            id="inside the strategy",
        ),
        pytest.param(["--trainer.accelerator=hpu_infer"], {}, id="registered name"),
    ],
)
def test_arguments(emulated: None, arguments: list[str], expected: dict[str, Any], tmp_path: Path) -> None:
    cli = run_cli(tmp_path, *arguments)
    assert config_of(cli) == InferenceConfig(**expected)
    assert_predicted_on_hpu(cli)
    assert (emulator.stats().replays > 0) == config_of(cli).hpu_graphs


def test_an_argument_beats_the_yaml(emulated: None, tmp_path: Path) -> None:
    file = write(tmp_path, accelerator_yaml({"prefetch": 3, "in_flight": 4}))
    cli = run_cli(tmp_path, file, "--trainer.accelerator.prefetch=7")
    assert config_of(cli) == InferenceConfig(prefetch=7, in_flight=4)
    assert_predicted_on_hpu(cli)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="strategy auto"),
        pytest.param(["--trainer.strategy=hpu_infer"], id="registered name"),
        pytest.param([f"--trainer.strategy.class_path={STRATEGY}"], id="class path"),
    ],
)
def test_strategies_beside_the_registered_name(emulated: None, arguments: list[str], tmp_path: Path) -> None:
    cli = run_cli(tmp_path, "--trainer.accelerator=hpu_infer", *arguments)
    assert type(cli.trainer.strategy) is HPUInferenceStrategy
    assert cli.model.device_in_setup == "hpu"
    assert_predicted_on_hpu(cli)


def test_yaml_with_accelerator_and_strategy_and_its_device(emulated: None, tmp_path: Path) -> None:
    strategy = f"  strategy:\n    class_path: {STRATEGY}\n    init_args:\n      device: hpu\n"
    cli = run_cli(tmp_path, write(tmp_path, accelerator_yaml({"prefetch": 3}) + strategy))
    assert config_of(cli) == InferenceConfig(prefetch=3)
    assert type(cli.trainer.strategy) is HPUInferenceStrategy
    assert_predicted_on_hpu(cli)


@pytest.mark.filterwarnings("ignore")  # as an error, jsonargparse's warning would lead it to the union's next type
def test_the_configuration_that_a_run_saved_repeats_it(emulated: None, tmp_path: Path) -> None:
    first = run_cli(tmp_path, write(tmp_path, accelerator_yaml(OTHER_VALUES)), saves_config=True)
    second = run_cli(tmp_path, f"--config={tmp_path / 'config.yaml'}")
    assert config_of(second) == config_of(first) != InferenceConfig()
    assert_predicted_on_hpu(second)


def test_a_writer_by_its_class_path(emulated: None, tmp_path: Path) -> None:
    text = f"""
trainer:
  accelerator:
    class_path: {ACCELERATOR}
  callbacks:
    - class_path: lightning_hpu_infer.PredictionWriter
      init_args:
        path: {tmp_path / "out"}
        columns: {{prediction: logits}}
        rows_per_file: 4
        compression: snappy
"""
    cli = run_cli(tmp_path, write(tmp_path, text), "--return_predictions=false")
    (writer,) = (each for each in vars(cli.trainer)["callbacks"] if isinstance(each, PredictionWriter))
    assert (writer.columns, writer.rows_per_file, writer.resume) == ({"prediction": "logits"}, 4, True)
    expected: Any = predict("cpu", Net(), rows())
    logits = read_predictions(tmp_path / "out")["logits"].combine_chunks().to_numpy_ndarray()
    assert_equal([torch.from_numpy(logits.copy())], [torch.cat(expected)])
    again = run_cli(tmp_path, write(tmp_path, text), "--return_predictions=false")
    assert again.model.devices == []  # nothing was left


def refusal(capsys: pytest.CaptureFixture[str], folder: Path, arguments: Sequence[str]) -> str:
    """What the CLI says instead of running: jsonargparse of a type, our classes of a value."""
    with pytest.raises((SystemExit, ValueError)) as refused:
        run_cli(folder, *arguments)
    return capsys.readouterr().err if isinstance(refused.value, SystemExit) else str(refused.value)


BAD_VALUES = [
    *[(name, value) for name in ("hpu_graphs", "async_copy", "pipelining", "defer_hooks") for value in (7, "maybe")],
    *[(name, value) for name in ("prefetch", "in_flight") for value in (-1, 1025, 1.5, "many", True)],
    *[("max_graphs", value) for value in (0, 65537, "many", False)],
    *[("verify_graphs", value) for value in (-1, 65537, "many", False)],
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_a_bad_value_in_the_yaml_is_refused_by_its_name(
    name: str, value: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said = refusal(capsys, tmp_path, [write(tmp_path, accelerator_yaml({name: value}))])
    assert f"`{name}` must be" in said or f'Parser key "{name}"' in said
    assert str(value) in said


@pytest.mark.parametrize(("name", "value"), [("prefetch", "x"), ("prefetch", "-1"), ("hpu_graphs", "7")])
def test_a_bad_value_on_the_command_line_is_refused_by_its_name(
    name: str, value: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = [f"--trainer.accelerator={ACCELERATOR}", f"--trainer.accelerator.{name}={value}"]
    said = refusal(capsys, tmp_path, arguments)
    assert f"`{name}` must be" in said or f'Parser key "{name}"' in said


def test_an_unknown_option_is_refused_by_its_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = refusal(capsys, tmp_path, [write(tmp_path, accelerator_yaml({"graphs": True}))])
    assert "graphs" in said
    assert "not accepted" in said or "not expected" in said


def test_a_class_path_alone_as_a_string_is_refused_by_lightning_with_the_names_there_are(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The argument is a string to jsonargparse until some option of the class is given."""
    said = refusal(capsys, tmp_path, [f"--trainer.accelerator={ACCELERATOR}"])
    assert f"invalid accelerator name: `accelerator='{ACCELERATOR}'`" in said
    assert "hpu_infer" in said


# Does not import this package: the class path does, or the script that uses the registered name.
SCRIPT = """
import json
import sys

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 3)

    def predict_step(self, batch, batch_idx):
        self.seen = batch.device.type
        return self.net(batch)


class Data(LightningDataModule):
    def predict_dataloader(self):
        return DataLoader(torch.arange(40.0).reshape(10, 4), batch_size=2)


if __name__ == "__main__":
    cli = LightningCLI(Model, Data, seed_everything_default=3, save_config_callback=None)
    result = {
        "predictions": [batch.tolist() for batch in cli.trainer.predict_loop.predictions],
        "device": cli.model.seen,
        "accelerator": type(cli.trainer.accelerator).__name__,
        "prefetch": getattr(getattr(cli.trainer.accelerator, "config", None), "prefetch", None),
    }
    with open("result.json", "w") as file:
        json.dump(result, file)
"""


def run_script(folder: Path, *arguments: str, first_line: str = "") -> dict[str, Any]:
    (folder / "main.py").write_text(first_line + SCRIPT)
    # The Lightning at hand; PYTHONPATH may be relative to another folder than the script's.
    search = os.pathsep.join([str(ROOT), str(Path(lightning.__file__).parents[1])])
    completed = subprocess.run(
        [sys.executable, "main.py", "predict", *QUIET, *arguments],
        env=os.environ | {"PYTHONPATH": search, "LIGHTNING_HPU_INFER_EMULATOR": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert completed.returncode == 0, completed.stderr
    return dict(json.loads((folder / "result.json").read_text()))


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_script(tmp_path_factory.mktemp("stock"), "--trainer.accelerator=cpu")


def assert_like_stock(ours: dict[str, Any], stock: dict[str, Any], prefetch: int | None) -> None:
    assert (stock["device"], stock["accelerator"]) == ("cpu", "CPUAccelerator")
    assert (ours["device"], ours["accelerator"], ours["prefetch"]) == ("hpu", "HPUInferenceAccelerator", prefetch)
    torch.testing.assert_close(torch.tensor(ours["predictions"]), torch.tensor(stock["predictions"]))


def test_a_command_whose_script_knows_nothing_of_this_package(stock: dict[str, Any], tmp_path: Path) -> None:
    ours = run_script(tmp_path, write(tmp_path, accelerator_yaml({"prefetch": 3})))
    assert_like_stock(ours, stock, prefetch=3)


def test_a_command_with_the_registered_names(stock: dict[str, Any], tmp_path: Path) -> None:
    names = ["--trainer.accelerator=hpu_infer", "--trainer.strategy=hpu_infer"]
    ours = run_script(tmp_path, *names, first_line="import lightning_hpu_infer\n")
    assert_like_stock(ours, stock, prefetch=None)
