"""A run: what is there, the plan, and how it is carried out and recorded."""
