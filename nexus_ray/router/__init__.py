"""Router statistics: what the base's routers do on each source of text, as exact moments."""
