"""What all tests share. Their models are so small that a second thread costs more than it brings."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; commands inherit it


def pytest_configure(config: pytest.Config) -> None:
    """Have xdist hand out files in the order of their names.

    It would keep files of few tests for the end, some of which take long, while other processes wait.
    """
    config.option.loadscopereorder = False


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the family "small", which makes and judges pictures of 16 pixels. Not to be changed."""
    from .oracles import add_image_encoder, save_folder

    folder = save_folder(tmp_path_factory.mktemp("small") / "model", "small")
    add_image_encoder(folder)
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say aloud how much was not tested for want of the public test data."""
    skipped = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    if count := sum("needs the public test data" in reason for reason in skipped):
        terminalreporter.write_line(
            f"NOT TESTED: {count} tests need public configs, key lists or photos that are not here",
            yellow=True,
        )
