"""A module that does not import."""

raise RuntimeError("the licence server\nis asleep")
