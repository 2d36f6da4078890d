"""Options and guards for the whole suite."""

import os

import hypothesis
import pytest

from slmkernels.validate import rule

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=500)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser):
    parser.addoption("--device", default=os.environ.get("SLMKERNELS_TEST_DEVICE", "cpu"))


def pytest_configure(config):
    os.environ["SLMKERNELS_TEST_DEVICE"] = config.getoption("--device")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN, so that an element nobody wrote is seen."""
    with rule.poisoned_memory():
        yield
