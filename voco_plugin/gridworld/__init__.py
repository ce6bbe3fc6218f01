"""The synthetic world and the tiny VLM that learns it; only the command line, studies and tests import it."""
