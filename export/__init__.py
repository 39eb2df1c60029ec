"""Bake head classes and merged weights into files that stock runtimes load."""
