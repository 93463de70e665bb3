"""Router statistics: what the base's routers do on each source of text, and which experts matter in each layer."""
