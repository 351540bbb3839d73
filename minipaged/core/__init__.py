"""The heart of minipaged: PagedAttention's bookkeeping and the loop around it, in pure Python.

It imports nothing of the package but events, outputs and errors. Features plug into `seams`.
"""
