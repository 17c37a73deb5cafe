"""Whether a prediction writer may write what a step predicted after later steps have run."""

from collections.abc import Sequence
from types import FunctionType
from typing import Any

from lightning_hpu_infer.bytecode import names_in, seen_in, uses_of
from lightning_hpu_infer.held import Reach, called_by, is_users
from lightning_hpu_infer.shared import assigned_variable, shared_state


def may_write_late(writer: Any, steps: Sequence[object]) -> bool:
    """Whether a writer is not seen to use what steps change, nor to change what they use. Main thread only.

    Args:
        writer: A callback with a method `write_on_batch_end`.
        steps: The module first, and the callbacks whose hooks run with its steps.
    """
    write = getattr(writer.write_on_batch_end, "__func__", writer.write_on_batch_end)
    if not isinstance(write, FunctionType) or not is_users(type(writer)):
        return True
    before, after = Reach(steps), Reach([writer])
    if any(id(step) in after.found for step in steps) or id(writer) in before.found:
        return False
    if shared_state(before, after) or assigned_variable(before, after):
        return False
    argument = "".join(write.__code__.co_varnames[2:3])  # the module; its name is the same in other methods, as a rule
    codes = [function.__code__ for function in after.functions()]
    uses = [uses_of(code, argument) for code in codes]
    used = {name for use in uses for name in use.attributes}
    named = {name for code in codes for name in names_in(code)}
    if any(use.passed_on for use in uses) or "lightning_module" in named:
        used |= named
    used = called_by(steps[0], used)
    filled = {name for code in codes for name in seen_in(code).filled}
    if any(use.assigned for use in uses) or used & filled:
        return False
    seen = [seen_in(function.__code__) for function in before.functions()]
    return not any(used & (each.assigned | each.filled) for each in seen)
