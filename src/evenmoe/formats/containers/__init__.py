"""File types: bytes → plain data, within a memory budget; no format's meaning is known here."""
