"""The tables of experiments: their settings, the making of their rows, and what is read from them."""
