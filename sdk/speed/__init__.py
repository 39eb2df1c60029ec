"""Measuring what a cache policy does to speed and memory: the job behind ``thinkkv bench``."""
