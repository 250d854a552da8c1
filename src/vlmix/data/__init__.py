"""Where samples come from, and how they are mixed, checked and counted."""
