"""Diagnoses of versions and bundles."""
