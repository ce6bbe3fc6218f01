"""What ms-swift puts on ``sys.path`` and imports: one file, of a name that hides no other module."""
