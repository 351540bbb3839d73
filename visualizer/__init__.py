"""A web page that shows a running engine live: its KV blocks, block tables and queues.

It only reads the engine's events (`minipaged.events`), never its internals. Start it with `visualizer.app.launch`.
"""
