"""The APIs that a main function speaks: remoe's own, OpenAI's and Anthropic's.

Each module has one `Api` (common.py): it reads a body, makes the request of it that `MainFunction.answer` takes, and writes the answer,
whole or as a stream. routes.py says which API a path or a payload is for. A parameter that is not supported is refused by its name;
nothing is accepted and ignored.
"""
