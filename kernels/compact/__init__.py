"""The kept tokens of a prompt gathered into the cache rows."""
