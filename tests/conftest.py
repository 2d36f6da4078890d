"""Options and guards for the whole suite."""

import os

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=500)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser):
    parser.addoption("--device", default=os.environ.get("SLMKERNELS_TEST_DEVICE", "cpu"))


def pytest_configure(config):
    os.environ["SLMKERNELS_TEST_DEVICE"] = config.getoption("--device")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN, also inside the operators, so that an element nobody wrote is seen."""
    previous = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(previous, warn_only=warn_only)
