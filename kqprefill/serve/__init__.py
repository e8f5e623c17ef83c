"""Scoring over HTTP: requests in the shapes of OpenAI's interface, a queue that batches are packed from, metrics.

`app.py` has the endpoints, which need starlette; `server.py` runs them, with uvicorn.
"""
