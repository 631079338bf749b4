"""The flash side: the store's format, conversion and verification. Read FORMAT.md first."""

PROJECT = "flashring"  # tells our package from another of the same name
