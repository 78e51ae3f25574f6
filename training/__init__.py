"""Headless programs: ``python -m training.<verb>``."""
