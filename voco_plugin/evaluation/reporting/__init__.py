"""Pictures and the one-page report.

``mask`` (the rule as PNG or abbreviated text), ``charts`` (loss curves and bars; needs matplotlib), ``sheet``
(images with questions and answers), ``report`` (Markdown). Nothing is imported here: each module loads on its
own.
"""
