"""The wings: features that the heart (`minipaged.core`) works without, each in its own file or folder.

`minipaged.build` assembles an engine from them. A wing imports the heart; the heart imports no wing.
"""
