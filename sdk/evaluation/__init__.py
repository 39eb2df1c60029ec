"""Measuring what a cache policy does to answers: tasks, samples, scoring and resumable runs behind ``thinkkv eval``."""
