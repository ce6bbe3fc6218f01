"""The HTTP front: the API of OpenAI over one engine.

Reading order: `app` (the routes), `limits` (what a request passes before one), `chat`; below it
`request_fields` and `schemas` (JSON → a request), `prompt_building` (messages → the compressed stream;
`media` and `fetching` give it pixels), `answering_plan` and `choices` (the engine's answers → text;
`text_pieces`, `stop_strings`, `token_bytes`), `client_gone` (streams, and clients that leave). `server` runs
it on a port.

Nothing is imported here: FastAPI loads with `app` alone.
"""
