"""The tests of Habana's bridge, unmodified, on the emulator in lazy mode.

They are not part of this repository. Set the variable below to a checkout of
https://github.com/HabanaAI/gaudi-pytorch-bridge (tried with 1.19.0) and run this file, which takes one to three
minutes. Nothing is copied from there, and nothing written to it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.emulator import bridge_plugin

VARIABLE = "LIGHTNING_HPU_INFER_BRIDGE_SOURCE"
ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif(
        VARIABLE not in os.environ, reason=f"set {VARIABLE} to a checkout of gaudi-pytorch-bridge to run it"
    ),
    pytest.mark.timeout(900),
]

# Chosen: every file of the folders `any_mode` and `lazy` but these.
LEFT_OUT = {
    "trains": ["test_ema", "test_fused_adamw", "test_hpu_custom_lamb_optimizer"],
    "float8 ops of the bridge": [
        *("test_hpu_convert_from_int4", "test_hpu_fp8_ops", "test_hpu_fp8_ops_any_mode", "test_hpu_fp8_parameters"),
        *("test_hpu_fp8_te", "test_hpu_graph_fp8_te", "test_hpu_scaled_mm", "test_hpu_sum_fp8"),
    ],
    "several processes": [
        *("test_dist_coalese", "test_dist_pg_destroy", "test_dist_scatter", "test_hpu_lazy_collectives"),
        "test_saving_multinode_graphs",
    ],
    "compiled kernels of hpex": [
        *("test_custom_softmax", "test_hpu_bounds_check_indices", "test_hpu_ctc_loss", "test_hpu_mixture_of_experts"),
        *("test_hpu_expand_into_jagged_permute", "test_hpu_multiple_sdpa_impls", "test_hpu_rms_norm"),
        "test_hpu_rotary_pos_embedding_helper",
    ],
    "torchvision": ["test_hpu_deform_conv2d", "test_hpu_nms", "test_hpu_roi_align"],
    "logs and the compiler's files": [
        *("test_dynamic_shapes_detector", "test_hpu_inference_const_section", "test_hpu_logger_flags"),
        "test_log_level",
    ],
    "more memory than 6 GiB": ["test_huge_tensor"],
}
# What tests of backward say; those whose names say so are not started.
BACKWARD = "Cannot access accelerator device when none is available"

# Why a test fails: a pattern of its name and error, and how many fail for it.
CAUSES: dict[str, tuple[str, int]] = {
    "the CPU's kernels lack a type that the device takes": (
        r'"\w+" not implemented for|Unsupported datatype for add_relu|Expected a long tensor|Promotion for Float8',
        104,
    ),
    "quantization rounds otherwise": (r"test_quantize_per_\w+.*Not equal to tolerance rtol=0", 18),
    "an op that PyTorch has for other backends only": (r"convolution_overrideable not implemented", 8),
    "bool memory that holds more than 0 and 1": (r"test_multilevel_view_dtype", 1),
    "a name that is not emulated": (r"has no attribute '(TensorPacker|_data_ptr)'", 2),
    "trains": (r"ModuleCacher caches in training only|fp8 layers are not emulated", 4),
    "the test, on current versions of NumPy and pytest": (r"np.alltrue|expected a sequence of values", 4),
}


def _run(tmp_path: Path) -> dict[str, tuple[str, str]]:
    folder = Path(os.environ[VARIABLE]) / "tests" / "pytest_working"
    files = sorted(path for sub in ("any_mode", "lazy") for path in (folder / sub).glob("test*.py"))
    if not files:
        pytest.fail(
            f"{VARIABLE}={os.environ[VARIABLE]} has no tests/pytest_working/lazy; name a checkout of the bridge"
        )
    left_out = {name for names in LEFT_OUT.values() for name in names}
    assert left_out <= {path.stem for path in files}
    chosen = [str(path.relative_to(folder)) for path in files if path.stem not in left_out]
    options = ["-p", "tests.emulator.bridge_plugin", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", "."]
    options += ["--mode", "lazy", "-q", "--tb", "short", "-W", "ignore", "--timeout", "120"]
    options += ["--continue-on-collection-errors", "-k", "not bwd and not backward"]
    results = tmp_path / "results.json"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PT_HPU_LAZY_MODE": "1",
        "HABANA_LOGS": str(tmp_path),
        bridge_plugin.RESULTS: str(results),
    }
    command = [sys.executable, "-m", "pytest", *options, *chosen]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=800)
    if not results.exists():
        pytest.fail(f"the bridge's tests ended early ({done.returncode}): {done.stdout[-2000:]}{done.stderr[-2000:]}")
    outcomes: dict[str, tuple[str, str]] = json.loads(results.read_text())
    return outcomes


def _cause(failure: str) -> str:
    known = (cause for cause, (pattern, _) in CAUSES.items() if re.search(pattern, failure, re.DOTALL))
    return next(known, f"unknown: {failure}")


def test_what_passes_and_why_the_rest_does_not(tmp_path: Path) -> None:
    outcomes = _run(tmp_path)
    failed = {
        name: error for name, (outcome, error) in outcomes.items() if outcome == "failed" and BACKWARD not in error
    }
    passed = sum(outcome == "passed" for outcome, _ in outcomes.values())
    causes = Counter(_cause(f"{name}: {error}") for name, error in failed.items())
    assert causes == {cause: count for cause, (_, count) in CAUSES.items()}
    assert passed >= 7400
