"""What a person writes: frozen pydantic models, the strict YAML reader, the search space. Imports only `errors` and `text`."""
