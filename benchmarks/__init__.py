"""Experiments and measurements: one question a script, one small harness below them all."""
