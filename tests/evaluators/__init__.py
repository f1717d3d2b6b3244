"""Tests of evaluators/."""
