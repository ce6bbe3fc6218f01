"""Video streams: frames are compressed as they come, kept within a budget, and asked about at any time."""
