"""How commands write what users named."""


def on_one_line(name: str) -> str:
    """File names may hold newlines and terminal codes; a line of output must stay one line."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in name)
