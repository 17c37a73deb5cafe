"""A user's own lists of ops for autocast, which the bridge reads when it is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_hpu_infer.emulator import autocast
from tests.helpers import installed


def _dtypes() -> list[torch.dtype]:
    x = torch.ones(2, 2).to("hpu")
    with torch.autocast("hpu", dtype=torch.bfloat16):
        return [torch.add(x, x).dtype, torch.mm(x, x).dtype, torch.matmul(x, x).dtype, torch.exp(x.bfloat16()).dtype]


def test_lists_in_files_replace_the_default_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As in the bridge's test_hpu_autocast.py, test_autocast_custom_list.
    (tmp_path / "lower").write_text("add\nmm\nno_such_op\n")
    (tmp_path / "float32").write_text("matmul\nadd")
    monkeypatch.setenv(autocast.LOWER_LIST_ENV, str(tmp_path / "lower"))
    monkeypatch.setenv(autocast.FLOAT32_LIST_ENV, str(tmp_path / "float32"))
    with installed():
        # `add` is on both lists: lower wins. `exp` is on neither, so the list of promotion is asked.
        assert _dtypes() == [torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16]
    monkeypatch.delenv(autocast.LOWER_LIST_ENV)
    monkeypatch.delenv(autocast.FLOAT32_LIST_ENV)
    with installed():
        assert _dtypes() == [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]


def test_a_file_that_is_not_there_is_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(autocast.LOWER_LIST_ENV, str(tmp_path / "missing"))
    with pytest.warns(UserWarning, match=f"{autocast.LOWER_LIST_ENV} is ignored.*missing"), installed():
        assert _dtypes()[1] is torch.bfloat16
