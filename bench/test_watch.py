"""Watching costs what it may, or less: under 1% of a step between two that are read, under 5% of one that is."""

from __future__ import annotations

import pytest

from bench import watch


def test_what_watching_costs(request: pytest.FixtureRequest) -> None:
    """Of the fastest of a few steps each, in turn: other work on the machine only ever adds time."""
    quick = request.config.getoption("--bench-quick")
    times = watch.measure(
        rounds=1 if quick else 7, tokens=64 if quick else 512, compiled=False, layers=1 if quick else 4
    )
    fastest = {name: min(seconds) for name, seconds in times.items()}
    assert fastest[watch.OFF] < 0.01 * fastest[watch.BASE]
    if not quick:
        assert fastest[watch.ADDED] < 0.05 * fastest[watch.BASE]
