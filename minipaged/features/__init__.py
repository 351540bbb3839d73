"""The wings: features that the heart (`minipaged.core`) lives without, each a file or a folder of its own.

`minipaged.build` puts them together. A wing imports the heart; the heart imports no wing.
"""
