"""The HTTP front: the API of OpenAI over one engine."""
