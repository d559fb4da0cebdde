"""What ``tools/deep.py`` has pytest do: run the tests that draw alone, and write down what they drew.

``DEEP_MULTIPLE`` in the environment says how many times its ordinary number of examples a test draws, ``DEEP_OUT`` the
file to which each test adds its line.
"""

import inspect
import json
import os
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings
from hypothesis.statistics import collector

from tests.draws import ORDINARY


def pytest_collection(session) -> None:
    """Before a test file is read: it multiplies its own number of examples by what the profile says."""
    examples = ORDINARY * int(os.environ["DEEP_MULTIPLE"])
    settings.register_profile("piece", settings.get_profile("deep"), max_examples=examples, database=None)
    settings.load_profile("piece")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list) -> None:
    """Keep the tests that draw."""
    items[:] = [item for item in items if draws(item.obj)]


def draws(test: Callable) -> bool:
    """Whether a test draws: by ``given``, as a state machine, or by running one."""
    names = getattr(getattr(inspect.unwrap(test), "__code__", None), "co_names", ())  # torch.no_grad wraps some
    return getattr(test, "is_hypothesis_test", False) or "run_state_machine_as_test" in names


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item) -> Iterator[None]:
    """Run a test, and write down how many examples it drew in how much time of its process, and how it failed."""
    drawn, failure, start = [], "", time.process_time()
    try:
        with collector.with_value(drawn.append):
            yield
    except BaseException as error:
        failure = f"{type(error).__name__}: {error}\n" + "\n".join(getattr(error, "__notes__", ()))
        raise
    finally:
        phases = [phase for told in drawn for phase in told.values() if isinstance(phase, dict)]
        cases = [case for phase in phases for case in phase.get("test-cases", ())]
        row = {
            "test": item.nodeid,
            "multiple": int(os.environ["DEEP_MULTIPLE"]),
            "examples": sum(case["status"] in ("valid", "interesting") for case in cases),
            "seconds": round(time.process_time() - start, 3),
            "failure": failure,
        }
        with open(os.environ["DEEP_OUT"], "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
