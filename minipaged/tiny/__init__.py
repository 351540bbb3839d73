"""The embedded model: a Llama of a few million parameters that is small enough to live in the repository.

``WEIGHTS`` is a directory that any Llama-capable engine (and ``transformers``) can load.  It was made by
``python -m minipaged.tiny.train`` from a corpus that ``minipaged.tiny.corpus`` generates.
"""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
