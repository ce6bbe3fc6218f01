"""Video while it is watched: frames compressed as they come, kept within a budget, asked about at any
time.
"""
