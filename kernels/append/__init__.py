"""New tokens written behind the end of every cache row."""
