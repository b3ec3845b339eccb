"""``fxmem demo``: train a real language model three ways and show what each costs.

One setup per process, the same model, text and steps: plain autograd, activation checkpointing,
fxmem. Ends with a table and a picture of live bytes over time.
"""
