"""``minipaged bench``: measures how fast this engine is on this machine, alone and compared with other engines."""
