"""Attention of new tokens over cache rows."""
