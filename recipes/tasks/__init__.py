"""Procedural reasoning tasks."""
