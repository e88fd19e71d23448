"""Fixtures of the tests of the model and its cache."""

import os
import threading

import pytest
from folder_values import file_size


@pytest.fixture
def gate(monkeypatch):
    """An event: each write to a folder waits for it before its last step. `gate.reached` is set once one waits."""
    file_size(1000)  # it writes, and is remembered
    replace, opened = os.replace, threading.Event()
    opened.reached = threading.Event()

    def wait(*paths):
        opened.reached.set()
        assert opened.wait(10)
        replace(*paths)

    monkeypatch.setattr(os, "replace", wait)
    yield opened
    opened.set()
