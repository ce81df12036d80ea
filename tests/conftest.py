"""Shared by the tests: the embedded base model, loaded once, and one thread, so that nothing depends on the machine's cores."""
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
torch.set_flush_denormal(True)


@pytest.fixture(scope="session")
def base():
    """(model, processor) of toy/base, float32, eval. Do not change the weights."""
    from transformers import AutoModelForImageTextToText

    from rollout import load_processor
    path = str(ROOT / "toy" / "base")
    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval(), load_processor(path)


@pytest.fixture
def root():
    return ROOT
