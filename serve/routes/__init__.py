"""The routes of the HTTP interface, a file a concern. They need a service but no Ray."""
