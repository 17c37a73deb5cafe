"""The process that runs the checks of one mode: `python -m lightning_hpu_infer.verify.child JOB`."""

import faulthandler
import gc
import json
import sys
import time
import traceback

import torch

from lightning_hpu_infer import _habana
from lightning_hpu_infer.doctor import examine, gather_facts
from lightning_hpu_infer.verify.catalogue import checks
from lightning_hpu_infer.verify.channel import Channel, Job
from lightning_hpu_infer.verify.check import Broken, Check, Kind, Mode, NotTried, Result, Verdict


def run_check(check: Check, mode: Mode) -> Result:
    """Run a check here.

    Args:
        check: The check.
        mode: The mode of this process.
    """
    start, details, figures = time.perf_counter(), "", {}
    try:
        seen = check.run()
    except Broken as error:
        verdict, text = Verdict.BROKEN, str(error)
    except NotTried as error:
        verdict, text = Verdict.NOT_TRIED, str(error)
    except Exception as error:  # whatever a device raises is a finding
        verdict, text, details = Verdict.BROKEN, f"{type(error).__name__}: {error}".strip(), traceback.format_exc()
    else:
        verdict, text, figures = Verdict.HELD, seen.text, seen.figures
    return Result(
        mode=mode,
        kind=check.kind,
        name=check.name,
        verdict=verdict,
        seen=" ".join(text.split())[:500],
        turns_off=check.turns_off if verdict == Verdict.BROKEN else "",
        seconds=round(time.perf_counter() - start, 3),
        figures=figures,
        details=details,
    )


def main(arguments: list[str]) -> int:
    """Run the checks of a job, in the order of the catalogue.

    After a broken assumption, or an error that no check expects, the device may be in any state: the process ends, and
    the one that waits starts another for the rest.
    """
    job = Job(**json.loads(arguments[0]))
    channel = Channel(job)
    faulthandler.enable()
    diagnosis = examine(gather_facts())
    channel.send(diagnosis=json.loads(diagnosis.to_json()))
    if diagnosis.facts.error or not diagnosis.facts.device_count or _habana.is_lazy() != (job.mode == "lazy"):
        return 0
    for check in checks(job.mode, quick=job.quick, only=job.only):
        if check.id in job.skip:
            continue
        # TorchDynamo gives up on a function after eight versions of it.
        torch.compiler.reset()
        gc.collect()
        with channel.running(check.id):
            result = run_check(check, job.mode)
        channel.result(result)
        if result.details or (result.verdict == Verdict.BROKEN and result.kind == Kind.ASSUMPTION):
            return 0
    channel.send(end=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
