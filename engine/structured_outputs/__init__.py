"""Output that follows a JSON schema, a pattern, a list of choices or a grammar."""
