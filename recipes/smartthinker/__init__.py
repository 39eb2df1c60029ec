"""SmartThinker (arXiv:2507.04348): a pure core, and thin adapters to TRL."""
