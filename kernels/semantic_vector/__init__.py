"""What a head makes of its most attended tokens."""
