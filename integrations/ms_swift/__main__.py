"""Writes the path of the file for ms-swift's ``--external_plugins``."""

import sys

from voco_plugin.integrations.ms_swift import PLUGIN

sys.stdout.write(f"{PLUGIN}\n")
