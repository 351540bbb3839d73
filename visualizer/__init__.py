"""The page that shows a running engine: blocks, block tables and queues, live.

It listens to the engine's events (`minipaged.events`) and knows nothing of its insides. Start it with
`visualizer.app.launch`.
"""
