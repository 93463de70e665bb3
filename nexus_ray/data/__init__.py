"""Text: where it comes from, how it is tokenised and how it is packed into sequences."""
