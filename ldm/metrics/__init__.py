"""Numbers that say how good pictures are."""
