"""The model implementations, one file per family, and the loader that reads their weights from a checkpoint."""
