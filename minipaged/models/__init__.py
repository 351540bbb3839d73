"""The models: each a file that reads from top to bottom, and the loader that fills them from a checkpoint."""
