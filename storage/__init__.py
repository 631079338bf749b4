"""The flash side: the store's format, conversion and verification. Read FORMAT.md first."""
