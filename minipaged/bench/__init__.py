"""``minipaged bench``: how fast this engine is on this machine, side by side with others and by itself."""
