"""What stands around the routes: keys, limits, the access log and metrics, as ASGI middleware."""
