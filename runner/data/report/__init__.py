"""The dataset report: what a run trains on, what it leaves out, and what looks wrong with it.

``read`` gathers the data, ``findings`` (pure) checks it, ``page`` and ``html`` show the result.
"""
