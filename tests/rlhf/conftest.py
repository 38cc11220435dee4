import pytest
from suite import rlhf


@pytest.fixture
def few_held_out(monkeypatch):
    """Hold out 16 prompts instead of 200, so that a tiny run takes a third of the time."""
    monkeypatch.setattr(rlhf, "HELD_OUT", 16)
