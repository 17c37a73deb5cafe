"""Random programs until the time is up: `python -m tests.fuzz --seconds 600 --seed 0`."""

import argparse
import gc
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from itertools import count

import torch
import torch._dynamo  # noqa: F401 (once, in place of once per process)

from tests.fuzz.program import FLAGS, Program, drawn
from tests.fuzz.shrink import failures_apart, shrunk


def each_alone() -> Iterator[tuple[str, Program]]:
    """Programs with one choice that is not the default."""
    choices = {each.name: each.metadata["values"][1:] for each in fields(Program) if each.name != "flags"}
    for name, values in choices.items():
        for value in values:
            yield f"{name}={value!r}", Program(**{name: value}).sensible()
    for flag, values in FLAGS.items():
        for value in values[1:]:
            yield f"{flag}={value!r}", Program(flags={flag: value})


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="begins no program after that")
    parser.add_argument("--seed", type=int, default=0, help="of the first program; each has the next one")
    parser.add_argument("--each", action="store_true", help="run each choice by itself instead")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the processes are forked, which threads would not survive
    gc.freeze()  # memory that no child writes is not copied
    programs = each_alone() if options.each else ((f"seed {seed}", drawn(seed)) for seed in count(options.seed))
    end, run, failed = time.monotonic() + options.seconds, 0, 0
    for name, program in programs:
        if time.monotonic() > end:
            break
        found = failures_apart(program)
        run, failed = run + 1, failed + bool(found)
        for kind, text in found.items():
            sys.stdout.write(f"{name}, {kind}: failures({shrunk(program, kind)})\n    {text}\n\n")
            sys.stdout.flush()
    sys.stdout.write(f"{run} programs from seed {options.seed}, {failed} failed\n")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
