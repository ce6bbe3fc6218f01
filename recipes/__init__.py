"""Training recipes (YAML), shipped inside the wheel as ``voco_plugin.recipes``.

``voco recipes`` lists them, ``voco train NAME`` runs one, ``voco recipes copy NAME`` gives you yours to
change.
"""
