"""Measurements, each a program of its own: `python -m benchmarks.NAME`."""

import harness  # noqa: F401, before torch: its threads sleep while they wait, and take no core from what is measured
