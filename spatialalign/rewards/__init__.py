"""Rewards that are asked while a clip is still noise."""
