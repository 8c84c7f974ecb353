"""From sources to the items of a run, their pixels, and the report on them."""
