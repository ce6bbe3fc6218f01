"""For ``swift sft --external_plugins …/voco_ms_swift.py``."""

from voco_plugin.integrations.ms_swift import register

register()
