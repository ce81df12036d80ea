"""Dataclass fields become command-line options."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path

EMBEDDED = str(Path(__file__).resolve().parent.parent / "toy" / "base")


def option(default, text: str, toy=None, **more):
    """A dataclass field that is also a command-line option. toy: its value for the embedded default, where that differs."""
    return field(default=default, metadata={"help": text, "toy": toy, **more})


def flag(name: str) -> str:
    """group_size -> --group-size"""
    return "--" + name.replace("_", "-")
