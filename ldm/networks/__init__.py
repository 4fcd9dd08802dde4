"""Networks: (x, time, cond) -> out."""
