"""See `api.py`."""
