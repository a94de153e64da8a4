"""A sigma for each input: searching it, what a memory of certified balls promises, and selectors that are sound.

`search` finds sigmas and `table` trains with them; `distances`, `ledger` and `memory` are memory-based certification;
`selectors` choose a sigma that stays the same nearby, and `sound` has the radius of that and reads it from records;
`reading` keeps the three radii apart. Votes and certificates at these sigmas come from `smoothkit`.
"""
