"""Chat in the terminal: the conversation, its commands, and who answers."""

from nexus_ray.chat.session import Session, chat, printable

__all__ = ["Session", "chat", "printable"]
