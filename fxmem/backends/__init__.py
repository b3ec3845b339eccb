"""How loop bodies run: operator by operator, as segments that Inductor compiles, or with
kernels.
"""
