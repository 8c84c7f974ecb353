"""The dataset report: what a run will train on, what it leaves out, and what looks wrong with it.

`read` gathers what is needed, `findings` (pure) judges it, `page` and `html` show it.
"""
