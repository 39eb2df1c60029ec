"""How much the last queries of a prompt attend to each of its tokens."""
