"""A sigma for each input: searching it, what a memory of certified balls promises, and selectors that are sound.

`search` and `table` choose sigmas; `distances`, `ledger` and `memory` are memory-based certification; `selectors` are
locally constant sigmas with a radius of their own; `certificates` brings all of it to votes, `sound` has the min rule
and reads it from records, `settings` makes rows of a table, and `reading` keeps the three radii apart.
"""
