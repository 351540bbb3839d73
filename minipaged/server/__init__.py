"""An OpenAI-compatible HTTP server around one engine. Needs the extra ``serve``: FastAPI and uvicorn."""
