"""What training loops of other projects need: one module a framework, imported only where it is asked for.

`lightning`, `pytorch_lightning`, `transformers` and `accelerate` need the package of that name; `logs` needs none.
"""
