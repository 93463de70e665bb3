"""Requests and answers of the HTTP interface, in OpenAI's shapes.

Fields that only steer OpenAI's own platform are accepted and ignored. Fields that would change the answer and are not
supported are refused, and so are unknown ones: a misspelt `max_token` must not be ignored.
"""
