"""`oreal serve`: an OpenAI-compatible server around one engine."""
